"""Scope `lagged` against loops in float64 over several steps; its start, its state and what may not touch it (METHODS, "From signal to
weight")."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from tests import methods
from tests.test_policy import EQUAL_LENGTHS, SPANS, F, Waits, cross_entropy, same, small_model, whole_step
from tests.test_train import ALONE, Keep, Killed, fit, killer, same_bits, short_plan, start_model
from tests.test_weighting_rho1 import ceil
from wmtp import outcome, params
from wmtp.dependencies import ROOT
from wmtp.method_schema import AnyMethod
from wmtp.policy import WeightError
from wmtp.tokens import TokenData
from wmtp.train import train_step
from wmtp.weighting import selection
from wmtp.weighting.lag import Lag

LAGGED = {"kind": "lagged", "ema": 0.0}
OTHERS = ("inverted_k", "dft", "focal", "loss_topk", "entropy_topk")
FORMS = [(form, mode) for form in methods.EXCESS_FORMS for mode in methods.HEAD_MODES]


def lagged(form, mode="shared_target", ema=0.0, **changes):
    block = methods.excess_block(form, mode, scope={**LAGGED, "ema": ema}) | changes
    return methods.objective("rho1", values=block)


def steps(n=3, spans=SPANS):
    return [whole_step("rho1", spans, seed=seed) for seed in range(n)]


def gradients(objective, listed, budget=10**9, model=None):
    """The gradient and the log sums of each step, over a model that keeps its weights."""
    model, found = model or small_model(torch.float64), []
    for step in listed:
        optimizer = Keep(model.parameters(), lr=1.0)
        sums, _ = train_step(model, optimizer, objective, step, ALONE, budget, math.inf)
        found.append(({name: one for (name, _), one in zip(model.named_parameters(), optimizer.kept)}, sums))
    return found


# --- by definition, one entry at a time --------------------------------------------------------------------------------------------


def between(score, m):
    """Half way between the m-th and the next of the scores in descending order."""
    ordered = sorted(score, reverse=True)
    return (ordered[m - 1] + ordered[m]) / 2


def statistics(score, form):
    """[a threshold or a shift, a mean] of one group of scores."""
    n = len(score)
    if form == "weighted":
        return [math.log(math.fsum(math.exp(s) for s in score) / n), 1.0]
    m = {"tokenskip": n - math.floor(0.3 * n + 1e-9), "percentile_emphasis": n - ceil(0.6, n)}.get(form, ceil(0.6, n))
    threshold = between(score, m)
    return [threshold, math.fsum(raw(s, form, [threshold, 1.0]) for s in score) / n]


def raw(score, form, known):
    if form == "weighted":
        return math.exp(score - known[0])
    if form == "percentile_emphasis":
        return (max(score, 0) * (score > known[0]) + 0.2) / known[1]
    return (score >= known[0]) / known[1]


def grouped(score, form, mode):
    """The groups whose entries share a threshold, and the mean and deviation of each head's scores."""
    score = {e: abs(s) for e, s in score.items()} if form == "absolute" else score
    if mode == "shared_target":
        return {0: {e: s for e, s in score.items() if e[2] == 0}}
    of_head = {h: {e: s for e, s in score.items() if e[2] == h} for h in range(F)}
    return of_head if mode in ("per_head", "per_head_zscore") else {0: score}


def moments(group):
    mean = math.fsum(group.values()) / len(group)
    return [mean, math.sqrt(math.fsum((s - mean) ** 2 for s in group.values()) / len(group))]


def standardised(of_head, known):
    return {0: {e: (s - known["head", h][0]) / known["head", h][1] for h, group in of_head.items() for e, s in group.items()}}


def measured(score, form, mode):
    groups, known = grouped(score, form, mode), {}
    if mode == "per_head_zscore":
        known = {("head", h): moments(group) for h, group in groups.items()}
        groups = standardised(groups, known)
    return known | {key: statistics(list(group.values()), form) for key, group in groups.items()}


def by_definition(score, known, form, mode):
    groups = grouped(score, form, mode)
    groups = standardised(groups, known) if mode == "per_head_zscore" else groups
    weight = {e: raw(s, form, known[key]) for key, group in groups.items() for e, s in group.items()}
    return {e: weight[(*e[:2], 0) if mode == "shared_target" else e] for e in score}


def averaged(old, new, ema):
    return {key: [ema * a + (1 - ema) * b for a, b in zip(old[key], new[key])] for key in new} if old else new


@pytest.mark.slow
@pytest.mark.parametrize("ema", [0.0, 0.7])
@pytest.mark.parametrize(("form", "mode"), FORMS)
def test_three_steps_equal_the_loops(form, mode, ema):
    """While the model learns: each step is judged by what the step before, or the running mean up to it, measured."""
    model, objective, known = small_model(torch.float64), lagged(form, mode, ema), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in steps():
        ce = cross_entropy(model, step)
        score = {e: loss - float(step.signal_BT[e[0], e[1]]) for e, loss in ce.items()}
        known = known or measured(score, form, mode)
        weight = by_definition(score, known, form, mode)
        total = math.fsum(weight.values())
        sums, _ = train_step(model, optimizer, objective, step, ALONE, 60, 1.0)
        figures = objective.summary(sums)
        expected = math.fsum(weight[e] * ce[e] for e in ce) / total
        assert figures["loss"] == pytest.approx(expected, rel=1e-6)
        assert figures["weight_rescale"] == pytest.approx(len(ce) / total, rel=1e-6) and figures["weight_mean"] == pytest.approx(1)
        assert figures["weight_selected"] == pytest.approx(sum(w > 0 for w in weight.values()) / len(ce))
        assert figures["weight_max"] == pytest.approx(max(weight.values()) * len(ce) / total, rel=1e-6)
        share = [w / total for w in weight.values() if w]
        assert figures["weight_ess"] == pytest.approx(1 / math.fsum(p * p for p in share) / len(ce), rel=1e-6)
        concentration = math.exp(-math.fsum(p * math.log(p) for p in share)) / len(ce)
        assert figures["weight_concentration"] == pytest.approx(concentration, rel=1e-6)
        known = averaged(known, measured(score, form, mode), ema)
    for name, found in objective.lag.known.items():
        wanted = {"threshold": 0, "log_mean_exp": 0, "mean": 1, "head_mean": 0, "head_std": 1}[name]
        keys = [key for key in known if isinstance(key, tuple) == name.startswith("head")]
        assert found.flatten().tolist() == pytest.approx([known[key][wanted] for key in keys], rel=1e-9)


@pytest.mark.parametrize("name", OTHERS)
def test_other_weightings_are_judged_by_the_step_before(name):
    model = small_model(torch.float64)
    objective = methods.objective(name, scope=LAGGED)
    first, second = ({e: -loss for e, loss in cross_entropy(model, step).items()} for step in steps(2))
    _, sums = gradients(objective, steps(2), model=model)[1]
    if name in ("dft", "focal"):
        u = [math.exp if name == "dft" else lambda s: (1 - math.exp(s)) ** 2][0]
        mean = [math.fsum(u(s) for e, s in first.items() if e[2] == h) / sum(e[2] == h for e in first) for h in range(F)]
        weight = {e: u(s) / mean[e[2]] for e, s in second.items()}
        expected = math.fsum(-w * second[e] for e, w in weight.items()) / math.fsum(weight.values())
        assert objective.summary(sums)["loss"] == pytest.approx(expected, rel=1e-6)
    if name == "loss_topk":
        of_zero = [-s for e, s in first.items() if e[2] == 0]
        threshold = between(of_zero, ceil(0.6, len(of_zero)))
        chosen = [e for e in second if -second[*e[:2], 0] >= threshold]
        assert objective.summary(sums)["loss"] == pytest.approx(math.fsum(-second[e] for e in chosen) / len(chosen), rel=1e-6)
    assert objective.summary(sums)["weight_rescale"] != 1


# --- the step as a whole -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mix", [1.0, 0.4])
@pytest.mark.parametrize("head_weights", [None, (4.0, 2.0, 1.0, 0.0)])
@pytest.mark.parametrize(("form", "mode"), FORMS)
def test_the_first_step_is_that_of_two_passes(form, mode, head_weights, mix):
    two_pass = methods.objective("rho1", values=methods.excess_block(form, mode, scope="two_pass") | {"mix": mix})
    (found, sums), (expected, _) = (
        gradients(replace(one, head_weights=head_weights), steps(1))[0] for one in (lagged(form, mode, mix=mix), two_pass)
    )
    same(found, expected, 1e-6)
    assert float(sums["note_rescale"] / sums["n"].sum()) == pytest.approx(1, abs=1e-6) or head_weights


@pytest.mark.slow
@pytest.mark.parametrize(("form", "mode"), FORMS)
def test_no_split_of_the_steps_matters(form, mode):
    found = [gradients(lagged(form, mode, 0.5), steps(3, EQUAL_LENGTHS), budget) for budget in (10**9, 40, 20)]
    for other in found[1:]:
        for (one, sums), (another, other_sums) in zip(found[0], other):
            same(another, one)
            assert all(torch.allclose(other_sums[key], sums[key], rtol=1e-10, atol=1e-12) for key in sums)


@pytest.mark.parametrize("mix", [1.0, 0.4])
def test_the_gradient_is_that_of_weights_of_mean_one(mix):
    """Multiplied once, before it is clipped, by N / sum(w): not by a mean of micro-batches."""
    listed, model = steps(2), small_model(torch.float64)
    objective = lagged("topk", mix=mix)
    found = gradients(objective, listed, 60, model)[1][0]
    first, second = ({e: loss - float(step.signal_BT[e[0], e[1]]) for e, loss in cross_entropy(model, step).items()} for step in listed)
    known = measured(first, "topk", "shared_target")
    weight = {e: 1 + mix * (w - 1) for e, w in by_definition(second, known, "topk", "shared_target").items()}
    scale = 1 / math.fsum(weight.values())
    scores = model(listed[1].tokens_BT).log_softmax(-1)
    loss = sum(-scale * w * scores[b, i - h - 1, h, listed[1].tokens_BT[b, i]] for (b, i, h), w in weight.items())
    expected = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters()))))
    same(found, expected, 1e-6)


def test_the_norm_that_is_clipped_is_the_scaled_gradients():
    listed, model = steps(2), small_model(torch.float64)
    objective = lagged("topk")
    gradient, _ = gradients(objective, listed, model=model)[1]
    objective = lagged("topk")
    for step in listed:
        _, norm = train_step(model, Keep(model.parameters(), lr=1.0), objective, step, ALONE, 10**9, 1e9)
    assert float(norm) == pytest.approx(math.sqrt(sum(float(one.square().sum()) for one in gradient.values())), rel=1e-12)


@pytest.mark.parametrize("keep_fraction", [1.0, 1e-6])
def test_thresholds_at_the_ends_of_the_population(keep_fraction):
    """All stay all, also those below every score of the step before; one stays one or more."""
    objective = lagged("topk", keep_fraction=keep_fraction)
    found = [objective.summary(sums)["weight_selected"] for _, sums in gradients(objective, steps(1) * 2)]
    assert found == [1.0, 1.0] if keep_fraction == 1 else [pytest.approx(1 / len(whole_step().response_BT.nonzero()))] * 2
    easier = replace(steps(1)[0], signal_BT=steps(1)[0].signal_BT + 100)
    if keep_fraction == 1:
        assert objective.summary(gradients(objective, [easier])[0][1])["weight_selected"] == 1


def test_a_budget_that_rounding_makes_all_of_a_step_is_below_its_lowest_score():
    """All of the same step again; no promise for steps of other scores."""
    objective = lagged("topk", keep_fraction=0.999)
    found = [objective.summary(sums)["weight_selected"] for _, sums in gradients(objective, steps(1) * 2)]
    assert found == [1.0, 1.0]
    model, step = small_model(torch.float64), steps(1)[0]
    lowest = min(loss - float(step.signal_BT[e[0], e[1]]) for e, loss in cross_entropy(model, step).items() if e[2] == 0)
    assert float(objective.lag.known["threshold"]) == pytest.approx(lowest - 1, rel=1e-9)


ROUNDED = [
    (partial(selection.topk, keep_fraction=0.6), 0.6),
    (partial(selection.tokenskip, drop_fraction=0.3), 0.7),
    (partial(selection.percentile_emphasis, percentile=0.6, alpha=0.2), 0.4),
]


@pytest.mark.parametrize("ema", [0.9, 0.99])
@pytest.mark.parametrize(("weigh", "share"), ROUNDED, ids=["topk", "tokenskip", "percentile_emphasis"])
def test_a_step_whose_budget_is_all_or_nothing_by_rounding_does_not_decide_the_next(weigh, share, ema):
    """A thousand scores a step, and once a single one."""
    lag, random, found = Lag(ema), torch.Generator().manual_seed(0), []
    for n in (1000, 1000, 1, 1000, 1000):
        score, valid, new = torch.randn(1, n, generator=random).double() + 5, torch.ones(1, n, dtype=torch.bool), {}
        weigh(score, valid, lag=new)
        if not lag.known:
            lag.update(new)
        weight = weigh(score, valid, lag=lag.known)
        found.append(float((weight > 0.5).double().mean()))
        lag.update(new)
    assert found[0] == pytest.approx(share, abs=1e-3) and found[3:] == pytest.approx([share] * 2, abs=0.1)


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize(
    "weigh",
    [
        partial(selection.topk, keep_fraction=1.0),
        partial(selection.tokenskip, drop_fraction=0.0),
        partial(selection.percentile_emphasis, percentile=1.0, alpha=0.2),
    ],
    ids=["topk", "tokenskip", "percentile_emphasis"],
)
def test_a_budget_of_all_or_nothing_holds_for_every_step(weigh, ema):
    lag, valid = Lag(ema), torch.ones(1, 50, dtype=torch.bool)
    for level in (0.0, 100.0, -100.0, 3.0):
        score, new = torch.rand(1, 50).double() + level, {}
        weigh(score, valid, lag=new)
        if not lag.known:
            lag.update(new)
        assert torch.equal(weigh(score, valid, lag=lag.known), valid.float())
        lag.update(new)


def test_a_step_of_which_nothing_reaches_the_threshold_is_an_error_and_changes_nothing():
    model, objective = small_model(torch.float64), lagged("topk")
    gradients(objective, steps(1), model=model)
    before, known = {key: value.clone() for key, value in model.state_dict().items()}, objective.lag.state()
    easier = replace(steps(1)[0], signal_BT=steps(1)[0].signal_BT + 100)
    with pytest.raises(WeightError, match="none of the step's 296 targets is selected by the statistics of the step before"):
        train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), objective, easier, ALONE, 40, 1.0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()) and objective.lag.state() == known
    model.zero_grad()
    again = lagged("topk")
    gradients(again, steps(1), model=model)
    expected = gradients(again, steps(2)[1:], model=model)[0][0]
    same(gradients(objective, steps(2)[1:], model=model)[0][0], expected, 1e-12)
    assert objective.lag.state() == again.lag.state(), "what the refused step saw is forgotten"


def test_a_weight_that_is_no_number_stops_the_step():
    objective = lagged("topk")
    objective.lag.known = {"threshold": torch.zeros(1, 1).double(), "mean": torch.zeros(1, 1).double()}
    with pytest.raises(WeightError, match="infinite or not a number"):
        gradients(objective, steps(1))


@pytest.mark.parametrize("name", ["rho1", *OTHERS])
def test_nothing_waits_for_the_device(name):
    work = methods.objective(name, mix=0.5, head_weights=[4.0, 2.0, 1.0, 1.0], scope=LAGGED)
    step, ce = work.prepare(whole_step(name)), torch.rand(len(SPANS), 20, F, dtype=torch.float64, requires_grad=True)

    def losses(*_, with_entropy=False, **__):
        return (ce, ce.detach()) if with_entropy else ce

    with Waits() as waits:
        work.weigh_step(losses, step, [step], ALONE)
        total, _ = work.loss(losses, step)
        total.backward()
        work.remember(step, ALONE)
    assert not waits.found


# --- the state ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[("rho1", 0.0), ("rho1", 0.9), ("focal", 0.9)], ids=str)
def made(request):
    name, ema = request.param
    return lambda: methods.objective(name, n_future=3, scope={**LAGGED, "ema": ema})


@pytest.fixture(scope="module")
def uninterrupted(made, micro, data):
    model = start_model(micro.bundle, torch.float32)
    return model, fit(model, made(), short_plan(data))


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2, 4])
def test_interrupted_and_resumed_equals_uninterrupted(micro, data, made, uninterrupted, tmp_path, at):
    with pytest.raises(Killed):
        fit(start_model(micro.bundle, torch.float32), made(), short_plan(data), scratch=tmp_path, on_log=killer(at))
    model = start_model(micro.bundle, torch.float32)
    assert json.dumps(fit(model, made(), short_plan(data), scratch=tmp_path)) == json.dumps(uninterrupted[1])
    assert same_bits(model, uninterrupted[0])


def test_a_training_starts_without_the_statistics_of_another(micro, data, made, uninterrupted):
    objective = made()
    for _ in range(2):
        model = start_model(micro.bundle, torch.float32)
        assert fit(model, objective, short_plan(data)) == uninterrupted[1]


def test_evaluation_changes_no_statistics(micro, data, made):
    objective, model = made(), start_model(micro.bundle)
    fit(model, objective, short_plan(data))
    known = objective.lag.state()
    assert known
    outcome.validation(model, TokenData(micro.processed, "validation"), ALONE, 500)
    with torch.no_grad():
        objective.loss(model, objective.prepare(short_plan(data).step(0)))
    assert objective.lag.state() == known and not objective.lag.seen


def test_a_running_mean_starts_from_the_first_step():
    objective = lagged("topk", ema=0.9)
    gradients(objective, steps(1))
    alone = lagged("topk", ema=0.0)
    gradients(alone, steps(1))
    for name, value in alone.lag.known.items():
        torch.testing.assert_close(objective.lag.known[name], value, rtol=1e-12, atol=0)


# --- the keys ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rho1", *OTHERS])
def test_every_weighting_with_a_scope_may_be_lagged(name):
    assert methods.objective(name, scope={"kind": "lagged", "ema": 0.5}).lag.ema == 0.5
    assert methods.objective(name).lag is None and "scope" in methods.block(name)


@pytest.mark.parametrize(
    "scope", ["lagged", {"kind": "lagged"}, {"kind": "sequence", "ema": 0.0}, {**LAGGED, "ema": 1.0}, {**LAGGED, "decay": 1}]
)
def test_a_wrong_scope_is_refused(scope):
    with pytest.raises(ValidationError):
        TypeAdapter(AnyMethod).validate_python(methods.block("rho1", scope=scope))


def test_a_wrong_scope_is_one_line():
    values = params.read_yaml(ROOT / "params.yaml")
    values["methods"]["rho1"]["scope"] = {"kind": "lagged", "ema": 1.5}
    with pytest.raises(params.ParameterError, match=r"methods\.rho1.*ema: Input should be less than 1, found 1\.5"):
        params.validate(values)
    values["methods"]["rho1"]["scope"] = "lagged"
    with pytest.raises(params.ParameterError, match=r"methods\.rho1\.scope: .*two_pass or \{kind: lagged, ema: 0\.0\}, found 'lagged'"):
        params.validate(values)
