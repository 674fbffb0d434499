"""Figures of each head against a loop over tokens."""

import copy
import math

import pytest
import torch

from tests.test_train import ALONE, start_model
from wmtp.bundle import NotFinite
from wmtp.measure import PARTS, drafts, measure
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
                order = sorted(range(len(at)), key=lambda token: (-float(at[token]), token))
                found[h].append((part, -float(at[ids[i]]), order.index(int(ids[i]))))
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
    with pytest.raises(NotFinite, match=r"validation: the model's loss by head is \[\d.*, nan, \d.*\], expected numbers"):
        measure(model, TokenData(micro.processed, "validation"), ALONE, 3000)


def test_a_model_that_knows_nothing_foresees_no_more_than_its_first_guess(micro, case):
    """Of equal logits the arg max is the first: a tie is no knowledge."""
    model, (_, data, expected) = start_model(micro.bundle), case
    with torch.no_grad():
        model.norm.weight.zero_()
    found = measure(model, data, ALONE, 3000).whole()
    assert all(figures["accuracy_at_1"] == 0 and figures["ce"] == pytest.approx(math.log(400)) for figures in found.values())
    assert all(figures["perplexity"] == pytest.approx(400) for figures in found.values()) and len(found) == len(expected)


def test_a_split_without_a_correct_program_is_told(case, monkeypatch):
    model, data, _ = case
    monkeypatch.setattr("wmtp.measure.in_order", lambda *_: iter(()))
    with pytest.raises(ValueError, match="validation: no correct program to measure a model on"):
        measure(model, data, ALONE, 3000)


def test_drafts_are_counted_against_the_same_texts_without(case):
    model, data, _ = case
    prompts = [ids[: data.response_start[row]].tolist() for row, ids in zip(range(4), data.input_ids(range(4)))]
    found = drafts(model, prompts, 9, 2, 400)
    assert (found.n_prompts, found.n_different) == (4, 0) and 1 <= found.tokens_per_forward <= 3 and found.speed_up > 0


def test_the_speed_up_is_that_of_drafts_over_none(case, monkeypatch):
    """Each forward costs a second here, so it is the quotient of the forwards: the prompt's gives one token, each further one three."""
    model = case[0]
    clock, forwards = [0.0], type(model).hidden
    monkeypatch.setattr("wmtp.measure.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(type(model), "hidden", lambda *given, **named: clock.__setitem__(0, clock[0] + 1) or forwards(*given, **named))
    with torch.no_grad():
        constant = start_model_of_one_token(model)
    found = drafts(constant, [[5, 6, 7]] * 2, 9, 2, 400)
    assert (found.tokens_per_forward, found.speed_up, found.n_different) == (9 / 4, 9 / 4, 0)


def start_model_of_one_token(model):
    """It writes token 0 for ever, whichever head is asked."""
    constant = copy.deepcopy(model)
    constant.norm.weight.zero_()
    return constant
