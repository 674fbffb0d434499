"""Dynamic fine-tuning: a token weighs its own probability (2508.05629), so that improbable tokens pull less."""

import torch
from torch import Tensor

from wmtp.weighting.heads import mean_one_per_head


def head_weights(ce_BTF: Tensor, response_BT: Tensor) -> Tensor:
    """Proportional to p = exp(-ce), mean 1 over each row's targets of each head; [B, T, F] float32.

    Mean 1 per head, because a far head is sure of little: over all heads together it would lose nearly all weight.
    """
    return mean_one_per_head(torch.exp(-ce_BTF.double()), response_BT)
