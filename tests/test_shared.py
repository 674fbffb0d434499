"""One network that is policy and critic: its step against a triple loop in float64, and what must not matter (METHODS, "Critic")."""

import itertools
import json
import math
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pydantic import TypeAdapter

from tests import methods
from tests.test_incorrect import trained
from tests.test_policy import (
    EIGHT_BY_ONE,
    EQUAL_LENGTHS,
    FOUR_BY_TWO,
    ONE_BY_EIGHT,
    SPANS,
    F,
    T,
    cross_entropy,
    merged,
    same,
    small_model,
    spans_of,
    whole_step,
)
from tests.test_train import ALONE, OPTIMIZER, Killed, killer, same_bits
from tests.test_weighting import exact_projection
from wmtp import flops, outcome, shared, train
from wmtp.align import future_targets
from wmtp.batches import Batch, share
from wmtp.blocks import reads_pairs
from wmtp.critic import Critic, pairs
from wmtp.method_schema import AnyMethod
from wmtp.model import load_bundle
from wmtp.plan import Plan
from wmtp.policy import check_faults

NAMES = ("verifiable_shared", "uniform_shared")
BOTH = ("value_only", "weighted")


def settings_of(name, on_incorrect="value_only", n_future=F, **changes):
    values = methods.block(name, n_future, policy_on_incorrect=on_incorrect, **changes)
    return TypeAdapter(AnyMethod).validate_python(values)


def objective(name, on_incorrect="value_only", n_future=F, **changes):
    values = methods.block(name, n_future, policy_on_incorrect=on_incorrect, **changes)
    return shared.objective(settings_of(name, on_incorrect, n_future, **changes), methods.objective(name, values=values))


def network(dtype=torch.float64, head=0.5):
    """A policy whose value head has learned something."""
    model = shared.network(settings_of(NAMES[0]), small_model(dtype))
    torch.nn.init.normal_(model.value.weight, std=head, generator=torch.Generator().manual_seed(2))
    return model


def mixed_step(**changes):
    return replace(whole_step(**changes), is_correct_B=torch.arange(len(SPANS)) % 2 == 0)


@pytest.fixture(scope="module")
def model():
    return network()


def run(model, work, step, budget=10**9, size=1):
    """(loss, gradients, log sums) of a step as the training loop makes them."""
    model.zero_grad(set_to_none=True)
    step = work.prepare(step)
    count, loss, sums = work.count(step), 0.0, {}
    for batch in [batch for rank in range(size) for batch in share(step, rank, size, budget)]:
        total, parts = work.loss(model, batch)
        (total / count).backward()
        loss += float(total.detach()) / count
        sums = {key: merged(key, sums[key], part) if sums else part for key, part in parts.items()}
    if "faults" in sums:
        check_faults(sums["faults"])
    return loss, {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}, sums


def value_logits(model, step, ce):
    """{(b, i): logit} for states P-1..L-1, as tensors with a gradient: w . [hidden, surprise so far] + bias."""
    hidden_BTD = model.trunk.hidden(step.tokens_BT)[0]
    weight, bias = model.value.weight[0], model.value.bias[0]
    found = {}
    for b, (first, last) in enumerate(spans_of(step)):
        for i in range(first - 1, last):
            surprise = math.fsum(ce[b, j, 0] for j in range(first, i + 1))
            found[b, i] = hidden_BTD[b, i] @ weight[:-1] + weight[-1] * surprise + bias
    return found


def row_weights(v, first, last, low=0.1, high=5.0):
    """exp weights of one row from its values by state, gamma 1, lam 0.95, beta 0.9, within [low, high]."""
    A = [math.fsum(0.95 ** (j - i) * (v[j] - v[j - 1]) for j in range(i, last)) for i in range(first, last + 1)]
    mean = math.fsum(A) / len(A)
    sigma = max(0.01, math.sqrt(math.fsum((a - mean) ** 2 for a in A) / len(A)))
    u = [math.exp(min(5.0, max(-5.0, (a - mean) / sigma)) / 0.9) for a in A]
    return exact_projection(u, low, high)


def by_loops(model, name, on_incorrect, step):
    """The whole step's loss as a tensor, one row, token and head at a time."""
    ce = cross_entropy(model.trunk, step)
    log_p, logit = torch.log_softmax(model.trunk(step.tokens_BT), -1), value_logits(model, step, ce)
    policy, value, n = 0.0, 0.0, 0
    for b, (first, last) in enumerate(spans_of(step)):
        correct = bool(step.is_correct_B[b])
        states = [logit[b, i] for i in range(first - 1, last)]
        target = torch.tensor(float(correct), dtype=torch.float64)
        value = value + sum(torch.nn.functional.binary_cross_entropy_with_logits(z, target) for z in states) / len(states)
        if not correct and on_incorrect == "value_only":
            continue
        v = {i: float(torch.sigmoid(logit[b, i].detach())) for i in range(first - 1, last)}
        weight = row_weights(v, first, last) if name == "verifiable_shared" else [1.0] * (last - first + 1)
        for i in range(first, last + 1):
            for h in range(F):
                policy, n = policy - weight[i - first] * log_p[b, i - h - 1, h, step.tokens_BT[b, i]], n + 1
    return policy / n + 0.5 * value / len(SPANS)


@pytest.mark.parametrize("on_incorrect", BOTH)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_takes_loss_and_gradient_of_the_triple_loop(name, on_incorrect, model):
    step = mixed_step()
    expected = by_loops(model, name, on_incorrect, step)
    gradients = dict(zip(dict(model.named_parameters()), torch.autograd.grad(expected, list(model.parameters()))))
    for budget in (10**9, 40):
        loss, found, _ = run(model, objective(name, on_incorrect), step, budget)
        assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
        same(found, gradients, 1e-5)


@pytest.mark.parametrize("on_incorrect", BOTH)
@pytest.mark.parametrize("name", NAMES)
def test_no_split_of_the_step_matters(name, on_incorrect, model):
    step, work = mixed_step(spans=EQUAL_LENGTHS), objective(name, on_incorrect)
    loss, gradients, sums = run(model, work, step, ONE_BY_EIGHT)
    for budget, size in ((FOUR_BY_TWO, 1), (EIGHT_BY_ONE, 3)):
        other_loss, other, other_sums = run(model, work, step, budget, size)
        assert other_loss == pytest.approx(loss, rel=1e-10)
        same(other, gradients)
        assert all(torch.allclose(other_sums[key], sums[key], rtol=1e-10, atol=0) for key in sums if key != "faults")


@pytest.mark.parametrize("name", NAMES)
def test_the_log_is_of_the_targets_that_train_the_policy(name, model):
    step, work = mixed_step(), objective(name)
    figures, ce = work.summary(run(model, work, step, 40)[2]), cross_entropy(model.trunk, step)
    right = [loss for (b, _, _), loss in ce.items() if b % 2 == 0]
    assert work.count(work.prepare(step)) == len(right)
    assert figures["ce"] == pytest.approx(math.fsum(right) / len(right), rel=1e-9)
    assert figures["weight_mean"] == pytest.approx(1, abs=1e-6) and figures["weight_on_incorrect"] == 0
    assert figures["value_loss"] > 0 and figures["value_brier"] > 0 and json.dumps(figures, allow_nan=False)
    both = objective(name, "weighted")
    assert 0.2 < both.summary(run(model, both, step, 40)[2])["weight_on_incorrect"] < 0.8


@pytest.mark.parametrize("on_incorrect", BOTH)
@pytest.mark.parametrize("changes", [{}, {"mix": 0.5, "head_weights": [4.0, 2.0, 1.0, 1.0]}], ids=["plain", "mixed and by head"])
def test_the_log_has_the_shares_of_weights_on_their_bounds(on_incorrect, changes, model):
    """Of the weighting's own weights, whatever is made of them then, in any split."""
    step, clip = mixed_step(), (0.8, 1.2)
    work = objective("verifiable_shared", on_incorrect, weight_clip_min=clip[0], weight_clip_max=clip[1], **changes)
    ce, found = cross_entropy(model.trunk, step), []
    logit = value_logits(model, step, ce)
    for b, (first, last) in enumerate(spans_of(step)):
        if b % 2 == 0 or on_incorrect == "weighted":
            found += row_weights({i: float(torch.sigmoid(logit[b, i].detach())) for i in range(first - 1, last)}, first, last, *clip)
    low, high = (sum(abs(w - bound) < 1e-6 for w in found) / len(found) for bound in clip)
    assert low > 0.1 and high > 0.1
    for budget in (10**9, 40):
        figures = work.summary(run(model, work, step, budget)[2])
        assert (figures["weight_at_clip_min"], figures["weight_at_clip_max"]) == pytest.approx((low, high), rel=1e-12)


def test_incorrect_rows_train_the_value_alone_and_it_reaches_the_trunk(model):
    """With the correct rows' part taken away, head 0's blocks move and the further heads and the output do not."""
    step, work = mixed_step(), objective("uniform_shared")
    batch = work.prepare(step).take(torch.arange(1, len(SPANS), 2).numpy())
    model.zero_grad(set_to_none=True)
    work.loss(model, batch)[0].backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert {"value.weight", "value.bias", "trunk.layers.0.attention.wq.weight", "trunk.norm.weight"} <= moved
    assert "trunk.output.weight" not in moved and not any("extra_heads" in name for name in moved)


def test_weights_take_no_part_in_the_gradient(model):
    """Of the policy's loss alone no gradient reaches the value head."""
    work = objective("verifiable_shared", value_coef=1e-12)
    gradients = run(model, work, mixed_step())[1]
    assert float(gradients["value.weight"].abs().max()) < 1e-9 < float(gradients["trunk.output.weight"].abs().max())


def test_the_log_has_the_spread_of_the_values_steps(model):
    step, work = mixed_step(), objective(NAMES[0])
    _, _, sums = run(model, work, step, budget=40)
    logit = value_logits(model, step, cross_entropy(model.trunk, step))
    steps = []
    for b, (first, last) in enumerate(spans_of(step)):
        v = [float(torch.sigmoid(logit[b, i].detach())) for i in range(first - 1, last)]
        steps += [after - before for before, after in itertools.pairwise(v)]
    assert work.summary(sums)["value_delta_std"] == pytest.approx(statistics.pstdev(steps), rel=1e-9)


def test_a_dead_shared_critic_is_told_and_a_living_one_is_not(capsys):
    shared.warn_if_dead([{"value_delta_std": 0.5}, {"value_delta_std": 0.004}], "train-x")
    assert "train-x: the shared critic is DEAD: the standard deviation of its values' steps is 0.004, under 0.01" in capsys.readouterr().err
    for records in ([{"value_delta_std": 0.02}], [{"loss": 1.0}], []):
        shared.warn_if_dead(records, "train-x")
    assert capsys.readouterr().err == ""


def test_an_untrained_value_head_weighs_uniformly():
    model = network(head=0.0)
    found = [run(model, objective(name), mixed_step()) for name in NAMES]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    same(found[0][1], found[1][1], 1e-6)


def test_its_values_are_the_critics_on_the_same_trunk(model):
    step, work = mixed_step(), objective("uniform_shared")
    critic = Critic(model.trunk)
    critic.value.load_state_dict(model.value.state_dict())
    critic_BT = critic(step.tokens_BT, step.response_BT)[0]
    batch = work.prepare(step)
    expected = work.value.regression(critic_BT, batch)[0].sum()
    assert float(work.loss(model, batch)[1]["value_loss"]) == pytest.approx(float(expected.detach()), rel=1e-12)


def test_values_under_autocast_are_those_of_float32_arithmetic():
    """Their differences are what a step's weights are made of."""
    model, step = network(torch.float32), mixed_step()
    targets = future_targets(step.tokens_BT, step.response_BT, F)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ce, logit = model(step.tokens_BT, targets, with_values=True)
        hidden = model.trunk.hidden(step.tokens_BT)[0]
    surprise = torch.cat([torch.zeros(len(SPANS), 1), ce[:, :-1, 0].double().cumsum(1)], 1)
    expected = hidden.double() @ model.value.weight[0, :-1].double() + surprise * model.value.weight[0, -1] + model.value.bias
    assert logit.dtype == ce.dtype == torch.float32
    torch.testing.assert_close(logit.double(), expected.detach(), rtol=0, atol=1e-5)


def test_an_incorrect_response_without_a_state_before_it_is_refused_before_the_forward():
    """Though it does not train the policy."""
    with pytest.raises(ValueError, match="response starts at position 0"):
        objective(NAMES[0]).prepare(mixed_step(spans=(SPANS[0], (0, 9), *SPANS[2:])))


@pytest.mark.parametrize("on_incorrect", BOTH)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_reach_weights_and_loss(name, on_incorrect):
    work, random = objective(name, on_incorrect), torch.Generator().manual_seed(1)
    step, found = work.prepare(mixed_step()), []
    ce, logit = (torch.rand(*shape, generator=random, requires_grad=True) for shape in ((len(SPANS), T, F), (len(SPANS), T)))
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            total, sums = work.loss(lambda *_, **__: (ce, logit), step)
        found.append([total, *torch.autograd.grad(total, (ce, logit)), *sums.values()])
        assert total.dtype == torch.float32 and all(part.dtype == torch.float64 for part in sums.values())
    assert all(torch.equal(one, other) for one, other in zip(*found))


@pytest.mark.parametrize("name", NAMES)
def test_a_filler_row_gives_zero_gradients_to_every_parameter(name, model):
    work = objective(name)
    filler = share(work.prepare(mixed_step(spans=SPANS)), 2, 3, T)[-1]
    assert filler.row_B.tolist() == [-1] and isinstance(filler, Batch)
    model.zero_grad(set_to_none=True)
    total, sums = work.loss(model, filler)
    total.backward()
    assert float(total.detach()) == 0
    assert all((part == (-math.inf if key.startswith("max_") else 0)).all() for key, part in sums.items())
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_the_order_of_rows_change_nothing(name, model):
    step, work = mixed_step(), objective(name)
    padding = torch.stack([torch.arange(T) > last for _, last in SPANS])
    order = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])
    moved = {key: value[order] for key, value in step.arrays().items()}
    loss, gradients, _ = run(model, work, step, 60)
    for other in (replace(step, tokens_BT=step.tokens_BT.masked_fill(padding, 7)), replace(step, **moved)):
        other_loss, found, _ = run(model, work, other, 60)
        assert other_loss == pytest.approx(loss, rel=1e-12)
        same(found, gradients)


def test_shared_methods_read_pairs_and_others_train_the_policy_itself():
    assert all(reads_pairs(settings_of(name)) for name in NAMES)
    plain = TypeAdapter(AnyMethod).validate_python(methods.block("baseline"))
    policy, work = small_model(torch.float32), methods.objective("baseline")
    assert shared.network(plain, policy) is policy and shared.objective(plain, work) is work


# --- the loop ----------------------------------------------------------------------------------------------------------------------


def fit(micro, data, **changes):
    """(model, records) of four steps of two pairs."""
    settings = settings_of("verifiable_shared", n_future=3)
    model = shared.network(settings, load_bundle(micro.bundle, dtype=torch.float32))
    plan = Plan(data, pairs(data)[:8], 2, 1.0, 0.01, 3, None, 1, 2)
    work = objective("verifiable_shared", n_future=3)
    return model, lambda: train.fit(model, work, plan, SimpleNamespace(**vars(OPTIMIZER)), ALONE, **changes)


def test_killed_and_resumed_equals_uninterrupted_value_head_included(micro, data, tmp_path):
    whole, go = fit(micro, data)
    records = go()
    assert whole.value.weight.any() and whole.value.bias.any()
    with pytest.raises(Killed):
        fit(micro, data, scratch=tmp_path, on_log=killer(3))[1]()
    again, go = fit(micro, data, scratch=tmp_path, on_log=lambda step, _: first.append(step))
    first = []
    assert json.dumps(go()) == json.dumps(records) and first[0] == 3
    assert same_bits(again, whole)


@pytest.mark.parametrize("on_incorrect", BOTH)
def test_the_account_counts_the_targets_that_a_row_has(micro, data, on_incorrect):
    """An incorrect row that trains the value alone has those of head 0."""
    plan = Plan(data, pairs(data)[:8], 2, 1.0, 0.01, 3)
    model, rows = shared.network(settings_of(NAMES[0]), load_bundle(micro.bundle)), plan.rows_read()
    extents = data.lengths[rows], data.response_start[rows]
    found = outcome.account(model, objective("verifiable_shared", on_incorrect, n_future=3), plan, {"loss": 2.0, "ce": 3.0})["train_flops"]
    assert found == flops.training(model, *extents, data.is_correct[rows] if on_incorrect == "value_only" else None)
    assert (found < flops.training(model, *extents)) == (on_incorrect == "value_only")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_stage_trains_on_pairs_and_saves_the_policy_alone(micro, data, tmp_path, name):
    seen, records = trained(micro, data, tmp_path, methods.block(name, 3), name)
    assert all(data.is_correct[rows].tolist() == [True, False] * 4 for rows in seen) and len(seen) == len(records) > 2
    assert all(record["weight_on_incorrect"] == 0 and record["value_loss"] > 0 for record in records)
    start, found = load_bundle(micro.bundle, dtype=torch.float32), load_bundle(tmp_path / "out")
    assert list(found.state_dict()) == list(start.state_dict()) and not same_bits(found, start)
    assert json.loads((tmp_path / "report.json").read_text())["parameters"] == sum(p.numel() for p in start.parameters())
