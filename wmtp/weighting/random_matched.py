"""Control: weights drawn from the critic's own. The distribution of its weights without their places."""

from typing import Any

from torch import Tensor

from wmtp import noise
from wmtp.weighting import advantage
from wmtp.weighting.projection import project_mean_one, shares_at_bounds


def token_weights(
    signal_BT: Tensor,
    response_BT: Tensor,
    row_B: Tensor,
    is_correct_B: Tensor | None = None,
    *,
    beta: float,
    seed: int,
    weight_clip_min: float,
    weight_clip_max: float,
    notes: dict[str, float] | None = None,
    **settings: Any,
) -> Tensor:
    """Weights [B, T] drawn with replacement from the step's pooled critic weights by (seed, row id), then projected as those were."""
    bounds = {"weight_clip_min": weight_clip_min, "weight_clip_max": weight_clip_max}
    critic_BT = advantage.token_weights(signal_BT, response_BT, is_correct_B, beta=beta, notes=notes, **bounds, **settings)
    # Sorted, so that a draw is a quantile of the step's weights and does not depend on the order of its rows.
    pool = critic_BT[response_BT].double().sort().values
    drawn_BT = noise.uniform(seed, row_B, response_BT.shape[1], "random_matched")
    u_BT = pool[(drawn_BT * len(pool)).long()] if len(pool) else drawn_BT
    weight_BT = project_mean_one(u_BT, response_BT, weight_clip_min, weight_clip_max)
    if notes is not None:
        notes |= shares_at_bounds(weight_BT, response_BT, weight_clip_min, weight_clip_max)
    return weight_BT.float()
