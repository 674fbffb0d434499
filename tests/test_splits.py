import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp.records import Problem, StdioTests
from wmtp.splits import SplitError, assign, check_disjoint, without_benchmarks

SHARES = {"warm_up": 0.5, "policy": 0.3, "validation": 0.2}


def problem(task_id, group="g", statement=None, difficulty=None):
    made = {"task_id": task_id, "source": "codecontests", "group": group, "statement": statement or f"statement of {task_id}"}
    return Problem(**made, tests=StdioTests(inputs=["1"], outputs=["1"]), difficulty=difficulty)


def problems(sizes):
    """`sizes[i]` problems of group i, shuffled as they might lie in a file."""
    made = [problem(f"{group}_{i}", f"group {group}") for group, size in enumerate(sizes) for i in range(size)]
    random.Random(0).shuffle(made)
    return made


@settings(deadline=None, max_examples=80)
@given(sizes=st.lists(st.integers(1, 6), min_size=30, max_size=60), seed=st.integers(0, 1000))
def test_parts_are_a_partition_by_group_near_their_shares(sizes, seed):
    made = problems(sizes)
    parts = assign(made, SHARES, seed, None)
    assert list(parts) == list(SHARES)
    assert sorted(p.task_id for part in parts.values() for p in part) == sorted(p.task_id for p in made)
    owners = {}
    for name, part in parts.items():
        for one in part:
            assert owners.setdefault(one.group, name) == name
        # Each of its two borders can be passed by at most one group.
        assert abs(len(part) - SHARES[name] * len(made)) <= 2 * max(sizes)
    check_disjoint(parts, {})


def test_the_seed_decides_and_nothing_else():
    made = problems([2] * 40)
    first = assign(made, SHARES, 1, None)
    assert assign(made, SHARES, 1, None) == first != assign(made, SHARES, 2, None)
    backwards = assign(made[::-1], SHARES, 1, None)
    assert {name: {p.task_id for p in part} for name, part in backwards.items()} == {
        name: {p.task_id for p in part} for name, part in first.items()
    }


def test_at_most_max_problems_the_first_of_the_whole_split():
    made = problems([1] * 40)
    whole, small = assign(made, SHARES, 1, None), assign(made, SHARES, 1, 5)
    assert {name: part[:5] for name, part in whole.items()} == small


def test_harder_problems_are_left_out_of_the_splits_that_have_a_limit_and_of_no_other():
    made = [problem(f"{i}", f"group {i}", difficulty=(1, 2, 3, None)[i % 4]) for i in range(80)]
    whole = assign(made, SHARES, 1, None)
    limited = assign(made, SHARES, 1, None, {"policy": 2, "validation": None})
    assert limited["policy"] == [p for p in whole["policy"] if p.difficulty in (1, 2)] and len(limited["policy"]) < len(whole["policy"])
    assert (limited["warm_up"], limited["validation"]) == (whole["warm_up"], whole["validation"])
    small = assign(made, SHARES, 1, 4, {"policy": 2})
    assert small["policy"] == limited["policy"][:4], "the limit on difficulty comes before the limit on number"


def test_a_split_without_easy_problems_is_an_error():
    made = [problem(f"{i}", f"group {i}", difficulty=3) for i in range(20)]
    with pytest.raises(SplitError, match="split policy is empty"):
        assign(made, SHARES, 1, None, {"policy": 2})


def test_a_split_of_share_zero_is_left_out():
    assert list(assign(problems([1] * 10), {"a": 0.5, "b": 0.0, "c": 0.5}, 0, None)) == ["a", "c"]


@pytest.mark.parametrize("made, groups", [([], 0), ([problem("a"), problem("b")], 1)])
def test_an_empty_split_is_an_error_that_names_it(made, groups):
    with pytest.raises(SplitError, match=rf"split \w+ is empty: {groups} groups are too few for data\.splits\.\w+ = 0\.[235]"):
        assign(made, SHARES, 0, None)


def test_a_group_in_two_splits_is_an_error():
    parts = {"policy": [problem("a", "round 7")], "critic": [problem("b", "round 7")]}
    with pytest.raises(SplitError, match="group round 7 lies in splits policy and critic"):
        check_disjoint(parts, {})


def test_a_benchmark_statement_among_the_training_problems_is_an_error_whatever_its_spacing():
    parts = {"policy": [problem("a", "1", "Add  the\nnumbers.")]}
    with pytest.raises(SplitError, match=r"mbpp problem mbpp/11 is also a training problem \(a\)"):
        check_disjoint(parts, {"mbpp": [problem("mbpp/11", "mbpp/11", " Add the numbers. ")]})


def test_a_benchmark_group_among_the_training_problems_is_an_error():
    parts = {"policy": [problem("a", "shared")]}
    with pytest.raises(SplitError, match="humaneval problem HumanEval/3 is also a training problem"):
        check_disjoint(parts, {"humaneval": [problem("HumanEval/3", "shared")]})


def test_distinct_benchmarks_pass():
    check_disjoint({"policy": [problem("a", "1")], "critic": [problem("b", "2")]}, {"mbpp": [problem("mbpp/11", "mbpp/11")]})


def test_what_repeats_a_benchmark_is_left_out_of_training():
    held_out = {"b": [problem("b/1", "x", "Print   the\nsum."), problem("b/2", "y")]}
    made = [problem("t/1", "z", "Print the sum."), problem("t/2", "y"), problem("t/3", "z")]
    kept = without_benchmarks(made, held_out)
    assert [one.task_id for one in kept] == ["t/3"]
    check_disjoint({"policy": kept}, held_out)
