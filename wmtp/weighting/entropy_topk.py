"""Reference-free selection by entropy: train on the tokens before which the policy is least sure (ESLM, 2505.19893)."""

from functools import partial

from torch import Tensor

from wmtp.weighting.heads import by_target, decide, shared
from wmtp.weighting.lag import Known
from wmtp.weighting.selection import topk


def head_weights(
    entropy_BTF: Tensor,
    response_BT: Tensor,
    row_B: Tensor | None = None,
    *,
    keep_fraction: float,
    scope: str = "sequence",
    lag: Known | None = None,
) -> Tensor:
    """N / m on the m = ceil(keep_fraction * N) response tokens of each row (of the step, two_pass) with the highest entropy of head 0,
    for every head; [B, T, F] float32.

    `entropy_BTF` in nats is that of the distribution from which the token was predicted, whatever the token then was.
    """
    weigh = partial(topk, keep_fraction=keep_fraction)
    return decide(by_target(entropy_BTF), response_BT, shared, weigh, row_B if scope == "two_pass" else None, lag)
