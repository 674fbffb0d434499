import json
import math
import os
import signal
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import methods
from tests.conftest import ROOT, run_ranks, start
from tests.test_model import random_model
from wmtp import flops, outcome, sampling, train
from wmtp import params as parameters
from wmtp.align import align_future
from wmtp.batches import collate, in_order
from wmtp.bundle import read_args
from wmtp.checkpoint import save_model
from wmtp.critic import Critic, ValueObjective, pairs
from wmtp.model import load_bundle
from wmtp.optim import build_optimizer, learning_rate
from wmtp.plan import Plan
from wmtp.policy import PolicyObjective, WeightError
from wmtp.preference import PairwiseObjective
from wmtp.protocols import PROTOCOLS, with_sampling
from wmtp.raw_data import read_raw
from wmtp.scores import problems_of
from wmtp.shared import SharedPolicy
from wmtp.tokens import TokenData, TokenError, Tokenizer
from wmtp.train import NotFinite
from wmtp.view import View
from wmtp.weighting import METHODS
from wmtp.world import World, joined

ALONE = World(0, 1, torch.device("cpu"))
ADVANTAGE = {
    "beta": 0.9, "gamma": 1.0, "lam": 0.95, "sigma_floor": 0.01, "z_clip": 5.0, "weight_clip_min": 0.1, "weight_clip_max": 5.0,
    "concentration_floor": 0.3,
}  # fmt: skip
SETTINGS = {"baseline": {}, "verifiable": ADVANTAGE, "rho1": {"keep_fraction": 0.6}}
OPTIMIZER = SimpleNamespace(
    betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip_norm=1.0, warmup_fraction=0.3, final_fraction=0.1, micro_batch_tokens=500
)


def policy(name, n_future=3, **changes):
    return PolicyObjective(METHODS[name], SETTINGS[name] | changes, n_future)


def signal_of(data):
    """A number for each token of a row, as a critic (in 0..1) or a reference (nats) might give."""
    return lambda row: np.random.default_rng(row).random(int(data.lengths[row]), dtype=np.float32)


def plan_of(data, per_step=7, n_epochs=1.0, units=None, **changes):
    units = data.correct_rows()[:40] if units is None else units
    return Plan(data, units, per_step, n_epochs, 0.01, 3, signal_of(data), **({"log_every": 1, "checkpoint_every": 1} | changes))


def start_model(bundle, dtype=torch.float64, n_future=3):
    return random_model(read_args(bundle).with_heads(n_future), seed=6, dtype=dtype, scale=0.15).train()


class Keep(torch.optim.SGD):
    """Keeps the gradients that a step would use."""

    def step(self, closure=None):
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        self.kept = [g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for g in gradients]


def gradient(model, objective, step, world=ALONE, budget=600, parallel="ddp"):
    """{name: gradient} of one whole step."""
    wrapped = world.wrap(model, parallel)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = Keep(trained.values(), lr=1.0)
    train.train_step(wrapped, optimizer, objective, step, world, budget, clip_norm=math.inf)
    return dict(zip(trained, optimizer.kept))


def assert_equal_gradients(found, expected, tolerance):
    assert set(found) == set(expected)
    scale = max(float(value.norm()) for value in expected.values())
    assert scale > 0
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= tolerance * max(float(value.norm()), 1e-2 * scale), name


def brute_force_loss(model, name, data, rows):
    """sum of w * ce over rows, tokens and heads, one row at a time, over the number of targets of all rows."""
    step = collate(data, rows, signal_of(data))
    if name == "verifiable":
        weight_BT = METHODS[name].function()(step.signal_BT, step.response_BT, **ADVANTAGE)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for place, row in enumerate(rows):
        ids = torch.tensor(data.input_ids([row])[0], dtype=torch.long)
        P, T = int(data.response_start[row]), len(ids)
        scores = model(ids[None])[0].log_softmax(-1)
        ce = {(i, h): -scores[i - h - 1, h, ids[i]] for i in range(P, T) for h in range(scores.shape[1]) if i - h - 1 >= 0}
        weight = dict.fromkeys(range(P, T), 1.0)
        if name == "verifiable":
            weight = {i: float(weight_BT[place, i]) for i in range(P, T)}
        if name == "rho1":
            excess = {i: float(ce[i, 0].detach()) - float(signal_of(data)(row)[i]) for i in range(P, T)}
            m = math.ceil(0.6 * (T - P) - 1e-9)
            chosen = sorted(excess, key=lambda i: (-excess[i], i))[:m]
            weight = {i: float(np.float32((T - P) / m)) if i in chosen else 0.0 for i in range(P, T)}
        total = total + sum(weight[i] * value for (i, _), value in ce.items())
        count += len(ce)
    return total / count


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_takes_the_gradient_of_the_weighted_mean(micro, data, name):
    plan, model = plan_of(data, 3), start_model(micro.bundle)
    loss = brute_force_loss(model, name, data, plan.step(0).row_B.numpy())
    expected = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters()))))
    assert_equal_gradients(gradient(model, policy(name), plan.step(0)), expected, 1e-10)


@pytest.mark.parametrize("name", SETTINGS)
def test_micro_batches_change_nothing(micro, data, name):
    step = plan_of(data).step(0)
    one, several = (gradient(start_model(micro.bundle), policy(name), step, budget=budget) for budget in (10**6, 1))
    assert_equal_gradients(several, one, 1e-10)


def test_micro_batches_change_nothing_for_the_critic(micro, data):
    rows = np.arange(7)
    found = []
    for budget in (10**6, 1):
        critic = Critic(start_model(micro.bundle, n_future=1))
        torch.nn.init.normal_(critic.value.weight, generator=torch.Generator().manual_seed(0))
        found.append(gradient(critic, ValueObjective("bce", lm_coef=0.5), collate(data, rows), budget=budget))
    assert_equal_gradients(found[1], found[0], 1e-10)


def test_ntp_is_head_zero_alone(micro, data):
    step = plan_of(data).step(0)
    whole, ntp = start_model(micro.bundle), start_model(micro.bundle, n_future=1)
    ntp.load_state_dict({name: value for name, value in whole.state_dict().items() if name in ntp.state_dict()})
    ids, mask = step.tokens_BT, step.response_BT
    targets = align_future(ids.masked_fill(~mask, -100), 1, -100)
    loss = whole(ids, targets, n_future=1).sum() / mask.sum()
    names = list(dict(ntp.named_parameters()))
    expected = dict(zip(names, torch.autograd.grad(loss, [dict(whole.named_parameters())[name] for name in names])))
    assert_equal_gradients(gradient(ntp, policy("baseline", 1), step), expected, 1e-10)


def test_a_prompt_shorter_than_the_heads_is_refused(data):
    step = plan_of(data).step(0)
    short = replace(step, response_BT=torch.arange(step.tokens_BT.shape[1]).expand_as(step.tokens_BT) >= 2)
    with pytest.raises(WeightError, match="a prompt of 2 tokens is shorter than the 3 heads"):
        policy("baseline").prepare(short)


rates = settings(deadline=None, max_examples=100)


@rates
@given(n=st.integers(2, 400), warmup=st.floats(0, 0.9), final=st.floats(0, 1), peak=st.floats(1e-6, 0.1))
def test_learning_rate_rises_to_its_peak_and_falls_to_its_final_fraction(n, warmup, final, peak):
    found, n_warmup = [learning_rate(step, n, peak, warmup, final) for step in range(n)], round(warmup * n)
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in found)
    assert found[:n_warmup] == sorted(found[:n_warmup]) and found[n_warmup:] == sorted(found[n_warmup:], reverse=True)
    assert found[0] == pytest.approx(peak / n_warmup if n_warmup else peak) and found[0] > 0
    assert max(found) == pytest.approx(peak)
    if n - n_warmup >= 2:
        assert found[-1] == pytest.approx(final * peak, abs=1e-15)
    if n_warmup:
        assert found[n_warmup - 1] == pytest.approx(peak), "the last step of the warm-up is at the peak"


def test_learning_rate_is_half_way_down_in_the_middle():
    assert learning_rate(60, 101, 1.0, 0.2, 0.0) == pytest.approx(0.5, abs=0.02)


def test_matrices_decay_norms_do_not_and_what_is_frozen_is_left_out(micro):
    critic = Critic(start_model(micro.bundle, n_future=1))
    critic.trunk.output.requires_grad_(False)
    optimizer = build_optimizer(critic, OPTIMIZER)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    expected = {id(p): 0.1 if p.ndim == 2 else 0.0 for name, p in critic.named_parameters() if name != "trunk.output.weight"}
    assert decays == expected and sum(len(group["params"]) for group in optimizer.param_groups) == len(expected)
    assert all(group["lr"] == 0 and group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 for group in optimizer.param_groups)


def short_plan(data, **changes):
    """Four steps of three rows."""
    return plan_of(data, 3, units=data.correct_rows()[:12], **changes)


def fit(model, objective, plan, **changes):
    return train.fit(model, objective, plan, OPTIMIZER, ALONE, **changes)


def same_bits(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_each_step_uses_its_rate_and_is_logged(micro, data):
    plan, seen = plan_of(data, log_every=2), []
    records = fit(start_model(micro.bundle), policy("rho1"), plan, on_log=lambda step, figures: seen.append((step, figures)))
    assert plan.n_steps == 6 == math.ceil(40 / 7) and [record["step"] for record in records] == [2, 4, 6]
    assert seen == [(record["step"], record) for record in records]
    expected = [learning_rate(step - 1, 6, 0.01, 0.3, 0.1) for step in (2, 4, 6)]
    assert [record["learning_rate"] for record in records] == expected
    for record in records:
        assert record["weight_mean"] == pytest.approx(1, abs=1e-6) and record["weight_selected"] == pytest.approx(0.6, abs=0.02)
        assert record["ce"] == pytest.approx(np.mean([record[f"ce_head{h}"] for h in range(3)]))


def test_the_last_step_is_logged_whatever_the_interval(micro, data):
    assert [r["step"] for r in fit(start_model(micro.bundle), policy("baseline"), plan_of(data, log_every=4))] == [4, 6]


def test_training_learns(micro, data):
    records = fit(start_model(micro.bundle, torch.float32), policy("baseline"), plan_of(data, n_epochs=2.0))
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]


def test_equal_seeds_give_equal_bits_and_other_seeds_other_ones(micro, data):
    found = []
    for seed in (3, 3, 4):
        model = start_model(micro.bundle, torch.float32)
        records = fit(model, policy("verifiable"), replace(short_plan(data), seed=seed))
        found.append((json.dumps(records), model))
    assert found[0][0] == found[1][0] and same_bits(found[0][1], found[1][1])
    assert found[0][0] != found[2][0] and not same_bits(found[0][1], found[2][1])


class Killed(Exception):
    """Stands for whatever ends a run."""


def killer(at):
    def on_log(step, figures):
        if step == at:
            raise Killed

    return on_log


@pytest.fixture(scope="module")
def uninterrupted(micro, data):
    model = start_model(micro.bundle, torch.float32)
    return model, fit(model, policy("verifiable"), short_plan(data))


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("at", range(1, 5))
def test_interrupted_anywhere_and_resumed_equals_uninterrupted(micro, data, uninterrupted, tmp_path, every, at):
    plan, first = short_plan(data, checkpoint_every=every), []
    with pytest.raises(Killed):
        fit(start_model(micro.bundle, torch.float32), policy("verifiable"), plan, scratch=tmp_path, on_log=killer(at))
    model = start_model(micro.bundle, torch.float32)
    records = fit(model, policy("verifiable"), plan, scratch=tmp_path, on_log=lambda step, _: first.append(step))
    assert first[0] == (at - 1) // every * every + 1, "it goes on where the last save was"
    assert same_bits(model, uninterrupted[0])
    assert json.dumps(records) == json.dumps(uninterrupted[1])


def test_interrupted_twice(micro, data, uninterrupted, tmp_path):
    for at in (2, 4):
        with pytest.raises(Killed):
            fit(start_model(micro.bundle, torch.float32), policy("verifiable"), short_plan(data), scratch=tmp_path, on_log=killer(at))
    model = start_model(micro.bundle, torch.float32)
    assert fit(model, policy("verifiable"), short_plan(data), scratch=tmp_path) == uninterrupted[1]
    assert same_bits(model, uninterrupted[0])


@dataclass(frozen=True)
class BrokenAt:
    """The policy's objective, with a loss that is no number in one step (the one whose first row is `row`)."""

    inner: PolicyObjective
    row: int
    value: float

    def prepare(self, step):
        self_row = int(step.row_B[0])
        factor = self.value if self_row == self.row else 1.0
        prepared = self.inner.prepare(step)
        return replace(prepared, signal_BT=torch.full_like(prepared.weight_BT, factor))

    def count(self, step):
        return self.inner.count(step)

    def loss(self, model, batch):
        total, sums = self.inner.loss(model, batch)
        return total * (batch.signal_BT.max() if batch.row_B.min() >= 0 else 1.0), sums

    def summary(self, sums):
        return self.inner.summary(sums)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_before_the_weights_change(micro, data, value):
    plan, kept = plan_of(data), {}
    model = start_model(micro.bundle, torch.float32)

    def keep(step, figures):
        kept[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    broken = BrokenAt(policy("baseline"), int(plan.step(3).row_B[0]), value)
    with pytest.raises(NotFinite, match=r"warm_up: step 4 of 6: gradient norm is nan; weights unchanged"):
        fit(model, broken, plan, on_log=keep, label="warm_up")
    assert list(kept) == [1, 2, 3]
    assert all(torch.equal(tensor, kept[3][name]) for name, tensor in model.state_dict().items())
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_gradients_are_clipped_to_the_global_norm(micro, data):
    step, deltas = plan_of(data).step(0), []
    for clip in (math.inf, 0.01):
        model = start_model(micro.bundle)
        before = torch.cat([p.detach().flatten() for p in model.parameters()]).clone()
        _, norm = train.train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), policy("baseline"), step, ALONE, 600, clip)
        deltas.append(before - torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert float(norm) == pytest.approx(float(deltas[0].norm())), "the norm is that before clipping"
    assert float(deltas[1].norm()) == pytest.approx(0.01, rel=1e-4)
    torch.testing.assert_close(deltas[1] / deltas[1].norm(), deltas[0] / deltas[0].norm())


def view(**changes):
    """params.yaml as a training stage sees it, with other values: section__key=value. One row a step: many steps, soon done."""
    values = parameters.read_yaml(ROOT / "params.yaml")
    small = {"warm_up__batch_rows": 1, "warm_up__n_epochs": 0.5, "run__checkpoint_every": 1, "optimizer__micro_batch_tokens": 600}
    for path, value in (small | changes).items():
        section, _, key = path.partition("__")
        values[section][key] = value
    declared = ["seed", "warm_up", "optimizer", "run.dtype", "run.parallel", "run.device", *parameters.OPERATIONAL]
    return View(parameters.validate(values), declared, "warm-up")


def nothing(step, figures):
    pass


def tune(micro, out, on_log=nothing, **changes):
    return train.tune(view(**changes), "warm_up", "policy", micro.bundle, micro.processed, out, ALONE, on_log)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Where scratch directories go in this test."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path / ".work"


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def scratch_folders(work):
    return [path for path in work.iterdir() if path.is_dir()]


@pytest.fixture(scope="module")
def whole_run(micro, tmp_path_factory):
    """(records, files) of a tuning that nothing disturbed."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(root))
        return tune(micro, root / "out"), contents(root / "out")


def test_equal_runs_write_equal_bytes_and_leave_no_scratch(micro, work, tmp_path, whole_run):
    records = tune(micro, tmp_path / "out")
    assert (records, contents(tmp_path / "out")) == whole_run and not list(work.iterdir())
    assert whole_run[1] != contents(micro.bundle)


def test_a_killed_run_finds_its_state_and_writes_what_it_would_have_written(micro, work, tmp_path, whole_run):
    seen = []
    with pytest.raises(Killed):
        tune(micro, tmp_path / "out", killer(20))
    assert not (tmp_path / "out").exists() and len(scratch_folders(work)) == 1
    records = tune(micro, tmp_path / "out", lambda step, _: seen.append(step))
    assert (records, contents(tmp_path / "out")) == whole_run and not list(work.iterdir())
    assert seen[0] == 20, "run.checkpoint_every is 1: what was logged at step 10 was saved too"


@pytest.mark.parametrize("change", [{"warm_up__learning_rate": 0.02}, {"optimizer__weight_decay": 0.0}, {"run__dtype": "bfloat16"}])
def test_another_fingerprint_never_finds_the_state(micro, work, change):
    seen, plan = [], short_plan(TokenData(micro.processed, "policy"))
    for changes, at in (({}, 4), (change, 2), (change, 0)):

        def on_log(step, figures, at=at):
            seen.append(step)
            killer(at)(step, figures)

        model = start_model(micro.bundle, torch.float32)
        try:
            with train.fitted(model, policy("baseline"), plan, view(**changes), ALONE, stage="s", inputs={"data": "x"}, on_log=on_log):
                pass
        except Killed:
            continue
    assert seen == [1, 2, 3, 4, 1, 2, 2, 3, 4], "the second run starts anew, the third goes on where the second one was"
    assert len(scratch_folders(work)) == 1, "the first run's state is still its own"


def test_other_inputs_never_find_the_state_and_operational_keys_do_not_matter(micro, work):
    plan = short_plan(TokenData(micro.processed, "policy"))
    for changes, inputs, expected in (({}, "x", [1, 2]), ({}, "y", [1, 2]), ({"run__checkpoint_every": 7}, "x", [2])):
        seen = []

        def on_log(step, figures, seen=seen):
            seen.append(step)
            killer(2)(step, figures)

        model, fixed = start_model(micro.bundle, torch.float32), {"stage": "s", "inputs": {"data": inputs}}
        with pytest.raises(Killed), train.fitted(model, policy("baseline"), plan, view(**changes), ALONE, on_log=on_log, **fixed):
            pass
        assert seen == expected


def test_zero_epochs_give_the_start_itself(micro, work, tmp_path):
    records = tune(micro, tmp_path / "out", warm_up__n_epochs=0)
    ours, theirs = load_bundle(tmp_path / "out"), load_bundle(micro.bundle, dtype=torch.float32)
    assert same_bits(ours, theirs) and records == []
    outcome.write_log(tmp_path / "log.csv", records)
    assert (tmp_path / "log.csv").is_file(), "the stage's log is one of its outputs, also when there was nothing to log"


def test_a_start_with_another_tokenizer_is_refused_before_anything_is_trained(micro, work, tmp_path):
    from wmtp.sources import train_tokenizer

    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.model").write_bytes(train_tokenizer(["def f(xs): return xs"] * 50, 280))
    with pytest.raises(TokenError, match=r"warm_up\.start: tokenizer .*, expected that of the token data"):
        train.tune(view(), "warm_up", "policy", other, micro.processed, tmp_path / "out", ALONE, nothing)
    assert not work.exists() and not (tmp_path / "out").exists()


def test_the_log_holds_its_numbers_in_full(tmp_path):
    records = [{"step": 1, "loss": 0.1 + 0.2, "rate": 1e-9}, {"step": 2, "loss": 2.5, "rate": 0.0}]
    outcome.write_log(tmp_path / "log.csv", records)
    assert (tmp_path / "log.csv").read_text() == "step,loss,rate\n1,0.30000000000000004,1e-09\n2,2.5,0.0\n"


def test_a_model_that_is_no_numbers_is_neither_validated_nor_saved(micro, tmp_path):
    model, data = start_model(micro.bundle), TokenData(micro.processed, "validation")
    with torch.no_grad():
        model.layers[0].attention.wq.weight[1, 2] = math.nan
    with pytest.raises(NotFinite, match=r"validation: the model's loss by head is \[nan, nan, nan\]"):
        outcome.validation(model, data, ALONE, 3000)
    with pytest.raises(NotFinite, match=r"layers\.0\.attention\.wq\.weight, among 1 of \d+ tensors, holds numbers that are not finite"):
        save_model(model, micro.bundle, tmp_path / "out", ALONE, {})
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_validation_is_the_mean_loss_of_each_head_over_correct_programs(micro):
    data, model = TokenData(micro.processed, "validation"), start_model(micro.bundle)
    losses = [[], [], []]
    for row in data.correct_rows():
        ids = torch.tensor(data.input_ids([row])[0], dtype=torch.long)
        scores = model(ids[None])[0].log_softmax(-1)
        for i in range(int(data.response_start[row]), len(ids)):
            for h in range(3):
                losses[h].append(-float(scores[i - h - 1, h, ids[i]]))
    for budget in (1, 3000):
        found = outcome.validation(model, data, ALONE, budget)
        assert found == pytest.approx({f"validation_ce_head{h}": np.mean(losses[h]) for h in range(3)}, rel=1e-10)


def test_the_account_counts_what_was_read(micro, data):
    plan, model = plan_of(data, n_epochs=1.5), start_model(micro.bundle)
    figures = outcome.account(model, policy("baseline"), plan, {"loss": 2.0, "ce": 3.0, "grad_norm": 1.0}, 11)
    n_tokens = sum(int(data.lengths[plan.step(number).row_B].sum()) for number in range(plan.n_steps))
    n_weights = sum(p.numel() for p in model.parameters())
    assert (figures["steps"], figures["tokens"], figures["parameters"]) == (9, n_tokens, n_weights)
    assert figures["last_loss"] == 2.0 and figures["last_ce"] == 3.0
    every = np.concatenate([plan.step(number).row_B.numpy() for number in range(plan.n_steps)])
    read, first_step = ((data.lengths[one], data.response_start[one]) for one in (every, plan.step(0).row_B.numpy()))
    assert figures["train_flops"] == flops.training(model, *read) > 0
    assert (figures["signal_flops"], figures["total_flops"]) == (11, figures["train_flops"] + 11)
    end = {"loss": 2.0, "ce": 3.0}
    twice = outcome.account(model, policy("rho1", scope="two_pass"), plan, end)
    assert twice["train_flops"] == flops.training(model, *read) + flops.training_forward(model, *read), "a forward more"
    lagged = outcome.account(model, methods.objective("rho1", n_future=3, scope={"kind": "lagged", "ema": 0.0}), plan, end)
    assert lagged["train_flops"] == flops.training(model, *read) + flops.training_forward(model, *first_step), "the first step goes twice"
    assert outcome.account(SharedPolicy(model), policy("baseline"), plan, {"loss": 2.0, "ce": 3.0})["parameters"] == n_weights


def test_a_model_tells_which_problems_it_and_its_start_learned_from(micro, data, tmp_path):
    """Those whose rows were read and no others; nothing of a start without a record."""
    plan = plan_of(data, 4, n_epochs=0.5)
    rows = np.concatenate([plan.step(number).row_B.numpy() for number in range(plan.n_steps)])
    assert plan.rows_read().tolist() == rows.tolist() and len(rows) == 20
    model = start_model(micro.bundle, torch.float32)
    first = outcome.record(model, plan, micro.bundle)
    n_flops = flops.training(model, data.lengths[rows], data.response_start[rows])
    assert first == {"n_steps": 5, "flops": n_flops, "learned_from": problems_of(data, rows)} and n_flops > 0
    save_model(model, micro.bundle, tmp_path / "first", ALONE, first)
    other = TokenData(micro.processed, "validation")
    second = outcome.record(model, plan_of(other, 2, units=other.correct_rows()[:2]), tmp_path / "first")["learned_from"]
    own = problems_of(other, other.correct_rows()[:2])
    assert second == {key: sorted({*own[key], *first["learned_from"][key]}) for key in ("task_ids", "groups")}
    assert outcome.record(model, plan_of(data, n_epochs=0), micro.bundle)["learned_from"] == {"task_ids": [], "groups": []}


def tune_and_die(bundle, processed, out, moment):
    """A run that is killed without warning: when its last step is logged, or when its first save is about to take its name."""
    paths = SimpleNamespace(bundle=Path(bundle), processed=Path(processed))
    replace_file = os.replace

    def die_in_save(source, target):
        if moment == "save":
            os.kill(os.getpid(), signal.SIGKILL)
        replace_file(source, target)

    def die_at_log(step, figures):
        # By then there is a saved state, whatever the interval.
        if moment == "log" and step > 50:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = die_in_save
    torch.set_num_threads(1)
    tune(paths, Path(out), die_at_log, warm_up__n_epochs=1.0)


def tune_in_a_process(micro, out, moment, seed):
    worker = start("tests.test_train", "tune_and_die", micro.bundle, micro.processed, out, moment, DVC_ROOT=out.parent, PYTHONHASHSEED=seed)
    return worker.communicate(timeout=240)[1], worker.returncode


@pytest.fixture(scope="module")
def never_killed(micro, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    error, code = tune_in_a_process(micro, out, "never", 1)
    assert code == 0, error
    return contents(out)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["log", "save"])
def test_killed_without_warning_and_started_again_writes_the_same_bytes(micro, work, tmp_path, never_killed, moment):
    """Under another hash seed too."""
    error, code = tune_in_a_process(micro, tmp_path / "out", moment, 2)
    assert code == -signal.SIGKILL and scratch_folders(work) and not (tmp_path / "out").exists(), error
    error, code = tune_in_a_process(micro, tmp_path / "out", "never", 3)
    assert code == 0, error
    assert ("(resumed)" in error) == (moment == "log")
    assert contents(tmp_path / "out") == never_killed and not list(work.iterdir())


CASES = [(name, dtype, parallel) for name in SETTINGS for dtype in ("float32", "float64") for parallel in ("ddp", "fsdp")]


def on_two_ranks(bundle, processed, raw, out):
    """Everything that needs a group, in one: each rank leaves what it found in out/RANK.pt."""
    torch.set_num_threads(1)
    data, found, bundle = TokenData(processed, "policy"), {}, Path(bundle)
    with joined("cpu") as world:
        for name, dtype, parallel in CASES:
            model = start_model(bundle, getattr(torch, dtype))
            # Unequal shares and micro-batches; for one row, a rank that holds nothing but filler.
            found[name, dtype, parallel] = gradient(model, policy(name), plan_of(data).step(0), world, 300, parallel)
            model = start_model(bundle, getattr(torch, dtype))
            found[name, dtype, parallel, "one row"] = gradient(model, policy(name), plan_of(data, 1).step(0), world, 300, parallel)
        for parallel in ("ddp", "fsdp"):
            for kind, n_rows in CRITICS:
                found["critic", kind, n_rows, parallel] = critic_gradient(bundle, data, kind, n_rows, world, 300, parallel)
            found["resumed", parallel] = resumed_on_ranks(bundle, data, world, parallel, Path(out) / parallel)
            found["broken", parallel] = broken_on_ranks(bundle, data, world, parallel)
        found["completions"] = completions(bundle, Path(raw), world)
    torch.save(found, f"{out}/{world.rank}.pt")


# Unequal shares; of a single row or pair, a rank that holds nothing but filler.
CRITICS = [("bce", 7), ("bce", 1), ("pairwise", 10), ("pairwise", 2)]


def critic_gradient(bundle, data, kind, n_rows, world=ALONE, budget=10**6, parallel="ddp"):
    critic = Critic(start_model(bundle, n_future=1))
    torch.nn.init.normal_(critic.value.weight, generator=torch.Generator().manual_seed(0))
    objective, rows = ValueObjective("bce", lm_coef=0.5), np.arange(n_rows)
    if kind == "pairwise":
        objective, rows = PairwiseObjective(lm_coef=0.5), pairs(data).reshape(-1)[:n_rows]
    return gradient(critic, objective, collate(data, rows), world, budget, parallel)


def resumed_on_ranks(bundle, data, world, parallel, scratch):
    """(records of a whole run, of one interrupted and resumed, do the weights agree bit for bit)."""
    scratch.mkdir(exist_ok=True)
    ends = []
    for folder, at in ((None, 0), (scratch, 4), (scratch, 0)):
        model = start_model(bundle, torch.float32)
        try:
            fixed = {"parallel": parallel, "scratch": folder, "on_log": killer(at)}
            records = train.fit(model, policy("rho1"), plan_of(data, checkpoint_every=2), OPTIMIZER, world, **fixed)
        except Killed:
            continue
        ends.append((records, {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}))
    (whole, weights), (again, others) = ends
    return whole, again, all(torch.equal(weights[name], others[name]) for name in weights)


def broken_on_ranks(bundle, data, world, parallel):
    """What a rank says when the loss of one step is no number on the rank that holds the longest row alone."""
    plan = plan_of(data)
    broken = BrokenAt(policy("baseline"), int(plan.step(1).row_B[0]), math.nan)
    try:
        train.fit(start_model(bundle, torch.float32), broken, plan, OPTIMIZER, world, parallel=parallel)
    except NotFinite as error:
        return str(error)
    return ""


def completions(bundle, raw, world):
    """Text of every completion, from a model in float64 whose arg max no rounding can turn; None on all ranks but the first."""
    protocol = with_sampling(PROTOCOLS["alpaca"], n_samples=2, max_tokens=8)
    benchmark = sampling.Benchmark("humaneval", protocol, read_raw(raw).benchmarks["humaneval"], "alpaca")
    model = random_model(read_args(bundle).with_heads(1), seed=4).eval()
    found = sampling.complete(model, Tokenizer(bundle), benchmark, world, seed=1, batch_rows=4)
    return found and [one.model_dump() for one in found]


@pytest.fixture(scope="module")
def ranks(micro, tmp_path_factory):
    """What two real ranks found."""
    out = tmp_path_factory.mktemp("ranks")
    ends = run_ranks("tests.test_train", "on_two_ranks", micro.bundle, micro.processed, micro.raw_data, out)
    assert [code for code, _ in ends] == [0, 0], "\n".join(error[-3000:] for _, error in ends)
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["many rows", "one row"])
@pytest.mark.parametrize("name, dtype, parallel", CASES)
def test_two_ranks_take_the_gradient_of_one(ranks, micro, data, name, dtype, parallel, rows):
    key, per_step = ((name, dtype, parallel), 7) if rows == "many rows" else ((name, dtype, parallel, rows), 1)
    expected = gradient(start_model(micro.bundle, getattr(torch, dtype)), policy(name), plan_of(data, per_step).step(0), budget=10**6)
    for found in ranks:
        assert_equal_gradients(found[key], expected, 1e-6 if dtype == "float32" else 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind, n_rows", CRITICS)
def test_two_ranks_take_the_critics_gradient_of_one(ranks, micro, data, kind, n_rows, parallel):
    expected = critic_gradient(micro.bundle, data, kind, n_rows)
    for found in ranks:
        assert_equal_gradients(found["critic", kind, n_rows, parallel], expected, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_resume_bit_for_bit_and_log_the_same(ranks, parallel):
    (whole, again, equal), (other, _, other_equal) = (found["resumed", parallel] for found in ranks)
    assert whole == again == other and equal and other_equal and [record["step"] for record in whole] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_two_ranks_log_what_one_logs(ranks, micro, data):
    alone = fit(start_model(micro.bundle, torch.float32), policy("rho1"), plan_of(data))
    for found, expected in zip(ranks[0]["resumed", "ddp"][0], alone):
        assert found == pytest.approx(expected, rel=1e-3)
        assert found["weight_mean"] == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_loss_that_is_no_number_stops_both_ranks_with_the_step(ranks, parallel):
    for found in ranks:
        assert "step 2 of 6: gradient norm is nan" in found["broken", parallel]


@pytest.mark.slow
def test_completions_do_not_depend_on_the_number_of_ranks(ranks, micro):
    assert ranks[0]["completions"] == completions(micro.bundle, micro.raw_data, ALONE) and ranks[1]["completions"] is None


def validate_sharded(bundle, processed, out, budget):
    torch.set_num_threads(1)
    # A wait for a rank that never comes must end within the test.
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=15))
    with joined("cpu") as world:
        model = start_model(Path(bundle))
        world.wrap(model, "fsdp")
        found = outcome.validation(model, TokenData(processed, "validation"), world, int(budget))
    Path(out, f"{world.rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_sharded_validation_survives_ranks_with_unequal_numbers_of_batches(micro, tmp_path):
    data = TokenData(micro.processed, "validation")

    def n_batches(budget, rank):
        return sum(bool((batch.row_B >= 0).all()) for batch in in_order(data, data.correct_rows(), rank, 2, budget))

    budget = next(budget for budget in range(200, 900, 10) if n_batches(budget, 0) != n_batches(budget, 1))
    ends = run_ranks("tests.test_train", "validate_sharded", micro.bundle, micro.processed, tmp_path, budget, seconds=120)
    assert [code for code, _ in ends] == [0, 0], "\n".join(error[-600:] for _, error in ends)
    expected = outcome.validation(start_model(micro.bundle), data, ALONE, 3000)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(expected, rel=1e-10)
