"""Figures of each head against a loop over tokens."""

import math

import pytest
import torch

from tests.test_train import ALONE, start_model
from wmtp.bundle import NotFinite
from wmtp.measure import PARTS, measure
from wmtp.tokens import TokenData


@torch.no_grad()
def by_loops(model, data):
    """{head: [(part, nats, rank)]}: rank 0 is the likeliest token."""
    found = {h: [] for h in range(model.n_future)}
    for row in data.correct_rows():
        ids = torch.tensor(data.input_ids([row])[0], dtype=torch.long)
        scores, start = model(ids[None])[0].log_softmax(-1), int(data.response_start[row])
        for i in range(start, len(ids)):
            for h in found:
                at = scores[i - h - 1, h]
                part = (i - start) * PARTS // (len(ids) - start)
                found[h].append((part, -float(at[ids[i]]), int((at > at[ids[i]]).sum())))
    return found


@pytest.fixture(scope="module")
def case(micro):
    data, model = TokenData(micro.processed, "validation"), start_model(micro.bundle)
    return model, data, by_loops(model, data)


@pytest.mark.parametrize("budget", [1, 3000])
def test_figures_of_each_head_are_those_of_a_loop(case, budget):
    model, data, expected = case
    found = measure(model, data, ALONE, budget)
    for h, tokens in expected.items():
        ce = math.fsum(nats for _, nats, _ in tokens) / len(tokens)
        assert found.whole()[f"head{h}"] == pytest.approx(
            {
                "n_tokens": len(tokens), "ce": ce, "perplexity": math.exp(ce),
                **{f"accuracy_at_{k}": sum(rank < k for *_, rank in tokens) / len(tokens) for k in (1, 5)},
            }, rel=1e-9,
        )  # fmt: skip


def test_places_are_tenths_of_each_response_and_make_up_the_whole(case):
    model, data, expected = case
    rows = measure(model, data, ALONE, 3000).by_place()
    assert [row["place"] for row in rows] == [(part + 0.5) / PARTS for part in range(PARTS)]
    for part, row in enumerate(rows):
        for h, tokens in expected.items():
            own = [(nats, rank) for where, nats, rank in tokens if where == part]
            assert row[f"n_tokens_head{h}"] == len(own)
            assert row[f"ce_head{h}"] == pytest.approx(math.fsum(nats for nats, _ in own) / len(own), rel=1e-9)
            assert row[f"accuracy_at_1_head{h}"] == pytest.approx(sum(rank == 0 for _, rank in own) / len(own), rel=1e-12)


def test_a_model_of_no_numbers_has_no_figures(micro):
    model = start_model(micro.bundle)
    with torch.no_grad():
        model.extra_heads[0].attention.wo.weight[0, 0] = math.nan
    with pytest.raises(NotFinite, match="validation: the model's losses there are not finite"):
        measure(model, TokenData(micro.processed, "validation"), ALONE, 3000)
