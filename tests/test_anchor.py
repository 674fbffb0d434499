"""The anchored objective against scalars, its average against the recursion, and its state through a kill and over ranks."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import run_ranks
from tests.test_critic import KINDS, T, one_loss, same, small_critic, train, whole_step
from tests.test_train import ALONE, OPTIMIZER, Killed, gradient, killer, start_model
from wmtp import train as room
from wmtp.anchor import AnchoredCritic, AnchoredObjective
from wmtp.batches import collate
from wmtp.critic import ValueObjective, load_critic, pairs, save_critic
from wmtp.plan import Plan
from wmtp.tokens import TokenData
from wmtp.world import joined


def anchored(apart=True, dtype=torch.float64):
    """A critic whose average holds other weights, if `apart`."""
    start = small_critic(dtype)
    critic = AnchoredCritic(start.trunk)
    critic.value.load_state_dict(start.value.state_dict())
    with torch.no_grad():
        for place, (slow, fast) in enumerate(zip(critic.average.parameters(), [*critic.trunk.parameters(), *critic.value.parameters()])):
            noise = torch.randn(fast.shape, generator=torch.Generator().manual_seed(place), dtype=torch.float64)
            slow.copy_(fast + 0.05 * apart * noise)
    return critic


def expected_loss(kind, logit, slow, target, coef, clip):
    v, v_slow = (1 / (1 + math.exp(-z)) for z in (logit, slow))
    losses = [one_loss(kind, logit, target)]
    if clip is not None:
        clipped = min(max(v, v_slow - clip), v_slow + clip)
        losses.append(one_loss(kind, math.log(clipped / (1 - clipped)), target))
    return max(losses) + coef * (v - v_slow) ** 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coef, clip", [(0.0, 0.2), (0.7, None), (0.3, 0.05)])
def test_the_loss_of_a_state_equals_the_scalar_one(kind, coef, clip):
    work = AnchoredObjective(kind, coef=coef, value_clip=clip)
    cases = list(product([-3.0, -0.4, 0.0, 0.1, 2.5], [-2.0, 0.0, 0.3, 4.0], [0.0, 0.3, 1.0]))
    logit, slow, target = (torch.tensor(column, dtype=torch.float64)[None] for column in zip(*cases))
    found = work.state_loss(logit, target, slow)[0].tolist()
    assert found == pytest.approx([expected_loss(kind, *case, coef, clip) for case in cases], rel=1e-9, abs=1e-12)


def test_a_value_beyond_the_clip_and_nearer_its_target_is_pulled_no_further():
    work = AnchoredObjective("bce", value_clip=0.2)
    logit = torch.tensor([[1.5, 1.5, 0.2, -1.5]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[1.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    work.state_loss(logit, target, torch.zeros_like(logit)).sum().backward()
    v = torch.sigmoid(logit.detach())
    assert logit.grad[0].tolist() == pytest.approx([0.0, *(v - target)[0, 1:].tolist()], abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_beside_its_own_average_a_critic_learns_as_without_one(kind):
    critic, step = anchored(apart=False), whole_step()
    plain = train(small_critic(), ValueObjective(kind, lam=0.9, lm_coef=0.5), step)
    held = train(critic, AnchoredObjective(kind, lam=0.9, lm_coef=0.5, decay=0.9, coef=0.5, value_clip=0.2), step)
    assert held[0] == pytest.approx(plain[0], rel=1e-12)
    same(held[1], plain[1])


@pytest.mark.parametrize("token_budget", [10**9, 2 * T])
def test_the_average_moves_once_a_step_and_no_gradient_moves_it(token_budget):
    critic, work, step = anchored(), AnchoredObjective("bce", decay=0.8, coef=0.5), whole_step()
    slow = {name: p.clone() for name, p in critic.average.named_parameters()}
    optimizer = torch.optim.SGD([p for p in critic.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        slow = {name: 0.8 * before + 0.2 * dict(critic.named_parameters())[name].detach() for name, before in slow.items()}
        _, gradients, _ = train(critic, work, step, token_budget)
        optimizer.step()
        assert not any(name.startswith("average") for name in gradients)
    for name, p in critic.average.named_parameters():
        torch.testing.assert_close(p, slow[name], rtol=1e-12, atol=1e-12)


def test_what_is_saved_is_the_critic_itself(tmp_path, micro):
    critic = AnchoredCritic(start_model(micro.bundle, torch.float32, n_future=1))
    with torch.no_grad():
        critic.average.value.bias.fill_(7.0)
        critic.value.bias.fill_(0.5)
    save_critic(critic, micro.bundle, tmp_path / "critic", {"passed": True}, {"task_ids": [], "groups": []}, ALONE)
    found = load_critic(tmp_path / "critic")
    assert type(found).__name__ == "Critic" and found.value.bias.tolist() == [0.5]


def trained(bundle, data, scratch=None, at=0, world=ALONE, parallel="ddp", dtype=torch.float32):
    model = AnchoredCritic(start_model(bundle, dtype, n_future=1))
    plan = Plan(data, pairs(data), 2, 0.5, 0.01, 3, log_every=1, checkpoint_every=2)
    work = AnchoredObjective("bce", decay=0.5, coef=1.0, value_clip=0.05)
    records = room.fit(model, work, plan, OPTIMIZER, world, parallel=parallel, scratch=scratch, on_log=killer(at))
    return records, {name: p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for name, p in model.named_parameters()}


@pytest.mark.slow
def test_killed_and_started_again_it_ends_the_same(micro, data, tmp_path):
    records, weights = trained(micro.bundle, data)
    with pytest.raises(Killed):
        trained(micro.bundle, data, tmp_path, at=5)
    again, others = trained(micro.bundle, data, tmp_path)
    assert again == records and all(torch.equal(weights[name], others[name]) for name in weights)
    assert any(not torch.equal(weights[name], weights[f"average.{name}"]) for name in weights if f"average.{name}" in weights)


def anchored_gradient(bundle, data, world, parallel, n_rows=7):
    model = AnchoredCritic(start_model(bundle, n_future=1))
    torch.nn.init.normal_(model.value.weight, generator=torch.Generator().manual_seed(0))
    work = AnchoredObjective("bce", decay=0.5, coef=1.0, value_clip=0.05, lm_coef=0.5)
    return gradient(model, work, collate(data, np.arange(n_rows)), world, 300, parallel)


def on_two_ranks(bundle, processed, out):
    torch.set_num_threads(1)
    data = TokenData(processed, "policy")
    with joined("cpu") as world:
        found = {kind: anchored_gradient(Path(bundle), data, world, kind) for kind in ("ddp", "fsdp")}
        found |= {f"{kind} one row": anchored_gradient(Path(bundle), data, world, kind, 1) for kind in ("ddp", "fsdp")}
        for dtype in (torch.float32, torch.float64):
            found |= {(kind, dtype): trained(Path(bundle), data, world=world, parallel=kind, dtype=dtype) for kind in ("ddp", "fsdp")}
    torch.save(found, f"{out}/{world.rank}.pt")


@pytest.fixture(scope="module")
def ranks(micro, tmp_path_factory):
    """What two real ranks found."""
    out = tmp_path_factory.mktemp("ranks")
    for code, error in run_ranks("tests.test_anchor", "on_two_ranks", micro.bundle, micro.processed, out):
        assert code == 0, error
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_take_the_gradient_of_one_also_where_a_rank_has_no_row(ranks, micro, data, parallel):
    for key, n_rows in ((parallel, 7), (f"{parallel} one row", 1)):
        expected = anchored_gradient(micro.bundle, data, ALONE, "ddp", n_rows)
        for found in ranks:
            same({name: g for name, g in found[key].items() if not name.startswith("average")}, expected)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_log_what_one_logs(ranks, micro, data, parallel):
    records = [one["loss"] for one in trained(micro.bundle, data)[0]]
    assert all([one["loss"] for one in found[parallel, torch.float32][0]] == pytest.approx(records, rel=1e-3) for found in ranks)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_after_many_steps_two_ranks_have_the_weights_of_one_and_its_average(ranks, micro, data, parallel):
    """In float64, relative to the way that each tensor has gone."""
    _, weights = trained(micro.bundle, data, dtype=torch.float64)
    start = dict(AnchoredCritic(start_model(micro.bundle, n_future=1)).named_parameters())
    for found in ranks:
        ends = found[parallel, torch.float64][1]
        apart = {name: float(((ends[name] - value).norm() / (value - start[name]).norm()).detach()) for name, value in weights.items()}
        assert any(name.startswith("average") for name in apart) and max(apart.values()) <= 1e-9, max(apart, key=apart.get)
