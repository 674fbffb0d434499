"""Benchmarks as they are scored: problems whose reference fails its own tests are left out, by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wmtp.judge import Limits, self_check
from wmtp.records import Problem


class UnscoredError(ValueError):
    """References that could not be judged, or of which none passes."""


@dataclass(frozen=True)
class Checked:
    """`report`: problems (scored), references_passed, without_reference, and references_failed: the task_ids that are left out."""

    problems: list[Problem]
    report: dict[str, Any]


def checked(name: str, problems: Sequence[Problem], others: Mapping[str, Sequence[str]], limits: Limits, workers: int) -> Checked:
    """The problems of a benchmark with references that pass; a problem whose reference fails tries its other right programs in turn.

    A problem without any stays, unchecked. References have four times the limits of `limits`.
    """
    found, turn = {problem.task_id: problem for problem in problems}, 0
    made = judged(name, problems, limits, workers)
    n_passed, failed = made["n_passed"], set(made["failed"])
    while tries := [found[task_id].model_copy(update={"reference": others[task_id][turn]}) for task_id in sorted(failed)
                    if turn < len(others.get(task_id, ()))]:  # fmt: skip
        again = judged(name, tries, limits, workers)
        better = {problem.task_id: problem for problem in tries if problem.task_id not in again["failed"]}
        found |= better
        n_passed, failed, turn = n_passed + len(better), failed - set(better), turn + 1
    scored = [problem for task_id, problem in found.items() if task_id not in failed]
    if not scored:
        raise UnscoredError(
            f"{name}: no reference of its {len(problems)} problems passes, {min(failed, default='none')} for one; mend the data"
        )
    without = made["n_without_reference"]
    counts = {"problems": len(scored), "references_passed": n_passed, "without_reference": without, "references_failed": sorted(failed)}
    return Checked(scored, counts)


def judged(name: str, problems: Sequence[Problem], limits: Limits, workers: int) -> dict[str, Any]:
    made = self_check(problems, limits, workers)
    if made["harness_errors"]:
        raise UnscoredError(f"{name}: {made['harness_errors']} references could not be judged: {made['harness_detail']}")
    return made
