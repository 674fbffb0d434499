"""Generalised advantage estimation against its double sum in float64, its identities, and what must not matter (METHODS, "Critic")."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from wmtp.advantage import check_starts, gae, policy_advantage, value_drops

# P and L of each row in 13 positions: the shortest prompt, the shortest response, no padding, much padding.
SPANS = ((1, 12), (5, 5), (4, 9), (12, 12), (2, 6), (7, 11))
T = 13


def mask(spans=SPANS, T=T):
    position = torch.arange(T)
    return torch.stack([(position >= first) & (position <= last) for first, last in spans])


def values_of(seed, spans=SPANS, T=T, dtype=torch.float64):
    return torch.rand(len(spans), T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rewards(spans=SPANS):
    return torch.tensor([b % 2 for b in range(len(spans))], dtype=torch.float64)


def deltas(v, R, P, L, gamma, terminal=True):
    """delta[i] for i = P..L from a row's values; without `terminal` the last one is 0."""
    found = {i: gamma * v[i] - v[i - 1] for i in range(P, L)}
    found[L] = R - v[L - 1] if terminal else 0.0
    return found


def double_sum(v, R, P, L, gamma, lam, terminal=True):
    """A[i] = sum over l >= i of (gamma * lam)^(l-i) * delta[l], for i = P..L."""
    delta = deltas(v, R, P, L, gamma, terminal)
    return {i: math.fsum((gamma * lam) ** (l - i) * delta[l] for l in range(i, L + 1)) for i in range(P, L + 1)}


def by_definition(values, reward, spans, gamma, lam, terminal=True):
    """(advantages by target token, value targets by state), one entry at a time; 0 elsewhere."""
    advantage, target = torch.zeros_like(values), torch.zeros_like(values)
    for b, (P, L) in enumerate(spans):
        v = values[b].tolist()
        for i, A in double_sum(v, float(reward[b]), P, L, gamma, lam[b] if isinstance(lam, list) else lam, terminal).items():
            advantage[b, i] = A
            target[b, i - 1] = v[i - 1] + A
    return advantage, target


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(gamma=st.floats(0, 1), lam=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_equals_the_double_sum(gamma, lam, seed):
    values, reward = values_of(seed), rewards()
    expected_A, expected_G = by_definition(values, reward, SPANS, gamma, lam)
    A, G = gae(values, reward, mask(), gamma, lam)
    close(A, expected_A)
    close(G, expected_G)
    without = by_definition(values, reward, SPANS, gamma, lam, terminal=False)[0]
    close(policy_advantage(values, mask(), gamma, lam), without)
    close(policy_advantage(values, mask(), gamma, lam, terminal_credit=True, reward_B=reward), expected_A)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lam_may_differ_from_row_to_row(dtype):
    lam = [0.0, 0.3, 0.95, 1.0, 0.5, 0.99]
    values, reward = values_of(3), rewards()
    A, G = gae(values, reward, mask(), 0.97, torch.tensor(lam, dtype=dtype))
    expected_A, expected_G = by_definition(values, reward, SPANS, 0.97, lam)
    close(A, expected_A, 1e-10 if dtype == torch.float64 else 1e-6)
    close(G, expected_G, 1e-10 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("length", [2, 3, 255, 256, 257, 1000])
def test_long_rows_equal_the_backward_recursion(length):
    spans, reward = ((1, length - 1),), torch.ones(1, dtype=torch.float64)
    values = values_of(4, spans, length)
    v, A, expected = values[0].tolist(), 0.0, torch.zeros(1, length, dtype=torch.float64)
    delta = deltas(v, 1.0, 1, length - 1, 0.999)
    for i in range(length - 1, 0, -1):
        expected[0, i] = A = delta[i] + 0.999 * 0.98 * A
    close(gae(values, reward, mask(spans, length), 0.999, 0.98)[0], expected)


def test_results_are_zero_outside_their_positions():
    A, G = gae(values_of(5) + 1, torch.ones(len(SPANS)), mask(), 0.9, 0.9)
    state = torch.zeros_like(mask())
    for b, (P, L) in enumerate(SPANS):
        state[b, P - 1 : L] = True
    assert (A[~mask()] == 0).all() and (G[~state] == 0).all()
    assert (G[state] != 0).all(), "the last prompt token, P-1, is trained"


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_without_discount_the_deltas_sum_to_the_reward_less_the_prompt_value(lam):
    values, reward = values_of(6), rewards()
    delta = gae(values, reward, mask(), 1.0, 0.0)[0]
    for b, (P, L) in enumerate(SPANS):
        assert float(delta[b].sum()) == pytest.approx(float(reward[b] - values[b, P - 1]), abs=1e-12)
        assert float(delta[b, L]) == pytest.approx(float(reward[b] - values[b, L - 1]), abs=1e-12), "from V(L-1), not V(L)"


def test_undiscounted_and_lam_one_compare_the_reward_with_the_state_before():
    values, reward = values_of(7), rewards()
    A, G = gae(values, reward, mask(), 1.0, 1.0)
    for b, (P, L) in enumerate(SPANS):
        close(A[b, P : L + 1], reward[b] - values[b, P - 1 : L])
        close(G[b, P - 1 : L], reward[b].expand(L - P + 1))


def test_undiscounted_policy_advantage_is_the_rise_to_the_last_judged_state():
    values = values_of(8)
    A = policy_advantage(values, mask(), 1.0, 1.0)
    for b, (P, L) in enumerate(SPANS):
        close(A[b, P : L + 1], values[b, L - 1] - values[b, P - 1 : L])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lam_zero_leaves_the_differences_themselves(gamma):
    values, reward = values_of(9), rewards()
    A = gae(values, reward, mask(), gamma, 0.0)[0]
    for b, (P, L) in enumerate(SPANS):
        for i, delta in deltas(values[b].tolist(), float(reward[b]), P, L, gamma).items():
            assert float(A[b, i]) == pytest.approx(delta, abs=1e-12)


@pytest.mark.parametrize(
    "function", [lambda v, lam: gae(v, rewards(), mask(), 1.0, lam)[0], lambda v, lam: policy_advantage(v, mask(), 1.0, lam)]
)
def test_lam_to_one_is_continuous(function):
    values = values_of(10)
    at_one = function(values, 1.0)
    for step in (1e-3, 1e-6, 1e-9):
        # |dA/dlam| <= sum over l of (l - i) * |delta| <= T^2
        assert float((function(values, 1 - step) - at_one).abs().max()) <= step * T * T
    assert float((function(values, 0.9) - at_one).abs().max()) > 1e-3, "lam has an effect"


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_the_reward_matters_for_every_lam(lam):
    values = values_of(11)
    (won, G_won), (lost, G_lost) = (gae(values, torch.full((len(SPANS),), R), mask(), 0.9, lam) for R in (1.0, 0.0))
    for b, (P, L) in enumerate(SPANS):
        expected = torch.tensor([(0.9 * lam) ** (L - i) for i in range(P, L + 1)], dtype=torch.float64)
        close((won - lost)[b, P : L + 1], expected)
        close((G_won - G_lost)[b, P - 1 : L], expected)


def test_the_policy_signal_holds_no_terminal_difference():
    values = values_of(12)
    A = policy_advantage(values, mask(), 1.0, 0.95)
    for b, (P, L) in enumerate(SPANS):
        assert float(A[b, L]) == 0.0
        if L > P:
            assert float(A[b, L - 1]) == pytest.approx(float(values[b, L - 1] - values[b, L - 2]), abs=1e-12)


def test_terminal_credit_needs_a_reward():
    with pytest.raises(ValueError, match="terminal_credit needs reward_B, found None"):
        policy_advantage(values_of(0), mask(), terminal_credit=True)


def test_value_drops_are_the_differences_before_the_end_of_text():
    values = values_of(13)
    found, expected = value_drops(values, mask()), torch.zeros_like(values)
    for b, (P, L) in enumerate(SPANS):
        for i in range(P, L):
            expected[b, i] = values[b, i] - values[b, i - 1]
    close(found, expected)


class Calls(TorchDispatchMode):
    """Counts every tensor operation, reads of single elements included."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("function", [lambda v, m: gae(v, torch.ones(2), m, 0.99, 0.95), lambda v, m: policy_advantage(v, m)])
def test_no_loop_over_tokens(function):
    counts = []
    for length in (2**4, 2**8, 2**12):
        spans = ((1, length - 1), (3, length - 2))
        with Calls() as calls:
            function(values_of(0, spans, length), mask(spans, length))
        counts.append(calls.n)
    assert counts[2] - counts[1] == counts[1] - counts[0], f"operations grow like log T, found {counts} for T = 16, 256, 4096"
    assert counts[2] < 200


# Whatever stands where no state of the response is: before the last prompt token, at the end of text itself, and in the padding.
@pytest.mark.parametrize("content", [1e6, -1e6, math.inf, math.nan])
def test_values_outside_the_judged_states_change_nothing(content):
    values, reward = values_of(14), rewards()
    poisoned = values.clone()
    for b, (P, L) in enumerate(SPANS):
        poisoned[b, : P - 1] = content
        poisoned[b, L:] = content
    for found, expected in zip(gae(poisoned, reward, mask(), 0.99, 0.9), gae(values, reward, mask(), 0.99, 0.9)):
        assert torch.equal(found, expected)
    assert torch.equal(policy_advantage(poisoned, mask()), policy_advantage(values, mask()))
    assert torch.equal(value_drops(poisoned, mask()), value_drops(values, mask()))


def test_the_value_of_the_last_prompt_token_matters():
    values, changed = values_of(15), values_of(15)
    for b, (P, _) in enumerate(SPANS):
        changed[b, P - 1] += 0.25
    difference = gae(changed, rewards(), mask(), 1.0, 0.9)[0] - gae(values, rewards(), mask(), 1.0, 0.9)[0]
    for b, (P, _) in enumerate(SPANS):
        assert float(difference[b, P]) == pytest.approx(-0.25) and float(difference[b, P + 1 :].abs().sum()) == 0


def test_permuting_rows_permutes_results_and_more_padding_changes_none():
    values, reward, order = values_of(16), rewards(), torch.tensor([3, 0, 5, 1, 4, 2])
    lam = torch.linspace(0, 1, len(SPANS), dtype=torch.float64)
    A, G = gae(values, reward, mask(), 0.99, lam)
    permuted_A, permuted_G = gae(values[order], reward[order], mask()[order], 0.99, lam[order])
    assert torch.equal(permuted_A, A[order]) and torch.equal(permuted_G, G[order])
    wider = torch.nn.functional.pad(values, (0, 9), value=0.7)
    close(gae(wider, reward, mask(T=T + 9), 0.99, lam)[0][:, :T], A, 1e-14)


@pytest.mark.parametrize(
    "given_dtype, dtype", [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)]
)
def test_results_are_at_least_float32(given_dtype, dtype):
    values = values_of(17, dtype=given_dtype)
    A, G = gae(values, rewards(), mask(), 1.0, 0.95)
    assert A.dtype == G.dtype == policy_advantage(values, mask()).dtype == value_drops(values, mask()).dtype == dtype
    close(A.double(), by_definition(values.double(), rewards(), SPANS, 1.0, 0.95)[0], 1e-5)


def test_float64_stays_float64():
    A, G = gae(values_of(18), rewards().float(), mask())
    assert A.dtype == G.dtype == policy_advantage(values_of(18), mask()).dtype == torch.float64


def test_a_row_without_response_gives_zeros_and_leaves_the_others_alone():
    values, response = values_of(19), mask()
    alone = gae(values[1:], rewards()[1:], response[1:], 1.0, 0.95)[0]
    response[0] = False
    A, G = gae(values, rewards(), response, 1.0, 0.95)
    assert (A[0] == 0).all() and (G[0] == 0).all() and torch.equal(A[1:], alone)
    assert (policy_advantage(values, response)[0] == 0).all()


@pytest.mark.parametrize(
    "values, response, message",
    [
        (torch.zeros(2, 4), torch.zeros(2, 5, dtype=torch.bool), r"\(2, 4\) and \(2, 5\)"),
        (torch.zeros(2, 4), torch.zeros(2, 4), "bool response mask"),
    ],
)
def test_wrong_masks_are_refused(values, response, message):
    for function in (lambda: gae(values, torch.zeros(len(values)), response), lambda: policy_advantage(values, response)):
        with pytest.raises(ValueError, match=message):
            function()


def test_a_response_without_a_state_before_it_is_refused():
    check_starts(mask())
    early = mask(((0, 3), *SPANS[1:]))
    for function in (lambda: check_starts(early), lambda: gae(values_of(0), rewards(), early, 1.0, 0.95)):
        with pytest.raises(ValueError, match="position 0"):
            function()
