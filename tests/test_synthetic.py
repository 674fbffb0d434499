"""The files of the micro task: real layouts, right and wrong programs told apart, nothing held out seen twice, equal bytes."""

import bisect
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.test_cases import stages
from wmtp import synthetic
from wmtp.cases import agrees, one_change_mutants
from wmtp.grammar import FAMILIES, function, lexical_tokens, program
from wmtp.problems import mbpp_split, read_codecontests, read_contest_benchmark, read_functions, read_humaneval, read_mbpp
from wmtp.protocols import PROTOCOLS, instruction_of, render_prompt
from wmtp.records import CallTests
from wmtp.synthetic import TRAIN_FORMS, VALUES, TaskSource, corpus, generate, runs_right

DATASETS = Path(__file__).parents[2] / "shared" / "datasets"
SIZE = {"n_train_compositions": 200, "n_eval_problems": 30, "min_operations": 1, "max_operations": 3}
FILES = ("codecontests/problems", "codecontests/solutions", "functions/problems", "functions/solutions", "humaneval/HumanEval")
UNSEEN = ("codecontests_test/problems", "codecontests_test/solutions")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("micro")
    return out, generate(out, seed=5, **SIZE)


def lines(path: Path) -> list[dict]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.decode().splitlines()]


def every_line(out: Path) -> dict[str, list[dict]]:
    found = {name: lines(out / f"{name}.jsonl.gz") for name in FILES + UNSEEN}
    return {**found, "mbpp/mbpp": lines(out / "mbpp" / "mbpp.jsonl")}


def digests(out: Path) -> dict[str, str]:
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.rglob("*")) if path.is_file()}


def run_function(text: str, calls: list[str]) -> list[str]:
    namespace = {}
    exec(text, namespace)
    return [str(eval(call, dict(namespace))) for call in calls]


def run_contest(text: str, given: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(text, {"input": lambda: given})
    return out.getvalue().strip()


def body_of(text: str) -> str:
    """The operations and the result of a program in either form, without what belongs to the form."""
    inner = text.splitlines()[1:]
    last = inner[-1].strip()
    last = last.removeprefix("return ") if last.startswith("return ") else last.removeprefix("print(").removesuffix(")").removeprefix("*")
    return "\n".join([*(line.strip() for line in inner[:-1]), last])


def test_counts_are_the_lines_of_the_files(made):
    out, counts = made
    found = every_line(out)
    assert counts == {
        "humaneval": len(found["humaneval/HumanEval"]),
        "mbpp": len(found["mbpp/mbpp"]),
        "codecontests_problems": len(found["codecontests/problems"]),
        "codecontests_solutions": len(found["codecontests/solutions"]),
        "functions_problems": len(found["functions/problems"]),
        "functions_solutions": len(found["functions/solutions"]),
        "codecontests_test_problems": len(found["codecontests_test/problems"]),
        "codecontests_test_solutions": len(found["codecontests_test/solutions"]),
    }
    assert counts["humaneval"] == 30 and counts["codecontests_problems"] + counts["functions_problems"] == 200
    assert sorted(path.name for path in out.rglob("*.*")) == sorted(
        ["HumanEval.jsonl.gz", "mbpp.jsonl", *["problems.jsonl.gz"] * 3, *["solutions.jsonl.gz"] * 3]
    )


def test_the_readers_of_the_real_files_read_them_and_drop_nothing(made):
    out, counts = made
    for name, reader in (("codecontests", read_codecontests), ("functions", read_functions)):
        problems, solutions, dropped = reader(out / name)
        assert (len(problems), len(solutions), dropped) == (counts[f"{name}_problems"], counts[f"{name}_solutions"], {})
        assert Counter(solution.is_correct for solution in solutions) == {True: len(problems), False: len(problems)}
        assert {problem.difficulty for problem in problems} == {1, 2, 3}
        assert max(Counter(problem.group for problem in problems).values()) == 5
    assert len(read_humaneval(out / "humaneval" / "HumanEval.jsonl.gz")) == 30
    mbpp = read_mbpp(out / "mbpp" / "mbpp.jsonl")
    assert Counter(map(mbpp_split, mbpp)) == {"prompt": 10, "test": 30, "validation": 36, "train": 36}
    assert [problem.task_id for problem in mbpp if mbpp_split(problem) == "test"][:2] == ["mbpp/11", "mbpp/12"]


@pytest.mark.skipif(not DATASETS.exists(), reason="the real files are not there")
def test_lines_have_the_fields_of_the_real_files(made):
    found = every_line(made[0])
    assert set(found["humaneval/HumanEval"][0]) == set(lines(DATASETS / "humaneval" / "HumanEval.jsonl.gz")[0])
    assert set(found["mbpp/mbpp"][0]) == set(lines(DATASETS / "mbpp" / "mbpp.jsonl")[0])
    for name, folder in (("codecontests", "codecontests_slice"), ("functions", "refactory")):
        for part, extra in (("problems", {"group", "difficulty"}), ("solutions", {"pair", "span", "origin"})):
            ours, theirs = set(found[f"{name}/{part}"][0]), set(lines(DATASETS / folder / f"{part}.jsonl.gz")[0])
            assert ours - theirs <= extra, (name, part)
            unused = {"train_row", "cluster", "reference_status", "reference_seconds_max", "verdict_py311"}
            assert theirs - ours <= unused, (name, part)


def test_right_programs_pass_every_test_and_wrong_ones_fail_some_without_a_crash(made):
    out, _ = made
    for problems, solutions, _ in (read_codecontests(out / "codecontests"), read_functions(out / "functions")):
        tests = {problem.task_id: problem.tests for problem in problems}
        for solution in solutions:
            test = tests[solution.task_id]
            if isinstance(test, CallTests):
                passed = [got == want for got, want in zip(run_function(solution.program, test.calls), test.expected)]
            else:
                passed = [run_contest(solution.program, given) == want for given, want in zip(test.inputs, test.outputs)]
            assert len(passed) >= 6 and all(passed) == solution.is_correct, solution


def test_references_of_all_benchmarks_pass_and_constants_fail(made):
    out, _ = made
    for problem in read_humaneval(out / "humaneval" / "HumanEval.jsonl.gz"):
        namespace = {}
        exec(problem.reference + problem.tests.test, namespace)
        namespace["check"](namespace["f"])
        with pytest.raises(AssertionError):
            namespace["check"](lambda xs, namespace=namespace: True)
    for problem in read_mbpp(out / "mbpp" / "mbpp.jsonl"):
        namespace = {}
        exec(problem.reference, namespace)
        assert len(problem.tests.asserts) == 3
        for line in problem.tests.asserts:
            exec(line, namespace)
        answers = {line.split(" == ")[1] for line in problem.tests.asserts}
        assert len(answers) > 1
    unseen, _, dropped = read_contest_benchmark(out / "codecontests_test")
    assert len(unseen) == SIZE["n_eval_problems"] and not dropped
    for problem in unseen:
        assert [run_contest(problem.reference, given) for given in problem.tests.inputs] == problem.tests.outputs
        assert len(problem.tests.inputs) >= 6 and len(set(problem.tests.outputs)) > 1


def test_the_span_is_where_the_two_programs_first_differ(made):
    out, _ = made
    for _, solutions, _ in (read_codecontests(out / "codecontests"), read_functions(out / "functions")):
        by_id = {solution.solution_id: solution for solution in solutions}
        for solution in solutions:
            other = by_id[solution.pair]
            assert other.pair == solution.solution_id and other.is_correct != solution.is_correct
            start, end = solution.span
            assert other.span[0] == start and solution.program[:start] == other.program[:start]
            assert solution.program[start:end] != other.program[slice(*other.span)]
            assert (start, end) in {(a, b) for _, a, b in lexical_tokens(solution.program)}


def test_wrong_places_are_spread_over_the_lines(made):
    _, solutions, _ = read_functions(made[0] / "functions")
    wrong = [solution for solution in solutions if not solution.is_correct]
    last = sum(solution.program.count("\n", 0, solution.span[0]) == solution.program.count("\n") for solution in wrong)
    assert 0.15 < last / len(wrong) < 0.5
    assert {solution.origin for solution in wrong} == {"mutant:operation", "mutant:constant", "mutant:order"}


def test_no_composition_occurs_twice_and_none_of_the_benchmarks_in_training(made):
    found = every_line(made[0])
    evaluation = [body_of(f"def f(xs):\n{line['canonical_solution']}") for line in found["humaneval/HumanEval"]]
    evaluation += [body_of(line["code"]) for line in found["mbpp/mbpp"]]
    evaluation += [body_of(line["output"]) for line in found["codecontests_test/solutions"]]
    training = [(body_of(line["output"]), line["is_correct"]) for name in FILES[1:4:2] for line in found[name]]
    right = [text for text, is_correct in training if is_correct]
    assert len(set(evaluation)) == len(evaluation) and len(set(right)) == len(right)
    assert not set(evaluation) & {text for text, _ in training}


def test_texts_are_short_and_the_shown_test_shorter(made):
    found = every_line(made[0])
    statements = [line["text"] for line in found["mbpp/mbpp"]] + [line["instruction"] for line in found["codecontests/problems"]]
    words = [len(text.split()) for text in statements]
    assert sum(words) / len(words) < 22 and max(words) <= 36
    programs = [line["output"] for name in FILES[1:4:2] for line in found[name]]
    assert max(text.count("\n") + 1 for text in programs) <= 5 and sum(map(len, programs)) / len(programs) < 110
    for line in found["mbpp/mbpp"]:
        assert len(eval(line["test_list"][0].removeprefix("assert f(").split(")")[0])) <= 4


def test_function_problems_ask_as_the_two_benchmarks_do_half_and_half(made):
    problems, solutions, _ = read_functions(made[0] / "functions")
    asks = Counter(problem.statement.startswith('Complete the function.\ndef f(xs):\n    """') for problem in problems)
    assert asks == {True: 80, False: 80}
    shown = [problem for problem in problems if "\nPass this test: " in problem.statement]
    assert len(shown) == 80
    right = {solution.task_id: solution.program for solution in solutions if solution.is_correct}
    for problem in shown:
        namespace = {}
        exec(f"{right[problem.task_id]}\n{problem.statement.split('Pass this test: ')[1]}", namespace)
    evaluated = read_mbpp(made[0] / "mbpp" / "mbpp.jsonl")[0]
    assert "\nPass this test: assert f([" in instruction_of(evaluated)[0]


def test_equal_seeds_give_equal_bytes_in_another_process_and_under_another_hash_seed(made, tmp_path):
    out, _ = made
    code = f"import sys; from pathlib import Path; from wmtp.synthetic import generate; generate(Path(sys.argv[1]), seed=5, **{SIZE})"
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    assert digests(tmp_path) == digests(out)


def test_remarks_are_needless_tokens_above_the_programs_of_a_task_that_is_the_same(made, tmp_path):
    generate(tmp_path, seed=5, **SIZE, remark_digits=9)
    here, there = digests(tmp_path), digests(made[0])
    assert {name for name in there if here[name] != there[name]} == {f"{kind}/solutions.jsonl.gz" for kind in ("codecontests", "functions")}
    seen = set()
    for name in ("codecontests/solutions", "functions/solutions"):
        for plain, line in zip(every_line(made[0])[name], every_line(tmp_path)[name], strict=True):
            remark, rest = line["output"].split("\n", 1)
            seen.add(remark)
            assert re.fullmatch("# [0-9]{9}", remark) and rest == plain["output"]
            assert line["span"] == [place + len(remark) + 1 for place in plain["span"]]
            assert line.get("fault_lines", []) == [number + 1 for number in plain.get("fault_lines", [])]
    assert len(seen) == SIZE["n_train_compositions"], "one a problem, the same above its right and its wrong program"


def test_another_seed_gives_other_problems(made, tmp_path):
    generate(tmp_path, seed=6, **SIZE)
    assert not set(digests(tmp_path).values()) & set(digests(made[0]).values())


def test_benchmarks_do_not_depend_on_how_much_is_trained_on(made, tmp_path):
    generate(tmp_path, seed=5, **{**SIZE, "n_train_compositions": 3})
    here, there = digests(tmp_path), digests(made[0])
    for name in ("humaneval/HumanEval.jsonl.gz", "mbpp/mbpp.jsonl", *(f"{name}.jsonl.gz" for name in UNSEEN)):
        assert here[name] == there[name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_eval_problems": 501}, "n_eval_problems is 501; expected 1 to 500"),
        ({"n_eval_problems": 0}, "expected 1 to 500"),
        ({"min_operations": 3, "max_operations": 2}, "found 3 and 2"),
        ({"min_operations": 0}, "expected 1 <= min_operations"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        generate(tmp_path, seed=1, **{**SIZE, **changes})


@pytest.mark.slow
def test_when_the_grammar_is_used_up_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "MAX_DRAWS", 30)
    with pytest.raises(ValueError, match="composition of 1 operations in 30 draws"):
        generate(tmp_path, seed=1, n_train_compositions=20_000, n_eval_problems=1, min_operations=1, max_operations=1)
    assert list(tmp_path.iterdir()) == []


def test_a_program_is_run_in_its_own_form():
    cases = [([1, 2], 3), ([4], 5)]
    assert runs_right("def f(xs):\n    return sum(xs)", "humaneval", cases) == [True, False]
    assert runs_right("print(sum(map(int, input().split())))", "contest", cases) == [True, False]
    assert runs_right("print(1)\nprint(2)", "contest", [([1], 1)]) == [False]
    assert runs_right("print(*[1, 2])", "contest", [([1], [1, 2])]) == [True]


def test_the_corpus_is_what_training_texts_look_like():
    texts = list(corpus(1, 30))
    assert texts == list(corpus(1, 30)) and texts[:10] == list(corpus(1, 10)) and texts != list(corpus(2, 30))
    assert len(set(texts)) == 30
    for text, form in zip(texts, TRAIN_FORMS * 6):
        head, response = text.split("### Response:\n")
        assert head.startswith("### Instruction:\n") and "Evaluation Notes" not in head
        assert response.startswith("xs = list(map(int, input().split()))\n" if form == "contest" else "def f(xs):\n")
    assert "### Evaluation Notes:" in next(corpus(1, 1, template="evaluation_notes"))


def test_a_training_prompt_and_an_evaluation_prompt_have_one_form(made):
    problem = read_humaneval(made[0] / "humaneval" / "HumanEval.jsonl.gz")[0]
    prompt = PROTOCOLS["alpaca"].prompt(problem, "alpaca")
    heads = [render_prompt(*instruction_of(task), "alpaca").split('"""')[0] for task in read_functions(made[0] / "functions")[0]]
    assert prompt.split('"""')[0] in heads


def pairs(n: int, seed: int) -> list:
    source = TaskSource(seed, 1, 3)
    return [source.draw(TRAIN_FORMS[i % 5], FAMILIES[i % 3], "train") for i in range(n)]


@pytest.mark.slow
def test_wrong_programs_are_no_more_degenerate_than_right_ones():
    tasks, fresh = pairs(300, seed=23), TaskSource(24, 1, 3).long
    for member in ([task.composition for task in tasks], [task.mutation.composition for task in tasks]):
        assert min(sum(stages(composition, xs) is not None for xs in fresh) / len(fresh) for composition in member) > 0.2


def features(text: str) -> set:
    tokens = ["^", *(token for token, _, _ in lexical_tokens(text)), "$"]
    return {*tokens, *itertools.pairwise(tokens), *zip(tokens, tokens[1:], tokens[2:]), len(tokens), ("length", len(text))}


@pytest.mark.slow
def test_a_program_alone_does_not_give_its_label_away():
    tasks = pairs(1600, seed=21)
    texts = [(program(task.composition, task.form), program(task.mutation.composition, task.form)) for task in tasks]
    right, wrong = (Counter(feature for pair in texts[:800] for feature in features(pair[member])) for member in (0, 1))

    def score(text: str) -> float:
        return sum(math.log((right[feature] + 1) / (wrong[feature] + 1)) for feature in features(text))

    positive, negative = ([score(pair[member]) for pair in texts[800:]] for member in (0, 1))
    negative.sort()
    below = [(bisect.bisect_left(negative, value) + bisect.bisect_right(negative, value)) / 2 for value in positive]
    auc = sum(below) / len(positive) / len(negative)
    assert abs(auc - 0.5) < 0.045  # three standard errors of 800 against 800


@pytest.mark.slow
@pytest.mark.parametrize("form", ["humaneval", "mbpp"])
def test_every_wrong_program_of_one_change_fails_the_benchmarks_tests(form):
    """On inputs that no test was chosen from: at most one mutant in two hundred differs there and passes all the same."""
    source = TaskSource(22, 1, 3)
    fresh = [source.rng.choices(VALUES, k=source.rng.randint(3, 8)) for _ in range(300)]
    wrong = survivors = 0
    for i in range(150):
        task = source.draw(form, FAMILIES[i % 3], "evaluate")
        right = function(task.composition)
        telling = [(xs, right(xs)) for xs in fresh if stages(task.composition, xs)]
        for mutant in one_change_mutants(task.composition):
            if not agrees(mutant, telling):
                wrong += 1
                survivors += agrees(mutant, task.cases)
    assert wrong > 1500 and survivors <= wrong / 200
