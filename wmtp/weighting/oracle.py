"""Control: where the decisive place of a program is known, its tokens weigh more."""

import torch
from torch import Tensor

from wmtp.weighting.projection import project_mean_one, shares_at_bounds


def token_weights(
    response_BT: Tensor,
    span_B2: Tensor,
    is_correct_B: Tensor,
    *,
    emphasis: float,
    policy_on_incorrect: str,
    weight_clip_min: float,
    weight_clip_max: float,
    notes: dict[str, float] | None = None,
) -> Tensor:
    """Tokens in the span [start, end) count `emphasis` times another token's before the projection; [B, T] float32, mean 1 over the step.

    Under `policy_on_incorrect: weighted` the span of an incorrect program is its fault and gets the least weight; under value_only all
    programs are correct. In a row whose place is unknown (-1) all tokens count alike; a step without any known place is an error.
    """
    if bool(response_BT.any()) and not bool((span_B2[:, 0] >= 0).any()):
        raise ValueError("oracle: no row of the step has a known decisive place, expected the micro task's pairs; use another method here")
    place_T = torch.arange(response_BT.shape[1], device=response_BT.device)
    inside_BT = (place_T >= span_B2[:, :1]) & (place_T < span_B2[:, 1:])
    is_fault_BT = inside_BT & ~is_correct_B[:, None] & (policy_on_incorrect == "weighted")
    u_BT = torch.where(is_fault_BT, 0.0, torch.where(inside_BT, emphasis, 1.0)).double()
    weight_BT = project_mean_one(u_BT, response_BT, weight_clip_min, weight_clip_max)
    if notes is not None:
        notes |= shares_at_bounds(weight_BT, response_BT, weight_clip_min, weight_clip_max)
    return weight_BT.float()
