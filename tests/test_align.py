"""The alignment of future tokens against its definition, one token at a time (METHODS, "Alignment")."""

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp import align
from wmtp.align import IGNORE, align_future, future_targets

FILL = -7.0


def by_definition(q, n_future, fill):
    B, T = q.shape
    out = torch.empty(B, T, n_future, dtype=q.dtype)
    for b in range(B):
        for t in range(T):
            for h in range(n_future):
                out[b, t, h] = q[b, t + h + 1] if t + h + 1 <= T - 1 else fill
    return out


def later(q, fill=FILL):
    return torch.cat([torch.full_like(q[:, :1], fill), q[:, :-1]], dim=1)


def earlier(q, fill=FILL):
    return torch.cat([q[:, 1:], torch.full_like(q[:, :1], fill)], dim=1)


def obeys_the_one_hot_probe(function, T=9, n_future=4):
    """Whether a value on the single target i changes exactly the entries (i-h-1, h), for every i."""
    blank = function(torch.zeros(1, T), n_future, 0.0)
    for i in range(T):
        probe = torch.zeros(1, T)
        probe[0, i] = 1.0
        changed = {(t, h) for _, t, h in (function(probe, n_future, 0.0) != blank).nonzero().tolist()}
        if changed != {(i - h - 1, h) for h in range(n_future) if i - h - 1 >= 0}:
            return False
    return True


def responses(*spans, T):
    mask = torch.zeros(len(spans), T, dtype=torch.bool)
    for b, (first, last) in enumerate(spans):
        mask[b, first : last + 1] = True
    return mask


@settings(max_examples=40, deadline=None, derandomize=True)
@given(B=st.integers(1, 3), T=st.integers(1, 9), n_future=st.integers(1, 12), seed=st.integers(0, 99))
def test_equals_its_definition(B, T, n_future, seed):
    q = torch.randn(B, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.equal(align_future(q, n_future, FILL), by_definition(q, n_future, FILL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_keeps_the_dtype_and_the_values_to_the_bit(dtype):
    q = torch.arange(10, dtype=dtype).reshape(2, 5)
    found = align_future(q, 3, -1)
    assert found.dtype == dtype and found.shape == (2, 5, 3)
    assert torch.equal(found, by_definition(q, 3, -1))


def test_a_single_target_reaches_its_own_entries_and_no_others():
    assert obeys_the_one_hot_probe(align_future)


@pytest.mark.parametrize("shift", [later, earlier])
def test_the_probe_rejects_an_alignment_that_is_off_by_one(shift):
    assert not obeys_the_one_hot_probe(lambda q, n_future, fill: align_future(shift(q, 0.0), n_future, fill))


def test_rows_do_not_reach_into_each_other():
    q = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([2, 0, 1])
    assert torch.equal(align_future(q[order], 4, FILL), align_future(q, 4, FILL)[order])
    assert torch.equal(align_future(q[1:2], 4, FILL)[0], align_future(q, 4, FILL)[1])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(first=st.integers(1, 7), length=st.integers(1, 6), padding=st.integers(0, 3), n_future=st.integers(1, 5))
def test_targets_are_the_response_tokens_and_the_mask_belongs_to_the_target(first, length, padding, n_future):
    T = first + length + padding
    tokens, response = torch.arange(100, 100 + T)[None], responses((first, first + length - 1), T=T)
    found = future_targets(tokens, response, n_future)
    for t in range(T):
        for h in range(n_future):
            i = t + h + 1
            inside = first <= i < first + length
            assert found[0, t, h] == (100 + i if inside else IGNORE)


def test_the_last_prompt_positions_train_the_heads_that_reach_the_response():
    targets = future_targets(torch.arange(10)[None], responses((4, 8), T=10), 4)
    for h in range(4):
        trained = (targets[0, :, h] != IGNORE).nonzero().flatten().tolist()
        assert trained == list(range(4 - h - 1, 8 - h)), f"head {h} starts with the last {h + 1} prompt positions"


def test_with_prompts_as_long_as_the_heads_every_head_sees_every_response_token_once():
    tokens, response = torch.arange(24).reshape(2, 12), responses((4, 9), (7, 11), T=12)
    targets = future_targets(tokens, response, 4)
    for b in range(2):
        for h in range(4):
            assert targets[b, :, h][targets[b, :, h] != IGNORE].tolist() == tokens[b][response[b]].tolist()


def test_a_shorter_prompt_hides_the_first_tokens_from_the_far_heads():
    targets = future_targets(torch.arange(8)[None], responses((2, 7), T=8), 4)
    assert (targets != IGNORE).sum((0, 1)).tolist() == [6, 6, 5, 4]


def test_contents_of_prompt_and_padding_are_no_targets():
    response = responses((3, 6), (5, 8), T=10)
    tokens = torch.arange(20).reshape(2, 10)
    other = torch.where(response, tokens, torch.tensor(77))
    assert torch.equal(future_targets(tokens, response, 4), future_targets(other, response, 4))


def test_a_row_without_response_has_no_targets():
    assert (future_targets(torch.arange(6)[None], torch.zeros(1, 6, dtype=torch.bool), 3) == IGNORE).all()


@pytest.mark.parametrize("shape, n_future", [((4,), 1), ((1, 4, 2), 1), ((1, 4), 0), ((1, 4), -1)])
def test_a_wrong_shape_or_number_of_heads_is_refused_with_what_was_found(shape, n_future):
    with pytest.raises(ValueError, match="align_future: expected") as error:
        align_future(torch.zeros(shape), n_future, 0.0)
    assert str(shape) in str(error.value) and str(n_future) in str(error.value)


def test_the_worked_example_in_the_documentation_holds():
    outcome = doctest.testmod(align, extraglobs={"torch": torch})
    assert outcome.attempted >= 1 and outcome.failed == 0
