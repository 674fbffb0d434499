"""Dynamic fine-tuning: a token weighs its own probability (2508.05629), so that improbable tokens pull less."""

import torch
from torch import Tensor

from wmtp.weighting.heads import by_target, decide, separate
from wmtp.weighting.lag import Known
from wmtp.weighting.selection import mean_one


def head_weights(
    ce_BTF: Tensor, response_BT: Tensor, row_B: Tensor | None = None, *, scope: str = "sequence", lag: Known | None = None
) -> Tensor:
    """Proportional to p = exp(-ce), mean 1 over each row's (the step's, two_pass) targets of each head; [B, T, F] float32.

    Mean 1 per head, because a far head is sure of little: over all heads together it would lose nearly all weight.
    """
    # Nothing is dropped: where every p is too small to be told from 0, weights are equal, and not none.
    u_BTF = by_target(torch.exp(-ce_BTF.double()).clamp(min=1e-300))
    return decide(u_BTF, response_BT, separate, mean_one, row_B if scope == "two_pass" else None, lag)
