"""Statistics over seeds and problems against enumeration and scipy; what a study refuses; its page and picture."""

import itertools
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from wmtp import study, study_report
from wmtp.compare import SHARED_KEYS, CompareError, Result, holm
from wmtp.study import Contrast, contrast, contrasts, resampled_means, wilcoxon

ARMS = ("baseline", "verifiable", "shuffled", "rho1")
STARTS = {"": {"humaneval": {"pass@1": 0.4, "n_problems": 12}}}


def against(*arms, control="baseline"):
    return {arm: None if arm == control else control for arm in arms}


def result(scores: list[float], protocol: str = "aa", ce: float = 0.5) -> Result:
    named = {f"p{place:02d}": score for place, score in enumerate(scores)}
    training = {
        "validation_ce_head0": ce,
        "parameters": 10,
        "trained_parameters": 10,
        "grown_heads": 0,
        "train_flops": 1e9,
        "signal_flops": 5e8,
        "total_flops": 1.5e9,
        "steps": 5,
        "tokens": 900,
    }
    return Result(
        "x",
        {"humaneval": dict.fromkeys(SHARED_KEYS, "same") | {"protocol_sha256": protocol}},
        {("humaneval", "pass@1"): named},
        training,
        {},
    )


def drawn(arms=ARMS, n_seeds=6, n_problems=12, seed=0) -> dict[str, list[Result]]:
    rng = np.random.default_rng(seed)
    return {arm: [result(list(rng.integers(0, 5, n_problems) / 4), ce=rng.random()) for _ in range(n_seeds)] for arm in arms}


def test_means_over_both_draws_agree_with_all_draws_enumerated():
    d = np.array([[0.5, -0.25, 0.0], [1.0, 0.25, -0.5]])
    every = [
        d[np.ix_(seeds, problems)].mean()
        for seeds in itertools.product(range(2), repeat=2)
        for problems in itertools.product(range(3), repeat=3)
    ]
    means = resampled_means(d, 100_000)
    assert means.mean() == pytest.approx(np.mean(every), abs=0.005) and means.std() == pytest.approx(np.std(every), abs=0.005)
    for edge in (-0.2, 0.0, 0.15, 0.4):
        assert (means <= edge).mean() == pytest.approx(np.mean(np.round(every, 12) <= edge), abs=0.01)


def test_one_seed_is_the_bootstrap_over_problems_and_one_problem_the_bootstrap_over_seeds():
    row = np.array([[0.5, 0.0, -0.25, 1.0]])
    for d in (row, row.T):
        means = resampled_means(d, 50_000)
        assert means.std() == pytest.approx(row.std() / 2, rel=0.02)


@given(st.lists(st.integers(-40, 40), min_size=2, max_size=9))
def test_wilcoxon_agrees_with_scipy_where_ranks_are_not_tied(d):
    values = [value for value in d if value]
    if len({abs(value) for value in values}) == len(values) and values:
        assert wilcoxon(d) == pytest.approx(stats.wilcoxon(values, method="exact").pvalue)


def test_wilcoxon_by_hand_under_ties_and_zeros():
    assert wilcoxon([0.0, 0.0]) == 1.0
    assert wilcoxon([1.0] * 6) == 2 / 64
    # Ranks 1.5, 1.5, 3 with signs +, +, -: as extreme are sums of ranks 0 to 3 and 3 to 6, which is all of them.
    assert wilcoxon([1, 1, -2]) == 1.0
    assert wilcoxon([1, 1, 2]) == 2 / 8
    assert wilcoxon(range(1, 101)) == 2 / 2**100


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_wilcoxon_agrees_with_all_signs_enumerated(d):
    kept = [value for value in d if value]
    ranks = stats.rankdata([abs(value) for value in kept]) if kept else np.array([])
    sums = [sum(rank for rank, sign in zip(ranks, signs) if sign) for signs in itertools.product((0, 1), repeat=len(kept))]
    far = abs(sum(rank for rank, value in zip(ranks, kept) if value > 0) - ranks.sum() / 2)
    assert wilcoxon(d) == np.mean([abs(one - ranks.sum() / 2) >= far - 1e-9 for one in sums])


def test_a_contrast_is_paired_by_seed_and_problem():
    ours = np.array([[1.0, 0.5, 0.0], [0.5, 0.5, 0.5]])
    theirs = np.array([[0.5, 0.0, 0.0], [0.5, 0.25, 0.5]])
    found = contrast("verifiable", ours, "baseline", theirs, "humaneval", 5000)
    assert (found.n_seeds, found.n_problems, found.primary) == (2, 3, True)
    assert found.difference == pytest.approx(1.25 / 6)
    assert (found.seeds_better, found.seeds_worse, found.p_sign, found.p_wilcoxon) == (2, 0, 0.5, 0.5)
    assert found.low >= 0 and found.mde == pytest.approx(2.8016 * found.stderr, rel=1e-3)
    assert found.stderr == resampled_means(ours - theirs, 5000).std(ddof=1), "over seeds and problems, not over seeds alone"


def test_a_shift_of_all_scores_is_found_in_every_draw():
    theirs = np.random.default_rng(1).integers(0, 3, (6, 20)) / 4
    found = contrast("a", theirs + 0.25, "b", theirs, "humaneval", 1000)
    assert found.low == found.high == found.difference == 0.25 and found.stderr == 0 and found.mde is None
    assert found.p == pytest.approx(2 / 1001) and found.p_wilcoxon == found.p_sign == 2 / 64


def test_primary_contrasts_are_adjusted_among_themselves():
    found = contrasts(drawn(), against(*ARMS), 500)
    primary, others = [one for one in found if one.primary], [one for one in found if not one.primary]
    assert {(one.arm, one.against) for one in primary} == {("verifiable", "baseline"), ("verifiable", "shuffled")}
    assert {(one.arm, one.against) for one in others} == {("shuffled", "baseline"), ("rho1", "baseline")}
    for table in (primary, others):
        assert [one.p_holm for one in table] == holm([one.p for one in table])


def test_holms_adjustment_is_over_all_benchmarks_of_a_table():
    found = drawn()
    for results in found.values():
        for one in results:
            one.evaluation["mbpp"] = one.evaluation["humaneval"]
            named = one.scores["humaneval", "pass@1"]
            one.scores["mbpp", "pass@1"] = dict(zip(named, reversed(named.values())))
    rows = contrasts(found, against(*ARMS), 500)
    for primary in (True, False):
        table = [one for one in rows if one.primary == primary]
        assert {one.benchmark for one in table} == {"humaneval", "mbpp"}
        assert [one.p_holm for one in table] == holm([one.p for one in table])


def test_a_run_without_samples_has_nothing_to_compare():
    found = drawn()
    for one in found["baseline"]:
        one.scores.clear()
    with pytest.raises(CompareError, match="x: no sampled completions of humaneval, expected some; raise n_samples above 0"):
        contrasts(found, against(*ARMS), 100)


def test_a_difference_that_only_one_seed_shows_is_not_certain():
    """A bootstrap over problems alone would be sure of it: the seed is one draw."""
    theirs = np.full((6, 200), 0.5)
    ours = theirs.copy()
    ours[0] = 1.0
    assert contrast("a", ours, "b", theirs, "humaneval", 2000).p > 0.2


def test_what_a_study_refuses(tmp_path):
    with pytest.raises(CompareError, match=r"baseline-1.*no such file"):
        study.read_arms({"baseline": None}, [1], tmp_path, tmp_path)


def test_rows_are_means_over_seeds():
    found = drawn(("baseline",), n_seeds=3)
    (row,) = study.arm_rows(found)
    each = [np.mean(list(one.scores["humaneval", "pass@1"].values())) for one in found["baseline"]]
    assert row["humaneval"] == pytest.approx(np.mean(each)) and row["humaneval_sd"] == pytest.approx(np.std(each, ddof=1))
    assert row["seeds"] == 3 and row["parameters"] == 10


def test_the_page_and_the_picture(tmp_path):
    found = drawn()
    rows: list[Contrast] = contrasts(found, against(*ARMS), 500)
    arms = study.arm_rows(found)
    text = study_report.page(arms, [asdict(one) for one in rows], ["humaneval"], 500, STARTS)
    for expected in (
        "verifiable - shuffled",
        "## Primary contrasts",
        "## Every other arm against baseline",
        "6 training seeds",
        "another critic",
    ):
        assert expected in text
    assert "a start of its own" not in text
    assert "†" not in text and "as copies of its last block" not in text
    grown = study_report.page([arm | {"grown_heads": 3} for arm in arms], [asdict(one) for one in rows], ["humaneval"], 500, STARTS)
    assert "rho1 began with 3 heads as copies of its last block." in " ".join(grown.split())
    own = {**STARTS, "rho1": {"humaneval": {"pass@1": 0.25, "n_problems": 12}}}
    told = " ".join(study_report.page(arms, [asdict(one) for one in rows], ["humaneval"], 500, own).split())
    assert (
        "rho1 has a start of its own, which its contrasts hold too: 25.0 % (HumanEval form); the others' 40.0 % (HumanEval form)." in told
    )
    by_seed = {(one.arm, one.against, one.benchmark): [0.0] * 6 for one in rows}
    for name in ("one.png", "two.png"):
        study_report.draw([asdict(one) for one in rows], by_seed, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def saved(monkeypatch, results):
    monkeypatch.setattr(study, "read_result", lambda name, metrics, verdicts: results[name])


def test_arms_that_read_other_rows_are_compared_among_themselves(monkeypatch, tmp_path):
    """Pairs make other steps and tokens, and no contrast with the rest, primary or not."""
    pair = ("verifiable", "uniform_shared")
    results = {f"{arm}-{seed}": found for arm, row in drawn(("baseline", *pair), 2).items() for seed, found in enumerate(row)}
    saved(monkeypatch, results)
    for arm in pair:
        for seed in (0, 1):
            results[f"{arm}-{seed}"].training.update(steps=9, tokens=1700)
    controls = {"baseline": None, **against(*pair, control="uniform_shared")}
    found = study.read_arms(controls, [0, 1], tmp_path, tmp_path)
    rows = contrasts(found, controls, 500)
    assert [(one.arm, one.against, one.primary) for one in rows] == [(*pair, False)]
    text = study_report.page(study.arm_rows(found), [asdict(one) for one in rows], ["humaneval"], 500, STARTS)
    assert "baseline: 5 steps, 900 tokens; verifiable, uniform_shared: 9 steps, 1,700 tokens" in " ".join(text.split())
    assert "## Every other arm against uniform_shared" in text
    results["uniform_shared-1"].training["tokens"] = 1701
    with pytest.raises(CompareError, match=r"seed 1: the arms differ in steps and tokens: .*'verifiable': .*'uniform_shared'"):
        study.read_arms(controls, [0, 1], tmp_path, tmp_path)


@pytest.mark.parametrize("seed", [0, 1])
def test_arms_of_another_budget_are_refused(monkeypatch, tmp_path, seed):
    results = {f"{arm}-{seed}": found for arm, row in drawn(("baseline", "rho1"), 2).items() for seed, found in enumerate(row)}
    saved(monkeypatch, results)
    assert set(study.read_arms(against("baseline", "rho1"), [0, 1], tmp_path, tmp_path)) == {"baseline", "rho1"}
    results[f"rho1-{seed}"].training["tokens"] = 901
    with pytest.raises(CompareError, match=f"seed {seed}: the arms differ in steps and tokens"):
        study.read_arms(against("baseline", "rho1"), [0, 1], tmp_path, tmp_path)


@pytest.mark.parametrize(("p_holm", "p_wilcoxon", "starred"), [(0.01, 0.03, True), (0.01, 0.06, False), (0.06, 0.03, False)])
def test_a_star_needs_both_tests(p_holm, p_wilcoxon, starred):
    found = drawn()
    rows = [asdict(one) | {"p_holm": p_holm, "p_wilcoxon": p_wilcoxon} for one in contrasts(found, against(*found), 100)]
    text = study_report.page(study.arm_rows(found), rows, ["humaneval"], 100, STARTS)
    assert (f"{p_holm:.3f}*" in text) == starred
    own = {**STARTS, **{arm: {"humaneval": {"pass@1": 0.25, "n_problems": 12}} for arm in ARMS if arm != "baseline"}}
    marked = study_report.page(study.arm_rows(found), rows, ["humaneval"], 100, own)
    assert f"{p_holm:.3f}†" in marked and f"{p_holm:.3f}*" not in marked and "†: from a start of its own" in " ".join(marked.split())
