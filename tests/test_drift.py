"""The divergence of two models' predictions against a loop over tokens."""

import copy

import pytest
import torch

from tests.test_train import ALONE, start_model
from wmtp.drift import drift
from wmtp.tokens import TokenData


@pytest.fixture(scope="module")
def moved(micro):
    start = start_model(micro.bundle)
    model = copy.deepcopy(start)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=parameter.dtype)
    return model, start, TokenData(micro.processed, "validation")


@pytest.mark.parametrize("budget", [1, 3000])
@torch.no_grad()
def test_it_is_the_mean_divergence_of_each_heads_predictions(moved, budget):
    model, start, data = moved
    found = [[], [], []]
    for row in data.correct_rows():
        ids = torch.tensor(data.input_ids([row])[0], dtype=torch.long)
        ours, theirs = (each(ids[None])[0].log_softmax(-1) for each in (model, start))
        for i in range(int(data.response_start[row]), len(ids)):
            for h in range(3):
                p, q = ours[i - h - 1, h], theirs[i - h - 1, h]
                found[h].append(float(sum(a.exp() * (a - b) for a, b in zip(p, q))))
        if len(found[0]) > 60:
            break
    expected = [sum(values) / len(values) for values in found]
    rows = data.correct_rows()[: 1 + list(data.correct_rows()).index(row)]
    data.correct_rows = lambda: rows
    try:
        assert drift(model, start, data, ALONE, budget) == pytest.approx(expected, rel=1e-9)
    finally:
        del data.correct_rows


def test_a_model_has_not_moved_from_itself_and_extra_heads_of_one_alone_are_left_out(moved, micro):
    model, start, data = moved
    assert drift(start, start, data, ALONE, 3000) == pytest.approx([0.0] * 3, abs=1e-12)
    one_head = start_model(micro.bundle, n_future=1)
    (found,) = drift(one_head, model, data, ALONE, 3000)
    assert found > 0
