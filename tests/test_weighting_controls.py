"""The controls against their definitions, one token at a time, and what must not matter to them (METHODS, "Controls")."""

import math
from collections import Counter

import pytest
import torch

from tests.methods import BOUNDS, OWN, PIPELINE, SEPARATE
from tests.test_advantage import SPANS, T, mask, values_of
from tests.test_weighting import budget, exact_projection
from wmtp import noise
from wmtp.advantage import policy_advantage
from wmtp.weighting import (
    METHODS,
    advantage,
    array_names,
    constant_critic,
    crr_binary,
    keywords,
    oracle,
    position_only,
    random_k,
    random_matched,
    shuffled,
)

SETTINGS = {**PIPELINE, "beta": 0.9}
ROWS = torch.tensor([11, 3, 8, 0, 42, 7])
PLACES = [(b, i) for b, (P, L) in enumerate(SPANS) for i in range(P, L + 1)]


def critic(seed=0, **changes):
    return advantage.token_weights(values_of(seed), mask(), **{**SETTINGS, **changes})


def projected(u):
    """{place: u} to weights, by the exact projection."""
    w = torch.zeros(len(SPANS), T, dtype=torch.float64)
    for place, weight in zip(u, exact_projection(list(u.values()), BOUNDS["weight_clip_min"], BOUNDS["weight_clip_max"])):
        w[place] = weight
    return w


def close(found, expected, tolerance=1e-6):
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("seed", range(5))
def test_shuffling_keeps_each_rows_multiset_and_moves_it_by_the_key(seed):
    found, weight = shuffled.token_weights(values_of(0), mask(), ROWS, seed=seed, **SETTINGS), critic()
    drawn = noise.uniform(seed, ROWS, T, "shuffled")
    for b, (P, L) in enumerate(SPANS):
        order = sorted(range(P, L + 1), key=lambda i: float(drawn[b, i]))
        assert found[b, P : L + 1].tolist() == [float(weight[b, i]) for i in order]
        assert Counter(found[b].tolist()) == Counter(weight[b].tolist())
    assert (found[~mask()] == 0).all() and not torch.equal(found, weight)


def test_every_place_of_a_row_is_as_likely_for_a_weight():
    response = mask(((3, 8),), 10).expand(6000, 10)
    values = values_of(1, ((3, 8),), 10).expand(6000, 10)
    found = shuffled.token_weights(values, response, torch.arange(6000), seed=1, **SETTINGS)
    first = found[:, 3:9] == advantage.token_weights(values, response, **SETTINGS)[0, 3]
    assert first.sum(1).eq(1).all(), "the example needs distinct weights"
    assert (first.sum(0) / 6000 - 1 / 6).abs().max() < 4 * math.sqrt(1 / 6 * 5 / 6 / 6000)


def test_a_constant_critic_is_the_pipeline_without_a_critic():
    close(constant_critic.token_weights(mask(), **SETTINGS), mask().float())
    fading = constant_critic.token_weights(mask(), **{**SETTINGS, "gamma": 0.9})
    close(fading, critic_of(torch.full((len(SPANS), T), 0.5), gamma=0.9))
    assert float((fading - mask().float()).abs().max()) > 0.1, "below 1 gamma alone makes weights"


def critic_of(values, **changes):
    return advantage.token_weights(values, mask(), **{**SETTINGS, **changes})


def bin_of(b, i, n_bins):
    P, L = SPANS[b]
    return n_bins if i == L else (i - P) * n_bins // (L - P)


@pytest.mark.parametrize("n_bins", [1, 4, 40])
def test_position_alone_gets_the_critics_mean_weight(n_bins):
    steps, of_bin = [{"signal_BT": values_of(seed), "response_BT": mask()} for seed in (0, 1, 2)], {}
    for seed in (0, 1, 2):
        weight = critic(seed)
        for b, i in PLACES:
            of_bin.setdefault(bin_of(b, i, n_bins), []).append(float(weight[b, i]))
    fitted = position_only.fit(iter(steps), n_bins=n_bins, **SETTINGS)
    expected = [math.fsum(of_bin[k]) / len(of_bin[k]) if k in of_bin else 1.0 for k in range(n_bins + 1)]
    torch.testing.assert_close(fitted, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    found = position_only.token_weights(mask(), fitted=fitted, n_bins=n_bins, **SETTINGS)
    close(found, projected({(b, i): expected[bin_of(b, i, n_bins)] for b, i in PLACES}))
    ends = [float(found[b, L]) for b, (P, L) in enumerate(SPANS)]
    assert len(set(ends)) == 1 and (n_bins > 1 or len({float(found[place]) for place in PLACES}) == 2)


def test_position_explains_a_critic_that_sees_position_alone():
    """Values that fall late in every row alike: the control then gives late tokens the low weights that the critic gives them."""
    spans = ((2, 21),) * 8
    response, values = mask(spans, 24), (torch.arange(24) < 17).double().expand(8, 24) * 0.5 + 0.2
    fitted = position_only.fit([{"signal_BT": values, "response_BT": response}], n_bins=20, **SETTINGS)
    found = position_only.token_weights(response, fitted=fitted, n_bins=20, **SETTINGS)
    close(found, advantage.token_weights(values, response, **SETTINGS), 1e-5)


def test_matched_weights_are_quantiles_of_the_critics_own():
    seed, weight = 5, critic()
    pool = sorted(float(weight[place]) for place in PLACES)
    drawn = noise.uniform(seed, ROWS, T, "random_matched")
    u = {place: pool[int(float(drawn[place]) * len(pool))] for place in PLACES}
    close(random_matched.token_weights(values_of(0), mask(), ROWS, seed=seed, **SETTINGS), projected(u))


def test_matched_weights_have_the_critics_distribution_in_the_large():
    spans = ((4, 63),) * 200
    response, values = mask(spans, 64), values_of(3, spans, 64)
    found = random_matched.token_weights(values, response, torch.arange(200), seed=1, **SETTINGS)[response].double()
    expected = advantage.token_weights(values, response, **SETTINGS)[response].double()
    at = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    torch.testing.assert_close(found.quantile(at), expected.quantile(at), rtol=0.05, atol=0)
    assert abs(float(torch.corrcoef(torch.stack([found, expected]))[0, 1])) < 0.03


@pytest.mark.parametrize("keep_fraction", [0.1, 0.55, 0.6, 1.0])
def test_random_k_spends_rho1s_budget_on_the_tokens_that_the_key_draws(keep_fraction):
    found = random_k.token_weights(mask(), ROWS, keep_fraction=keep_fraction, seed=9)
    drawn = noise.uniform(9, ROWS, T, "random_k")
    expected = torch.zeros(len(SPANS), T)
    for b, (P, L) in enumerate(SPANS):
        n = L - P + 1
        for i in sorted(range(P, L + 1), key=lambda i: -float(drawn[b, i]))[: budget(n, keep_fraction)]:
            expected[b, i] = n / budget(n, keep_fraction)
    assert torch.equal(found, expected)


def test_random_k_favours_no_place():
    response = mask(((3, 12),), 14).expand(6000, 14)
    share = (random_k.token_weights(response, torch.arange(6000), keep_fraction=0.6, seed=2) > 0).double().mean(0)[3:13]
    assert (share - 0.6).abs().max() < 4 * math.sqrt(0.24 / 6000)


@pytest.mark.parametrize("emphasis", [0.5, 1.0, 3.0, 1e4])
def test_the_oracle_emphasises_the_known_place(emphasis):
    span = torch.tensor([(3, 5), (-1, -1), (9, 10), (12, 13), (-1, -1), (7, 9)])
    settings, correct = {**BOUNDS, "emphasis": emphasis, "policy_on_incorrect": "value_only"}, torch.ones(len(SPANS), dtype=torch.bool)
    found = oracle.token_weights(mask(), span, correct, **settings)
    close(found, projected({(b, i): emphasis if span[b, 0] <= i < span[b, 1] else 1.0 for b, i in PLACES}))
    if emphasis > 1:
        assert float(found[0, 3]) == float(found.max()) > 1 > float(found[0, 2]) == float(found[1, 5])
    with pytest.raises(ValueError, match="no row of the step has a known decisive place"):
        oracle.token_weights(mask(), torch.full((len(SPANS), 2), -1), correct, **settings)


def test_shuffled_weights_keep_what_a_program_weighs_and_resampled_ones_do_not():
    """On pairs the mean weight of a program follows from its verdict: a control of the place alone, and one of both."""
    response, correct = mask(((3, 12), (3, 12)), 14), torch.tensor([True, False])
    values = torch.full((2, 14), 0.5)
    values[0, 3:], values[1, 3:] = torch.linspace(0.5, 0.95, 11), torch.linspace(0.5, 0.05, 11)
    arrays = {"signal_BT": values, "response_BT": response, "row_B": torch.tensor([0, 1]), "is_correct_B": correct}
    means = {}
    for name in ("verifiable", "shuffled", "random_matched"):
        function, extra = METHODS[name].function(), {} if name == "verifiable" else {"seed": 1}
        w = function(*(arrays[key] for key in array_names(function)), **SETTINGS, **extra)
        means[name] = [float(row[valid].mean()) for row, valid in zip(w, response)]
    assert means["verifiable"][0] > 1.3 > 0.7 > means["verifiable"][1]
    assert means["shuffled"] == pytest.approx(means["verifiable"], rel=1e-6)
    assert abs(means["random_matched"][0] - means["random_matched"][1]) < 0.5 * (means["verifiable"][0] - means["verifiable"][1])


@pytest.mark.parametrize("emphasis", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("low", [0.0, 0.1])
def test_the_oracle_learns_no_fault_of_an_incorrect_program(emphasis, low):
    span = torch.tensor([(3, 5), (-1, -1), (9, 10), (12, 13), (-1, -1), (7, 9)])
    right = torch.tensor([True, False, False, True, True, False])
    settings = {"emphasis": emphasis, "weight_clip_min": low, "weight_clip_max": 5.0}
    found = oracle.token_weights(mask(), span, right, policy_on_incorrect="weighted", **settings)
    decisive = {(b, i): span[b, 0] <= i < span[b, 1] for b, i in PLACES}
    faults = [place for place in PLACES if decisive[place] and not right[place[0]]]
    assert faults and all(float(found[place]) == pytest.approx(low, abs=1e-7) for place in faults)
    # The rest: emphasis at a correct program's place, 1 elsewhere, times the one factor that makes the mean 1.
    others = {place: emphasis if decisive[place] else 1.0 for place in PLACES if place not in faults}
    factor = (len(PLACES) - low * len(faults)) / sum(others.values())
    notes = {}
    oracle.token_weights(mask(), span, right, policy_on_incorrect="weighted", notes=notes, **settings)
    assert notes["at_clip_min"] == pytest.approx(len(faults) / len(PLACES))
    for place, u in others.items():
        assert float(found[place]) == pytest.approx(factor * u, rel=1e-6)
    bounded = oracle.token_weights(mask(), span, right, policy_on_incorrect="weighted", **(settings | {"weight_clip_max": 1.2}))
    assert float(bounded[mask()].mean()) == pytest.approx(1.0) and float(bounded.max()) <= 1.2 + 1e-6
    if emphasis != 1:
        assert not torch.equal(found, oracle.token_weights(mask(), span, right, policy_on_incorrect="value_only", **settings))


@pytest.mark.parametrize("lam", [0.0, 0.95, "length_adaptive"])
def test_crr_trains_on_tokens_of_positive_advantage(lam):
    values = values_of(4)
    found = crr_binary.token_weights(values, mask(), gamma=1.0, lam=lam)
    positive = policy_advantage(values, mask(), 1.0, advantage.row_lam(lam, mask())) > 0
    ends = [(b, L) for b, (P, L) in enumerate(SPANS)]
    assert not any(positive[place] for place in ends), "the end of text has no advantage, and trains all the same"
    chosen = [place for place in PLACES if positive[place] or place in ends]
    assert len(ends) < len(chosen) < len(PLACES)
    close(found, projected_selection(chosen))


def projected_selection(chosen):
    w = torch.zeros(len(SPANS), T, dtype=torch.float64)
    for place in chosen:
        w[place] = len(PLACES) / len(chosen)
    return w


def test_crr_without_a_positive_advantage_is_an_error_and_without_a_token_is_none():
    with pytest.raises(ValueError, match=f"none of the step's {len(PLACES)} tokens"):
        crr_binary.token_weights(torch.full((len(SPANS), T), 0.5), mask(), gamma=1.0, lam=0.95)
    assert not crr_binary.token_weights(values_of(0), torch.zeros_like(mask()), gamma=1.0, lam=0.95).any()


# --- what must not matter ----------------------------------------------------------------------------------------------------------

KNOWN_BEFORE = [name for name in SEPARATE if not METHODS[name].needs_forward and name != "ntp"]
FITTED = torch.tensor([0.5, 0.8, 1.0, 1.5, 1.2], dtype=torch.float64)


def weigh(name, order=None, padding=0, content=0.0, seed=3):
    """A method's weights of a step with its rows in another order, more padding, or other content where no target is."""
    order = torch.arange(len(SPANS)) if order is None else order
    pad = torch.nn.functional.pad
    values = values_of(6)
    for b, (P, L) in enumerate(SPANS):
        values[b, : P - 1], values[b, L:] = content, content
    arrays = {
        "signal_BT": pad(values[order], (0, padding), value=content), "response_BT": pad(mask()[order], (0, padding)), "row_B": ROWS[order],
        "is_correct_B": ROWS[order] > 0,
        "span_B2": torch.tensor([(P, P + 2) for P, _ in SPANS])[order],
    }  # fmt: skip
    own = dict(OWN.get(name, {}))
    own |= {"beta": 0.9} if "beta" in own else {}
    extra = {"seed": seed, "fitted": FITTED}
    return METHODS[name].weigh(arrays, own | {key: value for key, value in extra.items() if key in keywords(METHODS[name].function())})


@pytest.mark.parametrize("name", KNOWN_BEFORE)
def test_weights_are_float32_of_mean_one_on_the_mask_alone(name):
    w = weigh(name)
    assert w.dtype == torch.float32 and not w.requires_grad and (w[~mask()] == 0).all() and (w >= 0).all()
    assert float(w[mask()].double().mean()) == pytest.approx(1, abs=1e-6)
    if "weight_clip_min" in OWN.get(name, {}):
        assert float(w[mask()].max()) <= 5.0 + 1e-5
        assert name == "shuffled" or float(w[mask()].min()) >= 0.1 - 1e-6


@pytest.mark.parametrize("name", KNOWN_BEFORE)
def test_padding_company_and_content_off_the_targets_change_no_weight(name):
    found = weigh(name)
    assert torch.equal(weigh(name, padding=7)[:, :T], found) and not weigh(name, padding=7)[:, T:].any()
    assert torch.equal(weigh(name, content=1e3), found)
    order = torch.tensor([4, 2, 0, 5, 3, 1])
    torch.testing.assert_close(weigh(name, order), found[order], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["shuffled", "random_matched", "random_k"])
def test_random_controls_follow_their_key(name):
    assert torch.equal(weigh(name), weigh(name)) and not torch.equal(weigh(name), weigh(name, seed=4))
    torch.manual_seed(1)
    first = weigh(name)
    torch.manual_seed(2)
    assert torch.equal(weigh(name), first), "no global generator"


@pytest.mark.parametrize("name", ["shuffled", "random_k"])
def test_a_row_that_comes_twice_in_a_step_draws_the_same_twice(name):
    response, values, rows = mask()[[0, 0, 2]], values_of(7)[[0, 0, 2]], ROWS[[0, 0, 2]]
    arrays = {"signal_BT": values, "response_BT": response, "row_B": rows, "is_correct_B": rows > 0}
    settings = {**SETTINGS, "seed": 1} if name == "shuffled" else {"keep_fraction": 0.6, "seed": 1}
    w = METHODS[name].weigh(arrays, settings)
    assert torch.equal(w[0], w[1])


# --- numbers for the log -----------------------------------------------------------------------------------------------------------


def test_notes_say_which_beta_was_used_and_how_much_lies_on_a_bound():
    notes = {}
    w = critic(8, beta=0.3, notes=notes)
    n = len(PLACES)
    assert notes["beta"] == 0.3
    assert notes["at_clip_min"] == pytest.approx(sum(float(w[p]) <= 0.1 + 1e-6 for p in PLACES) / n) and notes["at_clip_min"] > 0
    assert notes["at_clip_max"] == pytest.approx(sum(float(w[p]) >= 5 - 1e-6 for p in PLACES) / n)
    wide = {"weight_clip_min": 0.0, "weight_clip_max": 1e9}
    sharp = {}
    critic(8, beta=0.02, notes=sharp, **wide)
    assert sharp["beta"] > 0.02 and sharp["at_clip_max"] == 0
    sharper = {}
    critic(8, beta=0.02, notes=sharper, concentration_floor=0.0, **wide)
    assert sharper["beta"] == 0.02


@pytest.mark.parametrize("name", ["shuffled", "constant_critic", "random_matched", "position_only", "oracle"])
def test_bounded_controls_note_their_bounds(name):
    function, notes = METHODS[name].function(), {}
    settings = {"verifiable": SETTINGS, "oracle": {**BOUNDS, "emphasis": 1e6, "policy_on_incorrect": "value_only"}}.get(name, SETTINGS)
    extra = {"shuffled": {"seed": 1}, "random_matched": {"seed": 1}, "position_only": {"fitted": FITTED, "n_bins": 5}}.get(name, {})
    arrays = {
        "signal_BT": values_of(0),
        "response_BT": mask(),
        "row_B": ROWS,
        "is_correct_B": ROWS > 0,
        "span_B2": torch.tensor([(P, P + 1) for P, _ in SPANS]),
    }
    w = function(*(arrays[key] for key in array_names(function)), **settings, **extra, notes=notes)
    assert notes["at_clip_max"] == pytest.approx(float((w[mask()] >= 5 - 1e-6).double().mean()))
    assert notes["at_clip_min"] == pytest.approx(float((w[mask()] <= 0.1 + 1e-7).double().mean()))
    assert ("beta" in notes) == (name not in ("oracle", "position_only"))
