"""Control: V is the same everywhere. What the critic's pipeline does without a critic: nothing, unless gamma is below 1."""

from typing import Any

import torch
from torch import Tensor

from wmtp.weighting import advantage


def token_weights(
    response_BT: Tensor, is_correct_B: Tensor | None = None, *, beta: float, notes: dict[str, float] | None = None, **settings: Any
) -> Tensor:
    """wmtp.weighting.advantage's weights [B, T] for V = 0.5, which is a pair's value before anything is read."""
    return advantage.token_weights(torch.full(response_BT.shape, 0.5), response_BT, is_correct_B, beta=beta, notes=notes, **settings)
