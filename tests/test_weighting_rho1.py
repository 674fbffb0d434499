"""Rho-1's selections and head modes against loops in float64 (METHODS, "Rho-1"), and the weightings that need the policy alone."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.methods import EXCESS_FORMS, HEAD_MODES
from tests.test_advantage import SPANS, T, mask, values_of
from wmtp.weighting import adamtp_mask, dft, entropy_topk, excess, focal, head_decay, heads, inverted_k, loss_topk, selection

F = 3
ENTRIES = [(b, i, h) for b, (P, L) in enumerate(SPANS) for i in range(P, L + 1) for h in range(F) if i - h - 1 >= 0]


def losses(seed, ties=False):
    """ce[b, t, h] with numbers everywhere: those of no target must not matter."""
    ce = 6 * torch.rand(len(SPANS), T, F, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ce.round() if ties else ce


def scores(ce, reference):
    """{(b, i, h): excess of target token i under head h}, by definition."""
    return {(b, i, h): float(ce[b, i - h - 1, h]) - float(reference[b, i]) for b, i, h in ENTRIES}


def placed(weight):
    found = torch.zeros(len(SPANS), T, F, dtype=torch.float64)
    for (b, i, h), w in weight.items():
        found[b, i - h - 1, h] = w
    return found


def close(found, expected, tolerance=1e-6):
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


def ceil(share, n):
    return math.ceil(Fraction(str(share)) * n)


def best(score, m):
    """The m entries of highest score; of equal ones those of the earlier token, then of the nearer head."""
    chosen = sorted(score, key=lambda e: (-score[e], *e))[:m]
    return {e: len(score) / m * (e in chosen) for e in score}


def proportional(u):
    return {e: value * len(u) / math.fsum(u.values()) for e, value in u.items()}


def weigh(score, form):
    """The weights of one group of entries by each selection's definition, one entry at a time."""
    n = len(score)
    if form in ("topk", "absolute"):
        return best({e: abs(s) for e, s in score.items()} if form == "absolute" else score, ceil(0.6, n))
    if form == "tokenskip":
        return best(score, n - math.floor(Fraction("0.3") * n))
    if form == "weighted":
        return proportional({e: math.exp(s) for e, s in score.items()})
    threshold = sorted(score.values())[max(ceil(0.6, n), 1) - 1]
    return proportional({e: max(s, 0) * (s > threshold) + 0.2 for e, s in score.items()})


def standardised(score):
    mean = math.fsum(score.values()) / len(score)
    std = math.sqrt(math.fsum((s - mean) ** 2 for s in score.values()) / len(score))
    return {e: (s - mean) / max(std, 1e-6) for e, s in score.items()}


def by_definition(score, form, head_mode, rows=None):
    """A row is a population; with `rows`, their ids, all are one, and of equal scores that of the lower id is better."""
    if rows is not None:
        of_row = {(rows[b], i, h): s for (b, i, h), s in score.items()}
        place = {row: b for b, row in enumerate(rows)}
        weight = step_by_definition(of_row, form, head_mode)
        return placed({(place[row], i, h): w for (row, i, h), w in weight.items()})
    weight = {}
    for b in range(len(SPANS)):
        of_head = [{e: s for e, s in score.items() if e[0] == b and e[2] == h} for h in range(F)]
        if head_mode == "shared_target":
            decided = weigh(of_head[0], form)
            weight |= {e: decided[b, e[1], 0] for h in range(F) for e in of_head[h]}
        elif head_mode == "per_head":
            weight |= {e: w for group in of_head if group for e, w in weigh(group, form).items()}
        else:
            groups = [standardised(group) for group in of_head if group] if head_mode == "per_head_zscore" else of_head
            weight |= weigh({e: s for group in groups for e, s in group.items()}, form)
    return placed(weight)


def step_by_definition(score, form, head_mode):
    of_head = [{e: s for e, s in score.items() if e[2] == h} for h in range(F)]
    if head_mode == "shared_target":
        decided = weigh(of_head[0], form)
        return {e: decided[e[0], e[1], 0] for e in score}
    if head_mode == "per_head":
        return {e: w for group in of_head for e, w in weigh(group, form).items()}
    groups = [standardised(group) for group in of_head] if head_mode == "per_head_zscore" else of_head
    return weigh({e: s for group in groups for e, s in group.items()}, form)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6), form=st.sampled_from([*EXCESS_FORMS]), head_mode=st.sampled_from(HEAD_MODES), ties=st.booleans(),
    rows=st.permutations([5, 0, 9, 3, 12, 7]),
)  # fmt: skip
def test_excess_weights_of_a_whole_step_equal_the_loops(seed, form, head_mode, ties, rows):
    ties = ties and head_mode != "per_head_zscore"
    ce, reference = losses(seed, ties), values_of(seed + 1) * 6
    reference = reference.round() if ties else reference
    keys = {"selection": form, "head_mode": head_mode, "scope": "two_pass", **EXCESS_FORMS[form]}
    close(
        excess.head_weights(ce, reference, mask(), torch.tensor(rows), **keys), by_definition(scores(ce, reference), form, head_mode, rows)
    )


def test_confidence_weights_of_a_whole_step_have_mean_one_in_each_head():
    p, rows = {(b, i, h): math.exp(-float(losses(9)[b, i - h - 1, h])) for b, i, h in ENTRIES}, torch.arange(len(SPANS))
    of_head = [{e: value for e, value in p.items() if e[2] == h} for h in range(F)]
    expected = placed({e: w for group in of_head for e, w in proportional(group).items()})
    close(dft.head_weights(losses(9), mask(), rows, scope="two_pass"), expected)
    inverse = placed({e: w for group in of_head for e, w in proportional({e: 1 - x for e, x in group.items()}).items()})
    close(focal.head_weights(losses(9), mask(), rows, focusing=1.0, scope="two_pass"), inverse)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), form=st.sampled_from([*EXCESS_FORMS]), head_mode=st.sampled_from(HEAD_MODES), ties=st.booleans())
def test_excess_weights_equal_the_loops(seed, form, head_mode, ties):
    ties = ties and head_mode != "per_head_zscore"  # a sum's last bit decides between equal z-scores of two heads
    ce, reference = losses(seed, ties), values_of(seed + 1) * 6
    reference = reference.round() if ties else reference
    found = excess.head_weights(ce, reference, mask(), selection=form, head_mode=head_mode, **EXCESS_FORMS[form])
    close(found, by_definition(scores(ce, reference), form, head_mode))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 20.0])
def test_softmax_over_heads_shares_each_token_out(temperature):
    ce, reference = losses(1), values_of(2) * 6
    score, weight = scores(ce, reference), {}
    for b, i, h in ENTRIES:
        group = {e: math.exp(s / temperature) for e, s in score.items() if e[:2] == (b, i)}
        weight[b, i, h] = group[b, i, h] * len(group) / math.fsum(group.values())
    close(excess.head_weights(ce, reference, mask(), selection="softmax_over_heads", temperature=temperature), placed(weight))


@pytest.mark.parametrize("head_mode", HEAD_MODES)
def test_inverted_k_is_the_lowest_excess(head_mode):
    ce, reference = losses(3), values_of(4) * 6
    score = {e: -s for e, s in scores(ce, reference).items()}
    found = inverted_k.head_weights(ce, reference, mask(), head_mode=head_mode, keep_fraction=0.6)
    close(found, by_definition(score, "topk", head_mode))


@pytest.mark.parametrize("form", EXCESS_FORMS)
@pytest.mark.parametrize("head_mode", HEAD_MODES)
def test_each_row_has_mean_one_whatever_the_selection(form, head_mode):
    """Over all heads; in each head where heads decide alone."""
    response = mask(((4, 19), (6, 6), (9, 15)), 20)
    ce, reference = 6 * torch.rand(3, 20, F, dtype=torch.float64), 6 * torch.rand(3, 20, dtype=torch.float64)
    weight = excess.head_weights(ce, reference, response, selection=form, head_mode=head_mode, **EXCESS_FORMS[form]).double()
    n_B = response.sum(1)
    torch.testing.assert_close(weight.sum((1, 2)) / n_B, torch.full((3,), float(F), dtype=torch.float64), rtol=0, atol=1e-5)
    if head_mode in ("shared_target", "per_head"):
        torch.testing.assert_close(weight.sum(1) / n_B[:, None], torch.ones(3, F, dtype=torch.float64), rtol=0, atol=1e-5)


def test_a_pooled_threshold_starves_head_zero_and_a_shared_one_does_not():
    """Far heads carry loss that no training removes: the reason for the default."""
    reference = values_of(5) * 2
    ce = heads.by_head((reference[..., None] + torch.tensor([0.1, 3.0, 4.0])).expand(len(SPANS), T, F))
    selected = {
        mode: (excess.head_weights(ce, reference, mask(), head_mode=mode, keep_fraction=0.5) > 0).sum((0, 1)).tolist()
        for mode in HEAD_MODES
    }
    assert selected["pooled"][0] < 0.2 * selected["pooled"][2]
    assert selected["per_head"][0] >= selected["per_head"][2] and selected["shared_target"][0] >= selected["shared_target"][2]


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.3, 0.29, 0.55, 0.7, 0.99])
def test_tokenskip_drops_exactly_the_floor_of_its_share(drop):
    for n in range(1, 101):
        valid = torch.zeros(1, 104, dtype=torch.bool)
        valid[0, 2 : 2 + n] = True
        kept = selection.tokenskip(torch.zeros(1, 104), valid, drop_fraction=drop)[0] > 0
        assert kept.nonzero().flatten().tolist() == list(range(2, 2 + n - math.floor(Fraction(str(drop)) * n)))


@pytest.mark.parametrize("content", [1e9, -1e9, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("form", [*EXCESS_FORMS, "softmax_over_heads"])
@pytest.mark.parametrize("head_mode", HEAD_MODES)
def test_what_stands_off_the_targets_changes_no_weight(content, form, head_mode):
    ce, reference = losses(6), values_of(7) * 6
    target = placed(dict.fromkeys(ENTRIES, 1.0)) > 0
    keys = {"temperature": 1.0} if form == "softmax_over_heads" else {**EXCESS_FORMS[form], "head_mode": head_mode}
    found = excess.head_weights(ce, reference, mask(), selection=form, **keys)
    assert (found[~target] == 0).all() and torch.isfinite(found).all()
    poisoned = excess.head_weights(
        ce.masked_fill(~target, content), reference.masked_fill(~mask(), content), mask(), selection=form, **keys
    )
    assert torch.equal(poisoned, found)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_soft_weights_survive_any_scale_of_scores(scale):
    score, valid = losses(8)[..., 0] * scale - 3 * scale, mask()
    for weight in (
        selection.weighted(score, valid, temperature=0.1),
        selection.percentile_emphasis(score, valid, percentile=0.5, alpha=0.1),
    ):
        assert torch.isfinite(weight).all() and (weight[~valid] == 0).all()
        torch.testing.assert_close(weight.double().sum(1) / valid.sum(1), torch.ones(len(SPANS)).double(), rtol=0, atol=1e-5)


def test_by_head_is_align_future_head_by_head_and_by_target_its_inverse():
    q = torch.arange(2.0 * 5 * F).view(2, 5, F)
    there = heads.by_head(q)
    for b, i, h in [(b, i, h) for b in range(2) for i in range(5) for h in range(F)]:
        if i - h - 1 >= 0:
            assert there[b, i - h - 1, h] == q[b, i, h]
            assert heads.by_target(there)[b, i, h] == q[b, i, h]
        else:
            assert heads.by_target(q)[b, i, h] == 0
    assert heads.by_target(torch.ones(1, 2, 4)).sum() == 1, "heads that reach beyond the row"


# --- weightings that need the policy alone -------------------------------------------------------------------------------------------


def per_head(u):
    """Each row's numbers of each head, scaled to mean 1."""
    weight = {}
    for b in range(len(SPANS)):
        for h in range(F):
            group = {e: value for e, value in u.items() if e[0] == b and e[2] == h}
            weight |= proportional(group) if group else {}
    return placed(weight)


@pytest.mark.parametrize("focusing", [0.0, 0.5, 2.0, 5.0])
def test_confidence_weights_equal_the_loops(focusing):
    ce = losses(9)
    p = {(b, i, h): math.exp(-float(ce[b, i - h - 1, h])) for b, i, h in ENTRIES}
    close(dft.head_weights(ce, mask()), per_head(p))
    close(focal.head_weights(ce, mask(), focusing=focusing), per_head({e: (1 - x) ** focusing for e, x in p.items()}))


def test_confidence_weights_do_not_collapse_on_a_head_that_is_sure_of_nothing_or_of_all():
    for value in (0.0, 1e-12, 50.0, 800.0):
        ce = losses(10)
        ce[..., 2] = value
        for weight in (dft.head_weights(ce, mask()), focal.head_weights(ce, mask(), focusing=2.0)):
            assert torch.isfinite(weight).all()
            n = placed(dict.fromkeys(ENTRIES, 1.0)).sum((0, 1))
            torch.testing.assert_close(weight.double().sum((0, 1)) / n, torch.ones(F).double(), rtol=0, atol=1e-5)


def test_reference_free_selection_is_by_head_zeros_own_number():
    ce, entropy = losses(11), losses(12)
    for found, q in (
        (loss_topk.head_weights(ce, mask(), keep_fraction=0.6), ce),
        (entropy_topk.head_weights(entropy, mask(), keep_fraction=0.6), entropy),
    ):
        close(found, by_definition(scores(q, torch.zeros(len(SPANS), T)), "topk", "shared_target"))


@pytest.mark.parametrize("decay", [0.3, 0.8, 1.0])
def test_head_decay_weighs_heads_alone(decay):
    mean = math.fsum(decay**h for h in range(F)) / F
    close(head_decay.head_weights(losses(13), mask(), decay=decay), placed({e: decay ** e[2] / mean for e in ENTRIES}))


@pytest.mark.parametrize("boundary_fraction", [0.01, 0.2, 0.5, 1.0])
def test_adamtp_heads_stop_at_the_next_boundary(boundary_fraction):
    entropy, weight = losses(14), {}
    for b, (P, L) in enumerate(SPANS):
        order = sorted(range(P, L + 1), key=lambda i: (-float(entropy[b, i - 1, 0]), i))
        boundaries = set(order[: ceil(boundary_fraction, L - P + 1)])
        row = [e for e in ENTRIES if e[0] == b]
        trained = {(b, i, h): float(not boundaries & set(range(i - h + 1, i + 1))) for _, i, h in row}
        weight |= proportional(trained)
    close(adamtp_mask.head_weights(entropy, mask(), boundary_fraction=boundary_fraction), placed(weight))


def test_adamtp_by_hand():
    """Tokens 4..9, a boundary at 7: head 0 trains everywhere, head 1 not on 7, head 2 not on 7 and 8."""
    entropy = torch.zeros(1, 11, 3)
    entropy[0, 6, 0] = 5.0
    weight = heads.by_target(adamtp_mask.head_weights(entropy, mask(((4, 9),), 11), boundary_fraction=1 / 6))[0]
    assert [(weight[:, h] > 0).nonzero().flatten().tolist() for h in range(3)] == [[4, 5, 6, 7, 8, 9], [4, 5, 6, 8, 9], [4, 5, 6, 9]]
    assert weight[4, 0] == pytest.approx(18 / 15)


def test_focal_weights_tell_near_certain_tokens_apart():
    """1 - p is about the loss itself where p is near 1, far below what 1 - exp(-ce) resolves."""
    ce = losses(15) * 1e-18
    close(focal.head_weights(ce, mask(), focusing=1.0), per_head({(b, i, h): float(ce[b, i - h - 1, h]) for b, i, h in ENTRIES}))
