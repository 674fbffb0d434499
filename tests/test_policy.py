"""The policy's objective on a small Transformer, against loops over rows, tokens and heads in float64 (METHODS, "Loss")."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from tests import methods
from wmtp import shared
from wmtp.align import align_future, future_targets
from wmtp.batches import Batch, share
from wmtp.blocks import reads_beta
from wmtp.bundle import ModelArgs
from wmtp.method_schema import AnyMethod, UniformMethod
from wmtp.model import Transformer
from wmtp.policy import (
    PolicyObjective,
    WeightError,
    _faults,
    check_faults,
    check_reached,
    check_weights,
    policy_objective,
    policy_signal,
)
from wmtp.scores import write_scores
from wmtp.tokens import Row, TokenData, write_split
from wmtp.train import train_step
from wmtp.weighting import METHODS, Method, MethodError, method_of
from wmtp.world import World

F, T, VOCABULARY = 4, 20, 23
# P and L of each row: the shortest prompt that four heads allow, a response of one token, no padding, much padding.
SPANS = ((4, 19), (9, 9), (5, 19), (7, 14), (6, 19), (4, 8), (12, 19), (10, 16))
ADVANTAGE = {**methods.PIPELINE, "beta": 0.9}
NAMES = ["ntp", "baseline", "verifiable", "rho1"]


@pytest.fixture(scope="module")
def models():
    """By number of heads, in float64; their weights are never changed."""
    return {n_future: small_model(torch.float64, n_future) for n_future in (1, F)}


def small_model(dtype, n_future=F):
    args = ModelArgs(
        dim=16, n_layers=n_future + 1, n_heads=2, n_kv_heads=2, vocab_size=VOCABULARY, multiple_of=8, ffn_dim_multiplier=None,
        norm_eps=1e-5, rope_theta=10000.0, n_future_tokens=n_future,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Transformer(args).to(dtype)


def heads(name):
    return 1 if name == "ntp" else F


def objective(name, mix=1.0, n_future=None, **changes):
    return methods.objective(name, [whole_step(name)], n_future or heads(name), mix=mix, **changes)


def reordered(step, order):
    return replace(step, **{key: value[order] for key, value in vars(step).items() if isinstance(value, torch.Tensor)})


def whole_step(name="baseline", spans=SPANS, seed=0):
    random = torch.Generator().manual_seed(seed)
    position = torch.arange(T)
    response = torch.stack([(position >= first) & (position <= last) for first, last in spans])
    read = torch.stack([position <= last for _, last in spans])
    tokens = torch.randint(1, VOCABULARY, (len(spans), T), generator=random) * read
    signal = torch.rand(len(spans), T, generator=random) * (4 if METHODS[name].signal == "reference" else 1) * read
    correct = torch.ones(len(spans), dtype=torch.bool)
    decisive = torch.tensor([(-1, -1) if row % 3 == 0 else (first + 1, first + 3) for row, (first, _) in enumerate(spans)])
    return Batch(torch.arange(len(spans)), tokens, response, signal if METHODS[name].signal else None, None, correct, span_B2=decisive)


def train(model, objective, step, micro_batches):
    """(loss, gradients, log sums) of a step as the training loop makes them: divided once, by the count of the whole step."""
    model.zero_grad(set_to_none=True)
    count, loss, sums = objective.count(step), 0.0, {}
    for batch in micro_batches:
        total, parts = objective.loss(model, batch)
        (total / count).backward()
        loss += float(total.detach()) / count
        sums = {key: merged(key, sums[key], part) if sums else part for key, part in parts.items()}
    if "faults" in sums:
        check_faults(sums["faults"])
    return loss, {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}, sums


def merged(key, one, other):
    return torch.maximum(one, other) if key.startswith("max_") else one + other


def prepared(model, objective, step, token_budget=10**9, size=1):
    step = objective.prepare(step)
    batches = [batch for rank in range(size) for batch in share(step, rank, size, token_budget)]
    if objective.scored_first:
        batches = objective.weigh_step(model, step, batches, World(0, 1, torch.device("cpu")))
    return train(model, objective, step, batches)


def same(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        distance = float((found[name] - gradient).abs().max()) / max(float(gradient.abs().max()), 1e-3)
        assert distance <= tolerance, f"{name}: gradients differ by {distance:.2e}"


def cross_entropy(model, step):
    """ce[b][i][h] = -log p of token i by head h, from the plain logits in float64; only where the position exists."""
    with torch.no_grad():
        log_p = torch.log_softmax(model(step.tokens_BT).double(), dim=-1)
    n_heads, found = log_p.shape[2], {}
    for b, (first, last) in enumerate(spans_of(step)):
        for i in range(first, last + 1):
            for h in range(n_heads):
                if i - h - 1 >= 0:
                    found[b, i, h] = -float(log_p[b, i - h - 1, h, step.tokens_BT[b, i]])
    return found


def spans_of(step):
    return [(int(row.nonzero()[0]), int(row.nonzero()[-1])) for row in step.response_BT]


def token_weight(name, step, ce):
    """{(b, i): weight} as single precision holds it; the weightings themselves have tests of their own."""
    if name == "verifiable":
        weight = METHODS[name].function()(step.signal_BT, step.response_BT, **ADVANTAGE)
        return {(b, i): float(weight[b, i]) for b, i in step.response_BT.nonzero().tolist()}
    found = {}
    for b, (first, last) in enumerate(spans_of(step)):
        n = last - first + 1
        m = math.ceil(0.6 * n - 1e-9)
        excess = {i: ce[b, i, 0] - float(step.signal_BT[b, i]) for i in range(first, last + 1)} if name == "rho1" else {}
        best = sorted(excess, key=lambda i: (-excess[i], i))[:m]
        for i in range(first, last + 1):
            found[b, i] = 1.0 if name != "rho1" else float(np.float32(n / m)) * (i in best)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_loss_equals_the_triple_loop(name, models):
    model, step = models[heads(name)], whole_step(name)
    ce = cross_entropy(model, step)
    weight = token_weight(name, step, ce)
    expected = math.fsum(weight[b, i] * loss for (b, i, _), loss in ce.items()) / len(ce)
    for token_budget in (10**9, 40):
        assert prepared(model, objective(name), step, token_budget)[0] == pytest.approx(expected, rel=1e-10)


def test_one_head_is_shifted_cross_entropy(models):
    model, step = models[1], whole_step()
    logits = model(step.tokens_BT)[:, :-1, 0]
    labels = step.tokens_BT.masked_fill(~step.response_BT, -100)[:, 1:]
    expected = functional.cross_entropy(logits.reshape(-1, VOCABULARY), labels.reshape(-1), ignore_index=-100)
    model.zero_grad()
    expected.backward()
    reference = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    loss, gradients, _ = prepared(model, objective("ntp"), step)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-12)
    same(gradients, reference, 1e-12)


@pytest.mark.parametrize("name", ["ntp", "baseline"])
def test_uniform_equals_the_sums_without_weights_to_the_bit(name):
    model, step = small_model(torch.float32, heads(name)), whole_step()
    targets = align_future(step.tokens_BT.masked_fill(~step.response_BT, -100), heads(name), -100)
    unweighted = model(step.tokens_BT, targets).sum()
    model.zero_grad()
    unweighted.backward()
    reference = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    total, _ = objective(name).loss(model, objective(name).prepare(step))
    total.backward()
    assert torch.equal(total, unweighted)
    assert all(torch.equal(parameter.grad, reference[key]) for key, parameter in model.named_parameters())


@pytest.mark.parametrize("name", NAMES)
def test_losses_of_a_half_precision_model_are_single_precision(name):
    """Its logits are rounded, their softmax is not: 0.03 nats lie between the two."""
    model, step = small_model(torch.bfloat16, heads(name)), whole_step(name)
    ce = cross_entropy(model, step)
    weight = token_weight(name, step, ce)
    total, _ = objective(name).loss(model, objective(name).prepare(step))
    assert total.dtype == torch.float32
    assert float(total.detach()) == pytest.approx(math.fsum(weight[b, i] * loss for (b, i, _), loss in ce.items()), rel=1e-5)


def test_under_autocast_losses_and_entropies_are_single_precision():
    """Logits are products in bfloat16, their softmax is not."""
    model, step = small_model(torch.float32), whole_step()
    targets = align_future(step.tokens_BT.masked_fill(~step.response_BT, -100), F, -100)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ce, entropy = model(step.tokens_BT, targets, with_entropy=True)
        logits = model(step.tokens_BT)
    assert ce.dtype == entropy.dtype == torch.float32 and logits.dtype == torch.bfloat16
    log_p = torch.log_softmax(logits.double(), -1)[targets >= 0]
    torch.testing.assert_close(ce[targets >= 0].double(), -log_p.gather(1, targets[targets >= 0][:, None])[:, 0], rtol=1e-5, atol=0)
    torch.testing.assert_close(entropy[targets >= 0].double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", methods.SEPARATE)
def test_autocast_does_not_reach_weights_and_loss(name):
    """To the bit, gradients included: what the network gave is all that bfloat16 may touch."""
    work = objective(name, mix=0.5, n_future=F, head_weights=[4.0, 2.0, 1.0, 1.0])
    step, found = work.prepare(whole_step(name)), []
    ce = torch.rand(len(SPANS), T, F, generator=torch.Generator().manual_seed(1), requires_grad=True)
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            total, sums = work.loss(lambda *_, with_entropy=False, **__: (ce, ce.detach()) if with_entropy else ce, step)
        found.append([total, *torch.autograd.grad(total, ce), *sums.values()])
        assert total.dtype == torch.float32 and all(part.dtype == torch.float64 for part in sums.values())
    assert all(torch.equal(one, other) for one, other in zip(*found))


ONE_BY_EIGHT, FOUR_BY_TWO, EIGHT_BY_ONE = 8 * T, 2 * T, T
EQUAL_LENGTHS = ((4, 19), (18, 19), (5, 19), (17, 19), (6, 19), (4, 19), (12, 19), (10, 19))


@pytest.mark.slow
@pytest.mark.parametrize("name, mix", [*((name, 1.0) for name in methods.SEPARATE), ("verifiable", 0.3), ("rho1", 0.3)])
def test_gradients_do_not_depend_on_the_split(name, mix, models):
    """Rows of equal length and very different numbers of targets, where a mean of means would be biased."""
    model, step, work = models[heads(name)], whole_step(name, EQUAL_LENGTHS), objective(name, mix)
    assert [len(share(step, 0, 1, budget)) for budget in (ONE_BY_EIGHT, FOUR_BY_TWO, EIGHT_BY_ONE)] == [1, 4, 8]
    loss, gradients, sums = prepared(model, work, step, ONE_BY_EIGHT)
    for budget, size in ((FOUR_BY_TWO, 1), (EIGHT_BY_ONE, 3)):
        other_loss, other, other_sums = prepared(model, work, step, budget, size)
        assert other_loss == pytest.approx(loss, rel=1e-10)
        same(other, gradients)
        assert all(torch.allclose(other_sums[key], sums[key], rtol=1e-10, atol=0) for key in sums)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["sequence", "two_pass"])
@pytest.mark.parametrize("head_weights", [None, (4.0, 2.0, 1.0, 0.0)])
@pytest.mark.parametrize(
    "form, mode", [*((form, mode) for form in methods.EXCESS_FORMS for mode in methods.HEAD_MODES), ("softmax_over_heads", None)]
)
def test_gradients_of_every_selection_do_not_depend_on_the_split(form, mode, head_weights, scope, models):
    model, step = models[F], whole_step("rho1", EQUAL_LENGTHS)
    work = replace(methods.objective("rho1", values=methods.excess_block(form, mode, scope=scope)), head_weights=head_weights)
    _, gradients, sums = prepared(model, work, step, ONE_BY_EIGHT)
    assert float(sums["w"].sum() / sums["n"].sum()) == pytest.approx(1, abs=1e-6)
    _, other, _ = prepared(model, work, step, EIGHT_BY_ONE, 3)
    same(other, gradients)


@pytest.mark.parametrize("name", ["rho1", "inverted_k", "dft", "focal", "loss_topk", "entropy_topk"])
def test_a_two_pass_step_is_the_whole_step_in_one_and_its_weights_are_the_functions(name, models):
    """Unequal rows, and one row twice: the population is the step, so that rows get unequal shares of it."""
    model, step, work = models[F], whole_step(name), objective(name, scope="two_pass")
    step = reordered(step, torch.tensor([0, 1, 2, 3, 4, 5, 6, 0]))
    _, gradients, sums = prepared(model, work, step)
    for budget, size in ((60, 1), (30, 3)):
        other = prepared(model, work, step, budget, size)
        same(other[1], gradients)
        assert all(torch.allclose(other[2][key], sums[key], rtol=1e-10, atol=0) for key in sums)
    ready = work.prepare(step)
    (batch,) = work.weigh_step(model, ready, [ready], World(0, 1, torch.device("cpu")))
    targets = align_future(step.tokens_BT.masked_fill(~step.response_BT, -100), F, -100)
    ce, entropy = model(step.tokens_BT, targets, with_entropy=True)
    assert torch.equal(batch.weight_BTF, METHODS[name].weigh(vars(step) | {"ce_BTF": ce.detach(), "entropy_BTF": entropy}, work.settings))
    shares = batch.weight_BTF.sum((1, 2)) / (targets != -100).sum((1, 2))
    assert float(shares.max() - shares.min()) > 0.02 and not batch.weight_BTF.requires_grad


def test_a_faulty_two_pass_weight_is_refused_before_the_second_pass(models):
    work = PolicyObjective(Faulty("1.1", None, True), {"scope": "two_pass"}, F)
    with pytest.raises(WeightError, match=r"mean 1\.1"):
        prepared(models[F], work, whole_step())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_unequal_rows_do_not_depend_on_the_split_in_single_precision(name):
    model, step, work = small_model(torch.float32), whole_step(name), objective(name, n_future=F)
    gradients = prepared(model, work, step)[1]
    same(prepared(model, work, step, 30, 2)[1], gradients, 2e-5)


@pytest.mark.parametrize("name", methods.SEPARATE)
def test_a_filler_row_gives_zero_gradients_to_every_parameter(name, models):
    """Three ranks, four rows: some rank has a micro-batch without a target and must join every collective all the same."""
    model, work = models[heads(name)], objective(name)
    step = work.prepare(whole_step(name))
    filler = share(step, 2, 3, T)[-1]
    assert filler.row_B.tolist() == [-1] and not filler.response_BT.any()
    model.zero_grad(set_to_none=True)
    total, sums = work.loss(model, filler)
    total.backward()
    assert float(total.detach()) == 0
    assert all((part == (-math.inf if key.startswith("max_") else 0)).all() for key, part in sums.items())
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and (parameter.grad == 0).all(), key


@pytest.mark.parametrize("name", ["verifiable", "rho1"])
def test_weights_take_no_part_in_the_gradient(name, models):
    """The gradient is that of fixed weights, and none reaches the signal."""
    model, step = models[F], whole_step(name)
    ce = cross_entropy(model, step)
    weight = torch.zeros(len(SPANS), T)
    for place, value in token_weight(name, step, ce).items():
        weight[place] = value
    fixed = prepared(model, objective("baseline"), step)[1], train(model, objective("baseline"), step, [replace(step, weight_BT=weight)])[1]
    signal = step.signal_BT.clone().requires_grad_()
    found = prepared(model, objective(name), replace(step, signal_BT=signal))[1]
    same(found, fixed[1])
    assert any(not torch.allclose(found[key], fixed[0][key], rtol=1e-3) for key in found), "the weights have an effect"
    assert signal.grad is None


class Proportional(Method):
    """Each target weighs as its loss does, mean 1: a weighting with a gradient, if it were let in."""

    def function(self):
        def head_weights(ce_BTF, signal_BT, response_BT):
            return ce_BTF * align_future(response_BT.double(), ce_BTF.shape[2], 0.0).sum() / ce_BTF.sum()

        return head_weights


def test_weights_made_from_the_forward_are_constants_to_the_gradient(models):
    model, step = models[F], whole_step()
    targets = align_future(step.tokens_BT.masked_fill(~step.response_BT, -100), F, -100)
    model.zero_grad()
    ce = model(step.tokens_BT, targets)
    (ce.detach() / ce.detach().sum() * ce).sum().backward()
    fixed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    same(prepared(model, PolicyObjective(Proportional("", None, True), {}, F), step)[1], fixed)


@pytest.mark.parametrize("name", ["verifiable", "rho1"])
def test_mix_blends_with_uniform(name, models):
    model, step = models[F], whole_step(name)
    uniform, full = prepared(model, objective("baseline"), step)[1], prepared(model, objective(name), step)[1]
    for mix in (0.0, 0.3, 1.0):
        found = prepared(model, objective(name, mix), step)[1]
        same(found, {key: uniform[key] + mix * (full[key] - uniform[key]) for key in full}, 1e-6)


@pytest.mark.parametrize("name", ["baseline", "verifiable", "rho1"])
def test_head_weights_scale_the_heads_losses_over_their_mean(name, models):
    """4, 2, 1, 1 count as 2, 1, 1/2, 1/2: the mean over all targets stays 1."""
    model, step = models[F], whole_step(name)
    ce = cross_entropy(model, step)
    weight = token_weight(name, step, ce)
    work = objective(name, head_weights=[4.0, 2.0, 1.0, 1.0])
    loss, _, sums = prepared(model, work, step, 40)
    expected = math.fsum(weight[b, i] * (2.0, 1.0, 0.5, 0.5)[h] * one for (b, i, h), one in ce.items()) / len(ce)
    assert loss == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(sums["w"] / sums["n"], torch.tensor([2.0, 1.0, 0.5, 0.5]).double(), rtol=0, atol=1e-5)


def test_equal_head_weights_are_none(models):
    step = whole_step("verifiable")
    found = [prepared(models[F], objective("verifiable", head_weights=value), step)[1] for value in (None, [0.5] * F)]
    same(found[1], found[0], 1e-12)


def test_head_weights_keep_each_rows_mean_where_heads_have_unequal_shares(models):
    """A pooled selection gives head 0 few tokens; scaled up it would raise the learning rate."""
    model, step = models[F], whole_step("rho1")
    work = methods.objective("rho1", values=methods.excess_block("topk", "pooled") | {"head_weights": [8.0, 1.0, 1.0, 1.0]})
    for row in range(len(SPANS)):
        sums = prepared(model, work, reordered(step, torch.tensor([row])))[2]
        assert float(sums["w"].sum() / sums["n"].sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("mix", [0.0, 0.1, 0.5])
def test_mixed_weights_keep_mean_one_and_the_mask(mix):
    step = whole_step("verifiable")
    full, mixed = (objective("verifiable", share).prepare(step).weight_BT for share in (1.0, mix))
    torch.testing.assert_close(mixed, (1 + mix * (full - 1)) * step.response_BT, rtol=0, atol=1e-6)
    assert mixed.dtype == full.dtype == torch.float32
    assert float(mixed[step.response_BT].double().mean()) == pytest.approx(1, abs=1e-6) and (mixed[~step.response_BT] == 0).all()


@pytest.mark.parametrize("name", methods.SEPARATE)
def test_weights_have_mean_one_in_every_head(name, models):
    sums = prepared(models[heads(name)], objective(name), whole_step(name), 40)[2]
    n_targets = sum(last - first + 1 for first, last in SPANS)
    assert sums["n"].tolist() == [n_targets] * len(sums["n"])
    means = sums["w"] / sums["n"]
    if name in ("head_decay", "adamtp_mask"):  # between the heads they choose, over all of them they do not
        assert (means.diff() < 0).all()
        means = means.mean()[None]
    torch.testing.assert_close(means, torch.ones_like(means), rtol=0, atol=1e-6)


def test_the_count_is_of_all_targets_of_all_heads():
    n_targets = sum(last - first + 1 for first, last in SPANS)
    for n_future in (1, 2, 4):
        assert objective("baseline", n_future=n_future).count(whole_step()) == n_targets * n_future


@pytest.mark.parametrize("n_future", [1, 2, 4])
def test_a_prompt_shorter_than_the_heads_is_refused(n_future):
    step = whole_step(spans=((n_future, 9), (12, 19)))
    objective("baseline", n_future=n_future).prepare(step)
    with pytest.raises(WeightError, match=rf"prompt of {n_future} tokens is shorter than the {n_future + 1} heads"):
        objective("baseline", n_future=n_future + 1).prepare(step)
    with pytest.raises(WeightError, match="shorter than"):
        objective("rho1", n_future=n_future + 1).prepare(step)


@pytest.mark.parametrize("name", methods.SEPARATE)
def test_padding_labels_and_signals_at_the_prompt_change_nothing(name, models):
    model, step = models[heads(name)], whole_step(name)
    position = torch.arange(T)
    padding = torch.stack([position > last for _, last in SPANS])
    # A critic's value belongs to a state: the last prompt token has one that counts, the end of text one that does not.
    states = torch.stack([(position >= first - 1) & (position < last) for first, last in SPANS])
    read = states if METHODS[name].signal == "critic" else step.response_BT
    other = replace(step, tokens_BT=step.tokens_BT.masked_fill(padding, 7), is_correct_B=~step.is_correct_B)
    if step.signal_BT is not None:
        other = replace(other, signal_BT=step.signal_BT.masked_fill(~read, 1e3))
    (loss, gradients, sums), (other_loss, other_gradients, other_sums) = (prepared(model, objective(name), s, 100) for s in (step, other))
    assert other_loss == pytest.approx(loss, rel=1e-12)
    same(other_gradients, gradients, 1e-12)
    # Whether a row is right matters to the log alone.
    assert all(torch.allclose(other_sums[key], sums[key], rtol=1e-12, atol=0) for key in sums if key != "w_incorrect")


@pytest.mark.parametrize("name", methods.SEPARATE)
def test_the_order_of_rows_does_not_matter(name, models):
    model, step, order = models[heads(name)], whole_step(name), torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])
    permuted, work = reordered(step, order), objective(name)
    (loss, gradients, _), (other_loss, other, _) = prepared(model, work, step), prepared(model, work, permuted)
    assert other_loss == pytest.approx(loss, rel=1e-12 if METHODS[name].needs_forward else 1e-7)
    same(other, gradients, 1e-10 if METHODS[name].needs_forward else 1e-6)
    if not METHODS[name].needs_forward:
        torch.testing.assert_close(work.prepare(permuted).weight_BT, work.prepare(step).weight_BT[order], rtol=0, atol=1e-6)


def test_a_token_changes_no_loss_of_a_target_before_it(models):
    model = models[F]
    step = whole_step("baseline", ((4, 12),))
    changed = replace(step, tokens_BT=step.tokens_BT.clone())
    changed.tokens_BT[0, 12] = 1 + int(step.tokens_BT[0, 12]) % (VOCABULARY - 1)
    ce, other = cross_entropy(model, step), cross_entropy(model, changed)
    assert all((ce[key] == pytest.approx(other[key], abs=1e-12)) == (key[1] != 12) for key in ce)


# --- weights that break their promise ----------------------------------------------------------------------------------------------


def valid_mask():
    return torch.tensor([[False, True, True, True], [False, False, True, True]])


def test_good_weights_are_returned_as_they_are():
    for good in (valid_mask().float(), torch.tensor([[0, 2.0, 0.5, 0.5], [0, 0, 1.5, 0.5]])):
        assert check_weights(good, valid_mask()) is good
    empty = torch.zeros(2, 3)
    assert check_weights(empty, torch.zeros(2, 3, dtype=torch.bool)) is empty


@pytest.mark.parametrize(
    "place, value, message",
    [
        ((0, 1), math.nan, "not a number"),
        ((0, 0), math.nan, "not a number"),
        ((0, 2), math.inf, "infinite"),
        ((1, 2), -1.0, "negative"),
        ((1, 3), 1.5, r"mean 1\.100000 over 5 targets"),
        ((1, 3), 0.99, "mean 0.998"),
        ((0, 0), 1.0, "mean 1.2"),
    ],
)
def test_a_bad_weight_is_refused_with_what_was_found(place, value, message):
    weight = valid_mask().float()
    weight[place] = value
    with pytest.raises(WeightError, match=message):
        check_weights(weight, valid_mask())


@pytest.mark.parametrize("scope", ["sequence", "two_pass"])
@pytest.mark.parametrize("mode", ["shared_target", "per_head", "pooled"])
def test_a_selection_of_nothing_is_refused(mode, scope, models):
    """All excess is below 0, and without alpha percentile_emphasis has nothing left to select."""
    work = methods.objective("rho1", values=methods.excess_block("percentile_emphasis", mode, scope=scope))
    work, step = replace(work, settings={**work.settings, "alpha": 0.0}), whole_step("rho1")
    with pytest.raises(WeightError, match=rf"of {1 if scope == 'two_pass' else len(SPANS)} populations that have targets none is selected"):
        prepared(models[F], work, replace(step, signal_BT=step.signal_BT + 100))


def test_one_row_of_which_nothing_is_selected_is_refused_among_many(models):
    """Though it has one of 74 tokens, and the mean is nearly 1."""
    work = methods.objective("rho1", values=methods.excess_block("percentile_emphasis", "shared_target"))
    work, step = replace(work, settings={**work.settings, "alpha": 0.0, "percentile": 0.0}), whole_step("rho1")
    step.signal_BT[:] = -100.0
    step.signal_BT[1] = 100.0
    with pytest.raises(WeightError, match=r"of 1 populations that have targets none is selected"):
        prepared(models[F], work, step)


def test_a_row_of_which_two_passes_select_nothing_is_none_of_its_population(models):
    step, work = whole_step("rho1"), methods.objective("rho1", scope="two_pass")
    step.signal_BT[1] = 100.0
    weights = prepared(models[F], work, step)[2]
    assert float(weights["w"].sum() / weights["n"].sum()) == pytest.approx(1, abs=1e-6)


def test_no_target_is_no_empty_selection():
    none = torch.zeros(2, 3, F, dtype=torch.bool)
    for population in (None, (1, 2), (0, 1, 2), ()):
        assert not _faults(none.float(), none, population)[:4].any()


def test_a_weight_beyond_the_targets_is_refused_though_the_mean_is_one():
    weight = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    with pytest.raises(WeightError, match="reach beyond them"):
        check_weights(weight, valid_mask())


@pytest.mark.parametrize("content", [math.nan, math.inf])
def test_a_broken_value_stops_the_step_before_its_forward(content):
    step = whole_step("verifiable")
    step.signal_BT[2, 8] = content
    with pytest.raises(WeightError, match="look at the signal"):
        objective("verifiable").prepare(step)


@pytest.mark.parametrize("needs_forward", [False, True])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda weight: weight.half(), "weights are float16, expected float32 or float64 and detached"),
        (lambda weight: weight.bfloat16(), "weights are bfloat16, expected"),
        (lambda weight: weight.clone().requires_grad_(), "weights are float32, part of a graph, expected"),
    ],
)
def test_weights_of_another_type_or_in_a_graph_are_refused(change, message, needs_forward, models):
    class Changed(Faulty):
        def function(self):
            whole = super().function()
            if self.needs_forward:
                return lambda ce_BTF, signal_BT, response_BT, **_: change(whole(ce_BTF, signal_BT, response_BT).float())
            return lambda signal_BT, response_BT: change(whole(signal_BT, response_BT).float())

    with pytest.raises(WeightError, match=message):
        prepared(models[F], PolicyObjective(Changed("1", None, needs_forward), {}, F), whole_step())


class Uneven(Method):
    """A weighting that gives each row's tokens 0.05 and 1.95 in turn, mean 1; a row here has an even number of them."""

    def function(self):
        def of_tokens(response_BT):
            odd_BT = response_BT.cumsum(1) % 2 == 1
            return torch.where(odd_BT, 0.05, 1.95) * response_BT

        if self.needs_forward:
            return lambda ce_BTF, response_BT, **_: align_future(of_tokens(response_BT), ce_BTF.shape[2], 0.0)
        return lambda response_BT, **_: of_tokens(response_BT)


@pytest.mark.parametrize("needs_forward", [False, True])
@pytest.mark.parametrize(
    "low, high, mix, is_refused", [(0.1, 5, 1, 1), (0.01, 1.5, 1, 1), (0.04, 2, 1, 0), (0.1, 5, 0.5, 1), (0.04, 2, 0.5, 0)]
)
def test_a_step_with_weights_outside_their_clips_is_refused(needs_forward, low, high, mix, is_refused):
    step, clips = whole_step(spans=((6, 15), (9, 18), (8, 11))), {"weight_clip_min": low, "weight_clip_max": high}
    work = PolicyObjective(Uneven("uneven", None, needs_forward), clips, F, mix)
    if is_refused:
        return refused(work, step, r"weights lie outside their clips")
    train_step(small_model(torch.float64), torch.optim.SGD([torch.zeros(1)]), work, step, World(0, 1, torch.device("cpu")), 40, 1.0)


class Faulty(Method):
    """A weighting whose every weight is its name, on the right entries."""

    def function(self):
        if self.needs_forward:
            return lambda ce_BTF, signal_BT, response_BT, **_: align_future(float(self.weighting) * response_BT, ce_BTF.shape[2], 0.0)
        return lambda signal_BT, response_BT: float(self.weighting) * response_BT


@pytest.mark.parametrize("needs_forward", [False, True])
@pytest.mark.parametrize("weight", ["nan", "-1", "1.1", "0"])
def test_weights_are_checked_every_step_whether_or_not_they_need_the_forward(needs_forward, weight, models):
    with pytest.raises(WeightError):
        prepared(models[F], PolicyObjective(Faulty(weight, None, needs_forward), {}, F), whole_step())


@pytest.mark.parametrize("weight", ["nan", "-1", "1.1", "0"])
def test_a_fault_is_found_on_the_device_and_makes_the_loss_no_number(weight, models):
    """Nothing waits for the weights, and no rank reaches its optimizer with wrong ones."""
    total, sums = PolicyObjective(Faulty(weight, None, True), {}, F).loss(models[F], whole_step())
    assert total.isnan() and sums["faults"].isnan().any() | sums["faults"].any()
    good, sums = PolicyObjective(Faulty("1", None, True), {}, F).loss(models[F], whole_step())
    assert good.isfinite() and not sums["faults"][:4].any()


@pytest.mark.parametrize("weight, message", [("nan", "not a number"), ("1.1", r"mean 1\.100000 over 296 targets")])
def test_a_step_with_a_fault_changes_no_weight_and_says_what_it_was(weight, message):
    model = small_model(torch.float64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    work, optimizer = PolicyObjective(Faulty(weight, None, True), {}, F), torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(WeightError, match=message):
        train_step(model, optimizer, work, whole_step(), World(0, 1, torch.device("cpu")), 40, 1.0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("lose", [torch.zeros_like, lambda weight_BT: weight_BT.roll(1, 1)], ids=["gone", "one place late"])
def test_weights_that_are_lost_after_their_check_change_no_model(lose):
    class Losing(PolicyObjective):
        def prepare(self, step):
            ready = super().prepare(step)
            return replace(ready, weight_BT=lose(ready.weight_BT))

    model = small_model(torch.float64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer, one_rank = torch.optim.SGD(model.parameters(), lr=1.0), World(0, 1, torch.device("cpu"))
    with pytest.raises(WeightError, match="weights that reached the loss have mean"):
        train_step(model, optimizer, Losing(METHODS["baseline"], {}, F), whole_step(), one_rank, 40, 1.0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Waits(TorchDispatchMode):
    """Operations whose result the host has to see, or that copy from the host, while a training step runs."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(index is not None and index.dtype == torch.bool for index in args[1])
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "equal", "_unique2"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("head_weights", [None, [4.0, 2.0, 1.0, 1.0]])
@pytest.mark.parametrize("name", METHODS)
def test_from_the_models_losses_to_the_steps_sums_nothing_waits_for_the_device(name, head_weights):
    changes = {"mix": 0.5, "head_weights": head_weights}
    settings = TypeAdapter(AnyMethod).validate_python(methods.block(name, F, **changes))
    work = shared.objective(settings, objective(name, n_future=F, **changes))
    step = work.prepare(whole_step(name))
    ce = torch.rand(len(SPANS), T, F, dtype=torch.float64, requires_grad=True)
    logit = torch.rand(len(SPANS), T, dtype=torch.float64, requires_grad=True)

    def given(*_, with_entropy=False, with_values=False, **__):
        return (ce, logit) if with_values else (ce, ce.detach()) if with_entropy else ce

    with Waits() as waits:
        total, _ = work.loss(given, step)
        total.backward()
    assert not waits.found
    with waits:
        bool(ce.sum() > 0), ce[ce > 0]
    assert waits.found, "the watch sees what it should"


# --- the log -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_summary_is_of_the_whole_step(name, models):
    model, work = models[heads(name)], objective(name)
    step = replace(whole_step(name), is_correct_B=torch.arange(len(SPANS)) % 3 > 0)
    loss, _, sums = prepared(model, work, step, 40)
    ce = cross_entropy(model, step)
    weight = token_weight(name, step, ce)
    w, n = [weight[b, i] for b, i, _ in ce], len(ce)
    figures = work.summary(sums)
    assert all(isinstance(value, float) for value in figures.values()) and json.dumps(figures, allow_nan=False)
    assert figures["loss"] == pytest.approx(loss, rel=1e-7)
    assert figures["ce"] == pytest.approx(math.fsum(ce.values()) / n, rel=1e-9)
    for h in range(work.n_future):
        of_head = [loss for (_, _, head), loss in ce.items() if head == h]
        assert figures[f"ce_head{h}"] == pytest.approx(math.fsum(of_head) / len(of_head), rel=1e-9)
        chosen = [weight[b, i] > 0 for b, i, head in ce if head == h]
        assert figures[f"weight_selected_head{h}"] == pytest.approx(sum(chosen) / len(chosen))
    assert figures["weight_mean"] == pytest.approx(1, abs=1e-6)
    assert figures["weight_std"] == pytest.approx(math.sqrt(math.fsum((x - 1) ** 2 for x in w) / n), abs=1e-6)
    assert (figures["weight_min"], figures["weight_max"]) == (pytest.approx(min(w)), pytest.approx(max(w)))
    assert figures["weight_ess"] == pytest.approx(math.fsum(w) ** 2 / math.fsum(x * x for x in w) / n, rel=1e-6)
    share = [x / math.fsum(w) for x in w if x > 0]
    assert figures["weight_concentration"] == pytest.approx(math.exp(-math.fsum(p * math.log(p) for p in share)) / n, rel=1e-6)
    assert figures["weight_selected"] == pytest.approx(sum(x > 0 for x in w) / n)
    wrong = math.fsum(weight[b, i] for b, i, _ in ce if b % 3 == 0)
    assert figures["weight_on_incorrect"] == pytest.approx(wrong / math.fsum(w))


def test_what_the_weighting_notes_is_logged_whatever_the_split(models):
    step = whole_step("verifiable")
    work = methods.objective("verifiable", weight_clip_min=0.0, weight_clip_max=1e9)
    work = replace(work, settings={**work.settings, "beta": 0.02})
    for budget in (10**9, 40):
        figures = work.summary(prepared(models[F], work, step, budget)[2])
        assert figures["weight_beta"] > 0.03 and figures["weight_concentration"] == pytest.approx(0.3, abs=1e-3)
        assert figures["weight_at_clip_max"] == 0
    usual = objective("verifiable").summary(prepared(models[F], objective("verifiable"), step, 40)[2])
    assert usual["weight_beta"] == pytest.approx(0.9) and 0 <= usual["weight_at_clip_min"] < 0.5
    assert "weight_beta" not in objective("baseline").summary(prepared(models[F], objective("baseline"), step)[2])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_with_bounds_logs_the_shares_of_weights_on_them_and_no_other(name, models):
    work, step, n_targets = objective(name, n_future=F), whole_step(name), sum(last - first + 1 for first, last in SPANS)
    if METHODS[name].needs_forward:
        step = replace(step, signal_BT=torch.rand(len(SPANS), T, generator=torch.Generator().manual_seed(0)))
    figures = work.summary(prepared(models[F], work, step)[2])
    shares = [figures.get(f"weight_at_clip_{end}") for end in ("min", "max")]
    if "weight_clip_min" not in methods.block(name):
        assert shares == [None, None]
    else:
        assert all(0 <= share <= 1 and share * n_targets == pytest.approx(round(share * n_targets), abs=1e-4) for share in shares)


# --- from params to an objective ---------------------------------------------------------------------------------------------------


def never():
    raise AssertionError("only a weighting that takes beta may read it")


def made(name, beta=None, seed=None, steps=None, **changes):
    block = TypeAdapter(AnyMethod).validate_python(methods.block(name, **changes))
    return policy_objective(name, block, beta or never, seed or never, steps or never)


def test_what_is_not_in_a_block_is_read_by_the_methods_that_name_it_alone():
    uniform = made("baseline")
    assert (uniform.method, dict(uniform.settings), uniform.n_future, uniform.mix) == (METHODS["baseline"], {}, 4, 1.0)
    rho1 = made("rho1", n_future=2, mix=0.5, keep_fraction=0.7)
    assert dict(rho1.settings) == {"selection": "topk", "head_mode": "shared_target", "scope": "sequence", "keep_fraction": 0.7}
    assert (rho1.n_future, rho1.mix, rho1.head_weights) == (2, 0.5, None)
    assert dict(made("verifiable", beta=lambda: 0.7).settings) == {**ADVANTAGE, "beta": 0.7}
    assert dict(made("random_k", seed=lambda: 5).settings) == {"keep_fraction": 0.6, "seed": 5}
    assert made("shuffled", beta=lambda: 0.7, seed=lambda: 5).settings["seed"] == 5
    assert made("baseline", head_weights=[1.0, 0.5, 0.25, 0.0]).head_weights == (1.0, 0.5, 0.25, 0.0)


def test_a_block_may_set_its_own_beta_and_then_reads_no_other():
    own = {**methods.block("verifiable"), "beta": 0.4}
    assert methods.objective("verifiable", values=own).settings["beta"] == 0.4
    settings = TypeAdapter(AnyMethod).validate_python(own)
    assert policy_objective("verifiable", settings, never, never, never).settings["beta"] == 0.4
    assert reads_beta(TypeAdapter(AnyMethod).validate_python(methods.block("verifiable"))) and not reads_beta(settings)
    binary = {"weighting": "shuffled", "n_future": 4, "mix": 1.0, "head_weights": None, "critic": "separate", **methods.BINARY}
    settings = TypeAdapter(AnyMethod).validate_python(binary)
    assert not reads_beta(settings), "1[A > 0] has no temperature"
    assert "beta" not in policy_objective("shuffled", settings, never, lambda: 5, never).settings


@pytest.mark.parametrize("name", METHODS)
def test_beta_is_a_key_of_the_weightings_that_take_it(name):
    block = methods.block(name)
    assert ("beta" in block) == ("sigma_floor" in block)
    if "beta" in block:
        one, other = ({**block, "beta": beta} for beta in (0.3, 3.0))
        steps = [whole_step("verifiable", seed=seed) for seed in (1, 2)]
        assert methods.objective(name, steps, values=one).settings["beta"] != methods.objective(name, steps, values=other).settings["beta"]


@pytest.mark.parametrize("name", METHODS)
def test_a_block_of_any_name_finds_the_row_of_its_weighting(name):
    settings = TypeAdapter(AnyMethod).validate_python(methods.block(name))
    assert method_of(name, settings) == method_of("another_name", settings) == METHODS[name]


def test_a_critic_that_its_row_has_not_is_refused():
    settings = settings_of("verifiable")
    with pytest.raises(MethodError, match=r"methods\.verifiable_shared: weighting 'advantage' with critic 'separate'; .*another name"):
        method_of("verifiable_shared", settings)


def test_a_weighting_that_no_row_has_is_refused():
    with pytest.raises(MethodError, match=r"methods\.x: weighting 'magic'; .*no such row, only ntp, baseline"):
        method_of("x", SimpleNamespace(weighting="magic"))


def test_a_fitted_method_sees_one_pass_of_the_split_before_it_trains():
    steps = [whole_step("position_only", seed=seed) for seed in (1, 2)]
    fitted = made("position_only", beta=lambda: 0.9, steps=lambda: steps).settings["fitted"]
    other = made("position_only", beta=lambda: 0.9, steps=lambda: steps[:1]).settings["fitted"]
    assert fitted.shape == (6,) and not torch.equal(fitted, other)


def test_a_weighting_that_names_an_array_no_step_has_is_refused():
    class Curious(Method):
        def function(self):
            return lambda no_such_BT: no_such_BT

    with pytest.raises(ValueError, match="curious asks for no_such_BT; a step has row_B, tokens_BT"):
        PolicyObjective(Curious("curious"), {}, F).prepare(whole_step())


def test_a_block_that_does_not_fit_its_name_is_refused():
    with pytest.raises(MethodError, match=r"methods\.verifiable: weighting 'uniform'; .*'advantage'"):
        policy_objective("verifiable", UniformMethod(weighting="uniform", n_future=4, mix=1.0, head_weights=None), never, never, never)


@pytest.fixture
def token_data(tmp_path):
    from wmtp.problems import Problem

    problem = Problem.model_construct(task_id="t/0", source="micro", group="g", difficulty=1)
    rows = [Row([1, 5, 6, 2], 2, True, 0, "s0", (-1, -1)), Row([1, 5, 2], 2, True, 0, "s1", (-1, -1))]
    counts = write_split(tmp_path / "policy", rows, [problem])
    manifest = {"tokenizer_sha256": "a" * 64, "splits": {"policy": {"sha256": "b" * 64, **counts}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return TokenData(tmp_path, "policy")


def settings_of(name, **changes):
    return TypeAdapter(AnyMethod).validate_python(methods.block(name, **changes))


@pytest.mark.slow
def test_signals_are_read_by_row_and_a_failed_gate_is_refused(token_data, tmp_path):
    values = [np.array([0.1, 0.2, 0.3, 0.4], dtype=np.float32), np.array([0.5, 0.6, 0.7], dtype=np.float32)]
    passed, failed = tmp_path / "passed.safetensors", tmp_path / "failed.safetensors"
    write_scores(passed, values, token_data, "c" * 64, unit="probability", training_flops=4, scoring_flops=3)
    write_scores(failed, values, token_data, "c" * 64, gate_passed=False, unit="probability")
    assert policy_signal("baseline", settings_of("baseline"), "nowhere", token_data, never) == (None, {}, 0)
    for path, train_anyway in ((passed, never), (failed, lambda: True)):
        row, inputs, n_flops = policy_signal("verifiable", settings_of("verifiable"), str(path), token_data, train_anyway)
        assert row(0).tolist() == values[0].tolist() and row(1).tolist() == values[1].tolist() and set(inputs) == {"signal"}
        assert n_flops == (7 if path == passed else 0)
    with pytest.raises(WeightError, match=r"failed the quality gate.*train_anyway: true"):
        policy_signal("verifiable", settings_of("verifiable"), str(failed), token_data, lambda: False)


def test_another_signals_scores_are_refused(token_data, tmp_path):
    def block(name, **changes):
        return TypeAdapter(AnyMethod).validate_python(methods.block(name, **changes))

    values = [np.full(4, 0.1, dtype=np.float32), np.full(3, 0.2, dtype=np.float32)]
    for unit, right, wrong in (("nats", "rho1", "verifiable"), ("probability", "verifiable", "rho1"), ("logit", "shuffled", "rho1")):
        file = tmp_path / unit / f"{METHODS[right].signal}.safetensors"
        write_scores(file, values, token_data, "c" * 64, unit=unit)
        assert policy_signal(right, settings_of(right), str(file), token_data, never)[0](1).tolist() == values[1].tolist()
        assert policy_signal(right, settings_of(right), str(file.parent), token_data, never)[0](1).tolist() == values[1].tolist()
        with pytest.raises(WeightError, match=f"scores in units of {unit}, expected .*another signal's file"):
            policy_signal(wrong, settings_of(wrong), str(file), token_data, never)
    file = tmp_path / "logit" / "critic.safetensors"
    with pytest.raises(WeightError, match="terminal_credit pays a reward of 0 or 1"):
        policy_signal("verifiable", settings_of("verifiable", terminal_credit=True), str(file), token_data, never)


def test_a_shared_critic_reads_no_scores_under_whatever_name(token_data):
    """Its values are those of the forward; a name of the table that has no scores takes no other critic."""
    block = methods.block("verifiable_shared")
    shared = TypeAdapter(AnyMethod).validate_python(block)
    for name in ("verifiable", "verifiable_shared"):
        assert policy_signal(name, shared, "nowhere", token_data, never) == (None, {}, 0)
        assert policy_objective(name, shared, lambda: 0.9, never, never).method == METHODS["verifiable_shared"]
    with pytest.raises(MethodError, match=r"methods\.verifiable_shared: weighting 'advantage' with critic 'separate'"):
        policy_signal("verifiable_shared", settings_of("verifiable"), "nowhere", token_data, never)


@pytest.mark.parametrize(
    "w, wce, met, lagged, message",
    [
        (8.0, 4.0, 4.0, False, None),
        (0.0, 4.0, 4.0, False, "weights that reached the loss have mean 0"),
        (7.99, 4.0, 4.0, False, "have mean 0.99875"),
        (math.nan, 4.0, 4.0, False, "have mean nan"),
        (7.99, 4.0, 4.0, True, None),
        (8.0, 4.0, 3.99, False, "its gradient is that of a loss of 3.99"),
        (8.0, 4.0, 3.99, True, "its gradient is that of a loss of 3.99"),
        (8.0, 4.0, math.nan, False, "its gradient is that of a loss of nan"),
        (8.0, 0.0, 0.0, False, None),
    ],
)
def test_weights_that_do_not_reach_the_loss_are_found(w, wce, met, lagged, message):
    if message is None:
        return check_reached(w, wce, met, 8, lagged)
    with pytest.raises(WeightError, match=message):
        check_reached(w, wce, met, 8, lagged)


@pytest.mark.parametrize("name", ["verifiable", "rho1"])
def test_a_gradient_of_unweighted_losses_changes_no_model(name):
    """Though weights and log are right."""

    class Unweighted(PolicyObjective):
        def loss(self, model, batch):
            targets = future_targets(batch.tokens_BT, batch.response_BT, self.n_future)
            return model(batch.tokens_BT, targets).sum(), super().loss(model, batch)[1]

    refused(
        Unweighted(*(getattr(objective(name), key) for key in ("method", "settings", "n_future"))), whole_step(name), "did not reach it"
    )


def refused(work, step, message):
    """train_step refuses the step with this message and leaves the model as it was."""
    model, one_rank = small_model(torch.float64), World(0, 1, torch.device("cpu"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightError, match=message):
        train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), work, step, one_rank, 40, 1.0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
