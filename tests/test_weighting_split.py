"""A step of eight rows as 1 x 8, as 4 x 2 and on two ranks gives equal gradients, by every method at every scope (METHODS, "Tests", 4)."""

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests import methods
from tests.conftest import run_ranks
from tests.test_train import ALONE, OPTIMIZER, assert_equal_gradients, gradient, plan_of, start_model
from wmtp import train
from wmtp.batches import share
from wmtp.tokens import TokenData
from wmtp.world import joined

ALL_ROWS = 10**6
SCOPED = [
    f"{name} {scope}" for name in ("rho1", "inverted_k", "dft", "focal", "loss_topk", "entropy_topk") for scope in ("two_pass", "lagged")
]
CASES = [*methods.SEPARATE, *SCOPED]
SHARDED = ["shuffled", "entropy_topk", "rho1 two_pass", "entropy_topk two_pass", "rho1 lagged", "entropy_topk lagged"]


def eight_rows(data, name):
    """A step of eight rows, one of them twice as at the border of two passes, and the method fitted to the split."""
    plan = plan_of(data, 8)
    step = plan.step(0)
    step = step.take(np.array([0, 1, 2, 3, 4, 5, 6, 0]))
    name, *scope = name.split()
    scope = [{"kind": "lagged", "ema": 0.5} if one == "lagged" else one for one in scope]
    return step, methods.objective(name, plan.first_pass(), n_future=3, **({"scope": scope[0]} if scope else {}))


def gradient_of(bundle, data, name, rows=None, world=ALONE, budget=ALL_ROWS, parallel="ddp"):
    """The gradient of a step of eight rows or some of them; where it is judged by the steps before, of these too."""
    step, objective = eight_rows(data, name)
    budget = two_rows_each(step) if budget is None else budget
    for earlier in (plan_of(data, 8).step(1), plan_of(data, 3).step(2)) if objective.lag else ():
        gradient(start_model(bundle), objective, earlier, world, budget, parallel)
    return gradient(start_model(bundle), objective, step if rows is None else step.take(np.array(rows)), world, budget, parallel)


def two_rows_each(step):
    """A budget under which eight rows make four micro-batches or more."""
    budget = int((step.response_BT.sum(1) + step.response_BT.int().argmax(1)).max()) * 2
    assert 4 <= len(share(step, 0, 1, budget)) <= 8
    return budget


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_give_the_gradient_of_the_whole(micro, data, name):
    assert_equal_gradients(gradient_of(micro.bundle, data, name, budget=None), gradient_of(micro.bundle, data, name), 1e-10)


def test_the_log_is_the_same_however_a_step_is_split(micro, data):
    """Minima and maxima over micro-batches are not sums."""
    plan, found = plan_of(data, 8, units=data.correct_rows()[:8]), []
    for budget in (ALL_ROWS, 1):
        settings = SimpleNamespace(**{**vars(OPTIMIZER), "micro_batch_tokens": budget})
        found.append(train.fit(start_model(micro.bundle), methods.objective("dft", n_future=3), plan, settings, ALONE)[0])
    assert found[1] == pytest.approx(found[0], rel=1e-6) and found[0]["weight_max"] > 1.1 > 0.9 > found[0]["weight_min"]


def on_two_ranks(bundle, processed, out):
    torch.set_num_threads(1)
    # A wait for a rank that never comes must end within the test.
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    data, found = TokenData(processed, "policy"), {}
    with joined("cpu") as world:
        for name in CASES:
            found[name] = gradient_of(Path(bundle), data, name, None, world, None)
        for name in SHARDED:
            found[name, "fsdp"] = gradient_of(Path(bundle), data, name, None, world, None, "fsdp")
            found[name, "one row"] = gradient_of(Path(bundle), data, name, [3], world)
    torch.save(found, f"{out}/{world.rank}.pt")


@pytest.fixture(scope="module")
def ranks(micro, tmp_path_factory):
    """What two real ranks found."""
    out = tmp_path_factory.mktemp("ranks")
    ends = run_ranks("tests.test_weighting_split", "on_two_ranks", micro.bundle, micro.processed, out)
    assert [code for code, _ in ends] == [0, 0], "\n".join(error[-3000:] for _, error in ends)
    return [torch.load(out / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_the_gradient_of_one(ranks, micro, data, name):
    expected = gradient_of(micro.bundle, data, name)
    for found in ranks:
        assert_equal_gradients(found[name], expected, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_sharded_ranks_and_a_rank_without_a_row_give_the_gradient_of_one(ranks, micro, data, name):
    for key, rows in (((name, "fsdp"), None), ((name, "one row"), [3])):
        expected = gradient_of(micro.bundle, data, name, rows)
        for found in ranks:
            assert_equal_gradients(found[key], expected, 1e-10)
