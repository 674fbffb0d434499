"""Test cases for a composition: inputs on which it shows what it does, chosen so that they tell it from its one-change mutants."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from wmtp.grammar import Composition, Value, compiled, function, mutations

Case = tuple[list[int], Value]
Trail = list[Value]
"""An input and the value after each clause of a composition, the result last."""

N_CASES = 6
SHORT = 4
LARGEST_VALUE = 999
MAX_SHARE = 0.85
MIN_SHARE = 0.4


def trace(operations: Sequence[Callable[[list[int]], Value]], xs: list[int]) -> list[list[int]] | None:
    """The list before and after each operation (compiled); None if one of them is empty or holds a value beyond LARGEST_VALUE."""
    lists = [xs]
    for operation in operations:
        xs = operation(xs)
        if not acceptable(xs):
            return None
        lists.append(xs)
    return lists


def acceptable(xs: list[int]) -> bool:
    return bool(xs) and min(xs) >= -LARGEST_VALUE and max(xs) <= LARGEST_VALUE


def telling_cases(composition: Composition, inputs: Sequence[list[int]]) -> list[Case]:
    """The inputs that `trace` accepts, with their results; none where the composition is degenerate.

    Degenerate: few such inputs, the first of them not short, an operation that rarely changes its list, a last list that knows one
    value only, or nearly always the same result.
    """
    operations, result = [compiled(operation) for operation in composition.operations], compiled(composition.result)
    cases, changes, seen = [], [], set()
    for left, xs in zip(range(len(inputs) - 1, -1, -1), inputs):
        if lists := trace(operations, xs):
            cases.append((xs, result(lists[-1])))
            changes.append([after != before for before, after in itertools.pairwise(lists)])
            seen.update(lists[-1])
        # Most draws end here, so what cannot be admitted any more is left at once.
        if len(cases) + left < MIN_SHARE * len(inputs) or (cases and len(cases[0][0]) > SHORT):
            return []
    n = len(cases)
    if len(seen) < 2 or min(map(sum, zip(*changes))) < n / 4:
        return []
    commonest = Counter(repr(value) for _, value in cases).most_common(1)[0][1]
    return cases if commonest <= MAX_SHARE * n else []


def agrees(composition: Composition, cases: Iterable[Case]) -> bool:
    run = function(composition)
    return all(run(xs) == value for xs, value in cases)


def one_change_mutants(composition: Composition) -> list[Composition]:
    found = (mutant.composition for place in mutations(composition) for mutant in place)
    return [mutant for mutant in found if mutant != composition]


def separating_cases(composition: Composition, cases: list[Case], probes: Sequence[list[int]] = ()) -> list[Case]:
    """The first case and as many more as it takes, N_CASES at least: every one-change mutant fails one of them.

    A mutant that agrees with the composition on all of `cases` and on all acceptable `probes` is taken to be the same function.
    """
    chosen = trails(composition, [xs for xs, _ in varied_cases(cases)])
    wider = trails(composition, [*(xs for xs, _ in cases), *probes])
    for mutant in one_change_mutants(composition):
        fails = failing(composition, mutant)
        if not any(map(fails, chosen)):
            found = (values for values in wider if fails(values) and all(map(acceptable, values[1:-1])))
            chosen += itertools.islice(found, 1)
    return [(values[0], values[-1]) for values in chosen]


def trails(composition: Composition, inputs: Iterable[list[int]]) -> list[Trail]:
    steps, found = [compiled(clause) for clause in composition.clauses], []
    for xs in inputs:
        values: Trail = [xs]
        for step in steps:
            values.append(xs := step(xs))
        found.append(values)
    return found


def failing(composition: Composition, mutant: Composition) -> Callable[[Trail], bool]:
    """Whether the mutant's result is another one, told from the composition's own trail of an input.

    Only what follows the first changed clause is run, and where the list is the same after the last changed one, so is the result.
    """
    changed = [place for place, (own, other) in enumerate(zip(composition.clauses, mutant.clauses)) if own != other]
    first, after = changed[0], changed[-1] + 1
    steps = [compiled(clause) for clause in mutant.clauses[first:]]
    of_change, rest = steps[: after - first], steps[after - first :]

    def fails(values: Trail) -> bool:
        value = values[first]
        for step in of_change:
            value = step(value)
        if value == values[after]:
            return False
        for step in rest:
            value = step(value)
        return value != values[-1]

    return fails


def varied_cases(cases: list[Case]) -> list[Case]:
    """The first case and then N_CASES - 1 others, from the back, each result in turn, so that no constant passes."""
    by_result: dict[str, list[Case]] = {}
    for case in (cases[0], *reversed(cases[1:])):
        by_result.setdefault(repr(case[1]), []).append(case)
    rounds = itertools.zip_longest(*by_result.values())
    return [case for case in itertools.chain.from_iterable(rounds) if case][:N_CASES]


def covering_cases(composition: Composition, cases: list[Case], limit: int) -> list[Case]:
    """Exactly `limit` cases, the first one among them, that do what `separating_cases` does; none where greedy search finds no such."""
    mutants = [failing(composition, mutant) for mutant in one_change_mutants(composition)]
    killed = [{i for i, fails in enumerate(mutants) if fails(values)} for values in trails(composition, [xs for xs, _ in cases])]
    chosen = [0]
    missing = set().union(*killed) - killed[0]
    while len(chosen) < limit:
        best = max((i for i in range(len(cases)) if i not in chosen), key=lambda i: len(killed[i] & missing))
        chosen.append(best)
        missing -= killed[best]
    found = [cases[i] for i in chosen]
    return found if not missing and len({repr(value) for _, value in found}) > 1 else []
