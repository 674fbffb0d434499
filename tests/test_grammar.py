"""Statements and programs agree by an independent reading of the words; mutations are symmetric; spans are whole tokens."""

import contextlib
import io
import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp.grammar import (
    FAMILIES,
    OPERATIONS,
    RESULTS,
    TO_COMPUTE,
    Clause,
    Composition,
    draw_composition,
    draw_mutation,
    first_difference,
    function,
    lexical_tokens,
    mutations,
    program,
    statement,
)

LISTS = st.lists(st.integers(-30, 60), max_size=8)
COMPARE = {
    "above": lambda x, k: x > k,
    "below": lambda x, k: x < k,
    "at least": lambda x, k: x >= k,
    "at most": lambda x, k: x <= k,
}
CLAUSE = r"(above|below|at least|at most) (\d+)"
# What the words mean, written down without a look at the grammar's expressions.
OPERATION_WORDS = {
    rf"keep what is {CLAUSE}": lambda xs, how, k: [x for x in xs if COMPARE[how](x, int(k))],
    r"keep the even numbers": lambda xs: [x for x in xs if not x & 1],
    r"keep the odd numbers": lambda xs: [x for x in xs if x & 1],
    r"keep the multiples of (\d)": lambda xs, k: [x for x in xs if x == x // int(k) * int(k)],
    r"drop the multiples of (\d)": lambda xs, k: [x for x in xs if x != x // int(k) * int(k)],
    r"add (\d) to each": lambda xs, k: [int(k) + x for x in xs],
    r"subtract (\d) from each": lambda xs, k: [-int(k) + x for x in xs],
    r"multiply each by (\d)": lambda xs, k: [sum([x] * int(k)) for x in xs],
    r"take each modulo (\d)": lambda xs, k: [x - x // int(k) * int(k) for x in xs],
    r"cap each at (\d)": lambda xs, k: [int(k) if x > int(k) else x for x in xs],
    r"raise each to at least (\d)": lambda xs, k: [int(k) if x < int(k) else x for x in xs],
    r"square each": lambda xs: [x**2 for x in xs],
    r"double each": lambda xs: [2 * x for x in xs],
    r"take the first (\d)": lambda xs, k: [x for i, x in enumerate(xs) if i < int(k)],
    r"drop the first (\d)": lambda xs, k: [x for i, x in enumerate(xs) if i >= int(k)],
    r"reverse the list": lambda xs: list(reversed(xs)),
    r"sort the list": lambda xs: list(Counter(xs).elements()) if not xs else sorted(xs, key=lambda x: x),
}
RESULT_WORDS = {
    r"the sum": lambda xs: sum(xs),
    r"the length": lambda xs: sum(1 for _ in xs),
    r"the largest": lambda xs: sorted(xs)[-1] if xs else 0,
    r"the smallest": lambda xs: sorted(xs)[0] if xs else 0,
    r"the sum of the distinct values": lambda xs: sum(Counter(xs)),
    r"the number of distinct values": lambda xs: len(Counter(xs)),
    rf"how many are {CLAUSE}": lambda xs, how, k: len([x for x in xs if COMPARE[how](x, int(k))]),
    r"the list": lambda xs: xs,
    r"the (\d) smallest in order": lambda xs, k: [x for i, x in enumerate(sorted(xs)) if i < int(k)],
    r"the (\d) largest in order": lambda xs, k: sorted(sorted(xs, reverse=True)[: int(k)]),
    r"the list with (\d) at the end": lambda xs, k: [*xs, int(k)],
    r"the list with (\d) in front": lambda xs, k: [int(k), *xs],
    rf"whether any is {CLAUSE}": lambda xs, how, k: len([x for x in xs if COMPARE[how](x, int(k))]) > 0,
    rf"whether all are {CLAUSE}": lambda xs, how, k: len([x for x in xs if COMPARE[how](x, int(k))]) == len(xs),
    r"whether (\d) is in it": lambda xs, k: xs.count(int(k)) > 0,
    r"whether (\d) is not in it": lambda xs, k: xs.count(int(k)) == 0,
    r"whether the sum is even": lambda xs: not sum(xs) & 1,
    r"whether the sum is odd": lambda xs: bool(sum(xs) & 1),
}


def computed(text: str) -> str:
    """The statement with its differences worked out."""
    return re.sub(r"\((\d\d) - (\d\d)\)", lambda match: str(int(match[1]) - int(match[2])), text)


def by_the_words(text: str, xs: list[int]):
    *operations, result = re.split(r", then |, and return ", computed(text).rstrip("."))
    for words in operations:
        xs = understood(OPERATION_WORDS, words[0].lower() + words[1:], xs)
    return understood(RESULT_WORDS, result, xs)


def understood(table, words: str, xs: list[int]):
    (match, meaning), *others = [(match, f) for pattern, f in table.items() if (match := re.fullmatch(pattern, words))]
    assert not others, words
    return meaning(xs, *match.groups())


def every_clause(groups):
    return [Clause(group, row, constant) for group in groups for row in range(len(group.rows)) for constant in group.constants]


def drawn(n: int, seed: int = 0) -> list[Composition]:
    rng = random.Random(seed)
    return [draw_composition(rng, 1 + i % 3, FAMILIES[i % len(FAMILIES)]) for i in range(n)]


def run_contest(text: str, xs: list[int]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(text, {"input": lambda: " ".join(map(str, xs))})
    return out.getvalue()


@given(xs=LISTS)
def test_every_clause_computes_what_its_words_say(xs):
    for clause in every_clause(OPERATIONS):
        whole = Composition((clause,), Clause(RESULTS["transform"][0], 0, 0))
        assert function(whole)(xs) == by_the_words(statement(whole), xs), statement(whole)
    for family in FAMILIES:
        for clause in every_clause(RESULTS[family]):
            whole = Composition((Clause(OPERATIONS[-1], 0, 0),), clause)
            value = function(whole)(xs)
            assert value == by_the_words(statement(whole), xs), statement(whole)
            assert type(value) is {"aggregate": int, "transform": list, "decide": bool}[family]


@pytest.mark.parametrize("composition", drawn(60, seed=1), ids=statement)
def test_a_program_runs_as_its_statement_reads_in_both_forms(composition):
    rng = random.Random(2)
    namespace = {}
    exec(program(composition, "humaneval"), namespace)
    for _ in range(20):
        xs = [rng.randint(-9, 30) for _ in range(rng.randint(1, 8))]
        expected = by_the_words(statement(composition), xs)
        assert namespace["f"](list(xs)) == expected == function(composition)(xs)
        shown = " ".join(map(str, expected)) if isinstance(expected, list) else str(expected)
        assert run_contest(program(composition, "contest"), xs) == shown + "\n"


def test_some_constants_are_given_as_a_difference_which_the_program_does_not_show():
    clauses = [clause for composition in drawn(3000) for clause in composition.clauses if len(clause.group.constants) > 1]
    worded = [clause for clause in clauses if clause.wording]
    assert abs(len(worded) / len(clauses) - TO_COMPUTE) < 0.03
    for clause in worded:
        assert clause.wording in clause.phrase and clause.wording not in clause.expression
        assert computed(clause.wording) == str(clause.constant)
    assert {clause.constant for clause in worded} == set(range(1, 10))


def test_a_mutant_of_a_worded_clause_has_the_words_of_its_own_constant():
    rng = random.Random(3)
    for composition in drawn(300):
        mutant = draw_mutation(rng, composition)
        changed = [new for new, old in zip(mutant.composition.clauses, composition.clauses) if new != old]
        assert all(not clause.wording or mutant.kind == "order" for clause in changed)


def test_equal_statements_mean_equal_programs_and_the_reverse():
    compositions = drawn(3000)
    statements, programs = {computed(statement(c)) for c in compositions}, {program(c, "mbpp") for c in compositions}
    assert len(statements) == len(programs) == len({(computed(statement(c)), program(c, "mbpp")) for c in compositions})
    assert {program(c, "contest").count("\n") for c in compositions} == {2, 3, 4}


def test_a_statement_in_full():
    def clause(words: str, groups) -> Clause:
        return next(clause for clause in every_clause(groups) if clause.phrase == words)

    operations = clause("keep the even numbers", OPERATIONS), clause("add 7 to each", OPERATIONS)
    composition = Composition(operations, clause("the sum", RESULTS["aggregate"]))
    assert statement(composition) == "Keep the even numbers, then add 7 to each, and return the sum."
    assert statement(composition, "print") == "Keep the even numbers, then add 7 to each, and print the sum."
    lines = ["def f(xs):", "    xs = [x for x in xs if x % 2 == 0]", "    xs = [x + 7 for x in xs]", "    return sum(xs)"]
    assert program(composition, "humaneval") == "\n".join(lines)
    lines = ["xs = list(map(int, input().split()))", "xs = [x for x in xs if x % 2 == 0]", "xs = [x + 7 for x in xs]", "print(sum(xs))"]
    assert program(composition, "contest") == "\n".join(lines)


def step_probabilities(composition: Composition) -> Counter:
    """Probability of each mutant under draw_mutation's rule, by enumeration."""
    chances = Counter()
    places = list(mutations(composition))
    for place in places:
        by_kind = Counter(mutant.kind for mutant in place)
        for mutant in place:
            chances[mutant.composition] += 1 / len(places) / len(by_kind) / by_kind[mutant.kind]
    return chances


@pytest.mark.parametrize("composition", drawn(60, seed=3), ids=statement)
def test_a_mutation_is_as_likely_backward_as_forward(composition):
    chances = step_probabilities(composition)
    assert sum(chances.values()) == pytest.approx(1)
    for mutant, chance in chances.items():
        assert step_probabilities(mutant)[composition] == pytest.approx(chance)
        assert sorted(id(clause.group) for clause in mutant.clauses) == sorted(id(clause.group) for clause in composition.clauses)


def test_mutations_are_drawn_with_these_probabilities():
    composition = drawn(12, seed=4)[-1]
    rng, n = random.Random(5), 8_000
    seen = Counter(draw_mutation(rng, composition).composition for _ in range(n))
    chances = step_probabilities(composition)
    assert set(seen) <= set(chances)
    for mutant, chance in chances.items():
        assert abs(seen[mutant] / n - chance) < 5 * (chance / n) ** 0.5


def test_the_rows_of_a_group_are_drawn_alike():
    group = next(group for group in RESULTS["decide"] if group.lines == 2)
    rng, n = random.Random(6), 20_000
    drawn_clauses = [draw_composition(rng, 1, "decide").result for _ in range(n)]
    rows = Counter(clause.row for clause in drawn_clauses if clause.group is group)
    constants = Counter(clause.constant for clause in drawn_clauses if clause.group is group)
    for counts in (rows, constants):
        expected = sum(counts.values()) / len(counts)
        assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_a_changed_clause_differs_in_one_place_of_its_line():
    for composition in drawn(200, seed=7):
        right = program(composition, "mbpp").splitlines()
        for mutant in (mutant for place in mutations(composition) for mutant in place):
            wrong = program(mutant.composition, "mbpp").splitlines()
            if mutant.composition == composition:
                continue
            changed = [i for i, (line, other) in enumerate(zip(right, wrong)) if line != other]
            at = mutant.place + 1
            assert changed == ([at, at + 1] if mutant.kind == "order" else [at])


def test_any_or_all_and_the_comparison_are_never_changed_at_once():
    group = next(group for group in RESULTS["decide"] if group.lines == 2)
    for row, (_, expression) in enumerate(group.rows):
        tokens = [token for token, _, _ in lexical_tokens(expression.format(k=5))]
        others = [[token for token, _, _ in lexical_tokens(group.rows[other][1].format(k=5))] for other in group.neighbours(row)]
        assert len(others) == 4 and all(sum(a != b for a, b in zip(tokens, other)) == 1 for other in others)


def test_spans_are_the_first_tokens_that_differ():
    for composition in drawn(300, seed=8):
        mutant = draw_mutation(random.Random(9), composition).composition
        if mutant == composition:
            continue
        for form in ("mbpp", "contest"):
            right, wrong = program(composition, form), program(mutant, form)
            (start, end), (other_start, other_end) = first_difference(right, wrong)
            assert start == other_start and right[:start] == wrong[:start]
            assert right[start:end] != wrong[other_start:other_end]
            for text, span in ((right, (start, end)), (wrong, (other_start, other_end))):
                assert span in {(a, b) for _, a, b in lexical_tokens(text)}


def test_spans_of_known_pairs():
    assert first_difference("xs = xs[:3]", "xs = xs[3:]") == ((8, 9), (8, 9))
    assert first_difference("if x > 10:\n  y", "if x >= 10:\n  y") == ((5, 6), (5, 7))
    assert first_difference("a = 12\nb = 3", "a = 12\nb = 45") == ((11, 12), (11, 13))
    with pytest.raises(ValueError, match="do not differ"):
        first_difference("a = 1", "a  =  1")
