"""Records to tokenised Arrow data sets: prompt template, response spans, lengths, and the manifest that later stages check.

A row is one program: prompt_ids + response_ids + [eos], built side by side, so that the prompt's length is never guessed by
tokenising twice.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from wmtp.atomic import atomic_directory, one_line
from wmtp.protocols import instruction_of, render_prompt
from wmtp.records import Problem, Solution, sha256_file, write_text

AGAIN = "make it again: dvc repro --single-item --force prepare-and-validate-datasets"


class TokenError(ValueError):
    """Text that does not survive its tokenizer, or token data that is not what its manifest says."""


class Tokenizer:
    """SentencePiece as Llama uses it. `decode(prompt + response)` gives the text back exactly, dummy prefix or not."""

    def __init__(self, bundle: str | Path):
        import sentencepiece

        self.path = Path(bundle) / "tokenizer.model"
        if not self.path.is_file():
            raise TokenError(f"{self.path}: no tokenizer there; run the stage that makes {bundle} (dvc repro)")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as error:
            raise TokenError(f"{self.path}: not a readable SentencePiece model: {one_line(error)}; get it again") from None
        self.sha256 = sha256_file(self.path)
        self.bos, self.eos = self.pieces.bos_id(), self.pieces.eos_id()
        self._newline = self.pieces.encode("\n")

    def __len__(self) -> int:
        return self.pieces.vocab_size()

    def encode_prompt(self, prompt: str) -> list[int]:
        """BOS and the prompt, which must end in a newline so that the response starts a line of its own."""
        return [self.bos, *self.pieces.encode(prompt)]

    def encode_response(self, response: str) -> list[int]:
        """The response as it stands after a newline: a tokenizer with a dummy prefix would otherwise add a space before it."""
        ids = self.pieces.encode("\n" + response)
        n = len(self._newline)
        if ids[:n] != self._newline:
            raise TokenError(f"{self.path}: merges a newline with the text after it; prompt and response cannot be told apart")
        return ids[n:]

    def decode_response(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
        """The response's text, its leading white space kept; end-of-text and padding must be cut off before."""
        newline = self.pieces.decode(self._newline)
        return self.pieces.decode([*self._newline, *response_ids])[len(newline) :]


@dataclass(frozen=True)
class Row:
    """One tokenised program; `response_start` is P, the last id is EOS at L. `span` = tokens of the known difference, or (-1, -1)."""

    input_ids: list[int]
    response_start: int
    is_correct: bool
    problem: int
    solution_id: str
    span: tuple[int, int]


def encode_row(tokenizer: Tokenizer, problem: Problem, index: int, solution: Solution, template: str) -> Row:
    prompt = render_prompt(*instruction_of(problem), template)
    prompt_ids, response_ids = tokenizer.encode_prompt(prompt), tokenizer.encode_response(solution.program)
    if tokenizer.pieces.decode(prompt_ids[1:] + response_ids) != prompt + solution.program:
        raise TokenError(f"{solution.solution_id}: text does not survive {tokenizer.path}: {(prompt + solution.program)[:80]!r}...")
    span = (-1, -1) if solution.span is None else _token_span(tokenizer, response_ids, solution.span, len(prompt_ids))
    return Row([*prompt_ids, *response_ids, tokenizer.eos], len(prompt_ids), solution.is_correct, index, solution.solution_id, span)


def encode_split(
    tokenizer: Tokenizer, problems: Sequence[Problem], solutions: dict[str, list[Solution]], template: str, max_length: int
) -> tuple[list[Row], dict[str, int]]:
    """Rows of a split in the problems' order, and how many programs were shortened or dropped, by reason."""
    rows, counts = [], Counter()
    for index, problem in enumerate(problems):
        for solution in solutions.get(problem.task_id, []):
            row = encode_row(tokenizer, problem, index, solution, template)
            if len(row.input_ids) > max_length:
                row = _shortened(tokenizer, problem, index, solution, template, len(row.input_ids) - max_length)
                counts["statement shortened"] += len(row.input_ids) <= max_length
            if len(row.input_ids) > max_length:
                counts["dropped: longer than data.max_length"] += 1
            else:
                rows.append(row)
    return rows, dict(sorted(counts.items()))


def _shortened(tokenizer: Tokenizer, problem: Problem, index: int, solution: Solution, template: str, excess: int) -> Row:
    """The row with its statement cut from the end by at least `excess` tokens, as far as there is statement to cut."""
    pieces = tokenizer.pieces.encode(problem.statement)
    # A few tokens more than the excess: a cut text may be encoded in more pieces than its part of the whole was.
    kept = tokenizer.pieces.decode(pieces[: max(1, len(pieces) - excess - 4)]).rstrip("\N{REPLACEMENT CHARACTER}")
    return encode_row(tokenizer, problem.model_copy(update={"statement": kept}), index, solution, template)


def _token_span(tokenizer: Tokenizer, response_ids: list[int], span: tuple[int, int], offset: int) -> tuple[int, int]:
    """Characters [start, end) of the response to token positions [first, last) of the row."""
    # Lengths of decoded prefixes are exact where token boundaries split no multi-byte character, which holds for ASCII spans.
    ends = [len(tokenizer.decode_response((), response_ids[: i + 1])) for i in range(len(response_ids))]
    first = next(i for i, end in enumerate(ends) if end > span[0])
    last = next((i for i, end in enumerate(ends) if end >= span[1]), len(ends) - 1)
    return offset + first, offset + last + 1


def write_split(path: Path, rows: list[Row], problems: list[Problem]) -> dict[str, Any]:
    """An Arrow data set of rows and, beside it, the problem index; returns counts for the report. Equal rows give equal bytes.

    `row.problem` numbers `problems`; on disk a problem is its place in the index, which holds only those that have rows.
    """
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    by_problem: dict[int, dict[str, list[int]]] = {p: {"correct": [], "incorrect": []} for p in sorted({row.problem for row in rows})}
    for number, row in enumerate(rows):
        by_problem[row.problem]["correct" if row.is_correct else "incorrect"].append(number)
    place = {p: n for n, p in enumerate(by_problem)}
    table = pa.table({
        "input_ids": pa.array([row.input_ids for row in rows], pa.list_(pa.int32())),
        "response_start": pa.array([row.response_start for row in rows], pa.int32()),
        "length": pa.array([len(row.input_ids) for row in rows], pa.int32()),
        "is_correct": pa.array([row.is_correct for row in rows], pa.bool_()),
        "problem": pa.array([place[row.problem] for row in rows], pa.int32()),
        "solution_id": pa.array([row.solution_id for row in rows], pa.string()),
        "span_start": pa.array([row.span[0] for row in rows], pa.int32()),
        "span_end": pa.array([row.span[1] for row in rows], pa.int32()),
    })  # fmt: skip
    index = [
        {
            "task_id": problems[p].task_id,
            "source": problems[p].source,
            "group": problems[p].group,
            "difficulty": problems[p].difficulty,
            **found,
        }
        for p, found in by_problem.items()
    ]
    with atomic_directory(path, "problems.json") as partial:
        # A fingerprint of our own: the library's default is random, and DVC would see a change where there is none.
        Dataset(table, fingerprint="wmtp").save_to_disk(str(partial / "rows"))
        write_text(partial / "problems.json", json.dumps(index, indent=0))
    n_correct = sum(row.is_correct for row in rows)
    return {
        "problems": len(index), "correct": n_correct, "incorrect": len(rows) - n_correct, "tokens": sum(len(row.input_ids) for row in rows),
        "longest": max((len(row.input_ids) for row in rows), default=0),
    }  # fmt: skip


def read_rows(folder: Path, expected: int) -> pa.Table:
    """What Dataset.save_to_disk wrote, memory-mapped. Read by pyarrow: importing datasets takes a second of every process.

    TokenError where a file is damaged or the rows are not as many as `expected`: a stream cut between two batches reads as a shorter one.
    """
    file = folder / "state.json"
    try:
        names, tables = [entry["filename"] for entry in _read_json(file)["_data_files"]], []
        for file in (folder / name for name in names):
            tables.append(pa.ipc.open_stream(pa.memory_map(str(file))).read_all())
        rows = pa.concat_tables(tables)
    except (OSError, KeyError, TypeError, pa.ArrowInvalid) as error:
        raise TokenError(f"{file}: damaged or absent: {one_line(error)}; {AGAIN}") from None
    if len(rows) != expected:
        raise TokenError(f"{folder}: expected {expected} rows as in manifest.json, found {len(rows)}; {AGAIN}")
    return rows


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise TokenError(f"{file}: damaged or absent: {one_line(error)}; {AGAIN}") from None


def _numpy(array: pa.Array) -> np.ndarray:
    """Its numbers where they lie; pyarrow's own to_numpy imports pandas."""
    return np.from_dlpack(array)


class TokenData:
    """A split on disk, memory-mapped: only the rows that are asked for are read."""

    def __init__(self, processed: str | Path, split: str):
        self.path = Path(processed) / split
        if not (self.path / "rows").is_dir():
            raise TokenError(f"{self.path}: no token data there; run prepare-and-validate-datasets (dvc repro)")
        file = Path(processed) / "manifest.json"
        self.manifest = _read_json(file)
        try:
            self.tokenizer_sha256: str = self.manifest["tokenizer_sha256"]
            counts = self.manifest["splits"][split]
            self.sha256: str = counts["sha256"]
            n_rows = counts["correct"] + counts["incorrect"]
        except (KeyError, TypeError) as error:
            raise TokenError(f"{file}: expected the hashes and counts of {split}, found no {one_line(error)}; {AGAIN}") from None
        self.problems: list[dict[str, Any]] = _read_json(self.path / "problems.json")
        if not self.problems:
            raise TokenError(f"{self.path}: the split is empty; raise its share in data.splits or add data")
        self.rows = read_rows(self.path / "rows", n_rows)
        self.lengths = self._column("length")
        self.response_start = self._column("response_start")
        self.problem_of = self._column("problem")
        self.is_correct = self._column("is_correct").astype(bool)
        self._spans = np.stack([self._column("span_start"), self._column("span_end")], axis=1)

    def _column(self, name: str) -> np.ndarray:
        column = self.rows.column(name)
        return _numpy((column.cast("uint8") if column.type == "bool" else column).combine_chunks())

    def __len__(self) -> int:
        return len(self.rows)

    def input_ids(self, rows: Sequence[int]) -> list[np.ndarray]:
        column = self.rows.column("input_ids")
        return [_numpy(column[int(row)].values) for row in rows]

    def spans(self) -> np.ndarray:
        """[rows, 2] token positions of the known first difference, -1 where unknown."""
        return self._spans

    def correct_rows(self) -> np.ndarray:
        return np.flatnonzero(self.is_correct)


def write_manifest(processed: Path, tokenizer: Tokenizer, template: str, counts: dict[str, dict[str, Any]]) -> None:
    """What later stages check: the tokenizer's hash, the template, and for each split its counts and one hash over its files.

    Of the splits alone: every training depends on the manifest, and a changed benchmark must not re-run them.
    """
    files = {path: digest for path, digest in file_hashes(processed).items() if path.split("/")[0] in counts}
    manifest: dict[str, Any] = {"tokenizer_sha256": tokenizer.sha256, "vocab_size": len(tokenizer), "template": template, "splits": {}}
    for name, count in counts.items():
        own = {path: digest for path, digest in files.items() if path.startswith(f"{name}/")}
        manifest["splits"][name] = {**count, "sha256": hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()}
    write_text(processed / "manifest.json", json.dumps({**manifest, "files": files}, indent=1, sort_keys=True))


def file_hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def check_same_tokenizer(expected_sha256: str, bundle: str | Path, whose: str) -> Tokenizer:
    """The bundle's tokenizer, which must be the one that made the token data."""
    tokenizer = Tokenizer(bundle)
    if tokenizer.sha256 != expected_sha256:
        raise TokenError(
            f"{tokenizer.path}: {whose}: tokenizer {tokenizer.sha256[:12]}, expected that of the token data, {expected_sha256[:12]};"
            " use a model that shares it, or set data.tokenizer"
        )
    return tokenizer
