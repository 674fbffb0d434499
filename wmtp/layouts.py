"""The raw line types of the source data sets and their strict reading.

A line that is not JSON, lacks a field, has one of another type or repeats an id is a RecordError with file, line and field. Fields that
no reader needs are passed over. Files may be plain or .gz, with either line end, with or without a newline at the end.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError, field_validator

from wmtp.records import Record, RecordError, read_lines


class Raw(Record):
    model_config = ConfigDict(extra="ignore")


class HumanEvalLine(Raw):
    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str


class MbppLine(Raw):
    task_id: int
    text: str
    code: str
    test_list: list[str] = Field(min_length=1)
    test_setup_code: str


class SanitizedMbppItem(Raw):
    task_id: int
    prompt: str
    code: str
    test_list: list[str] = Field(min_length=1)
    test_imports: list[str]


class EvalPlusLine(Raw):
    """Inputs are JSON arrays, one of a call's arguments each; some files write {} where there is none."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    base_input: list[list[Any]] = Field(min_length=1)
    plus_input: list[list[Any]]
    atol: float = Field(ge=0)

    @field_validator("plus_input", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return [] if value == {} else value


class ContestTests(Raw):
    input: list[str]
    output: list[str]


class ContestProblemLine(Raw):
    """`input`: the input and output format, where it is kept apart from the statement. `group`: what lies in one split, where that is not
    the round."""

    task_id: str
    instruction: str
    input: str = ""
    test_cases: ContestTests
    checker: Literal["exact", "token", "token-caseless", "token-float1e-6", "unverified"]
    cf_contest_id: int | None = None
    group: str | None = None
    difficulty: str | int | None = None


class FunctionTest(Raw):
    call: str
    expected: str


class FunctionProblemLine(Raw):
    task_id: str
    instruction: str
    test_setup_code: str
    tests: list[FunctionTest]
    group: str | None = None
    difficulty: int | None = None


class SolutionLine(Raw):
    task_id: str
    solution_id: str
    output: str
    is_correct: bool
    pair: str | None = None
    span: tuple[int, int] | None = Field(default=None, strict=False)


class ContestSolutionLine(SolutionLine):
    verified: bool
    origin: str


class FunctionSolutionLine(SolutionLine):
    """`label` is the authors' word, the origin where none is given; `is_correct` is what running it showed."""

    label: str
    origin: str | None = None


Line = TypeVar("Line", bound=Raw)


def validated(kind: type[Line], content: str, where: str) -> Line:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "line"
        raise RecordError(f"{where}: {field}: {first['msg']} (expected a {kind.__name__})") from None


def rows(path: Path, kind: type[Line], key: str = "task_id") -> Iterator[tuple[str, Line]]:
    """(file:line, row) for each line; a second row with the same `key` is an error."""
    lines = ((f"{path}:{number}", text) for number, text in read_lines(path))
    return distinct(((where, validated(kind, text, where)) for where, text in lines), key)


def items(path: Path, kind: type[Line], key: str = "task_id") -> Iterator[tuple[str, Line]]:
    """As `rows`, for a file that is one JSON array; items are counted from 1."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RecordError(f"{path}: no such file; run the stage that makes it (dvc repro)") from None
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, list):
        raise RecordError(f"{path}: expected a JSON array, found {type(found).__name__}")
    texts = ((f"{path}: item {number}", json.dumps(item)) for number, item in enumerate(found, 1))
    return distinct(((where, validated(kind, text, where)) for where, text in texts), key)


def distinct(found: Iterable[tuple[str, Line]], key: str) -> Iterator[tuple[str, Line]]:
    first_seen: dict[Any, str] = {}
    for where, row in found:
        value = getattr(row, key)
        if value in first_seen:
            raise RecordError(f"{where}: {key}: {value!r} stands at {first_seen[value]} already; expected it once")
        first_seen[value] = where
        yield where, row


def data_file(folder: Path, stem: str) -> Path:
    """folder/stem.jsonl.gz or folder/stem.jsonl; neither or both is an error."""
    found = [path for path in (folder / f"{stem}.jsonl.gz", folder / f"{stem}.jsonl") if path.exists()]
    if len(found) != 1:
        raise RecordError(f"{folder}: expected one of {stem}.jsonl.gz and {stem}.jsonl, found {len(found)}")
    return found[0]
