"""Reference-free selection by entropy: train on the tokens before which the policy is least sure (ESLM, 2505.19893)."""

from functools import partial

from torch import Tensor

from wmtp.weighting.heads import by_target, shared, targets
from wmtp.weighting.selection import topk


def head_weights(entropy_BTF: Tensor, response_BT: Tensor, *, keep_fraction: float) -> Tensor:
    """N / m on the m = ceil(keep_fraction * N) response tokens of each row with the highest entropy of head 0, for every head.

    `entropy_BTF` in nats is that of the distribution from which the token was predicted, whatever the token then was.
    """
    return shared(by_target(entropy_BTF), targets(response_BT, entropy_BTF.shape[2]), partial(topk, keep_fraction=keep_fraction))
