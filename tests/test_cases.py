"""Cases show what a composition does and tell it from its mutants."""

import random

import pytest

from wmtp.cases import LARGEST_VALUE, N_CASES, SHORT, agrees, covering_cases, one_change_mutants, separating_cases, telling_cases, trace
from wmtp.grammar import FAMILIES, OPERATIONS, RESULTS, Clause, Composition, compiled, draw_composition, function


def inputs(n: int, seed: int = 0) -> list[list[int]]:
    """Short lists first, then long ones."""
    rng = random.Random(seed)
    sizes = [3 + i % 2 for i in range(n // 3)] + [5 + i % 4 for i in range(n - n // 3)]
    return [[rng.randint(-3, 14) for _ in range(size)] for size in sizes]


def admitted(n: int, seed: int) -> list[tuple[Composition, list]]:
    rng, found, pool = random.Random(seed), [], inputs(40)
    while len(found) < n:
        composition = draw_composition(rng, rng.randint(1, 3), FAMILIES[len(found) % len(FAMILIES)])
        if cases := telling_cases(composition, pool):
            found.append((composition, cases))
    return found


def composition(*phrases: str) -> Composition:
    groups = (*OPERATIONS, *(group for family in FAMILIES for group in RESULTS[family]))
    clauses = {
        clause.phrase: clause
        for group in groups
        for row in range(len(group.rows))
        for clause in (Clause(group, row, constant) for constant in group.constants)
    }
    *operations, result = (clauses[phrase] for phrase in phrases)
    return Composition(tuple(operations), result)


def stages(whole, xs):
    return trace([compiled(operation) for operation in whole.operations], xs)


def test_stages_are_the_lists_between_the_operations():
    whole = composition("keep the even numbers", "add 7 to each", "the sum")
    assert stages(whole, [1, 2, 4]) == [[1, 2, 4], [2, 4], [9, 11]]
    assert stages(whole, [1, 3]) is None
    assert stages(composition("square each", "the sum"), [32]) is None
    assert stages(composition("square each", "the sum"), [31]) == [[31], [961]]


def test_telling_cases_carry_the_right_result_and_never_an_empty_or_large_stage():
    for whole, cases in admitted(60, seed=1):
        assert len(cases[0][0]) <= SHORT
        for xs, value in cases:
            assert function(whole)(xs) == value
            assert all(values and max(map(abs, values)) <= LARGEST_VALUE for values in stages(whole, xs))


@pytest.mark.parametrize(
    "phrases",
    [
        ("keep what is above 9", "keep what is below 2", "the sum"),
        ("cap each at 9", "cap each at 9", "the list"),
        ("double each", "take each modulo 2", "the list with 3 in front"),
        ("square each", "whether any is above 1"),
    ],
    ids=["always empty", "changes nothing", "one value", "always true"],
)
def test_degenerate_compositions_give_no_cases(phrases):
    assert telling_cases(composition(*phrases), inputs(200, seed=2)) == []


def test_a_composition_that_most_inputs_leave_empty_gives_no_cases():
    whole = composition("keep what is above 9", "the sum")
    telling = [[1, 10 + i, 20] for i in range(5)]
    assert telling_cases(whole, telling + [[1, 2, 3]] * 7) == [(xs, 30 + i) for i, xs in enumerate(telling)]
    assert telling_cases(whole, telling + [[1, 2, 3]] * 8) == []


def test_the_first_input_must_be_short():
    whole = composition("add 2 to each", "the sum")
    pool = inputs(60)
    assert telling_cases(whole, pool) and telling_cases(whole, pool[::-1]) == []


def test_every_mutant_that_differs_on_a_case_or_probe_fails_a_chosen_case():
    probes, separated = inputs(60, seed=3), 0
    for whole, cases in admitted(90, seed=4):
        chosen = separating_cases(whole, cases, probes)
        right = function(whole)
        assert len(chosen) >= N_CASES and chosen[0] == cases[0] and agrees(whole, chosen)
        assert all(stages(whole, xs) for xs, _ in chosen)
        for mutant in one_change_mutants(whole):
            wrong = function(mutant)
            differs = any(wrong(xs) != right(xs) for xs in [xs for xs, _ in cases] + [xs for xs in probes if stages(whole, xs)])
            assert agrees(mutant, chosen) is not differs
            separated += differs
    assert separated > 900


def test_a_probe_that_empties_the_list_is_no_case():
    whole = composition("keep what is above 5", "whether all are at least 2")
    assert (
        not agrees(whole, [([1, 2], False)]) and function(composition("keep what is above 5", "whether any is at least 2"))([1, 2]) is False
    )
    cases = [([6, 7, 8], True), ([6, 3, 9], True)]
    assert [xs for xs, _ in separating_cases(whole, cases, [[1, 2]])] == [[6, 7, 8], [6, 3, 9]]


def test_no_constant_passes():
    for whole, cases in admitted(90, seed=5):
        for chosen in (separating_cases(whole, cases), covering_cases(whole, cases, 3)):
            assert not chosen or len({repr(value) for _, value in chosen}) > 1


def test_covering_cases_are_as_many_as_asked_and_tell_as_much():
    found = [(whole, cases, covering_cases(whole, cases, 3)) for whole, cases in admitted(90, seed=6)]
    assert sum(bool(chosen) for _, _, chosen in found) > 45
    for whole, cases, chosen in found:
        if chosen:
            assert len(chosen) == 3 and chosen[0] == cases[0] and all(case in cases for case in chosen)
            for mutant in one_change_mutants(whole):
                assert agrees(mutant, chosen) == agrees(mutant, cases)


def test_a_cover_that_does_not_exist_is_not_made_up():
    whole = composition("reverse the list", "how many are above 5")
    cases = telling_cases(whole, inputs(200, seed=7))
    assert covering_cases(whole, cases, 1) == [] and covering_cases(whole, cases, 3)
