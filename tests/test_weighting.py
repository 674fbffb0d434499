"""Weights: the projection against an exact solution, each weighting against loops in float64, and what must not matter
(METHODS, "From signal to weight" and "Rho-1")."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import methods
from tests.test_advantage import SPANS, Calls, T, by_definition, mask, rewards, values_of
from tests.test_align import earlier, later
from wmtp import weighting
from wmtp.advantage import policy_advantage
from wmtp.align import align_future
from wmtp.weighting import METHODS, Method, concentration, keywords, project_mean_one
from wmtp.weighting.advantage import standardise, token_weights
from wmtp.weighting.excess import head_weights, select_top
from wmtp.weighting.uniform import token_weights as uniform_weights

DEFAULTS = {
    "beta": 0.9,
    "gamma": 1.0,
    "lam": 0.95,
    "sigma_floor": 0.01,
    "z_clip": 5.0,
    "weight_clip_min": 0.1,
    "weight_clip_max": 5.0,
    "concentration_floor": 0.3,
}
BOUNDS = [(0.1, 5.0), (0.0, 5.0), (0.5, 1.5), (0.1, 1.2), (0.0, math.inf), (0.9, math.inf)]


def exact_projection(u, lo, hi):
    """clip(c * u, lo, hi) of mean 1. The mean is piecewise linear in c, so c is solved for on the piece where it crosses 1."""
    ends = sorted({bound / x for x in u for bound in (lo, hi) if 0 < bound < math.inf})
    below = max((c for c in ends if mean_of(clipped(u, c, lo, hi)) < 1), default=0.0)
    above = min((c for c in ends if c > below), default=math.inf)
    free = [x for x in u if lo / x <= below and hi / x >= above]
    fixed = math.fsum(lo if lo / x > below else hi for x in u if not (lo / x <= below and hi / x >= above))
    # With no entry between its bounds the mean does not depend on c here.
    return clipped(u, (len(u) - fixed) / math.fsum(free) if free else above, lo, hi)


def clipped(u, c, lo, hi):
    return [min(max(c * x, lo), hi) for x in u]


def mean_of(w):
    return math.fsum(w) / len(w)


def project(u, lo, hi):
    u = torch.as_tensor(u, dtype=torch.float64)
    return project_mean_one(u, torch.ones_like(u, dtype=torch.bool), lo, hi)


def close(found, expected, tolerance):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(log_u=st.lists(st.floats(-12, 12), min_size=1, max_size=30), bounds=st.sampled_from(BOUNDS))
def test_projection_is_the_exact_one(log_u, bounds):
    u = [math.exp(x) for x in log_u]
    w = project(u, *bounds)
    close(w, exact_projection(u, *bounds), 1e-9)
    assert float(w.mean()) == pytest.approx(1, abs=1e-6)
    assert bounds[0] <= float(w.min()) and float(w.max()) <= bounds[1]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(log_u=st.lists(st.floats(-12, 12), min_size=2, max_size=30), bounds=st.sampled_from(BOUNDS), scale=st.floats(-200, 200))
def test_projection_is_idempotent_order_preserving_and_blind_to_scale(log_u, bounds, scale):
    u = torch.tensor(log_u, dtype=torch.float64).exp()
    w = project(u, *bounds)
    close(project(w, *bounds), w, 1e-9)
    close(project(u * math.exp(scale), *bounds), w, 1e-9)
    ranked = w[u.argsort(stable=True)]
    assert (ranked.diff() >= 0).all()


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("value", [0.0, 1e-250, 3.7, 1e250])
def test_equal_inputs_give_ones(bounds, value):
    close(project([value] * 7, *bounds), [1.0] * 7, 1e-12)
    close(project([value], *bounds), [1.0], 1e-12)


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("reach", [200, 300])
def test_projection_over_extreme_ranges(bounds, reach):
    """exp(-300) to exp(300) in float64, where a bound near 1 leaves the smallest entries to decide."""
    log_u = reach * (2 * torch.rand(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1)
    log_u[:2] = torch.tensor([-reach, reach])
    w = project(log_u.exp(), *bounds)
    assert torch.isfinite(w).all() and float(w.mean()) == pytest.approx(1, abs=1e-6)
    assert bounds[0] <= float(w.min()) and float(w.max()) <= bounds[1]
    assert (w[log_u.argsort()].diff() >= 0).all()
    close(w, exact_projection(log_u.exp().tolist(), *bounds), 1e-9)


@pytest.mark.parametrize("bounds", BOUNDS)
def test_zeros_among_the_inputs_leave_the_mean_reachable(bounds):
    w = project([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0], *bounds)
    assert float(w.mean()) == pytest.approx(1, abs=1e-6) and float(w[-1]) == float(w.max())
    assert bounds[0] <= float(w.min()) and float(w.max()) <= bounds[1]


@pytest.mark.parametrize("content", [0.0, 1e300, math.inf, math.nan, -1.0])
def test_entries_off_the_mask_get_zero_and_change_nothing(content):
    u, valid = torch.rand(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1, torch.ones(4, 6, dtype=torch.bool)
    valid[1, 2:] = False
    valid[3] = False
    w = project_mean_one(u, valid, 0.1, 5.0)
    assert torch.equal(project_mean_one(u.masked_fill(~valid, content), valid, 0.1, 5.0), w)
    assert (w[~valid] == 0).all()
    close(w[valid], exact_projection(u[valid].tolist(), 0.1, 5.0), 1e-9)


@pytest.mark.parametrize("bounds", BOUNDS)
def test_no_valid_entry_gives_zeros(bounds):
    for content in (0.0, 1.0, math.nan):
        w = project_mean_one(torch.full((2, 3), content), torch.zeros(2, 3, dtype=torch.bool), *bounds)
        assert torch.equal(w, torch.zeros(2, 3))


@pytest.mark.parametrize(
    "given_dtype, dtype", [(torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_projection_keeps_at_least_float32(given_dtype, dtype):
    assert project_mean_one(torch.ones(3, dtype=given_dtype), torch.ones(3, dtype=torch.bool), 0.1, 5.0).dtype == dtype


@pytest.mark.parametrize("lo, hi", [(-0.1, 5.0), (1.0, 5.0), (0.1, 1.0), (2.0, 0.5), (math.nan, 5.0), (0.1, math.nan)])
def test_bounds_that_leave_no_room_for_mean_one_are_refused(lo, hi):
    with pytest.raises(ValueError, match="0 <= lo < 1 < hi, found"):
        project([1.0, 2.0], lo, hi)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(w=st.lists(st.floats(0.001, 10), min_size=1, max_size=20), padding=st.integers(0, 3))
def test_concentration_is_the_exponent_of_the_entropy_over_n(w, padding):
    share = [x / math.fsum(w) for x in w]
    expected = math.exp(-math.fsum(p * math.log(p) for p in share)) / len(w)
    u, valid = torch.tensor([*w, *[9.0] * padding]), torch.tensor([True] * len(w) + [False] * padding)
    assert float(concentration(u, valid)) == pytest.approx(expected, rel=1e-5)


def test_concentration_at_its_ends():
    assert float(concentration(torch.full((8,), 3.0), torch.ones(8, dtype=torch.bool))) == pytest.approx(1)
    assert float(concentration(torch.eye(8)[0], torch.ones(8, dtype=torch.bool))) == pytest.approx(1 / 8)


def test_uniform_is_one_on_the_response_and_zero_elsewhere():
    w = uniform_weights(mask())
    assert w.dtype == torch.float32 and torch.equal(w == 1, mask()) and torch.equal(w == 0, ~mask())


# --- advantage ---------------------------------------------------------------------------------------------------------------------


def weights(values, response=None, **changes):
    return token_weights(values, mask() if response is None else response, rewards() > 0, **{**DEFAULTS, **changes})


def weights_by_definition(values, lam, beta=0.9, gamma=1.0, sigma_floor=0.01, z_clip=5.0, lo=0.1, hi=5.0, terminal=False):
    advantage = by_definition(values, rewards(), SPANS, gamma, lam, terminal=terminal)[0]
    places = [(b, i) for b, (P, L) in enumerate(SPANS) for i in range(P, L + 1)]
    A = [float(advantage[place]) for place in places]
    mu = mean_of(A)
    sigma = math.sqrt(mean_of([(a - mu) ** 2 for a in A]))
    z = [min(max((a - mu) / max(sigma, sigma_floor), -z_clip), z_clip) for a in A]
    w = torch.zeros_like(values)
    for place, weight in zip(places, exact_projection([math.exp(x / beta) for x in z], lo, hi)):
        w[place] = weight
    return w


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), lam=st.floats(0, 1), beta=st.floats(0.3, 3), gamma=st.floats(0.9, 1), z_clip=st.floats(0.5, 5))
def test_advantage_weights_equal_the_loops(seed, lam, beta, gamma, z_clip):
    values = values_of(seed)
    found = weights(values, lam=lam, beta=beta, gamma=gamma, z_clip=z_clip, concentration_floor=0.0)
    close(found, weights_by_definition(values, lam, beta, gamma, z_clip=z_clip), 1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_terminal_credit_pays_the_reward_at_the_last_token(seed):
    values = values_of(seed)
    found = weights(values, terminal_credit=True, concentration_floor=0.0)
    close(found, weights_by_definition(values, 0.95, terminal=True), 1e-6)
    assert not torch.allclose(found, weights(values, concentration_floor=0.0))
    with pytest.raises(ValueError, match="terminal_credit needs reward_B"):
        token_weights(values, mask(), **{**DEFAULTS, "terminal_credit": True})


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0, "length_adaptive"])
@pytest.mark.parametrize("spread", [1e-4, 0.3])
def test_weights_have_mean_one_within_bounds_on_the_mask_alone(lam, spread):
    values = (0.5 + spread * (values_of(20) - 0.5)).float()
    w = weights(values, lam=lam)
    assert w.dtype == torch.float32 and not w.requires_grad and torch.isfinite(w).all()
    assert float(w[mask()].double().mean()) == pytest.approx(1, abs=1e-6) and (w[~mask()] == 0).all()
    assert float(w[mask()].min()) >= 0.1 - 1e-6 and float(w[mask()].max()) <= 5 + 1e-5


def test_the_mean_is_that_of_the_whole_step_not_of_each_row():
    values = torch.where(torch.arange(len(SPANS))[:, None] < 3, 0.5, values_of(21))
    means = [float(row[valid].double().mean()) for row, valid in zip(weights(values), mask())]
    assert max(means) - min(means) > 0.05


@pytest.mark.parametrize("beta", [0.3, 0.5, 0.9])
def test_where_the_value_rises_the_weight_is_higher_than_where_it_falls(beta):
    """One row whose value falls once and one whose value rises once, at the same place."""
    spans, values = ((2, 11), (2, 11)), torch.full((2, T), 0.5)
    values[0, 7:], values[1, 7:] = 0.1, 0.9
    w = weights(values, mask(spans), lam=0.0, beta=beta)
    assert float(w[1, 7]) > 1.2 > 0.8 > float(w[0, 7])
    assert float(w[1, 7]) == float(w.max()) and float(w[0, 7]) == float(w[mask(spans)].min())


def test_the_sign_holds_for_every_lam():
    values, spans = torch.linspace(0.2, 0.8, T).expand(2, T).clone(), ((1, 12), (1, 12))
    values[1] = values[0].flip(0)
    for lam in (0.0, 0.5, 0.95, 1.0):
        w = weights(values, mask(spans), lam=lam)
        assert float(w[0, 1:12].min()) > float(w[1, 1:12].max())


def test_only_differences_of_values_enter():
    values = values_of(22) * 0.5
    close(weights(values + 0.4), weights(values), 1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0, "length_adaptive"])
def test_a_dead_critic_gives_almost_uniform_weights(seed, lam):
    random = torch.Generator().manual_seed(seed)
    spans = tuple((5, int(last)) for last in torch.randint(20, 99, (32,), generator=random))
    response = mask(spans, 100)
    values = (0.5 + 1e-4 * torch.randn(32, 100, generator=random)).float()
    off = weights(values, response, lam=lam)[response] - 1
    assert float(off.square().mean().sqrt()) <= 0.03 and float(off.abs().max()) <= 0.1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0, "length_adaptive"])
def test_a_dead_critic_gives_almost_uniform_weights_where_each_row_is_a_population(seed, lam):
    random = torch.Generator().manual_seed(seed)
    response = mask(tuple((5, int(last)) for last in torch.randint(8, 99, (32,), generator=random)), 100)
    values = (0.5 + 1e-4 * torch.randn(32, 100, generator=random)).float()
    work = methods.objective("verifiable_shared", lam=lam)
    arrays = {"ce_BTF": torch.zeros(32, 100, 4), "signal_BT": values, "response_BT": response, "is_correct_B": None}
    w, valid = work.method.weigh(arrays, work.settings), align_future(response, 4, False)
    for row, among in zip(w, valid):
        off = row[among].double() - 1
        assert abs(float(off.mean())) <= 1e-6
        assert 0 < float(off.square().mean().sqrt()) <= 0.03 and float(off.abs().max()) <= 0.1


def test_a_constant_critic_gives_ones():
    close(weights(torch.full((len(SPANS), T), 0.5))[mask()], torch.ones(int(mask().sum())), 1e-6)


def test_above_its_floor_the_spread_of_values_is_divided_out():
    values = 0.5 + 0.2 * (values_of(23) - 0.5)
    close(weights(2 * values), weights(values), 1e-6)
    floored = weights(values, sigma_floor=10.0)[mask()]
    assert float((floored - 1).abs().max()) < 0.05, "below it, it is not"


def test_standardise_is_over_the_valid_entries_alone():
    q = values_of(24)
    z = standardise(q, mask(), 0.01)
    inside = q[mask()]
    close(z[mask()], (inside - inside.mean()) / inside.std(correction=0), 1e-12)
    assert (z[~mask()] == 0).all() and z.dtype == torch.float64
    assert torch.equal(standardise(q.masked_fill(~mask(), 1e9), mask(), 0.01), z)


def test_beta_sharpens_and_flattens():
    values = values_of(25)
    found = [float(concentration(weights(values, beta=beta, concentration_floor=0.0), mask())) for beta in (0.3, 0.5, 0.9, 3.0, 1e4)]
    assert all(low < high for low, high in pairwise(found))
    close(weights(values, beta=1e9)[mask()], torch.ones(int(mask().sum())), 1e-6)


@pytest.mark.parametrize("beta", [0.02, 1e-4])
@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_a_very_small_beta_still_gives_finite_weights_of_mean_one(beta, floor):
    w = weights(values_of(26), beta=beta, concentration_floor=floor)
    assert torch.isfinite(w).all()
    assert float(w[mask()].double().mean()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("beta", [0.3, 0.5, 0.7, 0.9, 1.0])
def test_the_concentration_floor_does_not_bind_at_the_betas_of_the_sweep(beta):
    values = values_of(27)
    assert torch.equal(weights(values, beta=beta), weights(values, beta=beta, concentration_floor=0.0))


def test_below_the_concentration_floor_beta_is_raised_until_it_holds_and_no_further():
    values, wide = values_of(28), {"weight_clip_min": 0.0, "weight_clip_max": 1e9}
    assert float(concentration(weights(values, beta=0.05, concentration_floor=0.0, **wide), mask())) < 0.2
    w = weights(values, beta=0.05, **wide)
    assert 0.3 - 1e-6 <= float(concentration(w, mask())) < 0.301
    z = standardise(policy_advantage(values, mask(), 1.0, 0.95), mask(), 0.01)[mask()]
    high, low = int(z.argmax()), int(z.argmin())
    raised = float((z[high] - z[low]) / (w[mask()][high].double() / w[mask()][low].double()).log())
    assert raised > 0.05
    close(weights(values, beta=raised, concentration_floor=0.0, **wide), w, 1e-4)


def test_length_adaptive_lam():
    """max(0, 1 - 1 / (0.05 * length)) per row: 0 up to 20 tokens, 0.5 at 40, 0.8 at 100."""
    spans = ((1, 10), (1, 20), (1, 40), (1, 100))
    response, values = mask(spans, 101), values_of(29, spans, 101)
    expected = policy_advantage(values, response, 1.0, torch.tensor([0.0, 0.0, 0.5, 0.8], dtype=torch.float64))
    u = torch.exp(standardise(expected, response, 0.01).clamp(-5, 5) / 0.9)
    close(weights(values, response, lam="length_adaptive"), project_mean_one(u, response, 0.1, 5.0), 1e-6)


@pytest.mark.parametrize("content", [-1e3, 1e3])
def test_values_outside_the_judged_states_change_no_weight(content):
    values = values_of(30)
    poisoned = values.clone()
    for b, (P, L) in enumerate(SPANS):
        poisoned[b, : P - 1] = content
        poisoned[b, L:] = content
    assert torch.equal(weights(poisoned), weights(values))


def test_permuting_rows_permutes_advantage_weights():
    values, order = values_of(31), torch.tensor([4, 2, 0, 5, 3, 1])
    close(weights(values[order], mask()[order]), weights(values)[order], 1e-6)


def test_advantage_weights_are_detached_from_the_values():
    values = values_of(32).requires_grad_()
    assert not weights(values).requires_grad


def test_a_step_without_targets_gives_zero_weights():
    assert torch.equal(weights(values_of(33), torch.zeros_like(mask())), torch.zeros(len(SPANS), T))


def test_the_number_of_operations_grows_like_the_logarithm_of_the_length():
    counts = []
    for length in (2**4, 2**8, 2**12):
        spans = ((1, length - 1), (3, length - 2))
        with Calls() as calls:
            weights(values_of(0, spans, length), mask(spans, length), concentration_floor=0.0)
        counts.append(calls.n)
    assert counts[2] - counts[1] == counts[1] - counts[0] < 50


# --- excess ------------------------------------------------------------------------------------------------------------------------


def head_losses(loss, n_future=4):
    """ce[b, t, h] of a model whose head 0 has `loss` on each target token; further heads have numbers of their own; 0 off the mask."""
    ce = torch.zeros(*loss.shape, n_future, dtype=loss.dtype)
    own = torch.rand(*loss.shape, n_future, generator=torch.Generator().manual_seed(99), dtype=torch.float64).to(loss.dtype) * 9
    for b, (P, L) in enumerate(SPANS):
        for i in range(P, L + 1):
            for h in range(n_future):
                if i - h - 1 >= 0:
                    ce[b, i - h - 1, h] = loss[b, i] if h == 0 else own[b, i, h]
    return ce


def losses(seed, scale=6.0):
    return values_of(seed) * scale


def budget(n, keep_fraction):
    return math.ceil(Fraction(str(keep_fraction)) * n)


def chosen_by_definition(loss, reference, keep_fraction):
    """Tokens of each row with fewer than m better ones; of equal tokens the earlier is better."""
    chosen = torch.zeros_like(mask())
    for b, (P, L) in enumerate(SPANS):
        excess = {i: float(loss[b, i]) - float(reference[b, i]) for i in range(P, L + 1)}
        for i in excess:
            better = sum(excess[j] > excess[i] or (excess[j] == excess[i] and j < i) for j in excess)
            chosen[b, i] = better < budget(L - P + 1, keep_fraction)
    return chosen


def chosen_of(weight_BTF, h=0):
    """Which target tokens head h trains, read from the weights by their definition."""
    chosen = torch.zeros(weight_BTF.shape[:2], dtype=torch.bool)
    for b, t in weight_BTF[..., h].nonzero().tolist():
        chosen[b, t + h + 1] = True
    return chosen


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), keep_fraction=st.sampled_from([0.1, 0.3, 0.5, 0.6, 0.7, 1.0]), ties=st.booleans())
def test_excess_weights_equal_the_loops(seed, keep_fraction, ties):
    loss, reference = losses(seed), losses(seed + 1)
    if ties:
        loss, reference = loss.round(), reference.round()
    found = head_weights(head_losses(loss), reference, mask(), keep_fraction=keep_fraction)
    chosen, expected = chosen_by_definition(loss, reference, keep_fraction), torch.zeros(len(SPANS), T, 4)
    for b, (P, L) in enumerate(SPANS):
        n = L - P + 1
        for i in range(P, L + 1):
            for h in range(4):
                if chosen[b, i] and i - h - 1 >= 0:
                    expected[b, i - h - 1, h] = n / budget(n, keep_fraction)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_a_reference_that_knows_the_noise_leaves_what_can_be_learnt_and_a_shifted_one_does_not():
    """Loss = noise + what is still to learn; the reference's loss is the noise, a perfect one's is 0 where there is none."""
    to_learn = losses(41, 2.0)
    truth = chosen_by_definition(to_learn, torch.zeros_like(to_learn), 0.6)
    for noise in (losses(40, 8.0), torch.where(mask(), 0.0, 20.0).double()):
        ce = head_losses(noise + to_learn)
        for reference in (noise, later(noise, 20.0), earlier(noise, 20.0)):
            chosen = chosen_of(head_weights(ce, reference, mask(), keep_fraction=0.6))
            assert torch.equal(chosen, truth) == (reference is noise)


def test_the_excess_is_signed():
    """A token that the reference knows better is kept, one that it knows worse is dropped, however far apart they are."""
    loss, reference = torch.full((len(SPANS), T), 3.0), torch.full((len(SPANS), T), 3.0)
    reference[0, 4], reference[0, 6] = 2.0, 9.0
    chosen = chosen_of(head_weights(head_losses(loss), reference, mask(), keep_fraction=0.05))
    assert chosen[0].nonzero().flatten().tolist() == [4]
    chosen = chosen_of(head_weights(head_losses(loss), reference, mask(), keep_fraction=11 / 12))
    assert (mask()[0] & ~chosen[0]).nonzero().flatten().tolist() == [6]


def test_one_decision_a_token_serves_every_head():
    weight = head_weights(head_losses(losses(42)), losses(43), mask(), keep_fraction=0.6)
    for b, (P, L) in enumerate(SPANS):
        for i in range(P, L + 1):
            assert len({float(weight[b, i - h - 1, h]) for h in range(4) if i - h - 1 >= 0}) == 1
    far = head_losses(losses(42))
    far[..., 1:] = 123.0
    assert torch.equal(head_weights(far, losses(43), mask(), keep_fraction=0.6), weight), "head 0 decides"


def test_selected_tokens_weigh_so_that_each_head_has_mean_one():
    weight = head_weights(head_losses(losses(44)), losses(45), mask(), keep_fraction=0.6)
    for b, (P, L) in enumerate(SPANS):
        for h in range(min(P, 4)):
            assert float(weight[b, :, h].double().sum()) / (L - P + 1) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("keep_fraction", [0.1, 0.2, 0.3, 0.55, 0.6, 0.7, 0.9, 1.0])
def test_exactly_ceil_of_the_share_is_kept_however_many_tie(keep_fraction):
    for n in range(1, 101):
        valid = torch.zeros(1, 104, dtype=torch.bool)
        valid[0, 2 : 2 + n] = True
        kept = select_top(torch.zeros(1, 104), valid, keep_fraction).nonzero()[:, 1].tolist()
        assert kept == list(range(2, 2 + budget(n, keep_fraction))), "equal scores: the earlier tokens"


def test_a_selection_is_never_empty():
    """m = ceil(k * N) is at least 1 for every k > 0: a row of zero weights would break the mean in silence."""
    for keep_fraction in (0.01, 1e-6, 1e-12):
        assert select_top(losses(46), mask(), keep_fraction).sum(1).tolist() == [1] * len(SPANS)


@pytest.mark.parametrize("content", [1e9, -1e9, math.inf, -math.inf, math.nan])
def test_losses_outside_the_response_change_no_selection(content):
    loss, reference = losses(47), losses(48)
    ce, poisoned = head_losses(loss), reference.masked_fill(~mask(), content)
    poisoned_ce = ce.clone()
    for b, (P, L) in enumerate(SPANS):
        poisoned_ce[b, : P - 1], poisoned_ce[b, L:] = content, content
    expected = head_weights(ce, reference, mask(), keep_fraction=0.6)
    assert torch.equal(head_weights(poisoned_ce, poisoned, mask(), keep_fraction=0.6), expected)


def test_rows_are_weighed_alone_so_that_no_split_of_the_step_matters():
    loss, reference = losses(49), losses(50)
    whole = head_weights(head_losses(loss), reference, mask(), keep_fraction=0.6)
    for b in range(len(SPANS)):
        alone = head_weights(head_losses(loss)[b : b + 1], reference[b : b + 1], mask()[b : b + 1], keep_fraction=0.6)
        assert torch.equal(alone[0], whole[b])
    order = torch.tensor([4, 2, 0, 5, 3, 1])
    assert torch.equal(head_weights(head_losses(loss)[order], reference[order], mask()[order], keep_fraction=0.6), whole[order])


def test_a_row_without_targets_gets_zeros():
    response = mask()
    response[2] = False
    weight = head_weights(head_losses(losses(51)), losses(52), response, keep_fraction=0.6)
    assert torch.isfinite(weight).all() and (weight[2] == 0).all()


def test_differences_below_single_precision_still_decide():
    loss, response = torch.full((1, 6), 3.0, dtype=torch.float64), mask(((2, 5),), 6)
    loss[0, 4] += 1e-12
    ce = torch.nn.functional.pad(loss[:, 1:], (0, 1))[..., None]
    assert chosen_of(head_weights(ce, torch.zeros(1, 6), response, keep_fraction=0.25))[0].nonzero().flatten().tolist() == [4]


# --- the table ---------------------------------------------------------------------------------------------------------------------


def test_the_table_names_functions_that_exist_and_signals_that_are_cached():
    expected = {
        "ntp": Method("uniform"),
        "baseline": Method("uniform"),
        "verifiable": Method("advantage", "critic"),
        "rho1": Method("excess", "reference", needs_forward=True),
    }
    assert expected.items() <= METHODS.items()
    assert all(callable(method.function()) for method in METHODS.values())
    assert METHODS["verifiable"].function() is token_weights and METHODS["rho1"].function() is head_weights
    assert METHODS["baseline"].function() is uniform_weights


def test_the_page_names_what_a_weighting_may_ask_for_beside_its_block():
    asked = {word for name, method in METHODS.items() for word in keywords(method.function()) - set(methods.block(name))}
    assert asked >= {"seed", "notes", "fitted", "lag"}
    assert not [word for word in asked if f"`{word}`" not in weighting.__doc__]
