import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import methods
from tests.test_model import random_model
from wmtp.batches import Batch, collate, in_order, n_steps, share, step_rows
from wmtp.critic import Critic, ValueObjective

few = settings(deadline=None, max_examples=60)


@few
@given(n=st.integers(1, 40), per_step=st.integers(1, 15), seed=st.integers(0, 2**40), epochs=st.integers(1, 3))
def test_every_row_comes_once_an_epoch(n, per_step, seed, epochs):
    units = np.arange(n) * 3 + 1
    steps = n_steps(n, per_step, epochs)
    taken = np.concatenate([step_rows(units, per_step, seed, step) for step in range(steps)])
    assert all(len(step_rows(units, per_step, seed, step)) == per_step for step in range(steps))
    for epoch in range(epochs):
        assert sorted(taken[epoch * n : (epoch + 1) * n]) == units.tolist()


def test_order_is_a_pure_function_of_seed_and_step():
    units = np.arange(50)
    forward = [step_rows(units, 8, 3, step).tolist() for step in range(14)]
    assert [step_rows(units, 8, 3, step).tolist() for step in reversed(range(14))] == forward[::-1]
    assert [step_rows(units, 8, 4, step).tolist() for step in range(14)] != forward
    flat = [row for rows in forward for row in rows]
    assert flat[:50] != flat[50:100], "each pass has an order of its own"


def test_pairs_stay_together():
    units = np.arange(20).reshape(10, 2)
    taken = np.concatenate([step_rows(units, 4, 0, step) for step in range(5)])
    assert taken.shape == (20, 2) and (taken[:, 1] == taken[:, 0] + 1).all()
    assert sorted(taken[:10, 0]) == list(range(0, 20, 2))


@few
@given(n=st.integers(0, 5000), rows=st.integers(1, 64), tenths=st.integers(0, 45))
def test_steps_cover_the_epochs_and_no_more(n, rows, tenths):
    steps, wanted = n_steps(n, rows, tenths / 10), Fraction(tenths, 10) * n
    assert steps * rows >= wanted > (steps - 1) * rows or steps == wanted == 0


def test_fractions_of_epochs_are_exact():
    assert [n_steps(100, 1, x) for x in (0.07, 0.14, 0.28, 0.55)] == [7, 14, 28, 55], "0.07 * 100 is 7.000000000000001 in binary"
    assert n_steps(101, 100, 1.0) == 2 and n_steps(10, 3, 0) == 0


def rows_of(lengths, starts=None):
    """Token data of rows in memory; row r is 100 r + 1, 100 r + 2 and so on."""
    starts = starts or [max(1, length // 2) for length in lengths]
    return SimpleNamespace(
        lengths=np.array(lengths), response_start=np.array(starts), is_correct=np.arange(len(lengths)) % 2 == 0,
        spans=lambda: np.stack([np.arange(len(lengths)), np.arange(len(lengths)) + 1], axis=1).astype(np.int32),
        input_ids=lambda rows: [np.arange(1, lengths[row] + 1, dtype=np.int32) + 100 * row for row in map(int, rows)],
    )  # fmt: skip


def random_rows(n, seed=0, longest=20):
    return rows_of(np.random.default_rng(seed).integers(4, longest, n).tolist())


def content(batch):
    """{row: (tokens, response positions, signal)} without padding, and a check that padding is silent."""
    found = {}
    for place, row in enumerate(batch.row_B.tolist()):
        length = int(batch.response_BT[place].nonzero().max()) + 1
        assert (batch.tokens_BT[place, length:] == 0).all()
        signal = None if batch.signal_BT is None else batch.signal_BT[place, :length].tolist()
        found[row] = (batch.tokens_BT[place, :length].tolist(), batch.response_BT[place].nonzero().flatten().tolist(), signal)
    return found


def signal(row):
    return np.arange(20, dtype=np.float32)[: int(LENGTHS[row])] + row / 8


LENGTHS = [7, 4, 19, 12]


def test_collate_pads_with_silence():
    data = rows_of(LENGTHS, [2, 1, 9, 11])
    batch = collate(data, np.array([2, 1, 3]), signal)
    assert batch.tokens_BT.shape == (3, 19) and batch.tokens_BT.dtype == torch.int64 and batch.response_BT.dtype == torch.bool
    starts = data.response_start
    assert content(batch) == {
        row: (data.input_ids([row])[0].tolist(), list(range(starts[row], LENGTHS[row])), signal(row).tolist()) for row in (2, 1, 3)
    }
    assert not batch.signal_BT[1, 4:].any() and batch.is_correct_B.tolist() == [True, False, False] and batch.weight_BT is None


def test_collate_reads_token_data(data):
    batch = collate(data, np.array([3, 0]))
    for place, row in enumerate((3, 0)):
        assert batch.tokens_BT[place, : data.lengths[row]].tolist() == data.rows["input_ids"][int(row)].as_py()
        assert int(batch.response_BT[place].sum()) == data.lengths[row] - data.response_start[row]
        assert batch.is_correct_B[place] == data.is_correct[row]
        assert batch.span_B2[place].tolist() == data.spans()[row].tolist() and batch.span_B2.dtype == torch.int64


@few
@given(n=st.integers(1, 25), size=st.integers(1, 5), budget=st.integers(1, 120), seed=st.integers(0, 99))
def test_shares_cover_all_rows_once_within_the_budget(n, size, budget, seed):
    data = random_rows(n, seed)
    whole = collate(data, np.arange(n))
    shares = [share(whole, rank, size, budget) for rank in range(size)]
    assert len({len(batches) for batches in shares}) == 1, "every rank joins every collective"
    real = [batch for batches in shares for batch in batches if batch.row_B.tolist() != [-1]]
    assert sorted(row for batch in real for row in batch.row_B.tolist()) == list(range(n))
    found = {row: values for batch in real for row, values in content(batch).items()}
    assert found == content(whole)
    for batch in real:
        assert batch.tokens_BT.shape[1] == data.lengths[batch.row_B].max(), "cut to its own longest row"
        assert batch.tokens_BT.numel() <= budget or len(batch.row_B) == 1
        assert batch.shortest_prompt == data.response_start[batch.row_B].min()
    counts = [sum(len(batch.row_B) for batch in batches if batch.row_B.tolist() != [-1]) for batches in shares]
    assert max(counts) - min(counts) <= 1


def test_a_rows_signal_weight_and_label_go_with_it():
    data = rows_of(LENGTHS)
    whole = collate(data, np.arange(4), signal)
    weighted = Batch(**{**vars(whole), "weight_BT": whole.signal_BT * 2})
    for batch in share(weighted, 0, 2, 1) + share(weighted, 1, 2, 1):
        row = int(batch.row_B)
        assert batch.signal_BT[0].tolist() == signal(row).tolist() and batch.weight_BT[0].tolist() == (2 * signal(row)).tolist()
        assert batch.is_correct_B.tolist() == [row % 2 == 0] and batch.span_B2.tolist() == [[row, row + 1]]


def fillers(with_signal=False):
    """One row for three ranks: two of them get nothing but filler."""
    data = rows_of([12], [4])
    step = collate(data, np.array([0]), (lambda row: np.ones(12, dtype=np.float32)) if with_signal else None)
    step = Batch(**{**vars(step), "tokens_BT": step.tokens_BT % 40})
    return step, share(step, 1, 3, 1000)


@pytest.mark.parametrize("name", methods.SEPARATE)
def test_filler_rows_have_no_loss_no_gradient_and_no_count(name):
    step, _ = fillers(with_signal=True)
    step = Batch(**{**vars(step), "signal_BT": torch.arange(12.0)[None] / 20})
    objective, model = methods.objective(name, [step], n_future=3), random_model()
    (batch,) = share(objective.prepare(step), 1, 3, 1000)
    assert batch.row_B.tolist() == [-1]
    loss, sums = objective.loss(model, batch)
    loss.backward()
    assert loss.item() == 0
    for key, value in sums.items():
        assert (value == -math.inf).all() if key.startswith("max_") else not value.any(), key
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_filler_rows_have_no_value_loss():
    critic = Critic(random_model())
    _, (batch,) = fillers()
    loss, sums = ValueObjective("bce", lm_coef=0.5).loss(critic, batch)
    loss.backward()
    assert loss.item() == 0 and all(not value.any() for value in sums.values())
    trained = {name: p.grad for name, p in critic.named_parameters() if "extra_heads" not in name}
    assert all(gradient is not None and not gradient.any() for gradient in trained.values())


@few
@given(n=st.integers(0, 25), size=st.integers(1, 4), budget=st.integers(1, 120), seed=st.integers(0, 99))
def test_in_order_gives_each_row_to_one_rank_once_within_the_budget(n, size, budget, seed):
    data = random_rows(30, seed)
    rows = np.random.default_rng(seed).permutation(30)[:n]
    batches = [batch for rank in range(size) for batch in in_order(data, rows, rank, size, budget) if batch.row_B.tolist() != [-1]]
    assert sorted(row for batch in batches for row in batch.row_B.tolist()) == sorted(rows.tolist())
    assert all(batch.tokens_BT.numel() <= budget or len(batch.row_B) == 1 for batch in batches)
    expected = content(collate(data, np.arange(30)))
    assert all(values == expected[row] for batch in batches for row, values in content(batch).items())
