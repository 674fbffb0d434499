"""Focal loss: a token weighs (1 - p)^g, so that what is already known pulls less (Lin et al. 2017, 1708.02002, eq. 4)."""

import torch
from torch import Tensor

from wmtp.weighting.heads import mean_one_per_head


def head_weights(ce_BTF: Tensor, response_BT: Tensor, *, focusing: float) -> Tensor:
    """Proportional to (1 - p)^focusing (usual 0.5 to 5), mean 1 over each row's targets of each head; [B, T, F] float32."""
    # expm1 keeps 1 - p where p is so near 1 that the subtraction would give 0.
    return mean_one_per_head((-torch.expm1(-ce_BTF.double())).pow(focusing), response_BT)
