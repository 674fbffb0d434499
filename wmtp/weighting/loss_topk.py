"""Reference-free selection by loss: train on the tokens that the policy itself finds hardest (2505.19893, the loss variant)."""

from functools import partial

from torch import Tensor

from wmtp.weighting.heads import by_target, shared, targets
from wmtp.weighting.selection import topk


def head_weights(ce_BTF: Tensor, response_BT: Tensor, *, keep_fraction: float) -> Tensor:
    """N / m on the m = ceil(keep_fraction * N) response tokens of each row that head 0 has the highest loss on, for every head."""
    return shared(by_target(ce_BTF), targets(response_BT, ce_BTF.shape[2]), partial(topk, keep_fraction=keep_fraction))
