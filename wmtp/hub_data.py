"""Data sets from the hub, written into data/raw in the layouts that wmtp.raw_data reads.

Ids may also be local folders of parquet or JSON files in the same columns: Hugging Face's `datasets` reads both.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from wmtp.records import RecordError, atomic_path

PYTHON_3 = 3  # in CodeContests: 1 Python 2, 2 C++, 3 Python 3, 4 Java
MAX_PROGRAMS = 20  # of either label from one problem; some have thousands


def download(out: Path, *, codecontests: str, humaneval: str, mbpp: str, max_problems: int | None) -> dict[str, int]:
    """CodeContests' training and test parts, HumanEval and all parts of MBPP; counts of what was written. Streams: memory stays flat."""
    counts = {"codecontests": _write_codecontests(out / "codecontests", rows(codecontests, "train"), max_problems)}
    counts["codecontests_test"] = _write_codecontests(out / "codecontests_test", rows(codecontests, "test"), None, unsolved=True)
    columns = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
    tests = ({name: row[name] for name in columns} for row in rows(humaneval, "test"))
    counts["humaneval"] = _write_lines(out / "humaneval" / "HumanEval.jsonl", tests)
    columns = ("task_id", "text", "code", "test_list", "test_setup_code", "challenge_test_list")
    parts = [row for part in ("prompt", "test", "validation", "train") for row in rows(mbpp, part)]
    tasks = ({name: row[name] for name in columns} for row in sorted(parts, key=lambda row: row["task_id"]))
    return counts | {"mbpp": _write_lines(out / "mbpp" / "mbpp.jsonl", tasks)}


def rows(name: str, part: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    try:
        yield from load_dataset(name, split=part, streaming=True)
    except (FileNotFoundError, ConnectionError) as error:
        raise RecordError(f"data set {name}: {' '.join(str(error).split())}; check the id, the network and HF_TOKEN") from None


def _write_codecontests(folder: Path, problems: Iterable[dict[str, Any]], limit: int | None, unsolved: bool = False) -> int:
    """problems.jsonl and solutions.jsonl; a problem without a Python 3 program of either label is passed over, unless `unsolved`."""
    with atomic_path(folder / "solutions.jsonl") as solutions_path, open(solutions_path, "w") as solutions:

        def kept() -> Iterator[dict[str, Any]]:
            written = 0
            for number, row in enumerate(problems):
                if limit is not None and written >= limit:
                    return
                problem, programs = codecontests_lines(row, number)
                if programs or unsolved:
                    solutions.writelines(json.dumps(program) + "\n" for program in programs)
                    written += 1
                    yield problem

        return _write_lines(folder / "problems.jsonl", kept())


def codecontests_lines(row: dict[str, Any], number: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One problem of DeepMind's CodeContests as the lines of our layout: all its tests, its Python 3 programs of both labels."""
    task_id = f"{row['name']}#{number}"
    tests = [row[kind] for kind in ("public_tests", "private_tests", "generated_tests")]
    problem = {
        "task_id": task_id,
        "name": row["name"],
        "cf_contest_id": row["cf_contest_id"] or None,  # 0 where the problem is not Codeforces's
        "group": None if row["cf_contest_id"] else row["name"],
        "cf_index": row["cf_index"],
        "difficulty": str(row["difficulty"]),
        "tags": list(row["cf_tags"]),
        "instruction": row["description"],
        "test_cases": {"input": [x for t in tests for x in t["input"]], "output": [x for t in tests for x in t["output"]]},
        "checker": "token",
    }
    programs = []
    for kind, is_correct in (("solutions", True), ("incorrect_solutions", False)):
        python = [text for text, language in zip(row[kind]["solution"], row[kind]["language"]) if language == PYTHON_3]
        programs += [
            {
                "task_id": task_id,
                "solution_id": f"{task_id}/{kind}/{i}",
                "output": text,
                "is_correct": is_correct,
                "verified": True,
                "origin": "codecontests",
            }
            for i, text in enumerate(python[:MAX_PROGRAMS])
        ]
    return problem, programs


def _write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> int:
    count = 0
    with atomic_path(path) as temporary, open(temporary, "w") as out:
        for line in lines:
            out.write(json.dumps(line) + "\n")
            count += 1
    return count
