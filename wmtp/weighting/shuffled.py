"""Control: the critic's weights, each row's dealt out anew among its own tokens. Same multiset, same mean, no signal."""

from typing import Any

import torch
from torch import Tensor

from wmtp import noise
from wmtp.weighting import advantage


def token_weights(
    signal_BT: Tensor,
    response_BT: Tensor,
    row_B: Tensor,
    is_correct_B: Tensor | None = None,
    *,
    seed: int,
    notes: dict[str, float] | None = None,
    **settings: Any,
) -> Tensor:
    """wmtp.weighting.advantage's final weights [B, T] permuted within each row over its response tokens, by (seed, row id)."""
    weight_BT = advantage.token_weights(signal_BT, response_BT, is_correct_B, notes=notes, **settings)
    drawn_BT = noise.uniform(seed, row_B, response_BT.shape[1], "shuffled").masked_fill(~response_BT, torch.inf)
    # Both orders put a row's response tokens first: one at random, one as they stand.
    source_BT, place_BT = drawn_BT.argsort(dim=1, stable=True), (~response_BT).int().argsort(dim=1, stable=True)
    return torch.zeros_like(weight_BT).scatter_(1, place_BT, weight_BT.gather(1, source_BT))
