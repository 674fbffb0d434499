"""From scores to weights, group by group: selections and soft emphasis whose mean over the valid entries of each group is exactly 1.

A group is the last axis: a row's tokens, or a row's tokens of one head. `score` [..., K] float of any shape, `valid` bool of that shape;
what stands off the mask changes nothing. Weights are float32, 0 off the mask; a group without a valid entry gets zeros.

With a `lag` (wmtp.weighting.lag) thresholds and means are those of another population, which it holds, and the groups' own means only near
1. An empty one is filled with what these groups, then one for each of its entries, measure.
"""

import torch
from torch import Tensor

from wmtp.weighting.lag import Known, recalled

# 0.55 * 100 is 55.00000000000001 in binary; the slack keeps ceil from counting that as 56, and floor from losing one.
_SLACK = 1e-9
# How far beyond its scores the threshold of a population lies that is selected whole or not at all: one nat, or one standard deviation of
# z-scores. More than rounding, and of the size of the scores: in a running mean of thresholds one far number would decide all later steps.
_BEYOND = 1.0


def select_top(score: Tensor, valid: Tensor, keep_fraction: float) -> Tensor:
    """The ceil(keep_fraction * N) valid entries of highest score, at least one, bool; of equal scores the earlier entries."""
    return _best(score, valid, torch.ceil(_count(valid).double() * keep_fraction - _SLACK).clamp(min=1))


def topk(score: Tensor, valid: Tensor, *, keep_fraction: float, lag: Known | None = None) -> Tensor:
    """N / m on the m = ceil(keep_fraction * N) highest scores (Rho-1, 2404.07965, eq. 4: the paper divides by m, the same thing)."""
    if lag is None:
        return mean_one(select_top(score, valid, keep_fraction), valid)
    m = torch.ceil(_count(valid).double() * keep_fraction - _SLACK).clamp(min=1)
    return mean_one(_reaching(score, valid, m, lag, keep_fraction == 1), valid, lag=lag)


def tokenskip(score: Tensor, valid: Tensor, *, drop_fraction: float, lag: Known | None = None) -> Tensor:
    """0 on the floor(drop_fraction * N) lowest scores, N / m on the other m; of equal scores the later entries are dropped."""
    m = (_count(valid) - torch.floor(_count(valid).double() * drop_fraction + _SLACK)).clamp(min=1)
    if lag is None:
        return mean_one(_best(score, valid, m), valid)
    return mean_one(_reaching(score, valid, m, lag, drop_fraction == 0), valid, lag=lag)


def weighted(score: Tensor, valid: Tensor, *, temperature: float, lag: Known | None = None) -> Tensor:
    """N * softmax(score / temperature): nobody is dropped."""
    score = (score.double() / temperature).masked_fill(~valid, -torch.inf)
    if lag is None:
        # Any shift cancels; the largest score keeps exp from overflowing, and a group of nothing but -inf from being no number.
        return mean_one(torch.exp(score - score.amax(-1, keepdim=True).clamp(min=-1e300)), valid)
    shift = recalled(lag, "log_mean_exp", lambda: score.logsumexp(-1, keepdim=True) - _count(valid).double().log())
    return torch.exp(score - shift).masked_fill(~valid, 0.0).float()


def percentile_emphasis(score: Tensor, valid: Tensor, *, percentile: float, alpha: float, lag: Known | None = None) -> Tensor:
    """Proportional to max(s, 0) * 1[s > threshold] + alpha; the threshold is the ceil(percentile * N)-th lowest score, percentile 0..1."""
    m = _count(valid) - torch.ceil(_count(valid).double() * percentile - _SLACK).clamp(min=1)
    if percentile == 1:  # nobody, whatever an earlier step was like
        return mean_one(torch.full_like(score, alpha), valid, lag=lag)
    above = score > recalled(lag, "threshold", lambda: _threshold(score, valid, m))
    return mean_one(score.double().clamp(min=0) * above + alpha, valid, lag=lag)


def mean_one(u: Tensor, valid: Tensor, *, lag: Known | None = None) -> Tensor:
    """u * N / sum(u) over the valid entries of each group, float32; u >= 0 of any scale. A group of zeros stays one: nothing is selected,
    which the step's check of its weights refuses.
    """
    u = u.double().masked_fill(~valid, 0.0)
    total = u.sum(-1, keepdim=True)
    if lag is None:
        return (u * (_count(valid) / total.clamp(min=1e-300))).float()
    return (u / recalled(lag, "mean", lambda: total / _count(valid))).float()


def _reaching(score: Tensor, valid: Tensor, m: Tensor, lag: Known, all_kept: bool) -> Tensor:
    """Scores at or above the threshold of the m highest; `all_kept` is a budget of everything, in every step and not in this one alone."""
    return valid if all_kept else score >= recalled(lag, "threshold", lambda: _threshold(score, valid, m))


def _threshold(score: Tensor, valid: Tensor, m: Tensor) -> Tensor:
    """Half way between the m-th and the (m+1)-th highest score: the last bit of a second forward moves no score across it.

    Where all are selected it is below the lowest, where none is, above the highest; 0 for a group without entries.
    """
    n, last = _count(valid), score.shape[-1] - 1
    ordered = score.double().masked_fill(~valid, -torch.inf).sort(-1, descending=True).values
    next_one, m_th = (ordered.gather(-1, place.long().clamp(0, last)) for place in (m, m - 1))
    found = torch.where(m >= n, m_th - _BEYOND, (next_one + m_th) / 2)
    found = torch.where(m < 1, next_one + _BEYOND, found)
    return torch.where(n > 0, found, 0.0)


def _best(score: Tensor, valid: Tensor, m: Tensor) -> Tensor:
    order = score.masked_fill(~valid, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return (torch.empty_like(order).scatter_(-1, order, places) < m) & valid


def _count(valid: Tensor) -> Tensor:
    return valid.sum(-1, keepdim=True)
