"""Test cases for a composition: inputs on which it shows what it does, chosen so that they tell it from its one-change mutants."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from wmtp.grammar import Composition, Value, compiled, function, mutations

Case = tuple[list[int], Value]

N_CASES = 6
SHORT = 4
LARGEST_VALUE = 999
MAX_SHARE = 0.85


def stages(composition: Composition, xs: list[int]) -> list[list[int]] | None:
    """The list before and after each operation; None if one of them is empty or holds a value beyond LARGEST_VALUE."""
    return trace([compiled(operation) for operation in composition.operations], xs)


def trace(operations: Sequence[Callable[[list[int]], Value]], xs: list[int]) -> list[list[int]] | None:
    """As `stages`, of operations that are compiled already."""
    lists = [xs]
    for operation in operations:
        xs = operation(xs)
        if not xs or min(xs) < -LARGEST_VALUE or max(xs) > LARGEST_VALUE:
            return None
        lists.append(xs)
    return lists


def telling_cases(composition: Composition, inputs: Sequence[list[int]]) -> list[Case]:
    """The inputs that `stages` accepts, with their results; none where the composition is degenerate.

    Degenerate: few such inputs, the first of them not short, an operation that rarely changes its list, a last list that knows one
    value only, or nearly always the same result.
    """
    operations, result = [compiled(operation) for operation in composition.operations], compiled(composition.result)
    cases, changes, seen = [], [], set()
    for xs in inputs:
        if lists := trace(operations, xs):
            cases.append((xs, result(lists[-1])))
            changes.append([after != before for before, after in itertools.pairwise(lists)])
            seen.update(lists[-1])
    n = len(cases)
    if n < 0.4 * len(inputs) or len(cases[0][0]) > SHORT or len(seen) < 2 or min(map(sum, zip(*changes))) < n / 4:
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
    chosen, right = varied_cases(cases), function(composition)
    wider = [*cases, *((xs, right(xs)) for xs in probes)]
    for mutant in one_change_mutants(composition):
        if agrees(mutant, chosen):
            wrong = function(mutant)
            found = ((xs, value) for xs, value in wider if wrong(xs) != value and stages(composition, xs))
            chosen += itertools.islice(found, 1)
    return chosen


def varied_cases(cases: list[Case]) -> list[Case]:
    """The first case and then N_CASES - 1 others, from the back, each result in turn, so that no constant passes."""
    by_result: dict[str, list[Case]] = {}
    for case in (cases[0], *reversed(cases[1:])):
        by_result.setdefault(repr(case[1]), []).append(case)
    rounds = itertools.zip_longest(*by_result.values())
    return [case for case in itertools.chain.from_iterable(rounds) if case][:N_CASES]


def covering_cases(composition: Composition, cases: list[Case], limit: int) -> list[Case]:
    """Exactly `limit` cases, the first one among them, that do what `separating_cases` does; none where greedy search finds no such."""
    mutants = [function(mutant) for mutant in one_change_mutants(composition)]
    failing = [{i for i, run in enumerate(mutants) if run(xs) != value} for xs, value in cases]
    chosen = [0]
    missing = set().union(*failing) - failing[0]
    while len(chosen) < limit:
        best = max((i for i in range(len(cases)) if i not in chosen), key=lambda i: len(failing[i] & missing))
        chosen.append(best)
        missing -= failing[best]
    found = [cases[i] for i in chosen]
    return found if not missing and len({repr(value) for _, value in found}) > 1 else []
