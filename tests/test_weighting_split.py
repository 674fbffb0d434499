"""However a step of eight rows is split, 1 x 8, 4 x 2, or two ranks of either kind, every method at every scope takes the same gradient
and after many steps has the same weights (METHODS, "Tests", 4)."""

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from tests import methods, test_incorrect
from tests.conftest import run_ranks
from tests.test_train import ALONE, OPTIMIZER, SETTINGS, assert_equal_gradients, gradient, plan_of, start_model
from wmtp import shared, train
from wmtp.batches import share
from wmtp.blocks import reads_pairs
from wmtp.checkpoint import full_state
from wmtp.critic import pairs
from wmtp.method_schema import AnyMethod
from wmtp.tokens import TokenData
from wmtp.weighting import METHODS
from wmtp.world import joined

ALL_ROWS = 10**6
SCOPED = [
    f"{name} {scope}" for name in ("rho1", "inverted_k", "dft", "focal", "loss_topk", "entropy_topk") for scope in ("two_pass", "lagged")
]
PAIRED = ["verifiable weighted", "verifiable binary", "verifiable_shared weighted"]  # incorrect programs train the policy too
CASES = [*METHODS, *SCOPED, *PAIRED]
QUICK = ["baseline", "verifiable", "rho1", "verifiable_shared"]
# Trained over many steps with FSDP too; its gradients are compared for all.
SHARDED = ["verifiable", "rho1", "rho1 two_pass", "rho1 lagged", "verifiable_shared", "verifiable weighted"]
SINGLE = [name for name in METHODS if name not in SETTINGS]  # on ranks in float32; tests.test_train has the others
N_STEPS = 9


def block_of(name):
    """The method's block, changed as the name's second word says."""
    name, form = (*name.split(), None)[:2]
    if form == "binary":
        return test_incorrect.block(form, name, n_future=heads_of(name))
    changes = {"policy_on_incorrect": form} if form == "weighted" else {"scope": {"kind": form, "ema": 0.5} if form == "lagged" else form}
    return methods.block(name, heads_of(name), **(changes if form else {}))


def heads_of(name):
    return 1 if name == "ntp" else 3


def settings_of(name):
    return TypeAdapter(AnyMethod).validate_python(block_of(name))


def objective_of(name, plan):
    """The method fitted to the plan."""
    return shared.objective(settings_of(name), methods.objective(name.split()[0], plan.first_pass(), values=block_of(name)))


def eight_a_step(data, name, **changes):
    """A plan of four pairs a step for a method that reads pairs, of eight correct rows for all others."""
    units = pairs(data) if reads_pairs(settings_of(name)) else data.correct_rows()
    shortest = np.argsort(data.lengths[units].reshape(len(units), -1).sum(1), kind="stable")[: 24 // units.ndim]
    return plan_of(data, 8 // units.ndim, units=units[shortest], **changes)


def eight_rows(data, name):
    """A step of eight rows, one of them twice as at the border of two passes, and the method's objective."""
    plan = eight_a_step(data, name)
    return plan.step(0).take(np.array([0, 1, 2, 3, 4, 5, 6, 0])), objective_of(name, plan)


def one_row(step):
    """A row that trains the policy by every method."""
    return step.take(np.flatnonzero(step.is_correct_B & (step.span_B2[:, 0] >= 0))[:1])


def network(bundle, name, dtype=torch.float64):
    """The policy, with a value head that has learned something where its critic is shared."""
    model = shared.network(settings_of(name), start_model(bundle, dtype, heads_of(name)))
    if not isinstance(model, shared.SharedPolicy):
        return model
    torch.nn.init.normal_(model.value.weight, std=0.5, generator=torch.Generator().manual_seed(2))
    return model


def gradient_of(bundle, data, name, rows=None, world=ALONE, budget=ALL_ROWS, parallel="ddp", dtype=torch.float64):
    """The gradient of a step of eight rows, or of `rows` of it; where it is judged by the steps before, of these too."""
    step, objective = eight_rows(data, name)
    budget = two_rows_each(step) if budget is None else budget
    for earlier in (eight_a_step(data, name).step(1), plan_of(data, 3).step(2)) if getattr(objective, "lag", None) else ():
        gradient(network(bundle, name, dtype), objective, earlier, world, budget, parallel)
    return gradient(network(bundle, name, dtype), objective, step if rows is None else rows(step), world, budget, parallel)


def two_rows_each(step):
    """A budget under which eight rows make four micro-batches or more."""
    budget = int((step.response_BT.sum(1) + step.response_BT.int().argmax(1)).max()) * 2
    assert 4 <= len(share(step, 0, 1, budget)) <= 8
    return budget


def quick_and_slow(names):
    return [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in names if name not in QUICK)]


@pytest.mark.parametrize("name", quick_and_slow(CASES))
def test_micro_batches_give_the_gradient_of_the_whole(micro, data, name):
    assert_equal_gradients(gradient_of(micro.bundle, data, name, budget=None), gradient_of(micro.bundle, data, name), 1e-10)


@pytest.mark.parametrize("name", quick_and_slow(METHODS))
def test_micro_batches_give_the_gradient_of_the_whole_in_single_precision(micro, data, name):
    whole, several = (gradient_of(micro.bundle, data, name, budget=budget, dtype=torch.float32) for budget in (ALL_ROWS, None))
    assert_equal_gradients(several, whole, 1e-6)


def test_the_log_is_the_same_however_a_step_is_split(micro, data):
    """Minima and maxima over micro-batches are not sums."""
    plan, found = plan_of(data, 8, units=data.correct_rows()[:8]), []
    for budget in (ALL_ROWS, 1):
        settings = SimpleNamespace(**{**vars(OPTIMIZER), "micro_batch_tokens": two_rows_each(plan.step(0)) if budget is None else budget})
        found.append(train.fit(start_model(micro.bundle), methods.objective("dft", n_future=3), plan, settings, ALONE)[0])
    assert found[1] == pytest.approx(found[0], rel=1e-6) and found[0]["weight_max"] > 1.1 > 0.9 > found[0]["weight_min"]


def trained(bundle, data, name, world, budget, parallel="ddp"):
    """Every weight after N_STEPS of AdamW; on ranks other than 0 of a sharded model nothing."""
    plan, model = eight_a_step(data, name, n_epochs=N_STEPS / 3, log_every=N_STEPS), network(bundle, name)
    assert plan.n_steps == N_STEPS
    settings = SimpleNamespace(**{**vars(OPTIMIZER), "micro_batch_tokens": two_rows_each(plan.step(0)) if budget is None else budget})
    train.fit(model, objective_of(name, plan), plan, settings, world, parallel=parallel)
    return full_state(model) if parallel == "fsdp" else model.state_dict()


def on_two_ranks(bundle, processed, out):
    torch.set_num_threads(1)
    # A wait for a rank that never comes must end within the test.
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    data, found, bundle = TokenData(processed, "policy"), {}, Path(bundle)
    with joined("cpu") as world:
        for name in CASES:
            found[name, "alone"] = trained(bundle, data, name, ALONE, (ALL_ROWS, None)[world.rank])  # side by side, one on either rank
            for parallel in ("ddp", "fsdp"):
                found[name, parallel] = gradient_of(bundle, data, name, world=world, budget=None, parallel=parallel)
                found[name, parallel, "one row"] = gradient_of(bundle, data, name, one_row, world, parallel=parallel)
                if name in SINGLE:
                    single = {"parallel": parallel, "dtype": torch.float32}
                    found[name, parallel, "single"] = gradient_of(bundle, data, name, world=world, budget=None, **single)
            for parallel in ("ddp", "fsdp") if name in SHARDED else ("ddp",):
                found[name, "trained", parallel] = trained(bundle, data, name, world, None, parallel)
    torch.save(found, f"{out}/{world.rank}.pt")


@pytest.fixture(scope="module")
def ranks(micro, tmp_path_factory):
    """What two real ranks found."""
    out = tmp_path_factory.mktemp("ranks")
    ends = run_ranks("tests.test_weighting_split", "on_two_ranks", micro.bundle, micro.processed, out, seconds=600)
    assert [code for code, _ in ends] == [0, 0], "\n".join(error[-3000:] for _, error in ends)
    return [torch.load(out / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_the_gradient_of_one_also_where_a_rank_has_no_row(ranks, micro, data, name, parallel):
    for key, rows in (((name, parallel), None), ((name, parallel, "one row"), one_row)):
        expected = gradient_of(micro.bundle, data, name, rows)
        for found in ranks:
            assert_equal_gradients(found[key], expected, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", SINGLE)
def test_two_ranks_give_the_gradient_of_one_in_single_precision(ranks, micro, data, name, parallel):
    expected = gradient_of(micro.bundle, data, name, dtype=torch.float32)
    for found in ranks:
        assert_equal_gradients(found[name, parallel, "single"], expected, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_after_many_steps_the_weights_do_not_tell_how_each_was_split(ranks, micro, data, name):
    """Relative to the way that each tensor has gone; in float64 they stay within 1e-13."""
    start, whole = network(micro.bundle, name).state_dict(), ranks[0][name, "alone"]
    others = {"4 x 2": ranks[1][name, "alone"], **{key[2]: ranks[0][key] for key in ranks[0] if key[:2] == (name, "trained")}}
    assert len(others) == 2 + (name in SHARDED)
    for split, found in others.items():
        apart = {key: float((found[key] - value).norm() / (value - start[key]).norm()) for key, value in whole.items()}
        assert set(found) == set(whole) and max(apart.values()) <= 1e-9, (split, max(apart, key=apart.get))
