"""Control: what position alone explains. Tokens weigh as the critic weighs tokens of their relative position on average."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from wmtp.weighting import advantage
from wmtp.weighting.projection import project_mean_one, shares_at_bounds


def fit(steps: Iterable[Mapping[str, Tensor]], *, beta: float, n_bins: int, **settings: Any) -> Tensor:
    """The critic's mean weight by relative position over one pass of the split, float64 [n_bins + 1]; 1 where no token stands.

    `steps` are whole optimizer steps (arrays by name), so that each token counts with the weight that the critic's own method gives it.
    """
    total, n = torch.zeros(2, n_bins + 1, dtype=torch.float64)
    for step in steps:
        response_BT = step["response_BT"]
        weight_BT = advantage.token_weights(step["signal_BT"], response_BT, step.get("is_correct_B"), beta=beta, **settings)
        bins = relative_bin(response_BT, n_bins)[response_BT]
        total.index_add_(0, bins, weight_BT[response_BT].double())
        n.index_add_(0, bins, torch.ones_like(bins, dtype=torch.float64))
    return torch.where(n > 0, total / n.clamp(min=1), 1.0)


def token_weights(
    response_BT: Tensor,
    *,
    beta: float,
    fitted: Tensor,
    weight_clip_min: float,
    weight_clip_max: float,
    notes: dict[str, float] | None = None,
    **settings: Any,
) -> Tensor:
    """`fitted` at each token's relative position, projected to mean 1 over the step within the critic's bounds; [B, T] float32.

    `beta` and `settings` shaped `fitted` and have no further part.
    """
    u_BT = fitted[relative_bin(response_BT, len(fitted) - 1)]
    weight_BT = project_mean_one(u_BT, response_BT, weight_clip_min, weight_clip_max)
    if notes is not None:
        notes |= shares_at_bounds(weight_BT, response_BT, weight_clip_min, weight_clip_max)
    return weight_BT.float()


def relative_bin(response_BT: Tensor, n_bins: int) -> Tensor:
    """Which of `n_bins` equal parts of its response a token stands in, int64 [B, T], 0 off the response; the last token: n_bins.

    The last token, the end of text, has a part of its own: its advantage is 0 by construction, whatever stands before it.
    """
    place_BT = (response_BT.long().cumsum(1) - 1) * response_BT
    last_B1 = response_BT.sum(1, keepdim=True) - 1
    return torch.where(place_BT < last_B1, place_BT * n_bins // last_B1.clamp(min=1), n_bins * response_BT)
