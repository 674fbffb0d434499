"""Control: Rho-1's budget on the tokens of lowest excess, those with least left to learn."""

from functools import partial

from torch import Tensor

from wmtp.weighting.excess import signed_excess, spread
from wmtp.weighting.heads import targets
from wmtp.weighting.selection import topk


def head_weights(ce_BTF: Tensor, signal_BT: Tensor, response_BT: Tensor, *, head_mode: str, keep_fraction: float) -> Tensor:
    """wmtp.weighting.excess's topk weights [B, T, F] with the order reversed; of equal scores the earlier token is kept."""
    weigh = partial(topk, keep_fraction=keep_fraction)
    return spread(-signed_excess(ce_BTF, signal_BT), targets(response_BT, ce_BTF.shape[2]), head_mode, weigh)
