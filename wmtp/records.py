"""The line types of every JSONL file that passes between the training and the judging wing.

Files are read strictly (an unknown or missing field is an error that names file and line) and written atomically (temporary name,
fsync, rename), so a file that exists is whole.
"""

import contextlib
import csv
import gzip
import hashlib
import io
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class RecordError(ValueError):
    """A file or line that is not what its contract says; the message names file, line, field and what was found."""


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StdioTests(Record):
    """Input on stdin, output compared by the named checker."""

    kind: Literal["stdio"] = "stdio"
    inputs: list[str]
    outputs: list[str]
    checker: Literal["exact", "token", "token-caseless", "token-float1e-6", "unverified"] = "token"

    @property
    def n_tests(self) -> int:
        return len(self.inputs)


class CallTests(Record):
    """Expressions evaluated after `setup`; `str(value)` must equal `expected`."""

    kind: Literal["calls"] = "calls"
    setup: str = ""
    calls: list[str]
    expected: list[str]

    @property
    def n_tests(self) -> int:
        return len(self.calls)


class AssertTests(Record):
    """MBPP: the program, then `setup`, then each assert statement, in this order."""

    kind: Literal["asserts"] = "asserts"
    setup: str = ""
    asserts: list[str]

    @property
    def n_tests(self) -> int:
        return len(self.asserts)


class CheckTests(Record):
    """HumanEval: `test` defines check(candidate), called with the function named `entry_point`."""

    kind: Literal["check"] = "check"
    test: str
    entry_point: str
    n_tests: ClassVar[int] = 1  # one function, which its first failure ends


Tests = Annotated[StdioTests | CallTests | AssertTests | CheckTests, Field(discriminator="kind")]


class Problem(Record):
    """One task. `group` (contest round, composition) never lies in two splits; `prompt` is the code to be continued, if any."""

    task_id: str
    source: Literal["codecontests", "functions", "mbpp", "humaneval"]
    group: str
    statement: str
    input: str = ""
    prompt: str = ""
    tests: Tests
    reference: str | None = Field(default=None, description="a complete program that should pass, prompt included")
    difficulty: int | None = None


class Solution(Record):
    """A labelled program. `span`: characters [start, end) at which it first differs from its `pair`, where that is known."""

    task_id: str
    solution_id: str
    program: str
    is_correct: bool
    origin: str
    pair: str | None = None
    span: tuple[int, int] | None = Field(default=None, strict=False)


class Completion(Record):
    """What a model wrote. `temperature` 0 is greedy; (task_id, temperature, sample) is unique in a file."""

    task_id: str
    benchmark: str
    temperature: float
    sample: int
    raw: str = Field(description="decoded text as generated, without end-of-text")
    completion: str = Field(description="the text after the protocol's cut")
    truncated: bool = Field(description="the token limit came before an end or a stop")
    ended: bool = Field(description="the model ended the text itself")
    n_tokens: int = Field(description="of the raw text, without its end")
    n_forwards: int = Field(ge=1, description="that chose these tokens and the end, the prompt's own among them")


VERDICTS = ("pass", "fail", "error", "timeout", "memory", "output-limit", "crash", "harness-error")


class Verdict(Record):
    """What became of one completion; `harness-error` says that the judge failed and never counts as a fail."""

    task_id: str
    benchmark: str
    temperature: float
    sample: int
    verdict: Literal["pass", "fail", "error", "timeout", "memory", "output-limit", "crash", "harness-error"]
    detail: str = ""
    tests_passed: float | None = Field(default=None, description="share of the tests; None: those behind the first failure did not run")


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed to `path`, on any error removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None and error.errno:  # a failing write does not say of which file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_jsonl(path: str | Path, records: Iterable[Record]) -> None:
    """One record a line; a name ending in .gz is compressed, with a fixed header so that equal records give equal bytes."""
    with atomic_path(path) as temporary, contextlib.ExitStack() as stack:
        raw = stack.enter_context(open(temporary, "wb"))
        out = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0)) if str(path).endswith(".gz") else raw
        for record in records:
            out.write(record.model_dump_json().encode() + b"\n")


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of each line that is not blank, plain or .gz; an unreadable file is a RecordError."""
    opener, number = gzip.open if str(path).endswith(".gz") else open, 0
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line.decode("utf-8")
    except FileNotFoundError:
        raise RecordError(f"{path}: no such file; correct the path, or run the stage that makes it (dvc repro)") from None
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}:{number}: not a readable JSONL file: {error}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RecordError(f"{path}: not a readable JSONL file: {error} behind line {number}") from None


R = TypeVar("R", bound=Record)


def read_jsonl(path: str | Path, kind: type[R]) -> Iterator[R]:
    for number, line in read_lines(path):
        try:
            yield kind.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "line"
            raise RecordError(f"{path}:{number}: {where}: {first['msg']} (expected a {kind.__name__} line)") from None


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """CSV; numbers in full, None as an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def sha256_file(path: str | Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise RecordError(f"{path}: no such file; correct the path, or run the stage that makes it (dvc repro)") from None
