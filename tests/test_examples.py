"""The programs of the page have the weights that the first step of a training gives them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import methods
from tests.test_train import ALONE, start_model
from wmtp import pretrain
from wmtp.batches import share
from wmtp.critic import pairs
from wmtp.examples import examples, first_weights
from wmtp.plan import Plan
from wmtp.weighting import METHODS

F = 3
NAMES = {
    "verifiable": {}, "verifiable on pairs": {"policy_on_incorrect": "weighted"}, "rho1": {}, "rho1 two_pass": {"scope": "two_pass"},
    "rho1 lagged": {"scope": {"kind": "lagged", "ema": 0.0}}, "entropy_topk": {}, "oracle": {}, "position_only": {},
}  # fmt: skip


def signal_of(row):
    return np.random.default_rng(row).random(1000, dtype=np.float32)


@pytest.fixture(scope="module")
def model(micro):
    return start_model(micro.bundle)


def planned(name, data):
    signal = METHODS[name.split()[0]].signal
    fixed = (lambda row: signal_of(row)[: data.lengths[row]]) if signal else None
    units = pairs(data) if "pairs" in name else data.correct_rows()
    return Plan(data, units, 8 // units.ndim, 1, 0.0, 5, fixed)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_that_the_first_step_of_a_training_sums(name, data, model):
    plan = planned(name, data)
    work = methods.objective(name.split()[0], plan.first_pass(), F, **NAMES[name])
    found = first_weights(model, work, plan.step(0))
    step = work.prepare(plan.step(0))
    batches = share(step, 0, 1, 10**9)
    if work.scored_first:
        batches = work.weigh_step(model, step, batches, ALONE)
    sums = work.loss(model, batches[0])[1]
    # Lagged weights have mean 1 only once their step's sum is known.
    torch.testing.assert_close(found.double().sum((0, 1)), sums["w"], rtol=1e-6, atol=0)
    torch.testing.assert_close(found.double().square().sum((0, 1)), sums["w2"], rtol=1e-6, atol=0)


def test_an_example_is_a_program_token_by_token(data, model, tokenizer):
    plan = planned("rho1", data)
    step, work = plan.step(0), methods.objective("rho1", n_future=F)
    weight_BTF = first_weights(model, work, step)
    first_B = torch.tensor(data.response_start[step.row_B.numpy()])
    known = replace(step, span_B2=torch.stack([first_B + 1, first_B + 3], 1).masked_fill(torch.arange(8)[:, None] < 4, -1))
    found = examples(weight_BTF, known, data, tokenizer, "reference", 6)
    for b, one in zip([4, 5, 6, 7, 0, 1], found, strict=True):
        row = int(step.row_B[b])
        start, end = int(data.response_start[row]), int(data.lengths[row])
        assert one["tokens"] == pretrain.response_texts(tokenizer, data, np.array([row]))[0] and len(one["weights"]) == end - start
        for i, by_head in zip(range(start, end), one["weights"], strict=True):
            assert by_head == [float(weight_BTF[b, i - h - 1, h]) for h in range(F)]
        assert one["signal"] == signal_of(row)[start - 1 : end].tolist() and one["kind"] == "reference"
        assert one["prompt"] == tokenizer.pieces.decode(data.input_ids([row])[0][:start].tolist()) and "### Response:" in one["prompt"]
        assert one["place"] == ([1, 3] if b >= 4 else None)
        assert one["task_id"] == data.problems[int(data.problem_of[row])]["task_id"]
