"""The critic's quality report against counts of pairs, values made by hand and scipy (METHODS, "Critic", quality gate)."""

import json
import math
import signal
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from wmtp import gate as room
from wmtp.gate import Judged, auc, bootstrap_auc, bootstrap_mean, calibration, failures, localisation, pair_accuracy, report

UNREAD = 99.0  # stands at states that judge nothing: before the last prompt token, and at the end of text


def wins(right, wrong):
    return sum((r > w) + 0.5 * (r == w) for r in right for w in wrong) / (len(right) * len(wrong))


def labels(*numbers):
    return np.array(numbers, dtype=bool)


def row(start, *values):
    """A row's values: P = `start`, then v[P-1], v[P], ..., v[L-1]."""
    return np.array([*[UNREAD] * (start - 1), *values, UNREAD], dtype=np.float32)


def judged(rows, start, is_correct, problem=None, span=None):
    n = len(rows)
    problem = np.arange(n) if problem is None else np.array(problem)
    return Judged(rows, np.array(start), labels(*is_correct), problem, np.array(span if span is not None else [(-1, -1)] * n))


def held_out(n_problems=40, seed=0, skill=0.3, noise=0.1, drift=True, lengths=None):
    """A pair a problem; correct rows end `skill` higher on average; lengths 6 to 15 tokens by default, alike within a pair."""
    random = np.random.default_rng(seed)
    rows, is_correct, problem = [], [], []
    for p in range(n_problems):
        for right in (True, False):
            n = 6 + p % 10 if lengths is None else lengths(p, right)
            goal = np.clip(0.5 + (skill if right else -skill) / 2 + noise * random.standard_normal(), 0.01, 0.99)
            path = np.linspace(0.5, goal, n) if drift else np.full(n, goal)
            rows.append(row(3, *path))
            is_correct.append(right)
            problem.append(p)
    return judged(rows, [3] * len(rows), is_correct, problem)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch, request):
    """A fifth of the resamples: no test here hangs on the width of an interval but those that ask for all of them."""
    if "all_resamples" not in request.fixturenames:
        monkeypatch.setattr(room, "BOOTSTRAP", 200)


@pytest.fixture
def all_resamples():
    """Marks a test that needs the intervals as they are in the report."""


def gate(part, min_delta_std=0.001, confidence=0.95, seed=3):
    return report(part, confidence=confidence, min_delta_std=min_delta_std, seed=seed)


@contextmanager
def at_most(seconds=1.0):
    """An endless loop fails its test instead of stopping the session."""

    def stop(*_):
        raise TimeoutError(f"still running after {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# --- discrimination ----------------------------------------------------------------------------------------------------------------

scored = st.lists(
    st.tuples(st.one_of(st.integers(0, 3).map(float), st.floats(0, 1, width=32)), st.booleans()), min_size=2, max_size=30
).filter(lambda rows: len({label for _, label in rows}) == 2)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=scored)
def test_auc_counts_pairs_and_is_the_mann_whitney_statistic(rows):
    score, label = np.array([s for s, _ in rows]), labels(*(x for _, x in rows))
    right, wrong = score[label], score[~label]
    assert auc(score, label) == pytest.approx(wins(right, wrong), abs=1e-12)
    assert auc(score, label) == pytest.approx(mannwhitneyu(right, wrong).statistic / (len(right) * len(wrong)), abs=1e-12)
    assert auc(-score, label) == pytest.approx(1 - auc(score, label), abs=1e-12)


def test_auc_at_its_ends():
    label = labels(1, 1, 0, 0)
    assert auc(np.array([3, 2, 1, 0]), label) == 1 and auc(np.array([0, 1, 2, 3]), label) == 0
    assert auc(np.array([5, 5, 5, 5]), label) == 0.5 and auc(np.array([2.0, 1.0, 1.0, 0.0]), label) == 0.875


@pytest.mark.parametrize("right", [True, False])
def test_auc_needs_rows_of_both_kinds(right):
    with pytest.raises(ValueError, match="rows of both kinds, found"):
        auc(np.array([0.1, 0.2]), labels(right, right))


@pytest.mark.parametrize("right", [True, False])
def test_rows_of_one_kind_are_an_error_everywhere_and_never_an_endless_search(right):
    score, label = np.array([0.1, 0.2]), labels(right, right)
    with at_most(), pytest.raises(ValueError, match="rows of both kinds, found"):
        bootstrap_auc(score, label, np.arange(2), 0.95, 0)
    with at_most(), pytest.raises(ValueError, match="rows of both kinds, found"):
        gate(judged([row(2, 0.5, 0.6), row(2, 0.5, 0.7)], [2, 2], [right, right]))


def noisy(n=60, seed=1):
    random = np.random.default_rng(seed)
    label = np.arange(n) % 2 == 0
    return label + random.standard_normal(n), label, np.arange(n) // 2


def test_the_interval_holds_the_estimate_and_widens_with_confidence():
    score, label, problem = noisy()
    intervals = [bootstrap_auc(score, label, problem, confidence, 5) for confidence in (0.5, 0.8, 0.95, 0.99)]
    for low, high in intervals:
        assert 0 <= low < auc(score, label) < high <= 1
    assert all(wide[0] < narrow[0] and wide[1] > narrow[1] for narrow, wide in pairwise(intervals))


def test_the_interval_has_the_width_of_the_sampling_error(all_resamples):
    score, label, problem = noisy(400)
    # Independent rows: the variance of Hanley and McNeil (1982) holds.
    a = auc(score, label)
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = math.sqrt((a * (1 - a) + 199 * (q1 - a * a) + 199 * (q2 - a * a)) / 200**2)
    low, high = bootstrap_auc(score, label, problem, 0.95, 0)
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.15)


def test_problems_are_resampled_with_all_their_rows():
    """Ten copies of every row of a problem say nothing new: the interval stays to the bit."""
    score, label, problem = noisy()
    once, often = (bootstrap_auc(*(np.repeat(x, n) for x in (score, label, problem)), 0.95, 7) for n in (1, 10))
    assert once == often
    assert once != bootstrap_auc(score, label, problem, 0.95, 8) and once == bootstrap_auc(score, label, problem, 0.95, 7)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(rows=scored, n_problems=st.integers(1, 4))
def test_pair_accuracy_counts_pairs_within_a_problem(rows, n_problems):
    score, label = np.array([s for s, _ in rows]), labels(*(x for _, x in rows))
    problem = np.arange(len(rows)) % n_problems
    found = []
    for p in range(n_problems):
        right, wrong = score[(problem == p) & label], score[(problem == p) & ~label]
        found += [wins(right, wrong)] if len(right) and len(wrong) else []
    accuracy = pair_accuracy(score, label, problem)
    assert accuracy == pytest.approx(math.fsum(found) / len(found), abs=1e-12) if found else math.isnan(accuracy)


def test_a_critic_that_knows_only_the_problem_orders_no_pair():
    problem, label = np.array([0, 0, 0, 1, 1, 1]), labels(1, 1, 0, 1, 0, 0)
    score = np.where(problem == 0, 0.9, 0.1)
    assert auc(score, label) > 0.6 and pair_accuracy(score, label, problem) == 0.5


# --- calibration -------------------------------------------------------------------------------------------------------------------


def test_calibration_by_hand():
    score, label = np.array([0.05, 0.02, 0.5, 0.55, 0.59, 1.0, 0.95]), labels(0, 1, 1, 1, 0, 1, 1)
    bins = calibration(score, label)
    assert [b["n"] for b in bins] == [2, 3, 2]
    assert [b["predicted"] for b in bins] == pytest.approx([0.035, 1.64 / 3, 0.975])
    assert [b["observed"] for b in bins] == pytest.approx([0.5, 2 / 3, 1.0])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(rows=st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=40))
def test_bins_hold_every_row_once(rows):
    score, label = np.array([s for s, _ in rows]), labels(*(x for _, x in rows))
    bins = calibration(score, label)
    assert sum(b["n"] for b in bins) == len(rows) and all(b["n"] > 0 for b in bins)
    assert sum(b["n"] * b["predicted"] for b in bins) == pytest.approx(float(score.sum()), abs=1e-5)
    assert sum(b["n"] * b["observed"] for b in bins) == pytest.approx(int(label.sum()))
    assert all(0.1 * k - 1e-6 <= b["predicted"] <= 0.1 * (k + 1) + 1e-6 for b in bins for k in [min(int(b["predicted"] * 10 + 1e-6), 9)])


# --- values along a program --------------------------------------------------------------------------------------------------------


def test_shares_of_a_program_run_from_the_prompt_to_the_last_judged_state():
    part = judged([row(4, 0.0, 0.25, 0.5, 0.75, 1.0), row(1, 0.0, 0.5, 1.0)], [4, 1], [1, 0])
    for share, expected in ((0.0, [0, 0]), (0.25, [0.25, 0]), (0.5, [0.5, 0.5]), (0.75, [0.75, 1]), (1.0, [1, 1])):
        assert part.at_share(share).tolist() == expected


def test_differences_are_those_of_the_response_before_the_end_of_text():
    part = judged([row(4, 0.5, 0.75, 0.25), row(1, 0.5), row(2, 0.25, 1.0)], [4, 1, 2], [1, 0, 1])
    assert [delta.tolist() for delta in part.deltas()] == [[0.25, -0.5], [], [0.75]]
    assert all(delta.dtype == np.float64 for delta in part.deltas())


@pytest.mark.parametrize("drop, hit", [(3, False), (4, True), (5, True), (6, True), (7, True), (8, False)])
def test_a_drop_within_one_token_of_the_fault_is_a_hit(drop, hit):
    """P = 2, tokens 2..11, a fault in tokens [5, 7): tokens 4 to 7 are within one of it."""
    values = np.linspace(0.9, 0.8, 10)
    values[drop - 1 :] -= 0.4
    found = localisation(judged([row(2, *values)], [2], [0], span=[(5, 7)]))
    # v[1]..v[10] are judged, so tokens 2..10 have differences: nine places, four of them near.
    assert (found.hit.tolist(), found.chance.tolist()) == ([float(hit)], [pytest.approx(4 / 9)])


def test_chance_is_less_at_the_edges_and_shares_are_over_programs():
    falling = row(2, 0.9, 0.1, 0.1, 0.1, 0.1)  # tokens 2..5; the drop is at token 2
    part = judged([falling, falling, falling], [2, 2, 2], [0, 0, 0], span=[(2, 3), (5, 6), (4, 5)])
    figures = localisation(part).figures(0.95, 0)
    assert figures["bug_localisation"] == pytest.approx(1 / 3) and figures["n_bugs"] == 3
    assert figures["bug_localisation_by_chance"] == pytest.approx((2 / 4 + 2 / 4 + 3 / 4) / 3)


def test_the_largest_drop_is_the_lowest_difference_not_the_largest_change():
    values = row(2, 0.2, 0.9, 0.9, 0.6, 0.6)  # rises by 0.7 at token 2, falls by 0.3 at token 4
    assert localisation(judged([values], [2], [0], span=[(4, 5)])).hit == [1]


def test_right_programs_unknown_faults_and_the_end_of_text_are_left_out():
    values = np.array([UNREAD, 0.5, 0.4, 0.1, 0.1, -50.0], dtype=np.float32)
    part = judged([values] * 3, [2] * 3, [1, 0, 0], span=[(3, 4), (-1, -1), (3, 4)])
    found = localisation(part)
    assert (found.hit.tolist(), found.chance.tolist(), found.problem.tolist()) == ([1.0], [1.0], [2])
    nothing = localisation(judged([values], [2], [1], span=[(3, 4)])).figures(0.95, 0)
    assert nothing.pop("n_bugs") == 0 and all(math.isnan(value) for value in nothing.values())


# --- the gate ----------------------------------------------------------------------------------------------------------------------


def test_a_critic_that_tells_programs_apart_passes():
    figures = gate(held_out(skill=0.4))
    assert figures["passed"] is True
    assert 0.5 < figures["auc_low"] < figures["auc"] <= figures["auc_high"] and figures["pair_accuracy"] > 0.8


@pytest.mark.parametrize("seed", range(4))
def test_a_critic_that_guesses_fails(seed):
    figures = gate(held_out(skill=0.0, seed=seed))
    assert figures["passed"] is False and figures["auc_low"] <= 0.5


def test_a_constant_critic_fails():
    figures = gate(held_out(skill=0.0, noise=0.0))
    assert figures["passed"] is False and (figures["auc_low"], figures["auc"], figures["auc_high"]) == (0.5, 0.5, 0.5)


def test_values_that_do_not_move_along_a_program_fail_however_well_they_tell_programs_apart():
    frozen = held_out(skill=0.8, noise=0.01, drift=False)
    figures = gate(frozen)
    assert figures["auc_low"] == 1 and figures["delta_std"] < 1e-6 and figures["passed"] is False
    assert gate(frozen, min_delta_std=0.0)["passed"] is True


def test_the_floor_of_movement_is_met_by_equality():
    part = held_out(skill=0.4)
    spread = gate(part)["delta_std"]
    assert gate(part, min_delta_std=spread)["passed"] is True
    assert gate(part, min_delta_std=spread * 1.001)["passed"] is False


@pytest.mark.parametrize("longer_is_right", [True, False])
def test_a_critic_no_better_than_length_fails_whichever_way_length_points(longer_is_right):
    part = held_out(skill=0.4, lengths=lambda p, right: 6 + p % 5 + 8 * (right == longer_is_right))
    figures = gate(part)
    assert figures["length_auc"] == 1 and figures["auc_low"] > 0.5 and figures["passed"] is False


def test_the_length_that_counts_is_the_response_without_its_prompt():
    """Prompts of very different lengths, responses that are all alike."""
    rows, start = [], []
    for p in range(20):
        for right in (True, False):
            start.append(20 if right else 2)
            rows.append(row(start[-1], *np.linspace(0.5, 0.8 if right else 0.2, 8 + p % 3)))
    figures = gate(judged(rows, start, [1, 0] * 20, np.arange(40) // 2))
    assert figures["length_auc"] == 0.5 and figures["passed"] is True


def test_the_lower_end_of_the_interval_decides_not_the_estimate():
    few = held_out(n_problems=6, skill=0.06, seed=0)
    figures = gate(few)
    assert figures["auc"] > max(0.5, figures["length_auc"]) >= figures["auc_low"] and figures["passed"] is False


def test_every_figure_by_hand():
    rows = [row(2, 0.5, 0.6, 0.9), row(2, 0.5, 0.5, 0.2), row(3, 0.4, 0.4, 0.6, 0.7), row(3, 0.6, 0.8, 0.2, 0.3)]
    part = judged(rows, [2, 2, 3, 3], [1, 0, 1, 0], [0, 0, 1, 1], [(-1, -1), (3, 4), (-1, -1), (4, 5)])
    figures = gate(part)
    end, correct = np.array([0.9, 0.2, 0.7, 0.3]), np.array([1, 0, 1, 0])
    deltas = [0.1, 0.3, 0.0, -0.3, 0.0, 0.2, 0.1, 0.2, -0.6, 0.1]
    expected = {
        "auc": 1.0,
        "auc_low": 1.0,
        "auc_high": 1.0,
        "length_auc": 0.5,
        "prompt_auc": wins([0.5, 0.4], [0.5, 0.6]),
        # A quarter of two steps is none, of three steps one; half of two is one, of three two; three quarters round to two.
        "auc_at_25": wins([0.5, 0.4], [0.5, 0.8]),
        "auc_at_50": wins([0.6, 0.6], [0.5, 0.2]),
        "auc_at_75": wins([0.9, 0.6], [0.2, 0.2]),
        "auc_at_100": 1.0,
        "pair_accuracy": 1.0,
        "brier": float(((end - correct) ** 2).mean()),
        "calibration_error": (0.1 + 0.2 + 0.3 + 0.3) / 4,
        "delta_std": float(np.std(deltas)),
        "bug_localisation": 1.0,
        "bug_localisation_low": 1.0,
        "bug_localisation_high": 1.0,
        "bug_localisation_by_chance": 1.0,
        "n_bugs": 2,
        "n_programs": 4,
        "passed": True,
    }
    assert figures == {key: pytest.approx(value, abs=1e-6) for key, value in expected.items()}


def test_figures_are_plain_numbers_that_json_can_hold_where_nothing_is_known_too():
    figures = gate(held_out(n_problems=8))
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert figures["bug_localisation"] is None and figures["bug_localisation_by_chance"] is None and figures["n_bugs"] == 0


def test_equal_seeds_give_equal_reports():
    part = held_out(skill=0.1)
    assert gate(part) == gate(part) and gate(part, seed=4) != gate(part)


@pytest.mark.parametrize("content", [0.0, -1e3, math.nan])
def test_states_that_judge_nothing_change_no_figure(content):
    part = held_out(skill=0.2)
    other = [np.where(values == UNREAD, np.float32(content), values) for values in part.values]
    assert gate(Judged(other, part.start, part.is_correct, part.problem, part.span)) == gate(part)


@pytest.mark.parametrize("everywhere", [True, False])
def test_values_that_are_no_numbers_never_pass(everywhere):
    part = held_out(skill=0.4)
    for values in part.values if everywhere else part.values[:1]:
        values[4] = math.nan
    assert gate(part)["passed"] is False


@pytest.mark.parametrize("seed", range(3))
def test_a_dead_critic_fails_and_the_reasons_are_named(seed):
    random = np.random.default_rng(seed)
    alive = held_out(skill=0.4)
    dead = [np.where(v == UNREAD, UNREAD, 0.5 + 1e-4 * random.standard_normal(len(v))).astype(np.float32) for v in alive.values]
    figures = gate(replace(alive, values=dead), min_delta_std=0.01)
    assert figures["passed"] is False
    *_, still = failures(figures, 0.01)
    assert "values hardly move" in still and "0.00014, under the floor of 0.01" in still
    (low,) = failures(figures | {"auc_low": 0.45}, 0.0)
    assert low == "the lower end of the AUC's interval is 0.450, not above chance (0.5) and length alone (0.500)"
    assert failures(gate(alive), 0.001) == []


def test_a_figure_that_is_not_known_is_a_reason_to_fail():
    assert len(failures({"auc_low": None, "length_auc": None, "delta_std": None}, 0.0)) == 2
    assert len(failures({"auc_low": math.nan, "length_auc": 0.5, "delta_std": math.nan}, 0.0)) == 2


def test_the_prompt_alone_is_measured_by_the_value_before_the_program():
    """Prompts that give the label away, programs that add nothing."""
    rows = [row(3, v, *[v + 0.01 * k for k in range(4)]) for v in (0.9, 0.1, 0.8, 0.2, 0.7, 0.3)]
    figures = gate(judged(rows, [3] * 6, [1, 0] * 3, [0, 0, 1, 1, 2, 2]))
    assert figures["prompt_auc"] == 1 and gate(held_out(skill=0.5))["prompt_auc"] == 0.5


# --- the interval of a mean --------------------------------------------------------------------------------------------------------


def test_the_interval_of_the_localisation_has_the_width_of_its_sampling_error(all_resamples):
    random = np.random.default_rng(1)
    hit = (random.random(400) < 0.3).astype(float)
    low, high = bootstrap_mean(hit, np.arange(400), 0.95, 0)
    width = 2 * 1.96 * math.sqrt(hit.mean() * (1 - hit.mean()) / 400)
    assert low < hit.mean() < high and high - low == pytest.approx(width, rel=0.15)


def test_programs_of_one_problem_are_resampled_together(all_resamples):
    """Four equal programs a problem tell no more than one."""
    hit = (np.random.default_rng(2).random(100) < 0.5).astype(float)
    alone, together = (bootstrap_mean(np.repeat(hit, n), np.repeat(np.arange(100), n), 0.95, 0) for n in (1, 4))
    assert together == pytest.approx(alone)
    assert bootstrap_mean(np.repeat(hit, 4), np.arange(400), 0.95, 0)[0] > alone[0] + 0.02


def test_no_rows_have_no_interval():
    assert all(math.isnan(end) for end in bootstrap_mean(np.array([]), np.array([]), 0.95, 0))


# --- values that are logits --------------------------------------------------------------------------------------------------------


def shifted(part, seed=0):
    """As logits of which each problem has a level of its own."""
    level = 50 * np.random.default_rng(seed).standard_normal(int(part.problem.max()) + 1)
    values = [np.where(v == UNREAD, UNREAD, v + level[p]) for v, p in zip(part.values, part.problem)]
    return replace(part, values=values, unit="logit")


def test_logits_are_compared_within_problems_alone():
    plain = gate(replace(held_out(skill=0.3), unit="logit"))
    moved = gate(shifted(held_out(skill=0.3)))
    assert moved == {key: pytest.approx(value, abs=1e-6) for key, value in plain.items()}
    assert plain["passed"] is True and plain["auc"] == plain["pair_accuracy"] and plain["auc_low"] <= plain["auc"] <= plain["auc_high"]
    assert gate(replace(shifted(held_out(skill=0.3)), unit="probability"))["auc"] < 0.6


def test_logits_have_no_brier_score_and_no_calibration():
    figures = gate(shifted(held_out()))
    assert not {"brier", "calibration_error"} & set(figures)
    assert set(gate(held_out())) - set(figures) == {"brier", "calibration_error"}


def test_length_is_compared_within_problems_too():
    """Each correct program is one token longer than its twin, which says nothing across problems of very different length."""
    part = held_out(skill=0.3, lengths=lambda p, right: 6 + 5 * (p % 10) + right)
    assert gate(part)["length_auc"] < 0.6 and gate(replace(part, unit="logit"))["length_auc"] == 1
    assert gate(replace(part, unit="logit"))["passed"] is False


@settings(max_examples=30, deadline=None, derandomize=True)
@given(rows=st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 3)), min_size=1, max_size=25))
def test_the_auc_of_logits_is_a_mean_over_problems(rows):
    problem, label, score = (np.array(column) for column in zip(*rows))
    part = judged([row(2, s) for s in score], [2] * len(rows), label, problem)
    found = replace(part, unit="logit").auc(part.at_share(1.0))
    both = [p for p in np.unique(problem) if label[problem == p].any() and not label[problem == p].all()]
    expected = [wins(score[(problem == p) & label], score[(problem == p) & ~label]) for p in both]
    assert math.isnan(found) if not both else found == pytest.approx(np.mean(expected))


def test_shares_of_pairs_are_counted_in_float64_whatever_the_scores_are():
    n, score = 27, np.zeros(54, np.float32)
    score[:14] = 1
    assert pair_accuracy(score, np.arange(54) < n, np.arange(54) % n) == pytest.approx(20.5 / 27, rel=1e-14)
