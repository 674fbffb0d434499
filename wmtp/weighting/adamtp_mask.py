"""A head trains only as far as the next boundary: no guessing across a place where the text may go anywhere (2608.00434)."""

import torch
from torch import Tensor

from wmtp.weighting.heads import by_target, decide, pooled
from wmtp.weighting.selection import mean_one, select_top


def head_weights(entropy_BTF: Tensor, response_BT: Tensor, *, boundary_fraction: float) -> Tensor:
    """Equal weights [B, T, F] float32 of mean 1 over each row's targets of all heads, 0 on targets beyond a boundary.

    Boundaries are the ceil(boundary_fraction * N) response tokens of a row with the highest entropy of head 0. Head h predicts token
    i from position i-h-1 and trains on it where none of i-h+1..i is a boundary: the tokens it looks past and i itself, but not the
    very next one, which head 0 always trains on.
    """
    T, F = entropy_BTF.shape[1:]
    boundary_BT = select_top(by_target(entropy_BTF[..., :1])[..., 0], response_BT, boundary_fraction)
    passed_BT = boundary_BT.long().cumsum(1)
    before_BTF = torch.stack([torch.nn.functional.pad(passed_BT, (h, 0))[:, :T] for h in range(F)], dim=2)
    return decide((passed_BT[..., None] == before_BTF).double(), response_BT, pooled, mean_one)
