"""Far heads weigh less: head h weighs decay^h over its mean, every token alike."""

import torch
from torch import Tensor

from wmtp.align import align_future


def head_weights(ce_BTF: Tensor, response_BT: Tensor, *, decay: float) -> Tensor:
    """F * decay^h / sum(decay^j) on each target of head h [B, T, F] float32; of `ce_BTF` only the shape enters."""
    F = ce_BTF.shape[2]
    scale_F = decay ** torch.arange(F, dtype=torch.float64, device=ce_BTF.device)
    return align_future(response_BT.float(), F, 0.0) * (scale_F / scale_F.mean()).float()
