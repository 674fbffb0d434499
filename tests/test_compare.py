"""Paired statistics against hand computation, enumeration and scipy; refusals; the whole stage on small results."""

import csv
import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stages.compare import work
from wmtp import compare, view
from wmtp.compare import (
    SHARED_KEYS,
    CompareError,
    Result,
    bootstrap_p,
    difference,
    differences,
    holm,
    mcnemar,
    minimum_detectable,
    resampled_means,
)
from wmtp.passk import estimate
from wmtp.records import Verdict, write_jsonl
from wmtp.tracking import stage_run

SHARES = st.lists(st.integers(0, 10), min_size=2, max_size=30)


CONDITIONS = dict(zip(SHARED_KEYS, ("aa", "bb", "cc", "512 MiB", "3.11", "alpaca"), strict=True))


def result(name, scores, measure="pass@1", benchmark="humaneval", **conditions):
    named = {f"p{place}": score for place, score in enumerate(scores)} if isinstance(scores, list) else scores
    return Result(name, {benchmark: CONDITIONS | conditions}, {(benchmark, measure): named}, {}, {})


# The statistics of one contrast.


def test_golden_example():
    """d = .5, 0, 0, 1: mean .375, variance .6875 / 3. Of the 256 draws 16 have mean 0, 5 a mean above .75, 19 one of .75 or more."""
    ours, theirs = result("a", [1.0, 0.5, 0.0, 1.0]), result("b", [0.5, 0.5, 0.0, 0.0])
    found = difference(ours, theirs, "humaneval", "pass@1", 20_000)
    assert found.difference == 0.375
    assert found.stderr == pytest.approx(math.sqrt(0.6875 / 3 / 4), rel=1e-12)
    assert found.mde == pytest.approx((1.959963985 + 0.841621234) * 0.2393567, rel=1e-6)
    assert (found.n_problems, found.better, found.worse, found.test) == (4, 2, 0, "paired bootstrap")
    assert found.p == pytest.approx(2 / 2**4, abs=0.01)
    assert (found.low, found.high) == (0.0, 0.75)


def test_greedy_verdicts_are_tested_by_mcnemar():
    ours, theirs = result("a", [1.0] * 6 + [0.0, 1.0], "greedy"), result("b", [0.0] * 5 + [1.0, 1.0, 1.0], "greedy")
    found = difference(ours, theirs, "humaneval", "greedy", 100)
    assert (found.better, found.worse, found.difference) == (5, 1, 0.5)
    assert found.test == "exact McNemar"
    assert found.p == 2 * (1 + 6) / 64


@pytest.mark.parametrize("d", [[0.5, 0.0, 0.0, 1.0], [0.3, -0.1, 0.2, 0.2, -0.4], [1.0, -1.0, 0.0]])
def test_bootstrap_agrees_with_all_draws_enumerated(d):
    every = np.round([np.mean(draw) for draw in itertools.product(d, repeat=len(d))], 12)
    means = resampled_means(np.array(d), 200_000)
    assert means.mean() == pytest.approx(every.mean(), abs=0.01)
    for edge in (-0.2, 0.0, 0.1, 0.4):
        assert (means <= edge).mean() == pytest.approx((every <= edge).mean(), abs=0.01)
    assert bootstrap_p(means) == pytest.approx(min(1.0, 2 * min((every <= 0).mean(), (every >= 0).mean())), abs=0.02)


@pytest.mark.parametrize("n", [20, 200, 974])
def test_bootstrap_spread_equals_the_analytic_error(n):
    d = np.random.default_rng(n).integers(-10, 11, n) / 10
    means = resampled_means(d, 10_000)
    assert len(means) == 10_000
    assert means.std() == pytest.approx(math.sqrt(d.var() / n), rel=0.03)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(400):
        d = rng.binomial(10, 0.55, 80) / 10 - rng.binomial(10, 0.5, 80) / 10
        low, high = np.quantile(resampled_means(d, 1000), [0.025, 0.975])
        covered += low <= 0.05 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_number_of_resamples_need_not_fill_the_last_block():
    assert len(resampled_means(np.arange(5.0), compare.BLOCK + 1)) == compare.BLOCK + 1
    assert len(resampled_means(np.arange(5.0), 100)) == 100


def test_a_difference_that_cancels_out_is_exactly_zero():
    """0.3 - 0.1 - 0.2 is -2.8e-17 in floating point, which would count for one side alone."""
    means = resampled_means(np.array([0.3, -0.1, -0.2]), 5000)
    assert 0.0 in means
    assert np.abs(means[means != 0]).min() > 0.01


@given(SHARES, st.randoms(use_true_random=False))
def test_swapping_the_two_mirrors_everything(tenths, chance):
    a = [share / 10 for share in tenths]
    b = chance.sample(a, len(a))
    there, back = (difference(result("x", x), result("y", y), "humaneval", "pass@1", 200) for x, y in ((a, b), (b, a)))
    assert there.difference == pytest.approx(-back.difference, abs=1e-15)
    assert (there.low, there.high) == (pytest.approx(-back.high, abs=1e-12), pytest.approx(-back.low, abs=1e-12))
    assert (there.stderr, there.p, there.mde, there.better) == (back.stderr, back.p, back.mde, back.worse)


def test_equal_scores_differ_by_nothing_and_have_no_detectable_effect():
    found = difference(result("a", [0.1, 0.7, 0.3]), result("b", [0.1, 0.7, 0.3]), "humaneval", "pass@1", 500)
    assert (found.difference, found.stderr, found.low, found.high, found.p, found.mde) == (0.0, 0.0, 0.0, 0.0, 1.0, None)


def test_a_bootstrap_p_is_never_zero():
    assert bootstrap_p(np.ones(999)) == bootstrap_p(-np.ones(999)) == 2 / 1000
    assert bootstrap_p(np.zeros(999)) == 1.0


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ((3, 9, 0), (3, 9, 0), True),
        ((6, 9, 0), (3, 9, 0), False),
        ((3, 9, 0), (3, 8, 0), False),
        ((3, 9, 3), (3, 9, 0), False),
        ((3, 9, 3), (3, 9, 3), True),
        ((3, 9, 3), (), True),
        ((), (3, 9, 0), True),
    ],
)
def test_trainings_of_another_budget_are_told_apart(ours, theirs, same):
    one, other = (
        replace(result(name, [0.0, 1.0, 0.5]), training=dict(zip((*compare.BUDGET, "grown_heads"), spent)))
        for name, spent in (("a", ours), ("b", theirs))
    )
    assert difference(one, other, "humaneval", "pass@1", 100).same_budget is same


def test_one_problem_has_no_error():
    with pytest.raises(CompareError, match="1 problem, expected two"):
        difference(result("a", [0.1]), result("b", [0.2]), "humaneval", "pass@1", 100)


def test_mcnemar_equals_the_exact_binomial_test():
    assert mcnemar(0, 0) == 1.0
    for better, worse in itertools.product(range(15), repeat=2):
        if better + worse:
            assert mcnemar(better, worse) == pytest.approx(stats.binomtest(better, better + worse, 0.5).pvalue, rel=1e-12)
    assert mcnemar(1200, 900) == pytest.approx(stats.binomtest(1200, 2100, 0.5).pvalue, rel=1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_holm_equals_closed_testing(ps):
    """Holm's procedure is the closed test whose intersections are judged by Bonferroni."""
    places = range(len(ps))
    subsets = [some for size in range(1, len(ps) + 1) for some in itertools.combinations(places, size)]
    closed = [max(min(1.0, len(some) * min(ps[j] for j in some)) for some in subsets if i in some) for i in places]
    assert holm(ps) == pytest.approx(closed, rel=1e-12)


def test_holm_by_hand():
    assert holm([0.04, 0.01, 0.03]) == [0.06, 0.03, 0.06]
    assert holm([]) == []


def test_minimum_detectable_effect_has_its_power():
    stderr = 0.03
    effect = minimum_detectable(stderr)
    reach = stats.norm.ppf(0.975) * stderr
    assert stats.norm.sf(reach, effect, stderr) == pytest.approx(0.8, abs=1e-9)


@pytest.mark.parametrize("n, points", [(164, 6.9), (500, 4.0)])
def test_minimum_detectable_effect_at_ten_percent_discordance(n, points):
    assert round(100 * minimum_detectable(math.sqrt(0.1 / n)), 1) == points


# Tables of contrasts.


def test_every_other_is_compared_and_adjusted_with_all_of_them():
    rng = random.Random(3)
    results = [result(name, [rng.randint(0, 10) / 10 for _ in range(40)]) for name in ("start", "ntp", "baseline", "rho1")]
    found = differences(results, "baseline", 500)
    assert [(one.method, one.against) for one in found] == [("start", "baseline"), ("ntp", "baseline"), ("rho1", "baseline")]
    assert [one.p_holm for one in found] == holm([one.p for one in found])


def test_order_of_methods_and_problems_changes_nothing():
    rng = random.Random(4)
    results = [result(name, {f"p{i}": rng.randint(0, 10) / 10 for i in range(40)}) for name in ("ntp", "baseline", "rho1", "verifiable")]
    turned = [
        result(one.name, dict(rng.sample(list(one.scores["humaneval", "pass@1"].items()), 40))) for one in rng.sample(results, len(results))
    ]

    def by_name(found):
        return sorted(found, key=lambda one: one.method)

    assert by_name(differences(turned, "baseline", 500)) == by_name(differences(results, "baseline", 500))


def test_without_the_method_to_compare_with():
    with pytest.raises(CompareError, match="methods: baseline is missing"):
        differences([result("ntp", [0.5, 0.5])], "baseline", 100)


@pytest.mark.parametrize(
    "other, message",
    [
        (result("rho1", [0.1, 0.2], protocol_sha256="x"), "cannot be compared with baseline on humaneval: protocol_sha256 x, expected aa"),
        (result("rho1", [0.1, 0.2], problems_sha256="x"), "problems_sha256 x, expected bb; evaluate both on the same problems"),
        (result("rho1", [0.1, 0.2], judge_sha256="x"), "judge_sha256 x, expected cc; evaluate both by the same judge"),
        (result("rho1", [0.1, 0.2], memory="9 MiB"), "memory 9 MiB, expected 512 MiB; evaluate both under one memory limit"),
        (result("rho1", [0.1, 0.2], python="3.12"), "python 3.12, expected 3.11; evaluate both under one Python"),
        (result("rho1", [0.1, 0.2], template="x"), "template x, expected alpaca; evaluate both with one template of prompts"),
        (result("rho1", [0.1, 0.2], benchmark="mbpp"), "rho1 cannot be compared with baseline: benchmarks mbpp, expected humaneval"),
        (result("rho1", [0.1]), "rho1 has no pass@1 verdict for 1 problems of baseline, p1 first"),
        (result("rho1", [0.1, 0.2, 0.3, 0.4]), "baseline has no pass@1 verdict for 2 problems of rho1, p2 first"),
        (result("rho1", [1.0, 0.0], "greedy"), "baseline has no greedy verdict for 2 problems of rho1, p0 first"),
    ],
)
def test_results_of_unequal_conditions_are_refused(other, message):
    with pytest.raises(CompareError) as error:
        differences([result("baseline", [0.1, 0.2]), other], "baseline", 100)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# Files.

CRITIC = {
    "auc": 0.93, "auc_low": 0.91, "auc_high": 0.95, "length_auc": 0.52, "delta_std": 0.08, "bug_localisation": None,
    "bug_localisation_by_chance": None, "n_bugs": 0, "passed": True,
}  # fmt: skip
TRAINING = {
    "steps": 20,
    "tokens": 1000,
    "parameters": 300,
    "trained_parameters": 300,
    "grown_heads": 0,
    "train_flops": 600_000,
    "signal_flops": 50_000,
    "total_flops": 650_000,
    "last_loss": 0.5,
    "validation_ce_head0": 0.25,
}


def write_result(root, name, seed, trained=True, n_problems=12):
    """Random verdicts of `n_problems` problems in two benchmarks, one greedy and four sampled, with the metrics that belong to them."""
    rng = random.Random(seed)
    verdicts = [
        Verdict(
            task_id=f"{benchmark}/{problem}", benchmark=benchmark, temperature=0.8 if sample else 0.0, sample=max(0, sample - 1),
            verdict=rng.choice(["pass", "fail", "timeout"]),
        )
        for benchmark in ("humaneval", "mbpp")
        for problem in range(n_problems)
        for sample in range(5)
    ]  # fmt: skip
    write_jsonl(root / "verdicts" / f"{name}.jsonl", verdicts)
    evaluation = {}
    for benchmark in ("humaneval", "mbpp"):
        own = [verdict for verdict in verdicts if verdict.benchmark == benchmark]
        greedy = estimate([verdict for verdict in own if verdict.temperature == 0], [1])
        evaluation[benchmark] = estimate([verdict for verdict in own if verdict.temperature > 0], [1, 4])
        evaluation[benchmark] |= {"greedy": greedy["pass@1"], "greedy_stderr": greedy["pass@1_stderr"], **CONDITIONS}
    folder = root / "metrics" / name
    folder.mkdir(parents=True)
    (folder / "eval.json").write_text(json.dumps(evaluation))
    if trained:
        (folder / "train.json").write_text(json.dumps(TRAINING))
        (folder / "train.csv").write_text("step,loss,ce_head0\n" + "".join(f"{step},{2 / step},{1 / step}\n" for step in range(1, 21)))
    return evaluation


@pytest.fixture
def root(tmp_path):
    write_result(tmp_path, "start", 0, trained=False)
    for seed, name in enumerate(METHODS, 1):
        write_result(tmp_path, name, seed)
    (tmp_path / "metrics" / "critic.json").write_text(json.dumps(CRITIC))
    return tmp_path


HOUSE = Path(__file__).parents[1]
METHODS = ["ntp", "baseline", "verifiable", "rho1"]


def read(root, name="baseline", trained=True):
    return compare.read_result(name, root / "metrics", root / "verdicts", trained)


def test_scores_are_the_shares_of_passing_samples(root):
    found = read(root)
    lines = [json.loads(line) for line in (root / "verdicts" / "baseline.jsonl").read_text().splitlines()]
    for task_id, score in found.scores["mbpp", "pass@1"].items():
        drawn = [line["verdict"] == "pass" for line in lines if line["task_id"] == task_id and line["temperature"] > 0]
        assert len(drawn) == 4
        assert score == sum(drawn) / 4
    assert set(found.scores["mbpp", "greedy"].values()) == {0.0, 1.0}
    assert found.log["step"] == list(range(1, 21))
    assert read(root, "start", trained=False).training == {}


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_metrics_of_another_run_than_the_verdicts(root):
    edit_json(root / "metrics/baseline/eval.json", lambda values: values["mbpp"].update({"pass@1": 0.99}))
    with pytest.raises(CompareError, match=r"baseline.jsonl: mbpp comes to .* says .*0\.99.*; evaluate baseline again"):
        read(root)


def test_verdicts_of_a_kind_that_the_metrics_do_not_have(root):
    edit_json(root / "metrics/baseline/eval.json", lambda values: values["mbpp"].pop("pass@1"))
    with pytest.raises(CompareError, match="mbpp comes to"):
        read(root)


@pytest.mark.parametrize(
    "path, message",
    [
        ("metrics/baseline/eval.json", "eval.json: no such file"),
        ("metrics/baseline/train.json", "train.json: no such file"),
        ("metrics/baseline/train.csv", "train.csv: no such file"),
        ("verdicts/baseline.jsonl", "baseline.jsonl: no such file"),
    ],
)
def test_a_missing_file_is_named(root, path, message):
    (root / path).unlink()
    with pytest.raises(ValueError, match=message):
        read(root)


@pytest.mark.parametrize(
    "path, text, message",
    [
        ("metrics/baseline/eval.json", "{", "not valid JSON"),
        ("metrics/baseline/eval.json", "[" * 100_000, "not valid JSON: .*recursion"),
        ("metrics/baseline/eval.json", '{"humaneval": {}}', "verdicts of humaneval, mbpp, but .* has humaneval;"),
        (
            "metrics/baseline/eval.json",
            '{"humaneval": {"greedy": 1}, "mbpp": {}}',
            "eval.json: humaneval: no greedy_stderr, .*, found greedy",
        ),
        (
            "metrics/baseline/train.json",
            '{"steps": 3}',
            "train.json: no validation_ce_head0, tokens, parameters, trained_parameters, grown_heads, train_flops,"
            " signal_flops, total_flops, found steps",
        ),
        ("metrics/baseline/train.csv", "", "train.csv: not a table of numbers"),
        ("metrics/baseline/train.csv", "step,loss,ce_head0\n", "train.csv: no step, loss, ce_head0, found nothing"),
        ("metrics/baseline/train.csv", "step,loss,ce_head0\n1,2,x\n", "train.csv: not a table of numbers"),
        ("metrics/baseline/train.csv", "step,loss,ce_head0\n1,2,3\n2,2\n", "train.csv: not a table of numbers"),
        ("metrics/baseline/train.csv", "step,loss\n1,2\n", "train.csv: no ce_head0, found step, loss"),
        ("verdicts/baseline.jsonl", "", "verdicts of nothing"),
    ],
)
def test_a_broken_file_is_named(root, path, text, message):
    (root / path).write_text(text)
    with pytest.raises(CompareError, match=message):
        read(root)


def test_a_critic_without_its_figures(tmp_path):
    (tmp_path / "critic.json").write_text('{"auc": 0.9}')
    with pytest.raises(CompareError, match=r"critic.json: no passed, auc_low"):
        compare.read_critic(tmp_path / "critic.json")


def test_a_verdict_that_the_judge_failed_to_give_is_not_compared(root):
    path = root / "verdicts/baseline.jsonl"
    path.write_text(path.read_text().replace('"verdict":"fail"', '"verdict":"harness-error"', 1))
    with pytest.raises(ValueError, match="judge again"):
        read(root)


# The stage.


def run_stage(root, out):
    with stage_run("compare", {}, enabled=False) as track:
        return work(view.load(HOUSE), track, str(root / "metrics"), str(root / "verdicts"), str(out), *METHODS)


def written(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_the_stage_writes_its_files(root, capsys):
    summary = run_stage(root, root / "out")
    files = written(root / "out")
    names = ["differences.csv", "methods.csv", "report/pass_at_k.png", "report/table.md", "report/training.png", "selected.json"]
    assert sorted(files) == names
    rows = list(csv.DictReader(files["methods.csv"].decode().splitlines()))
    assert [row["method"] for row in rows] == ["start", *METHODS]
    evaluation = json.loads((root / "metrics/ntp/eval.json").read_text())
    row = next(row for row in rows if row["method"] == "ntp")
    assert float(row["humaneval_pass@4"]) == evaluation["humaneval"]["pass@4"]
    assert (row["steps"], row["validation_ce_head0"], rows[0]["steps"]) == ("20", "0.25", "")
    found = list(csv.DictReader(files["differences.csv"].decode().splitlines()))
    pairs = {frozenset((one["method"], one["against"])) for one in found}
    assert pairs == {frozenset(pair) for pair in itertools.combinations(METHODS, 2)} | {frozenset(("start", "baseline"))}
    assert len(found) == len(pairs) * 2 * 2
    assert {(one["benchmark"], one["measure"]) for one in found} == set(itertools.product(("humaneval", "mbpp"), compare.MEASURES))
    assert len(summary) == len(found)
    assert files["report/table.md"].decode() in capsys.readouterr().err


def test_selected_holds_the_numbers_of_the_reported_method(root):
    run_stage(root, root / "out")
    chosen = json.loads((root / "out" / "selected.json").read_text())
    evaluation = json.loads((root / "metrics" / view.load(HOUSE).report.method / "eval.json").read_text())
    assert chosen["training"] == TRAINING
    for benchmark, figures in evaluation.items():
        assert chosen[benchmark] == {key: value for key, value in figures.items() if key not in CONDITIONS}


@pytest.mark.slow
def test_equal_results_give_equal_bytes_in_any_order_of_lines(root):
    run_stage(root, root / "one")
    for path in (root / "verdicts").glob("*.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(random.Random(7).sample(lines, len(lines))))
    run_stage(root, root / "two")
    assert written(root / "one") == written(root / "two")


def test_a_refusal_leaves_nothing_behind(root):
    path = root / "verdicts" / "ntp.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if '"mbpp/3"' not in line))
    rest = [Verdict.model_validate_json(line) for line in path.read_text().splitlines() if '"mbpp"' in line]
    sampled, greedy = (estimate([one for one in rest if (one.temperature > 0) == kind], [1])["pass@1"] for kind in (True, False))
    edit_json(root / "metrics/ntp/eval.json", lambda values: values["mbpp"].update({"pass@1": sampled, "greedy": greedy}))
    with pytest.raises(
        CompareError, match="ntp cannot be compared with start on mbpp: ntp has no greedy verdict for 1 problems of start, mbpp/3"
    ):
        run_stage(root, root / "out")
    assert not (root / "out").exists()
