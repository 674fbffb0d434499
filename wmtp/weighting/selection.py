"""From scores to weights, group by group: selections and soft emphasis whose mean over the valid entries of each group is exactly 1.

A group is the last axis: a row's tokens, or a row's tokens of one head. `score` [..., K] float of any shape, `valid` bool of that shape;
what stands off the mask changes nothing. Weights are float32, 0 off the mask; a group without a valid entry gets zeros.
"""

import torch
from torch import Tensor

# 0.55 * 100 is 55.00000000000001 in binary; the slack keeps ceil from counting that as 56, and floor from losing one.
_SLACK = 1e-9


def select_top(score: Tensor, valid: Tensor, keep_fraction: float) -> Tensor:
    """The ceil(keep_fraction * N) valid entries of highest score, at least one, bool; of equal scores the earlier entries."""
    return _best(score, valid, torch.ceil(_count(valid).double() * keep_fraction - _SLACK).clamp(min=1))


def topk(score: Tensor, valid: Tensor, *, keep_fraction: float) -> Tensor:
    """N / m on the m = ceil(keep_fraction * N) highest scores (Rho-1, 2404.07965, eq. 4: the paper divides by m, the same thing)."""
    return mean_one(select_top(score, valid, keep_fraction), valid)


def tokenskip(score: Tensor, valid: Tensor, *, drop_fraction: float) -> Tensor:
    """0 on the floor(drop_fraction * N) lowest scores, N / m on the other m; of equal scores the later entries are dropped."""
    dropped = torch.floor(_count(valid).double() * drop_fraction + _SLACK)
    return mean_one(_best(score, valid, (_count(valid) - dropped).clamp(min=1)), valid)


def weighted(score: Tensor, valid: Tensor, *, temperature: float) -> Tensor:
    """N * softmax(score / temperature): nobody is dropped."""
    score = (score.double() / temperature).masked_fill(~valid, -torch.inf)
    # Any shift cancels; the largest score keeps exp from overflowing, and a group of nothing but -inf from being no number.
    return mean_one(torch.exp(score - score.amax(-1, keepdim=True).clamp(min=-1e300)), valid)


def percentile_emphasis(score: Tensor, valid: Tensor, *, percentile: float, alpha: float) -> Tensor:
    """Proportional to max(s, 0) * 1[s > threshold] + alpha; the threshold is the ceil(percentile * N)-th lowest score, percentile 0..1."""
    ordered = score.double().masked_fill(~valid, torch.inf).sort(-1).values
    place = torch.ceil(_count(valid).double() * percentile - _SLACK).clamp(min=1) - 1
    above = score > ordered.gather(-1, place.long())
    return mean_one(score.double().clamp(min=0) * above + alpha, valid)


def mean_one(u: Tensor, valid: Tensor) -> Tensor:
    """u * N / sum(u) over the valid entries of each group, float32; u >= 0 of any scale, a group of zeros gets ones."""
    u = u.double().masked_fill(~valid, 0.0)
    total = u.sum(-1, keepdim=True)
    return torch.where(total > 0, u * (_count(valid) / total.clamp(min=1e-300)), valid.double()).float()


def _best(score: Tensor, valid: Tensor, m: Tensor) -> Tensor:
    order = score.masked_fill(~valid, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return (torch.empty_like(order).scatter_(-1, order, places) < m) & valid


def _count(valid: Tensor) -> Tensor:
    return valid.sum(-1, keepdim=True)
