"""Rows that go on from shared prompts see what they would see alone."""

import pytest
import torch

from tests.test_model import GROUPED, SHAPES, random_model, random_tokens

PROMPT_R = torch.tensor([2, 0, 2, 1, 0, 2])
LENGTH_P = torch.tensor([4, 7, 2])


def forked(args, capacity=6, prompt_R=PROMPT_R):
    """A model, whole rows [R, 13] and a cache that goes on from their prompts; prompt p is the first LENGTH_P[p] tokens of its rows."""
    model, prompts_PT, rows_RT = random_model(args), random_tokens(args, 3, 7), random_tokens(args, len(prompt_R), 13, seed=5)
    own = torch.arange(13) >= LENGTH_P[prompt_R][:, None]
    rows_RT[:, :7] = torch.where(own[:, :7], rows_RT[:, :7], prompts_PT[prompt_R])
    cache = model.new_cache(3, 7, args.n_future_tokens)
    model(torch.where(torch.arange(7) < LENGTH_P[:, None], prompts_PT, 9), cache=cache)
    return model, rows_RT, cache.fork(prompt_R, LENGTH_P, capacity)


def step(model, rows_RT, cache, start_R, n):
    """The next `n` tokens of each row from its own `start_R` on; asserts that they give what the whole rows give."""
    at_RT = start_R[:, None] + torch.arange(n)
    found = model(rows_RT.gather(1, at_RT), cache=cache, position_BT=at_RT)
    expected = model(rows_RT)[torch.arange(len(rows_RT))[:, None], at_RT]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_one_prompt_see_what_they_see_alone(shape):
    """In all heads; several tokens a step, then one, at a place of its own for every row."""
    model, rows_RT, cache = forked(SHAPES[shape])
    start_R = LENGTH_P[PROMPT_R]
    step(model, rows_RT, cache, start_R, 3)
    uneven_R = start_R + torch.tensor([1, 2, 3, 3, 2, 1])
    step(model, rows_RT, cache, uneven_R, 1)
    step(model, rows_RT, cache, uneven_R + 1, 2)


def test_tokens_beyond_a_row_are_overwritten_unseen():
    """As with drafts that were not accepted."""
    model, rows_RT, cache = forked(GROUPED)
    start_R = LENGTH_P[PROMPT_R]
    wrong = (rows_RT + 1) % GROUPED.vocab_size
    at_RT = start_R[:, None] + torch.arange(4)
    model(wrong.gather(1, at_RT), cache=cache, position_BT=at_RT)
    step(model, rows_RT, cache, start_R, 2)
    step(model, rows_RT, cache, start_R + 2, 1)


@pytest.mark.parametrize("kept", [[5, 3, 0], [0, 2, 5], [1], [4, 1, 3, 0, 2, 5], [2, 2, 1]])
def test_rows_can_be_dropped_repeated_and_reordered(kept):
    model, rows_RT, cache = forked(GROUPED)
    step(model, rows_RT, cache, LENGTH_P[PROMPT_R], 2)
    rows = torch.tensor(kept)
    cache.select(rows)
    assert len(cache.prompts[0].keys) == len(set(PROMPT_R[rows].tolist())), "a prompt that no row goes on from is let go"
    step(model, rows_RT[rows], cache, LENGTH_P[PROMPT_R[rows]] + 2, 1)


def test_a_prompt_without_rows_changes_nothing():
    rows = torch.tensor([1, 0, 0])
    model, rows_RT, cache = forked(GROUPED, prompt_R=rows)
    step(model, rows_RT, cache, LENGTH_P[rows], 3)


def test_a_fork_leaves_what_it_was_made_from():
    model, tokens_BT = random_model(), random_tokens(GROUPED, 2, 6)
    prompts = model.new_cache(2, 5, 3)
    model(tokens_BT[:, :5], cache=prompts)
    one, other = (prompts.fork(torch.tensor([0, 1]), torch.tensor([5, 5]), 1) for _ in range(2))
    one.select(torch.tensor([1]))
    found = model(tokens_BT[:, 5:], cache=other, position_BT=torch.full((2, 1), 5))
    torch.testing.assert_close(found, model(tokens_BT)[:, 5:], rtol=1e-10, atol=1e-10)


def test_tokens_without_positions_start_an_empty_cache_and_no_other():
    model, _, fork = forked(GROUPED)
    cache, tokens_BT = model.new_cache(1, 4), torch.tensor([[3, 4]])
    model(tokens_BT, cache=cache, n_future=1)
    for filled in (cache, fork):
        with pytest.raises(ValueError, match="position_BT: expected the positions of the tokens"):
            model(tokens_BT, cache=filled, n_future=1)
    with pytest.raises(ValueError, match=r"first: expected 0 with a cache, .*, found 1"):
        model(tokens_BT, cache=model.new_cache(1, 4), first=1)


def test_in_half_precision_a_fork_is_as_near_the_truth_as_a_plain_cache():
    """Scores rounded to bfloat16 before the softmax would be twice as far."""
    prompt_R, length_P = torch.arange(40) % 3, torch.tensor([20, 12, 16])
    tokens_PT, last_R = random_tokens(GROUPED, 3, 20), random_tokens(GROUPED, 40, 1, seed=9)
    found = {}
    for name, dtype in (("truth", torch.float64), ("plain", torch.bfloat16), ("fork", torch.bfloat16)):
        # The same rounded weights in all three, so that what differs is the arithmetic of one step.
        model = random_model(dtype=torch.bfloat16, scale=0.6).to(dtype)
        cache = model.new_cache(3, 21)
        model(tokens_PT, cache=cache, n_future=1)
        if name == "fork":
            cache = cache.fork(prompt_R, length_P, 1)
        else:
            cache.select(prompt_R)
        found[name] = model(last_R, cache=cache, position_BT=length_P[prompt_R][:, None], n_future=1).detach()
        assert found[name].dtype == dtype
    plain, fork = (float((found[name].double() - found["truth"]).abs().mean()) for name in ("plain", "fork"))
    assert fork <= 1.1 * plain
