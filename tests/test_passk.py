"""pass@k against enumeration of all draws, and the error over problems against its formula."""

import itertools
import math
import statistics

import pytest

from wmtp.passk import estimate, pass_at_k, per_problem
from wmtp.records import Verdict


def verdicts(table, verdict_of=lambda passed: "pass" if passed else "fail"):
    return [
        Verdict(task_id=task_id, benchmark="micro", temperature=0.8, sample=sample, verdict=verdict_of(passed))
        for task_id, row in table.items()
        for sample, passed in enumerate(row)
    ]


@pytest.mark.parametrize("n", range(1, 8))
def test_equals_enumeration_of_all_draws(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), rel=1e-15)


def test_large_counts_are_exact():
    product = 1.0
    for i in range(100 - 10 + 1, 101):
        product *= 1 - 10 / i
    assert pass_at_k(100, 10, 10) == pytest.approx(1 - product, rel=1e-12)
    assert pass_at_k(1000, 1, 100) == 0.1
    assert pass_at_k(200, 0, 100) == 0.0
    assert pass_at_k(200, 101, 100) == 1.0


@pytest.mark.parametrize("n, c, k", [(3, 1, 4), (3, 4, 1), (3, -1, 1), (3, 1, 0), (0, 0, 1)])
def test_impossible_counts_raise(n, c, k):
    with pytest.raises(ValueError, match="pass"):
        pass_at_k(n, c, k)


def test_golden_example_with_its_exact_numbers():
    scores = estimate(verdicts({"b": [True, False, False, False], "a": [True, True, True, True], "c": [False] * 4}), [1, 2, 5])
    assert scores == {
        "pass@1": pytest.approx((0.25 + 1 + 0) / 3),
        "pass@1_stderr": pytest.approx(math.sqrt(statistics.variance([0.25, 1, 0]) / 3)),
        "pass@2": pytest.approx((0.5 + 1 + 0) / 3),
        "pass@2_stderr": pytest.approx(math.sqrt(statistics.variance([0.5, 1, 0]) / 3)),
        "n_problems": 3,
        "n_samples": 12,
    }


def test_k_is_left_out_where_any_problem_has_fewer_samples():
    scores = estimate(verdicts({"a": [True] * 10, "b": [True] * 3}), [1, 3, 4, 10])
    assert [key for key in scores if key.startswith("pass@") and "_" not in key] == ["pass@1", "pass@3"]


def test_everything_but_pass_counts_against_the_program():
    for name in ("fail", "error", "timeout", "memory", "output-limit", "crash"):
        rows = verdicts({"a": [True, False]}, lambda passed, name=name: "pass" if passed else name)
        assert estimate(rows, [1])["pass@1"] == 0.5


def test_order_of_verdicts_does_not_matter():
    rows = verdicts({"a": [True, False, True], "b": [False, False, True]})
    assert estimate(rows[::-1], [1, 2]) == estimate(rows, [1, 2])
    assert list(per_problem(rows[::-1])) == ["a", "b"]
    assert per_problem(rows) == {"a": (3, 2), "b": (3, 1)}


def test_one_problem_has_no_spread():
    assert estimate(verdicts({"a": [True, False]}), [1])["pass@1_stderr"] == 0.0


def test_harness_errors_empty_and_mixed_inputs_raise():
    rows = verdicts({"a": [True, False]})
    with pytest.raises(ValueError, match=r"micro a sample 0: the judge itself failed"):
        estimate(verdicts({"a": [True]}, lambda _: "harness-error"), [1])
    with pytest.raises(ValueError, match="got none"):
        estimate([], [1])
    with pytest.raises(ValueError, match="one benchmark at one temperature"):
        estimate([*rows, rows[0].model_copy(update={"temperature": 0.2, "sample": 9})], [1])
    with pytest.raises(ValueError, match="two verdicts"):
        estimate([*rows, rows[0]], [1])
