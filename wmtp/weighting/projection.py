"""Weights with mean exactly 1 inside bounds: the I-divergence projection of METHODS "From signal to weight"."""

import torch
from torch import Tensor

_BISECTIONS = 80


def total(x: Tensor, by_row: bool) -> Tensor:
    """The sum of everything, or of each row [B, 1]."""
    return x.sum(-1, keepdim=True) if by_row else x.sum()


def project_mean_one(u: Tensor, valid: Tensor, lo: float, hi: float, by_row: bool = False) -> Tensor:
    """w = clip(c * u, lo, hi) with the one c that makes the mean over `valid` exactly 1; float64 inside, shape of `u`, 0 off the mask.

    `by_row` gives each row (the last axis) a c and a mean of its own.

    `u` >= 0 of any scale and shape, `valid` bool of that shape, 0 <= lo < 1 < hi. Order-preserving, idempotent, indifferent to the
    scale of u. c is found by bisection in log space with a fixed number of steps, so nothing waits for the device. N = 0 gives zeros.
    """
    if not 0 <= lo < 1 < hi:
        raise ValueError(f"project_mean_one: expected 0 <= lo < 1 < hi, found lo {lo} and hi {hi}")
    u64 = u.double().masked_fill(~valid, 0.0)
    n_valid = total(valid, by_row).clamp(min=1)
    # A zero would stay below lo for every c and could make the mean unreachable; this far down the order is all that matters.
    largest = u64.amax(-1, keepdim=True) if by_row else u64.max()
    u64 = (u64 / largest.clamp(min=1e-300)).clamp(min=1e-300)
    among = u64.masked_fill(~valid, 1.0)
    # Here every weight is at least min(hi, 2) > 1, also when hi is infinite.
    high = torch.log(min(hi, 2.0) / (among.amin(-1, keepdim=True) if by_row else among.min()))
    low = torch.log(torch.full_like(high, max(lo, 1e-3))) - 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        mean = total((middle.exp() * u64).clamp(lo, hi) * valid, by_row) / n_valid
        low, high = torch.where(mean < 1, middle, low), torch.where(mean < 1, high, middle)
    return ((high.exp() * u64).clamp(lo, hi) * valid).to(torch.float64 if u.dtype == torch.float64 else torch.float32)


def concentration(w: Tensor, valid: Tensor) -> Tensor:
    """exp(entropy of w / sum(w)) / N: 1 for uniform weights, 1/N when one token holds everything."""
    share = (w.double() * valid) / (w.double() * valid).sum().clamp(min=1e-300)
    return torch.exp(-torch.xlogy(share, share).sum()) / valid.sum().clamp(min=1)


def shares_at_bounds(w: Tensor, valid: Tensor, lo: float, hi: float) -> dict[str, float]:
    """Shares of the valid entries of projected float64 weights that lie on a bound: numbers for the log."""
    n = valid.sum().clamp(min=1)
    # What u = 0 becomes is a little above lo = 0.
    return {"at_clip_min": float(((w <= lo + 1e-12) & valid).sum() / n), "at_clip_max": float(((w >= hi) & valid).sum() / n)}
