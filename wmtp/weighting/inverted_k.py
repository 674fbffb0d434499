"""Control: Rho-1's budget on the tokens of lowest excess, those with least left to learn."""

from functools import partial

from torch import Tensor

from wmtp.weighting.excess import HEAD_MODES, signed_excess
from wmtp.weighting.heads import decide
from wmtp.weighting.lag import Known
from wmtp.weighting.selection import topk


def head_weights(
    ce_BTF: Tensor,
    signal_BT: Tensor,
    response_BT: Tensor,
    row_B: Tensor | None = None,
    *,
    head_mode: str,
    keep_fraction: float,
    scope: str = "sequence",
    lag: Known | None = None,
) -> Tensor:
    """wmtp.weighting.excess's topk weights [B, T, F] with the order reversed; of equal scores the earlier token is kept."""
    weigh = partial(topk, keep_fraction=keep_fraction)
    population = row_B if scope == "two_pass" else None
    return decide(-signed_excess(ce_BTF, signal_BT), response_BT, HEAD_MODES[head_mode], weigh, population, lag)
