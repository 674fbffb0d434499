"""Training problems into splits, by group: one contest round or composition never lies in two of them."""

import random
from collections.abc import Mapping, Sequence

from wmtp.records import Problem


class SplitError(ValueError):
    """A split that came out empty, or a problem that lies on both sides of a line that must hold."""


def assign(
    problems: Sequence[Problem],
    shares: Mapping[str, float],
    seed: int,
    max_problems: int | None,
    max_difficulty: Mapping[str, int | None] | None = None,
) -> dict[str, list[Problem]]:
    """Groups in seeded order, cut where the running number of problems passes each share; order within a split is the shuffled one.

    `max_difficulty` leaves harder problems, and those of unknown difficulty, out of the splits that it names.
    """
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(problem.group, []).append(problem)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    parts: dict[str, list[Problem]] = {name: [] for name, share in shares.items() if share > 0}
    names, taken = list(parts), 0
    ends = [sum(shares[name] for name in names[: i + 1]) * len(problems) for i in range(len(names))]
    for group in order:
        place = next((i for i, end in enumerate(ends) if taken < end - 1e-9), len(names) - 1)
        parts[names[place]] += groups[group]
        taken += len(groups[group])
    for name, limit in (max_difficulty or {}).items():
        if limit is not None and name in parts:
            parts[name] = [problem for problem in parts[name] if problem.difficulty is not None and problem.difficulty <= limit]
    for name, part in parts.items():
        if not part:
            raise SplitError(f"split {name} is empty: {len(order)} groups are too few for data.splits.{name} = {shares[name]:g}")
    return {name: part[:max_problems] for name, part in parts.items()}


def without_benchmarks(problems: Sequence[Problem], benchmarks: Mapping[str, Sequence[Problem]]) -> list[Problem]:
    """The problems whose statement and group are no benchmark's: MBPP's training part, for one, repeats a task of its test part."""
    held_out = [problem for benchmark in benchmarks.values() for problem in benchmark]
    statements, groups = {_words(problem) for problem in held_out}, {problem.group for problem in held_out}
    return [problem for problem in problems if _words(problem) not in statements and problem.group not in groups]


def _words(problem: Problem) -> str:
    return " ".join(problem.statement.split())


def check_disjoint(parts: Mapping[str, Sequence[Problem]], benchmarks: Mapping[str, Sequence[Problem]]) -> None:
    """No group in two splits, no benchmark problem's group or exact statement among the training problems."""
    owner: dict[str, str] = {}
    for name, part in parts.items():
        for group in sorted({problem.group for problem in part}):
            if owner.setdefault(group, name) != name:
                raise SplitError(f"group {group} lies in splits {owner[group]} and {name}")
    statements = {_words(problem): problem.task_id for part in parts.values() for problem in part}
    for name, benchmark in benchmarks.items():
        for problem in benchmark:
            if problem.group in owner or _words(problem) in statements:
                twin = statements.get(_words(problem), problem.group)
                raise SplitError(f"{name} problem {problem.task_id} is also a training problem ({twin}); remove it from the training data")
