"""Records of the source data sets, one reader each. What is dropped is counted by reason; what is malformed is a RecordError."""

import ast
import re
from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Literal

from wmtp.layouts import (
    ContestProblemLine,
    ContestSolutionLine,
    FunctionProblemLine,
    FunctionSolutionLine,
    HumanEvalLine,
    MbppLine,
    SanitizedMbppItem,
    SolutionLine,
    data_file,
    items,
    rows,
)
from wmtp.protocols import parsed
from wmtp.records import AssertTests, CallTests, CheckTests, Problem, RecordError, Solution, StdioTests

Loaded = tuple[list[Problem], list[Solution], dict[str, int]]


def unix(text: str) -> str:
    return text.replace("\r\n", "\n")


def read_humaneval(path: str | Path) -> list[Problem]:
    """OpenAI's HumanEval.jsonl; the statement is the function's docstring, or the whole prompt where the function has none."""
    problems = []
    for where, row in rows(Path(path), HumanEvalLine):
        try:
            tree = ast.parse(row.prompt + "    pass\n")
        except SyntaxError as error:
            raise RecordError(f"{where}: prompt: not the head of a Python function: {error.msg} (line {error.lineno})") from None
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == row.entry_point]
        if not functions:
            raise RecordError(f"{where}: entry_point: {row.entry_point!r} is not defined in the prompt")
        problems.append(
            Problem(
                task_id=row.task_id,
                source="humaneval",
                group=row.task_id,
                statement=ast.get_docstring(functions[-1]) or row.prompt,
                prompt=row.prompt,
                tests=CheckTests(test=row.test, entry_point=row.entry_point),
                reference=row.prompt + row.canonical_solution,
            )
        )
    return problems


def read_mbpp(path: str | Path) -> list[Problem]:
    """Google's mbpp.jsonl; task ids become "mbpp/11". The order code, set-up, asserts is that of AssertTests."""
    return [
        mbpp_problem(row.task_id, row.text, row.code, AssertTests(setup=unix(row.test_setup_code), asserts=list(map(unix, row.test_list))))
        for _, row in rows(Path(path), MbppLine)
    ]


def read_sanitized_mbpp(path: str | Path) -> list[Problem]:
    """sanitized-mbpp.json: one JSON array; its imports run after the code and before the asserts."""
    return [
        mbpp_problem(
            row.task_id, row.prompt, row.code, AssertTests(setup="\n".join(row.test_imports), asserts=list(map(unix, row.test_list)))
        )
        for _, row in items(Path(path), SanitizedMbppItem)
    ]


def mbpp_problem(number: int, text: str, code: str, tests: AssertTests) -> Problem:
    name = f"mbpp/{number}"
    return Problem(task_id=name, source="mbpp", group=name, statement=unix(text).strip(), tests=tests, reference=unix(code))


def mbpp_split(problem: Problem) -> Literal["prompt", "test", "validation", "train"]:
    """Austin et al. 2021, section 2.1: 1-10 prompts, 11-510 test, 511-600 validation, 601-974 training."""
    name, _, number = problem.task_id.partition("/")
    if name != "mbpp" or not number.isdecimal() or not 1 <= int(number) <= 974:
        raise RecordError(f"task {problem.task_id}: expected an MBPP id from mbpp/1 to mbpp/974")
    return "prompt" if int(number) <= 10 else "test" if int(number) <= 510 else "validation" if int(number) <= 600 else "train"


def read_codecontests(folder: str | Path) -> Loaded:
    """problems.jsonl and solutions.jsonl of CodeContests form; groups are contest rounds. Also returns the drops by reason."""
    problems = [contest_problem(row, where) for where, row in rows(data_file(Path(folder), "problems"), ContestProblemLine)]
    return selected(problems, list(rows(data_file(Path(folder), "solutions"), ContestSolutionLine, key="solution_id")))


def read_contest_benchmark(folder: str | Path) -> tuple[list[Problem], dict[str, list[str]], dict[str, int]]:
    """A folder of CodeContests form to be solved, not trained on: (problems, each with its first right program as its reference, further
    right programs by task, drops by reason).
    """
    problems, solutions, dropped = read_codecontests(folder)
    right: dict[str, list[str]] = {}
    for solution in solutions:
        if solution.is_correct:
            right.setdefault(solution.task_id, []).append(solution.program)
    asked = [problem.model_copy(update={"reference": next(iter(right.get(problem.task_id, [])), None)}) for problem in problems]
    return asked, {task_id: programs[1:] for task_id, programs in right.items()}, dropped


def contest_problem(row: ContestProblemLine, where: str) -> Problem:
    inputs, outputs = row.test_cases.input, row.test_cases.output
    if len(inputs) != len(outputs):
        raise RecordError(f"{where}: test_cases: {len(inputs)} inputs but {len(outputs)} outputs; expected as many")
    contest, _, letter = row.task_id.partition("_")
    if row.group is None and row.cf_contest_id is None and not (contest and letter):
        raise RecordError(f"{where}: task_id: {row.task_id!r} has no round; expected <round>_<letter> where cf_contest_id is not given")
    text, layout = (unix(row.instruction).strip(), unix(row.input).strip()) if row.input else split_statement(unix(row.instruction))
    return Problem(
        task_id=row.task_id,
        source="codecontests",
        group=row.group or (contest if row.cf_contest_id is None else str(row.cf_contest_id)),
        statement=text,
        input=layout,
        tests=StdioTests(inputs=inputs, outputs=outputs, checker=row.checker),
        difficulty=int(row.difficulty) if str(row.difficulty).isdecimal() else None,
    )


def split_statement(text: str, max_examples: int = 2) -> tuple[str, str]:
    """(what is asked, input and output format with at most `max_examples` examples) of a Codeforces statement.

    The second part begins at the heading "Input"; a text without one is all statement. Notes on the examples, and the tags that an
    export may have put behind them, are left out.
    """
    text = re.split(r"(?m)^## \w+", text)[0]
    parts = re.split(r"(?m)^[ \t]*-*[ \t]*Input[ \t]*-*[ \t]*$", text, maxsplit=1)
    if len(parts) == 1:
        return text.strip(), ""
    layout = "Input" + re.split(r"(?m)^Note[ \t]*$", parts[1])[0]
    form, *examples = re.split(r"(?m)^Examples?[ \t]*$", layout, maxsplit=1)
    if examples:
        starts = [match.start() for match in re.finditer(r"(?m)^Input[ \t]*$", examples[0])]
        end = starts[max_examples] if len(starts) > max_examples else None
        form = f"{form.rstrip()}\n\nExamples\n\n{examples[0][:end].strip()}"
    return parts[0].strip(), re.sub(r"\n{3,}", "\n\n", form).strip()


def read_functions(folder: str | Path) -> Loaded:
    """problems.jsonl and solutions.jsonl with call tests; groups are `group`, else the task. Also returns the drops by reason."""
    problems = [
        Problem(
            task_id=row.task_id,
            source="functions",
            group=row.group or row.task_id,
            statement=unix(row.instruction).strip(),
            tests=CallTests(setup=row.test_setup_code, calls=[t.call for t in row.tests], expected=[t.expected for t in row.tests]),
            difficulty=row.difficulty,
        )
        for _, row in rows(data_file(Path(folder), "problems"), FunctionProblemLine)
    ]
    return selected(problems, list(rows(data_file(Path(folder), "solutions"), FunctionSolutionLine, key="solution_id")))


def selected(problems: Sequence[Problem], lines: Sequence[tuple[str, SolutionLine]]) -> Loaded:
    """What can be used of both, and the rest counted by reason; solutions are checked against the problems and each other first."""
    reasons = {problem.task_id: unusable_problem(problem) for problem in problems}
    ids = {row.solution_id for _, row in lines}
    labels: dict[tuple[str, str], set[bool]] = {}
    for where, row in lines:
        check_references(row, where, reasons, ids)
        labels.setdefault((row.task_id, unix(row.output)), set()).add(row.is_correct)
    dropped = Counter(f"problem: {reason}" for reason in reasons.values() if reason)
    kept: dict[tuple[str, str], Solution] = {}
    for _, row in lines:
        text = row.task_id, unix(row.output)
        reason = "its problem is dropped" if reasons[row.task_id] else unusable_program(row)
        reason = reason or ("text with both labels" if len(labels[text]) == 2 else "duplicate text" if text in kept else "")
        if reason:
            dropped[f"solution: {reason}"] += 1
        else:
            kept[text] = solution_of(row)
    return [problem for problem in problems if not reasons[problem.task_id]], paired(list(kept.values())), dict(sorted(dropped.items()))


def unusable_problem(problem: Problem) -> str:
    """Why, empty if it can be used."""
    if not problem.statement:
        return "empty statement"
    tests = problem.tests
    if not (tests.inputs if isinstance(tests, StdioTests) else tests.calls):
        return "no tests"
    return "unverified" if isinstance(tests, StdioTests) and tests.checker == "unverified" else ""


def unusable_program(row: SolutionLine) -> str:
    """Why, empty if it can be trained on."""
    if not row.output.strip():
        return "empty program"
    if isinstance(row, ContestSolutionLine) and not row.verified:
        return "unverified"
    return "not Python 3" if parsed(row.output) is None else ""


def check_references(row: SolutionLine, where: str, task_ids: Container[str], solution_ids: Container[str]) -> None:
    if row.task_id not in task_ids:
        raise RecordError(f"{where}: task_id: {row.task_id!r} is no problem of this folder")
    if row.pair is not None and (row.pair not in solution_ids or row.pair == row.solution_id):
        raise RecordError(f"{where}: pair: {row.pair!r} is no other solution of this folder")
    if row.span is not None and (row.pair is None or not 0 <= row.span[0] < row.span[1] <= len(row.output) or "\r\n" in row.output):
        raise RecordError(f"{where}: span: {list(row.span)} is no stretch of a paired program of {len(row.output)} characters without CRLF")


def solution_of(row: SolutionLine) -> Solution:
    return Solution(
        task_id=row.task_id,
        solution_id=row.solution_id,
        program=unix(row.output),
        is_correct=row.is_correct,
        origin=row.origin if isinstance(row, ContestSolutionLine) else row.origin or row.label,
        pair=row.pair,
        span=row.span,
    )


def paired(solutions: list[Solution]) -> list[Solution]:
    """A program whose other half was dropped is single from then on: where the two differ says nothing without it."""
    ids = {solution.solution_id for solution in solutions}
    return [s if s.pair is None or s.pair in ids else s.model_copy(update={"pair": None, "span": None}) for s in solutions]
