"""Readers: the real files with their known counts, each drop with its reason, each broken reference with its place."""

import json
from collections import Counter
from pathlib import Path

import pytest

from wmtp.problems import (
    mbpp_split,
    read_codecontests,
    read_functions,
    read_humaneval,
    read_mbpp,
    read_sanitized_mbpp,
    split_statement,
)
from wmtp.protocols import parsed
from wmtp.records import AssertTests, Problem, RecordError

DATASETS = Path(__file__).parents[2] / "shared" / "datasets"
real_data = pytest.mark.skipif(not DATASETS.exists(), reason="the real files are not there")

CONTEST = {
    "task_id": "7_a",
    "instruction": "Print x.",
    "test_cases": {"input": ["1"], "output": ["1"]},
    "checker": "exact",
    "cf_contest_id": 7,
    "difficulty": "9",
}
FUNCTION = {"task_id": "f/1", "instruction": "Do.", "test_setup_code": "y = 1", "tests": [{"call": "f(1)", "expected": "2"}]}
RIGHT = {
    "task_id": "7_a",
    "solution_id": "r",
    "output": "print(1)",
    "is_correct": True,
    "verified": True,
    "origin": "o",
    "label": "correct",
    "pair": "w",
    "span": [6, 7],
}
WRONG = {**RIGHT, "solution_id": "w", "output": "print(2)", "is_correct": False, "pair": "r"}


def write(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def contests(folder: Path, problems: list[dict], solutions: list[dict]):
    write(folder / "problems.jsonl", problems)
    write(folder / "solutions.jsonl", solutions)
    return read_codecontests(folder)


def functions(folder: Path, problems: list[dict], solutions: list[dict]):
    write(folder / "problems.jsonl", problems)
    write(folder / "solutions.jsonl", [{**line, "task_id": "f/1"} for line in solutions])
    return read_functions(folder)


def without(line: dict, *fields: str) -> dict:
    return {key: value for key, value in line.items() if key not in fields}


@real_data
def test_humaneval_is_read_whole():
    problems = read_humaneval(DATASETS / "humaneval" / "HumanEval.jsonl.gz")
    assert len(problems) == 164 and len({problem.group for problem in problems}) == 164
    assert problems[0].task_id == "HumanEval/0" and problems[0].tests.entry_point == "has_close_elements"
    assert problems[0].statement.startswith("Check if in given list of numbers")
    for problem in problems:
        assert problem.reference.startswith(problem.prompt) and problem.prompt.endswith("\n")
        assert problem.statement and parsed(problem.reference)


@real_data
def test_mbpp_is_read_whole_and_split_as_published():
    problems = read_mbpp(DATASETS / "mbpp" / "mbpp.jsonl")
    assert Counter(map(mbpp_split, problems)) == {"prompt": 10, "test": 500, "validation": 90, "train": 374}
    assert [problem.task_id for problem in problems] == [f"mbpp/{i}" for i in range(1, 975)]
    assert not any("\r" in problem.model_dump_json() or "\\r\\n" in problem.model_dump_json() for problem in problems)
    assert {len(problem.tests.asserts) for problem in problems} == {3}
    assert [problem.task_id for problem in problems if problem.tests.setup] == ["mbpp/367", "mbpp/927"]
    assert all(parsed(problem.reference) for problem in problems)


@real_data
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
def test_mbpp_references_pass_in_the_order_of_assert_tests():
    skipped = {"mbpp/123"}  # takes 2.7 s of CPU
    for problem in read_mbpp(DATASETS / "mbpp" / "mbpp.jsonl") + read_sanitized_mbpp(DATASETS / "mbpp" / "sanitized-mbpp.json"):
        if problem.task_id not in skipped:
            exec("\n".join([problem.reference, problem.tests.setup, *problem.tests.asserts]), {"__name__": "solution"})


@real_data
def test_sanitized_mbpp_is_read_whole():
    problems = read_sanitized_mbpp(DATASETS / "mbpp" / "sanitized-mbpp.json")
    assert len(problems) == 427 and Counter(map(mbpp_split, problems))["test"] == 257
    assert {len(problem.tests.asserts) for problem in problems} <= set(range(3, 8))
    assert any(problem.tests.setup.startswith("import math") for problem in problems)


@real_data
def test_the_codecontests_slice_is_read_and_what_is_unverified_counted():
    problems, solutions, dropped = read_codecontests(DATASETS / "codecontests_slice")
    assert (len(problems), len(solutions)) == (261, 1020)
    assert dropped == {"problem: unverified": 39, "solution: its problem is dropped": 39}
    assert Counter(solution.is_correct for solution in solutions) == {True: 261, False: 759}
    assert Counter(problem.tests.checker for problem in problems) == {"exact": 232, "token": 4, "token-caseless": 2, "token-float1e-6": 23}
    for problem in problems:
        assert problem.input.startswith("Input\n") and "\n## " not in problem.statement + problem.input
        assert 1 <= problem.input.count("\nInput\n") <= 2 and len(problem.statement) > 40
    groups = {problem.task_id: problem.group for problem in problems}
    assert groups["9_e_interesting_graph_and_apples_483"] == groups["9_a_die_roll_1319"] == "9"
    assert {problem.difficulty for problem in problems} >= {8, 9, None}


@real_data
def test_the_student_programs_are_read_and_duplicates_counted():
    problems, solutions, dropped = read_functions(DATASETS / "refactory")
    assert len(problems) == 5 and len(solutions) + sum(dropped.values()) == 4225
    assert set(dropped) == {"solution: duplicate text"}
    assert {solution.origin for solution in solutions} == {"correct", "wrong"}
    assert [problem.group for problem in problems] == [problem.task_id for problem in problems]
    assert sum(solution.is_correct != (solution.origin == "correct") for solution in solutions) > 0


def test_a_pair_is_read_with_its_span(tmp_path):
    problems, solutions, dropped = contests(tmp_path, [CONTEST], [RIGHT, WRONG])
    assert dropped == {} and problems[0].difficulty == 9 and problems[0].group == "7"
    assert [(s.solution_id, s.pair, s.span, s.is_correct) for s in solutions] == [("r", "w", (6, 7), True), ("w", "r", (6, 7), False)]
    problems, solutions, dropped = functions(tmp_path, [FUNCTION], [RIGHT, WRONG])
    assert dropped == {} and problems[0].tests.model_dump() == {"kind": "calls", "setup": "y = 1", "calls": ["f(1)"], "expected": ["2"]}
    assert [solution.origin for solution in solutions] == ["o", "o"]


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        ({"instruction": " \n"}, "problem: empty statement"),
        ({"test_cases": {"input": [], "output": []}}, "problem: no tests"),
        ({"checker": "unverified"}, "problem: unverified"),
    ],
)
def test_a_problem_is_dropped_with_its_reason_and_its_solutions(tmp_path, problem, reason):
    problems, solutions, dropped = contests(tmp_path, [{**CONTEST, **problem}], [RIGHT, WRONG])
    assert (problems, solutions) == ([], []) and dropped == {reason: 1, "solution: its problem is dropped": 2}


@pytest.mark.parametrize(
    ("solution", "reason"),
    [
        ({"output": "print 1", "span": [0, 5]}, "solution: not Python 3"),
        ({"output": "x = '\0'"}, "solution: not Python 3"),
        ({"output": " \n        "}, "solution: empty program"),
        ({"verified": False}, "solution: unverified"),
        ({"output": "print(1)"}, "solution: text with both labels"),
        ({"output": "print(1)", "is_correct": True}, "solution: duplicate text"),
    ],
)
def test_a_solution_is_dropped_with_its_reason_and_its_pair_is_single_from_then_on(tmp_path, solution, reason):
    _, solutions, dropped = contests(tmp_path, [CONTEST], [RIGHT, {**WRONG, **solution}])
    both = reason.endswith("both labels")
    assert dropped == {reason: 2 if both else 1}
    assert [(s.solution_id, s.pair, s.span) for s in solutions] == ([] if both else [("r", None, None)])


def test_function_problems_are_dropped_with_their_reason(tmp_path):
    assert functions(tmp_path, [{**FUNCTION, "tests": []}], [])[2] == {"problem: no tests": 1}
    assert functions(tmp_path, [{**FUNCTION, "instruction": ""}], [])[2] == {"problem: empty statement": 1}


def test_equal_programs_of_two_problems_are_no_duplicates(tmp_path):
    other = [{**line, "task_id": "7_b", "solution_id": f"{i}", "pair": None, "span": None} for i, line in enumerate((RIGHT, WRONG))]
    _, solutions, dropped = contests(tmp_path, [CONTEST, {**CONTEST, "task_id": "7_b"}], [RIGHT, WRONG, *other])
    assert len(solutions) == 4 and dropped == {}


@pytest.mark.parametrize(
    ("solution", "message"),
    [
        ({"task_id": "8_a"}, "task_id: '8_a' is no problem"),
        ({"pair": "z"}, "pair: 'z' is no other solution"),
        ({"pair": "w"}, "pair: 'w' is no other solution"),
        ({"span": [6, 6]}, "span: .6, 6. is no stretch"),
        ({"span": [-1, 3]}, "span"),
        ({"span": [6, 9]}, "span: .6, 9. is no stretch of a paired program of 8"),
        ({"pair": None}, "span"),
        ({"output": "\r\nprint(2)"}, "span: .*without CRLF"),
        ({"span": [1]}, "span"),
        ({"solution_id": "r"}, "solution_id: 'r' stands at .*:1 already"),
        ({"is_correct": 1}, "is_correct: .*boolean"),
    ],
)
def test_a_broken_solution_line_is_named(tmp_path, solution, message):
    with pytest.raises(RecordError, match=rf"solutions\.jsonl:2: {message}"):
        contests(tmp_path, [CONTEST], [RIGHT, {**WRONG, **solution}])


@pytest.mark.parametrize("field", ["task_id", "instruction", "test_cases", "checker"])
def test_a_missing_field_of_a_problem_is_named(tmp_path, field):
    with pytest.raises(RecordError, match=rf"problems\.jsonl:1: {field}: Field required"):
        contests(tmp_path, [without(CONTEST, field)], [])


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ({"test_cases": {"input": ["1"], "output": []}}, "test_cases: 1 inputs but 0 outputs"),
        ({"checker": "fuzzy"}, "checker: .*'fuzzy'|checker"),
        ({"task_id": "nothing", "cf_contest_id": None}, "task_id: 'nothing' has no round"),
    ],
)
def test_a_broken_problem_line_is_named(tmp_path, problem, message):
    with pytest.raises(RecordError, match=rf"problems\.jsonl:1: {message}"):
        contests(tmp_path, [{**CONTEST, **problem}], [])


def test_groups_come_from_the_contest_the_round_or_the_group(tmp_path):
    def group(line: dict) -> str:
        return contests(tmp_path, [line], [])[0][0].group

    assert group(CONTEST) == "7" and group({**CONTEST, "cf_contest_id": 12}) == "12"
    assert group(without({**CONTEST, "task_id": "31_b"}, "cf_contest_id")) == "31"
    assert functions(tmp_path, [FUNCTION], [])[0][0].group == "f/1"
    assert functions(tmp_path, [{**FUNCTION, "group": "set-1"}], [])[0][0].group == "set-1"


def test_a_difficulty_that_is_no_number_is_none(tmp_path):
    found = [contests(tmp_path, [{**CONTEST, "difficulty": d}], [])[0][0].difficulty for d in ("9", 4, "very hard", None)]
    assert found == [9, 4, None, None]


STATEMENT = """Find x.

Input

One number.

Output

x.

Examples

Input

1

Output

2

Input

3

Output

4

Input

5

Output

6

Note

In the first example, so.

## Categories

- math
"""


def test_a_statement_is_split_at_its_input_heading_and_keeps_two_examples():
    asked, layout = split_statement(STATEMENT)
    assert asked == "Find x."
    assert layout == "Input\n\nOne number.\n\nOutput\n\nx.\n\nExamples\n\nInput\n\n1\n\nOutput\n\n2\n\nInput\n\n3\n\nOutput\n\n4"
    assert split_statement(STATEMENT, max_examples=1)[1].endswith("Output\n\n2")
    assert split_statement(STATEMENT, max_examples=9)[1].endswith("Output\n\n6")


def test_a_statement_without_headings_is_all_statement():
    assert split_statement("Read x. Input it.\n\nPrint x.\n") == ("Read x. Input it.\n\nPrint x.", "")


def test_an_input_field_is_taken_as_it_is(tmp_path):
    problem = contests(tmp_path, [{**CONTEST, "instruction": STATEMENT, "input": "One x.\r\n"}], [])[0][0]
    assert problem.statement == STATEMENT.strip() and problem.input == "One x."


def test_crlf_inside_texts_becomes_a_newline(tmp_path):
    line = {"task_id": 11, "text": "Do.\r\nIt.", "code": "x = 1\r\ny = 2", "test_list": ["assert x\r\n"], "test_setup_code": "a\r\nb"}
    write(tmp_path / "mbpp.jsonl", [line])
    problem = read_mbpp(tmp_path / "mbpp.jsonl")[0]
    assert problem.reference == "x = 1\ny = 2" and problem.statement == "Do.\nIt."
    assert problem.tests == AssertTests(setup="a\nb", asserts=["assert x\n"])
    single = {**RIGHT, "output": "x = 1\r\nprint(1)", "pair": None, "span": None}
    assert contests(tmp_path, [CONTEST], [single])[1][0].program == "x = 1\nprint(1)"


@pytest.mark.parametrize(("number", "split"), [(1, "prompt"), (10, "prompt"), (11, "test"), (510, "test"), (511, "validation"),
                                               (600, "validation"), (601, "train"), (974, "train")])  # fmt: skip
def test_mbpp_split_at_its_borders(number, split):
    assert mbpp_split(mbpp(f"mbpp/{number}")) == split


@pytest.mark.parametrize("task_id", ["mbpp/0", "mbpp/975", "HumanEval/3", "mbpp/x", "mbpp/"])
def test_mbpp_split_refuses_other_ids(task_id):
    with pytest.raises(RecordError, match=f"task {task_id}: expected an MBPP id"):
        mbpp_split(mbpp(task_id))


def mbpp(task_id: str) -> Problem:
    return Problem(task_id=task_id, source="mbpp", group="g", statement="Do.", tests=AssertTests(asserts=["assert 1"]))


HUMANEVAL = {
    "task_id": "H/0",
    "prompt": 'def f(x):\n    """Do."""\n',
    "entry_point": "f",
    "canonical_solution": "    return 1\n",
    "test": "t",
}


def test_a_humaneval_line_becomes_a_problem(tmp_path):
    write(tmp_path / "h.jsonl", [HUMANEVAL, {**HUMANEVAL, "task_id": "H/1", "prompt": "def f(x):\n"}])
    first, second = read_humaneval(tmp_path / "h.jsonl")
    assert (first.statement, first.reference) == ("Do.", 'def f(x):\n    """Do."""\n    return 1\n')
    assert second.statement == second.prompt == "def f(x):\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"entry_point": "g"}, "entry_point: 'g' is not defined in the prompt"), ({"prompt": "def f(:\n"}, "prompt: not the head")],
)
def test_a_broken_humaneval_prompt_is_named(tmp_path, changes, message):
    write(tmp_path / "h.jsonl", [HUMANEVAL, {**HUMANEVAL, "task_id": "H/1", **changes}])
    with pytest.raises(RecordError, match=rf"h\.jsonl:2: {message}"):
        read_humaneval(tmp_path / "h.jsonl")


def test_programs_that_defeat_the_parser_do_not_stop_the_reader():
    assert parsed("x = 1") and not any(map(parsed, ("x = ", "(" * 5000, "-" * 100_000 + "1")))
