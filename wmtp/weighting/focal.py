"""Focal loss: a token weighs (1 - p)^g, so that what is already known pulls less (Lin et al. 2017, 1708.02002, eq. 4)."""

import torch
from torch import Tensor

from wmtp.weighting.heads import by_target, decide, separate
from wmtp.weighting.lag import Known
from wmtp.weighting.selection import mean_one


def head_weights(
    ce_BTF: Tensor, response_BT: Tensor, row_B: Tensor | None = None, *, focusing: float, scope: str = "sequence", lag: Known | None = None
) -> Tensor:
    """Proportional to (1 - p)^focusing (usual 0.5 to 5); [B, T, F] float32, mean 1 over each row's (the step's, two_pass) targets of
    each head.
    """
    # expm1 keeps 1 - p where p is so near 1 that the subtraction would give 0.
    # Nothing is dropped: rows that are known to the last bit have equal weights, and not none.
    u_BTF = by_target((-torch.expm1(-ce_BTF.double())).pow(focusing).clamp(min=1e-300))
    return decide(u_BTF, response_BT, separate, mean_one, row_B if scope == "two_pass" else None, lag)
