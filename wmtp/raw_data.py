"""data/raw: folders in their sources' own layouts, brought there by fetch-data and read as records by prepare.

    codecontests/  problems.jsonl[.gz], solutions.jsonl[.gz]        humaneval/          HumanEval.jsonl[.gz]
    functions/     problems.jsonl[.gz], solutions.jsonl[.gz]        mbpp/               mbpp.jsonl[.gz]
                                                                    codecontests_test/  problems.jsonl[.gz], solutions.jsonl[.gz]

The first two benchmarks must be there, the third may, and at least one of the first two folders, or MBPP's training part, gives something
to train on.
"""

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from wmtp import problems
from wmtp.layouts import data_file
from wmtp.records import Problem, RecordError, Solution

FOLDERS = ("codecontests", "functions", "humaneval", "mbpp", "codecontests_test")


class Corpus(NamedTuple):
    """Problems that may be trained on, their programs by task, the benchmarks that are held out, and what was dropped by reason.

    `alternatives`: right programs of a benchmark's problem beside its reference, by task.
    """

    training: list[Problem]
    solutions: dict[str, list[Solution]]
    benchmarks: dict[str, list[Problem]]
    dropped: Counter[str]
    alternatives: dict[str, list[str]]


def copy_folders(path: Path, folders: Mapping[str, str | None], out: Path) -> dict[str, int]:
    """The named folders of `path` as out/codecontests and so on, once every line of them has been read as a record.

    A fault is told by the caller's own file, and nothing is copied: DVC does not see a folder from outside change, so what was copied
    once with a bad line would stay when that line is mended.
    """
    wanted = {name: path / folder for name, folder in folders.items() if folder is not None}
    for name, folder in wanted.items():
        if not folder.is_dir():
            raise RecordError(f"{folder}: no such folder; source.data.path and source.data.folders.{name} should lead to the {name} files")
    found = {}
    for name, folder in wanted.items():
        found[name] = files = [file for file in sorted(folder.iterdir()) if file.name.endswith((".jsonl", ".jsonl.gz"))]
        if not files:
            raise RecordError(f"{folder}: no .jsonl or .jsonl.gz file there; source.data.folders.{name} should name the {name} files")
    read(wanted)
    counts = {}
    for name, files in found.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copyfile(file, out / name / file.name)
        counts[name] = len(files)
    return counts


def read_raw(raw: Path) -> Corpus:
    """Every folder of data/raw as records; see `read`."""
    return read({name: raw / name for name in FOLDERS})


def read(folders: Mapping[str, Path]) -> Corpus:
    """Folders by name as records; MBPP's test part is a benchmark, its training part is trained on, its other parts are left out."""
    if absent := [name for name in ("humaneval", "mbpp") if name not in folders]:
        raise RecordError(f"source.data.folders.{absent[0]}: expected a folder, since evaluation needs the benchmark; found null")
    training: list[Problem] = []
    solutions: dict[str, list[Solution]] = {}
    dropped: Counter[str] = Counter()
    for name, reader in (("codecontests", problems.read_codecontests), ("functions", problems.read_functions)):
        if name in folders and folders[name].is_dir():
            found, programs, reasons = reader(folders[name])
            training += found
            dropped.update({f"{name}: {reason}": count for reason, count in reasons.items()})
            for program in programs:
                solutions.setdefault(program.task_id, []).append(program)
    mbpp = problems.read_mbpp(data_file(folders["mbpp"], "mbpp"))
    for problem in mbpp:
        if problems.mbpp_split(problem) == "train":
            training.append(problem)
            solutions[problem.task_id] = [
                Solution(task_id=problem.task_id, solution_id=f"{problem.task_id}/reference", program=problem.reference, is_correct=True,
                         origin="reference")
            ]  # fmt: skip
    benchmarks = {
        "humaneval": problems.read_humaneval(data_file(folders["humaneval"], "HumanEval")),
        "mbpp": [problem for problem in mbpp if problems.mbpp_split(problem) == "test"],
    }
    alternatives: dict[str, list[str]] = {}
    if "codecontests_test" in folders and folders["codecontests_test"].is_dir():
        benchmarks["codecontests"], alternatives, reasons = problems.read_contest_benchmark(folders["codecontests_test"])
        dropped.update({f"codecontests_test: {reason}": count for reason, count in reasons.items()})
    return Corpus(training, solutions, benchmarks, dropped, alternatives)
