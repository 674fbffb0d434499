"""The grammar of the micro task: functions over a list of integers, described in words and written as short programs.

A composition is a sequence of operations and a result clause. Each clause is one row of a table that holds its phrase and its Python
expression, so that what a statement says, what a program computes and what a test expects come from one place. A mutation changes one
token-sized thing of a composition and gives another composition of the same grammar; the step is as likely backward as forward, so a
wrong program is no less plausible than a right one to whoever has not read the statement.
"""

import io
import random
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Value = int | bool | list[int]
Form = Literal["humaneval", "mbpp", "contest"]
Family = Literal["aggregate", "transform", "decide"]
FAMILIES: tuple[Family, ...] = ("aggregate", "transform", "decide")


@dataclass(frozen=True, eq=False)
class Group:
    """Clauses that are mistaken for each other: (phrase, expression) rows over the same constants {k}; (0,) where there is none.

    The rows are a grid of `lines` equal lines; a mutation goes to another row of the same line or the same column.
    """

    rows: tuple[tuple[str, str], ...]
    constants: tuple[int, ...] = (0,)
    lines: int = 1
    functions: dict[tuple[int, int], Callable[[list[int]], Value]] = field(default_factory=dict, repr=False)

    @property
    def columns(self) -> int:
        return len(self.rows) // self.lines

    def neighbours(self, row: int) -> list[int]:
        n = self.columns
        return [other for other in range(len(self.rows)) if other != row and (other // n == row // n or other % n == row % n)]


DIGITS = tuple(range(1, 10))
TO_COMPUTE = 0.25  # share of constants that a statement gives as a difference
COMPARISONS = (("above {k}", "> {k}"), ("below {k}", "< {k}"), ("at least {k}", ">= {k}"), ("at most {k}", "<= {k}"))

OPERATIONS = (
    Group(tuple((f"keep what is {words}", f"[x for x in xs if x {test}]") for words, test in COMPARISONS), DIGITS),
    Group((("keep the even numbers", "[x for x in xs if x % 2 == 0]"), ("keep the odd numbers", "[x for x in xs if x % 2 == 1]"))),
    Group(
        (
            ("keep the multiples of {k}", "[x for x in xs if x % {k} == 0]"),
            ("drop the multiples of {k}", "[x for x in xs if x % {k} != 0]"),
        ),
        DIGITS[2:],
    ),
    Group(
        (
            ("add {k} to each", "[x + {k} for x in xs]"),
            ("subtract {k} from each", "[x - {k} for x in xs]"),
            ("multiply each by {k}", "[x * {k} for x in xs]"),
            ("take each modulo {k}", "[x % {k} for x in xs]"),
        ),
        DIGITS[1:],
    ),
    Group(
        (("cap each at {k}", "[min(x, {k}) for x in xs]"), ("raise each to at least {k}", "[max(x, {k}) for x in xs]")),
        DIGITS,
    ),
    Group((("square each", "[x * x for x in xs]"), ("double each", "[x + x for x in xs]"))),
    Group((("take the first {k}", "xs[:{k}]"), ("drop the first {k}", "xs[{k}:]")), DIGITS[:3]),
    Group((("reverse the list", "xs[::-1]"), ("sort the list", "sorted(xs)"))),
)

RESULTS: dict[Family, tuple[Group, ...]] = {
    "aggregate": (
        Group(
            (
                ("the sum", "sum(xs)"),
                ("the length", "len(xs)"),
                ("the largest", "max(xs, default=0)"),
                ("the smallest", "min(xs, default=0)"),
            )
        ),
        Group((("the sum of the distinct values", "sum(set(xs))"), ("the number of distinct values", "len(set(xs))"))),
        Group(tuple((f"how many are {words}", f"sum(x {test} for x in xs)") for words, test in COMPARISONS), DIGITS),
    ),
    "transform": (
        Group((("the list", "xs"),)),
        Group((("the {k} smallest in order", "sorted(xs)[:{k}]"), ("the {k} largest in order", "sorted(xs)[-{k}:]")), DIGITS[1:4]),
        Group((("the list with {k} at the end", "xs + [{k}]"), ("the list with {k} in front", "[{k}] + xs")), DIGITS),
    ),
    "decide": (
        Group(
            tuple(
                (f"whether {words} {comparison}", f"{name}(x {test} for x in xs)")
                for words, name in (("any is", "any"), ("all are", "all"))
                for comparison, test in COMPARISONS
            ),
            DIGITS,
            lines=2,
        ),
        Group((("whether {k} is in it", "{k} in xs"), ("whether {k} is not in it", "{k} not in xs")), DIGITS),
        Group((("whether the sum is even", "sum(xs) % 2 == 0"), ("whether the sum is odd", "sum(xs) % 2 == 1"))),
    ),
}


@dataclass(frozen=True)
class Clause:
    """`wording` is how the statement gives the constant where it does not say it; what the clause means is the same without."""

    group: Group
    row: int
    constant: int
    wording: str = field(default="", compare=False)

    @property
    def phrase(self) -> str:
        return self.group.rows[self.row][0].format(k=self.wording or self.constant)

    @property
    def expression(self) -> str:
        return self.group.rows[self.row][1].format(k=self.constant)


class Composition(NamedTuple):
    operations: tuple[Clause, ...]
    result: Clause

    @property
    def clauses(self) -> tuple[Clause, ...]:
        return (*self.operations, self.result)


class Mutation(NamedTuple):
    """One token-sized change: the name of a function or operator (`operation`), a `constant`, or the `order` of two lines."""

    kind: Literal["operation", "constant", "order"]
    place: int
    composition: Composition


def draw_clause(rng: random.Random, groups: tuple[Group, ...]) -> Clause:
    """A group with probability proportional to its columns, then a row and a constant, each uniformly."""
    group = rng.choices(groups, weights=[group.columns for group in groups])[0]
    row, constant = rng.randrange(len(group.rows)), rng.choice(group.constants)
    computed = len(group.constants) > 1 and rng.random() < TO_COMPUTE
    return Clause(group, row, constant, difference(rng, constant) if computed else "")


def difference(rng: random.Random, constant: int) -> str:
    """For example "(61 - 54)" for 7: two numbers of two digits, the second uniform."""
    smaller = rng.randint(10, 99 - constant)
    return f"({smaller + constant} - {smaller})"


def draw_composition(rng: random.Random, n_operations: int, family: Family) -> Composition:
    return Composition(tuple(draw_clause(rng, OPERATIONS) for _ in range(n_operations)), draw_clause(rng, RESULTS[family]))


def clause_mutants(clause: Clause) -> Iterator[tuple[Literal["operation", "constant"], Clause]]:
    group, row, constant = clause.group, clause.row, clause.constant
    for other in group.neighbours(row):
        yield "operation", Clause(group, other, constant)
    for other in group.constants:
        if other != constant:
            yield "constant", Clause(group, row, other)


def mutations(composition: Composition) -> Iterator[list[Mutation]]:
    """For each place (a clause, or two neighbouring operations) its one-change mutants; a place that has none is left out.

    The order of two equal operations is a place too, though its mutant is the composition itself: without it the number of places,
    and with it the probability of a step, would depend on the direction.
    """
    clauses = composition.clauses
    for place, clause in enumerate(clauses):
        changed = [(kind, (*clauses[:place], other, *clauses[place + 1 :])) for kind, other in clause_mutants(clause)]
        if changed:
            yield [Mutation(kind, place, Composition(new[:-1], new[-1])) for kind, new in changed]
    operations = composition.operations
    for place in range(len(operations) - 1):
        first, second = operations[place : place + 2]
        swapped = Composition((*operations[:place], second, first, *operations[place + 2 :]), composition.result)
        yield [Mutation("order", place, swapped)]


def draw_mutation(rng: random.Random, composition: Composition) -> Mutation:
    """Place, then kind of change, then new value, each uniformly: the reverse step has the same probability. May change nothing."""
    mutants = rng.choice(list(mutations(composition)))
    kind = rng.choice(sorted({mutant.kind for mutant in mutants}))
    return rng.choice([mutant for mutant in mutants if mutant.kind == kind])


def statement(composition: Composition, verb: Literal["return", "print"] = "return") -> str:
    """For example "Keep the even numbers, then add 7 to each, and return the sum."."""
    words = ", then ".join(clause.phrase for clause in composition.operations)
    return f"{words[0].upper()}{words[1:]}, and {verb} {composition.result.phrase}."


def body(composition: Composition) -> str:
    """The lines of `f` below its header, without a newline at the end."""
    lines = [f"xs = {clause.expression}" for clause in composition.operations]
    return "\n".join(f"    {line}" for line in [*lines, f"return {composition.result.expression}"])


def program(composition: Composition, form: Form) -> str:
    """A complete program, without a newline at the end; `contest` reads one line of integers and prints."""
    if form != "contest":
        return f"def f(xs):\n{body(composition)}"
    lines = [f"xs = {clause.expression}" for clause in composition.operations]
    shown = f"*{composition.result.expression}" if is_list(composition.result) else composition.result.expression
    return "\n".join(["xs = list(map(int, input().split()))", *lines, f"print({shown})"])


def is_list(result: Clause) -> bool:
    return result.group in RESULTS["transform"]


def compiled(clause: Clause) -> Callable[[list[int]], Value]:
    """What the clause does; made once for each row and constant of its group and kept there, where a look costs no hash of a clause."""
    key = clause.row, clause.constant
    found = clause.group.functions.get(key)
    if found is None:
        found = clause.group.functions[key] = eval(f"lambda xs: {clause.expression}")  # only expressions of the tables above
    return found


def function(composition: Composition) -> Callable[[list[int]], Value]:
    steps = [compiled(clause) for clause in composition.clauses]

    def run(xs: list[int]) -> Value:
        for step in steps:
            xs = step(xs)
        return xs

    return run


def first_difference(one: str, other: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Characters [start, end) of the first lexical token in which two programs differ, in each of them; ValueError if none does."""
    for (text, *span), (other_text, *other_span) in zip(lexical_tokens(one), lexical_tokens(other)):
        if text != other_text:
            return tuple(span), tuple(other_span)
    raise ValueError("the two programs do not differ in a token that both of them have")


def lexical_tokens(text: str) -> Iterator[tuple[str, int, int]]:
    """(token, start, end) with character offsets, layout tokens left out."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.string.strip():
            yield token.string, starts[token.start[0] - 1] + token.start[1], starts[token.end[0] - 1] + token.end[1]
