"""Prompts letter by letter, cutting as a property, programs, hashes."""

import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.real import real
from wmtp.protocols import PROTOCOLS, Protocol, instruction_of, reachable, render_prompt, with_sampling, with_shots
from wmtp.records import AssertTests, CallTests, CheckTests, Problem, StdioTests

HUMANEVAL = Path(__file__).parents[2] / "shared" / "datasets" / "humaneval" / "HumanEval.jsonl.gz"

CODE = Problem(
    task_id="HumanEval/0",
    source="humaneval",
    group="0",
    statement="Twice.",
    prompt='\n\ndef twice(x):\n    """Twice."""\n',
    tests=CheckTests(test="def check(candidate):\n    assert candidate(2) == 4\n", entry_point="twice"),
)
PLUS = CODE.model_copy(update={"task_id": "Mbpp/2", "source": "mbpp", "prompt": '"""\nWrite twice.\nassert twice(2) == 4\n"""\n'})
ASSERTS = ["assert twice(\n    2) == 4", "assert twice(3) == 6", "assert twice(0) == 0"]
BASIC = Problem(
    task_id="mbpp/11",
    source="mbpp",
    group="11",
    statement="Write twice.",
    tests=AssertTests(asserts=ASSERTS),
    reference="def twice(x):\n    return x * 2",
)
CONTEST = Problem(
    task_id="1_a",
    source="codecontests",
    group="1",
    statement="Print twice x.",
    input="Input\n\nOne x.",
    tests=StdioTests(inputs=["1"], outputs=["2"]),
)
CALLS = Problem(task_id="f/1", source="functions", group="f", statement="Twice.", tests=CallTests(calls=["twice(2)"], expected=["4"]))


def problem_for(protocol: Protocol) -> Problem:
    return {"humaneval": CODE, "mbpp": BASIC, "mbpp+": PLUS, "contest": CONTEST, "any": CALLS}[protocol.benchmark]


def test_the_prompt_with_evaluation_notes_is_letter_by_letter_what_was_asked_for():
    assert render_prompt("Do it.", "One number.", "evaluation_notes") == (
        "### Instruction:\nDo it.\n\n"
        "### Input:\nOne number.\n\n"
        "### Evaluation Notes:\n"
        "- Return Python source code that prints the required answer.\n"
        "- Hidden tests are present; rely on the stated constraints rather than memorising samples.\n\n"
        "### Response:\n"
    )


def test_the_input_block_is_left_out_when_empty_and_alpaca_has_no_notes():
    assert render_prompt("Do it.", "", "alpaca") == "### Instruction:\nDo it.\n\n### Response:\n"
    assert render_prompt("Do it.", "x", "alpaca") == "### Instruction:\nDo it.\n\n### Input:\nx\n\n### Response:\n"


def test_an_unknown_template_is_named():
    with pytest.raises(ValueError, match="'chat' is unknown; expected evaluation_notes or alpaca"):
        render_prompt("Do it.", "", "chat")


def test_instructions_of_all_four_kinds_of_problem():
    assert instruction_of(CODE) == ('Complete the function.\n\n\ndef twice(x):\n    """Twice."""', "")
    assert instruction_of(BASIC) == ("Write twice.\nPass this test: assert twice(2) == 4", "")
    assert instruction_of(CONTEST) == ("Print twice x.", "Input\n\nOne x.")
    assert instruction_of(CALLS) == ("Twice.", "")


def test_a_one_line_assert_keeps_its_spacing():
    tests = AssertTests(asserts=['assert f("a  b",1)==2  '])
    assert instruction_of(BASIC.model_copy(update={"tests": tests}))[0].endswith('Pass this test: assert f("a  b",1)==2')


@pytest.mark.parametrize("name", PROTOCOLS)
@given(text=st.text(alphabet=st.sampled_from(list('\n defclasprintif@#`"[DONE]_mnx()')), max_size=80))
def test_a_cut_is_the_longest_head_without_a_stop(name, text):
    protocol = PROTOCOLS[name]
    head, found = protocol.cut(text)
    assert text.startswith(head) and not any(stop in head for stop in protocol.stops)
    assert found == any(stop in text for stop in protocol.stops)
    assert (not found and head == text) or any(text[len(head) :].startswith(stop) for stop in protocol.stops)


def test_alpaca_takes_every_benchmark_and_its_program_is_the_completion_untouched():
    for problem in (CODE, BASIC, CONTEST, CALLS):
        assert PROTOCOLS["alpaca"].prompt(problem, "alpaca") == render_prompt(*instruction_of(problem), "alpaca")
        assert PROTOCOLS["alpaca"].program(problem, "    pass\n\n") == "    pass\n\n"


def test_prompts_and_programs_of_the_named_protocols():
    body = "    return x * 2\n"
    codex, bigcode, evalplus = (PROTOCOLS[f"humaneval/{name}"] for name in ("codex", "bigcode", "evalplus"))
    assert codex.prompt(CODE, "alpaca") == CODE.prompt
    assert codex.program(CODE, body) == CODE.prompt + body
    assert bigcode.prompt(CODE, "alpaca") == CODE.prompt.strip()
    assert bigcode.program(CODE, "\n" + body) == CODE.prompt.strip() + "\n" + body
    assert evalplus.prompt(CODE, "alpaca") == CODE.prompt.strip() + "\n"
    assert evalplus.program(CODE, body + "\nprint(1)\n  oops") == CODE.prompt.strip() + "\n" + body
    plus = PROTOCOLS["mbpp+/evalplus"]
    assert plus.prompt(PLUS, "alpaca") == PLUS.prompt
    whole = "import math\n\ndef other(): ...\n\ndef twice(x):\n    return 2 * x\n"
    assert plus.cut(whole + "\nassert twice(1) == 2") == (whole, True)
    assert plus.program(PLUS, whole) == whole.replace("def other(): ...\n\n", "").replace("math\n\n", "math\n")
    docstring = f'"""\nWrite twice.\n{ASSERTS[0]}\n"""\n'
    assert PROTOCOLS["mbpp/bigcode"].prompt(BASIC, "alpaca") == docstring
    assert PROTOCOLS["mbpp/bigcode"].program(BASIC, "def twice(x): ...") == docstring + "def twice(x): ..."
    assert PROTOCOLS["contest/stdio"].prompt(CONTEST, "alpaca") == '"""\nPrint twice x.\n\nInput\n\nOne x.\n"""\n'
    assert PROTOCOLS["contest/stdio"].program(CONTEST, "print(2)") == "print(2)"


@pytest.mark.parametrize("name", [name for name, protocol in PROTOCOLS.items() if protocol.post != "reachable"])
@given(completion=st.text(max_size=30))
def test_a_completion_is_never_stripped(name, completion):
    protocol = PROTOCOLS[name]
    assert protocol.program(problem_for(protocol), completion).endswith(completion)


def test_three_shots_in_the_papers_form():
    with pytest.raises(ValueError, match="mbpp/3shot needs 3 worked examples, found 0"):
        PROTOCOLS["mbpp/3shot"].prompt(BASIC, "alpaca")
    protocol = with_shots(PROTOCOLS["mbpp/3shot"], [BASIC, BASIC, BASIC])
    tests = "\n".join(ASSERTS)
    task = (
        f"You are an expert Python programmer, and here is your task: Write twice. Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )
    assert protocol.prompt(BASIC, "alpaca") == f"{task}{BASIC.reference}\n[DONE]\n\n" * 3 + task
    assert protocol.cut("def twice(x):\n    return 2\n[DONE]\nmore") == ("def twice(x):\n    return 2", True)
    assert protocol.program(BASIC, "x = 1") == "x = 1"
    assert protocol.sha256 != PROTOCOLS["mbpp/3shot"].sha256
    with pytest.raises(ValueError, match=r"found 2.*\['HumanEval/0'\]"):
        with_shots(PROTOCOLS["mbpp/3shot"], [BASIC, CODE])


def test_a_problem_of_another_benchmark_is_refused():
    for name, problem in (
        ("humaneval/codex", BASIC), ("mbpp/bigcode", CODE), ("contest/stdio", CALLS), ("humaneval/evalplus", PLUS),
        ("mbpp+/evalplus", CODE),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"protocol {re.escape(name)}: problem {problem.task_id} has {problem.tests.kind} tests"):
            PROTOCOLS[name].prompt(problem, "alpaca")
        with pytest.raises(ValueError, match=re.escape(name)):
            PROTOCOLS[name].program(problem, "")


def test_the_hash_covers_every_field_and_survives_a_round_trip():
    base = PROTOCOLS["humaneval/codex"]
    other = {
        "name": "x",
        "benchmark": "any",
        "prompt_form": "code-stripped",
        "stops": ("\n",),
        "post": "completion",
        "shots": ("a",),
        "cpu_seconds": 2.0,
        "wall_seconds": 11.0,
        "n_samples": 7,
        "temperature": 0.3,
        "top_p": 0.9,
        "max_tokens": 100,
    }
    assert set(other) == set(Protocol.model_fields)
    hashes = {with_sampling(base, **{field: value}).sha256 for field, value in other.items()}
    assert len(hashes) == len(other) and base.sha256 not in hashes
    assert with_sampling(base).sha256 == base.sha256 == Protocol.model_validate(base.model_dump()).sha256
    fields = json.dumps(dict(sorted(base.model_dump(mode="json").items())))
    assert base.sha256 == hashlib.sha256(fields.encode()).hexdigest()
    assert len({protocol.sha256 for protocol in PROTOCOLS.values()}) == len(PROTOCOLS)


def test_protocols_are_frozen_named_after_their_key_and_checked_when_changed():
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name
        assert (protocol.cpu_seconds, protocol.wall_seconds) == (3.0, 10.0)
    with pytest.raises(ValueError, match="frozen"):
        PROTOCOLS["alpaca"].n_samples = 3
    for changes in ({"temperature": -1.0}, {"n_samples": 0}, {"top_p": 0.0}, {"samples": 3}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            with_sampling(PROTOCOLS["alpaca"], **changes)


def test_reachable_keeps_imports_and_what_the_entry_point_needs():
    source = (
        "import math\n"
        "from functools import cache\n\n"
        "LIMIT = 3\nOTHER = 4\n\n"
        "def helper(x):\n    return deeper(x) + LIMIT\n\n"
        "def deeper(x):\n    return x\n\n"
        "def unused(x):\n    return OTHER\n\n"
        "@cache\ndef solve(x):\n    return helper(x)\n\n"
        "print(solve(1))\n"
        "def broken(:\n"
    )
    kept = reachable(source, "solve")
    for line in ("import math", "from functools import cache", "LIMIT = 3", "def helper(x):", "def deeper(x):", "@cache", "def solve(x):"):
        assert line in kept
    for line in ("unused", "OTHER", "print", "broken"):
        assert line not in kept
    namespace = {}
    exec(kept, namespace)
    assert namespace["solve"](1) == 4


def test_reachable_keeps_helpers_that_the_tests_call():
    prompt = 'def helper(x):\n    return -x\n\n\ndef twice(x):\n    """Undo helper."""\n'
    tests = CheckTests(test="def check(candidate):\n    assert candidate(helper(2)) == 2\n", entry_point="twice")
    problem = CODE.model_copy(update={"prompt": prompt, "tests": tests})
    assert "def helper" in PROTOCOLS["humaneval/evalplus"].program(problem, "    return -x\n")
    assert "def helper" not in reachable(prompt + "    return -x\n", "twice")


def test_reachable_returns_what_it_cannot_mend():
    for source in ("def solve(:\n", "x = 1\n", ""):
        assert reachable(source, "solve") == source


def humaneval_rows() -> list[tuple[Problem, str]]:
    with gzip.open(HUMANEVAL, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) == 164
    tests = [CheckTests(test=row["test"], entry_point=row["entry_point"]) for row in rows]
    changes = [{"task_id": row["task_id"], "prompt": row["prompt"], "tests": test} for row, test in zip(rows, tests)]
    return [(CODE.model_copy(update=change), row["canonical_solution"]) for change, row in zip(changes, rows)]


@pytest.mark.skipif(not HUMANEVAL.exists(), reason="HumanEval is not there")
def test_no_stop_and_no_reduction_hurts_a_humaneval_reference():
    for problem, solution in humaneval_rows():
        for name in ("humaneval/codex", "humaneval/bigcode", "humaneval/evalplus"):
            completion = ("\n" if name.endswith("bigcode") else "") + solution
            program = PROTOCOLS[name].program(problem, PROTOCOLS[name].cut(completion)[0])
            compile(program, problem.task_id, "exec")
            lines = [line for line in solution.splitlines() if line.strip()]
            assert [line for line in lines if line not in program] == [], (name, problem.task_id)


@pytest.mark.skipif(not HUMANEVAL.exists(), reason="HumanEval is not there")
def test_humaneval_references_pass_after_the_reduction_to_what_is_reachable():
    for problem, solution in humaneval_rows():
        namespace = {}
        exec(PROTOCOLS["humaneval/evalplus"].program(problem, solution), namespace)
        exec(problem.tests.test, namespace)
        namespace["check"](namespace[problem.tests.entry_point])


@pytest.mark.slow
def test_no_stop_and_no_reduction_hurts_an_mbpp_plus_reference():
    protocol = PROTOCOLS["mbpp+/evalplus"]
    with gzip.open(real("evalplus/MbppPlus-v0.2.0.jsonl.gz"), "rt") as lines:
        for row in map(json.loads, lines):
            tests = CheckTests(test="", entry_point=row["entry_point"])
            problem = PLUS.model_copy(update={"task_id": row["task_id"], "prompt": row["prompt"], "tests": tests})
            whole, kept = {}, {}
            exec(row["canonical_solution"], whole)
            exec(protocol.program(problem, protocol.cut(row["canonical_solution"])[0]), kept)
            codes = [names[row["entry_point"]].__code__ for names in (whole, kept)]
            assert codes[0].co_code == codes[1].co_code and not set(codes[0].co_names) & (set(whole) - set(kept)), row["task_id"]
