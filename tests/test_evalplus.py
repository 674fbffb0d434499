"""EvalPlus's files: answers of the references as tests, agreement with a tolerance, two results a sample."""

import copy
import gzip
import json
import math
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.real import real
from tests.test_judge_command import command, lines
from wmtp.agreement import agree, close, digest, stored
from wmtp.judge import Limits, evalplus, judge
from wmtp.judge.evalplus import arguments, read_suites
from wmtp.layouts import EvalPlusLine
from wmtp.records import RecordError
from wmtp.sandbox import HarnessError

ROWS = [
    {
        "task_id": "HumanEval/0", "prompt": "def first(xs):\n", "entry_point": "first", "atol": 0, "contract": "", "test": "",
        "canonical_solution": "    xs.sort()\n    return xs[0] / 3 if xs else None\n",
        "base_input": [[[3, 1]], [[2]]], "plus_input": [[[]], [[7, 7]]],
    },
    {
        "task_id": "Mbpp/250", "prompt": '"""\nCount.\n"""\n', "entry_point": "count", "atol": 0, "contract": "", "assertion": "",
        "canonical_solution": "def count(t, x):\n    assert type(t) is tuple\n    return t.count(x)\n",
        "base_input": [[[1, 1, 2], 1]], "plus_input": {},
    },
]  # fmt: skip
SORTED, MINIMUM, NEAR = (
    "def first(xs):\n    return sorted(xs)[0] / 3 if xs else None\n",
    "def first(xs):\n    return min(xs) / 3\n",
    "def first(xs):\n    return min(xs) / 3 + 5e-7 if xs else None\n",
)
COUNT = "def count(t, x):\n    return sum(y == x for y in t)\n"


@pytest.mark.parametrize("error, told", [(HarnessError("fork server: no answer"), True), (ValueError("of the reference"), False)])
def test_a_sandbox_that_fails_is_no_answer_of_the_reference(error, told):
    def reference(*_):
        raise error

    answers = evalplus.each(reference, [[1]], EvalPlusLine.model_validate(ROWS[0]))
    if told:
        with pytest.raises(HarnessError, match="no answer"):
            next(answers)
    else:
        assert list(answers) == [None]


@pytest.mark.slow
def test_base_and_plus_are_two_results(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    drawn = [{"task_id": "HumanEval/0", "solution": text} for text in (SORTED, MINIMUM, NEAR, "def first(xs): return 0")]
    drawn += [{"task_id": "Mbpp/250", "solution": text} for text in (COUNT, COUNT, COUNT, "def count(t, x): return len(t)")]
    problems, samples = lines(tmp_path / "p.jsonl.gz", ROWS), lines(tmp_path / "s.jsonl", drawn)
    done = command(problems, samples, "--out", tmp_path / "v.jsonl", "--k", "1,2", "--workers", 1)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert [one["base"] == "pass" for one in found] == [True, True, True, False, True, True, True, False]
    assert (
        [one["plus"] == "pass" for one in found] == [one["passed"] for one in found] == [True, False, True, False, True, True, True, False]
    )
    assert found[1]["verdict"] == "error" and "ValueError" in found[1]["detail"]
    assert "base pass@1  75.00" in done.stdout and "plus pass@1  62.50" in done.stdout and "plus pass@2  " in done.stdout
    kept = sorted((tmp_path / "cache/wmtp/evalplus").iterdir())
    assert len(kept) == 2
    kept[0].write_text("{broken")
    again = command("--self-check", problems)
    assert again.returncode == 0 and "plus references: 2 of 2 pass" in again.stdout
    assert json.loads(kept[0].read_text())["answers"]


def test_answers_are_computed_once_and_anew_for_any_change(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    path = lines(tmp_path / "p.jsonl", ROWS)
    first = read_suites(path, Limits(), cache)
    with monkeypatch.context() as patch:
        patch.setattr(evalplus, "Sandbox", None)
        assert read_suites(path, Limits(), cache).plus == first.plus
        other = [{**ROWS[0], "plus_input": [[[1]]]}, ROWS[1]]
        with pytest.raises(TypeError):
            read_suites(lines(tmp_path / "q.jsonl", other), Limits(), cache)
        patch.setattr("platform.python_version", lambda: "2.7")
        with pytest.raises(TypeError):
            read_suites(path, Limits(), cache)
    assert read_suites(path, Limits(), path / "under a file").plus == first.plus, "a cache that cannot be written is no fault"


def test_inputs_without_an_answer_are_left_out_and_counted(tmp_path):
    body = """
    if xs == [1]: raise ValueError
    if xs == [2]: return object()
    if xs == [3]:
        import os; os._exit(0)
    return 7
"""
    row = {**ROWS[0], "canonical_solution": body, "base_input": [[[0]], [[1]], [[2]]], "plus_input": [[[3]], [[4]]]}
    suites = read_suites(lines(tmp_path / "p.jsonl", [row]), Limits(), tmp_path)
    assert suites.left_out == {"HumanEval/0": 3}
    for problem in (suites.base["HumanEval/0"], suites.plus["HumanEval/0"]):
        made = judge([(problem, "def first(xs): return 7"), (problem, "def first(xs): return 8")], Limits(), 1)
        assert [one.verdict for one in made] == ["pass", "fail"]


@pytest.mark.parametrize("suite", ["base_input", "plus_input"])
def test_a_reference_that_answers_nothing_would_let_any_program_pass_and_is_refused(tmp_path, suite):
    row = {
        **ROWS[0],
        "canonical_solution": "    if xs == [1]: raise ValueError\n    return 7\n",
        "base_input": [[[0]]],
        "plus_input": [[[4]]],
    }
    with pytest.raises(RecordError, match=rf"HumanEval/0: {suite}: the reference answers none of 2 inputs, so any program would pass"):
        read_suites(lines(tmp_path / "p.jsonl", [row | {suite: [[[1]], [[1]]]}]), Limits(), tmp_path / "cache")
    assert not (tmp_path / "cache").exists(), "a reference that was killed may answer when it is asked again"


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert evalplus.cache_directory() == pathlib.Path("/dev/null/wmtp/evalplus")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert evalplus.cache_directory() == pathlib.Path("/somewhere/wmtp/evalplus")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_input": [3]}, r"base_input\.0"),
        ({"atol": -1}, "atol"),
        ({"base_input": []}, "base_input"),
        ({"plus_input": None}, "plus_input"),
    ],
)
def test_a_broken_line_is_named(tmp_path, change, message):
    with pytest.raises(RecordError, match=rf"p\.jsonl:2: {message}"):
        read_suites(lines(tmp_path / "p.jsonl", [ROWS[1], {**ROWS[0], **change}]), Limits(), tmp_path)


numbers = st.floats(-1e6, 1e6) | st.integers(-1000, 1000)
nested = st.recursive(numbers, lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=4)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(expected=st.lists(numbers, min_size=1, max_size=5), moves=st.lists(st.floats(-3e-6, 3e-6), min_size=5, max_size=5), data=st.data())
def test_closeness_is_numpys(expected, moves, data):
    atol = data.draw(st.sampled_from([1e-6, 1e-4]))
    found = [value + move for value, move in zip(expected, moves)]
    assert close(found, expected, atol) == bool(np.allclose(found, expected, rtol=1e-7, atol=atol))


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-3, 3) | st.text("a,:[]", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=5,
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(plain, plain)
def test_digests_are_equal_where_values_are(left, right):
    assert (digest(left) == digest(right)) == (left == right)
    assert digest([left, right]) == digest(copy.deepcopy([left, right]))


@pytest.mark.parametrize(
    ("given_", "found", "expected", "atol", "oracle", "same"),
    [
        ([], 1, 1.0, 0, "equal", True),
        ([], 1.0 + 9e-7, 1.0, 0, "equal", True),
        ([], 1.0 + 2e-6, 1.0, 0, "equal", False),
        ([], 1, 1.0000001, 0, "equal", False),  # an int where a float is expected agrees only if equal
        ([], [1.0, 2.0], (1.0, 2.0), 0, "equal", False),
        ([], [1.0, 2.0000001], [1.0, 2.0], 0, "equal", True),
        ([], [1, 2.0000001], [1, 2.0], 0, "equal", False),  # no tolerance: not all floats
        ([], [1, 2.0000001], [1, 2.0], 1e-6, "equal", True),
        ([], math.inf, math.inf, 0, "equal", True),
        ([], math.inf, 1.0, 0, "equal", False),
        ([], 1.0, math.inf, 0, "equal", False),
        ([], math.nan, math.nan, 0, "equal", False),
        ([], "a", "a", 1e-6, "equal", True),
        ([], "b", "a", 1e-6, "equal", False),
        ([], None, 3, 0, "anything", True),
        ([], 0, 9, 0, "or-zero", True),
        ([], 1, 9, 0, "or-zero", False),
        ([], (2, 1, 1), (1, 2), 0, "same-items", True),
        ([], (2,), (1, 2), 0, "same-items", False),
        ([], "match", True, 0, "present", True),
        ([], None, True, 0, "present", False),
        ([], False, False, 0, "present", True),
        ([], 0, False, 0, "present", False),
        ([[-2.0, 1.0]], 2.00000001, 7.0, 1e-4, "root", True),
        ([[-2.0, 1.0]], 2.1, 2.1, 1e-4, "root", False),
        ([123, 1], 1 + 2 + 2, 0, 0, "padded-digits", True),
        ([3, 4], 34, 33, 0, "pyramid", False),
        ([3, 4], round(9 + 6 * math.hypot(1.5, 4)), 33, 0, "pyramid", True),
    ],
)  # fmt: skip
def test_agreement(given_, found, expected, atol, oracle, same):
    assert agree(given_, found, expected, atol, oracle) is same


def test_long_answers_are_kept_as_digests_where_only_equality_counts():
    long = list(range(5000))
    assert stored(["l", long], long, 0, "equal")[0] == "digest"
    assert stored(["l", long], long, 1e-6, "equal")[0] == stored(["l", long], long, 0, "same-items")[0] == "value"
    halves = [value / 2 for value in long]
    assert stored(["l", halves], halves, 0, "equal")[0] == "value"


@pytest.mark.slow
def test_arguments_keep_the_contracts_of_mbpp_plus():
    """Each task's own contract asserts the types of its arguments: tuples, sets, complex numbers."""
    broken = set()
    with gzip.open(real("evalplus/MbppPlus-v0.2.0.jsonl.gz"), "rt") as file:
        rows = [json.loads(line) for line in file]
    for row in rows:
        line = EvalPlusLine.model_validate_json(json.dumps(row))
        source = (line.prompt + line.canonical_solution).split("\n")
        at = max(number for number, text in enumerate(source) if text.startswith(f"def {line.entry_point}"))
        names: dict = {}
        exec("\n".join([*source[: at + 1], row["contract"] or "    pass"]), names)
        for arguments_ in [*line.base_input, *line.plus_input]:
            try:
                names[line.entry_point](*arguments(line.task_id, copy.deepcopy(arguments_)))
            except AssertionError:
                broken.add(line.task_id)
    assert broken <= {"Mbpp/267", "Mbpp/734"}, "two whose contracts their own inputs break"


@pytest.mark.stress
@pytest.mark.parametrize(("name", "n"), [("HumanEvalPlus-v0.1.10", 164), ("MbppPlus-v0.2.0", 378)])
def test_references_of_the_real_files_pass(name, n):
    done = command("--self-check", real(f"evalplus/{name}.jsonl.gz"), "--workers", 2)
    assert done.returncode == 0
    assert f"\nreferences: {n} of {n} pass" in done.stdout and f"plus references: {n} of {n} pass" in done.stdout
