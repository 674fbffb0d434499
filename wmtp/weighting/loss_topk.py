"""Reference-free selection by loss: train on the tokens that the policy itself finds hardest (2505.19893, the loss variant)."""

from functools import partial

from torch import Tensor

from wmtp.weighting.heads import by_target, decide, shared
from wmtp.weighting.lag import Known
from wmtp.weighting.selection import topk


def head_weights(
    ce_BTF: Tensor,
    response_BT: Tensor,
    row_B: Tensor | None = None,
    *,
    keep_fraction: float,
    scope: str = "sequence",
    lag: Known | None = None,
) -> Tensor:
    """N / m on the m = ceil(keep_fraction * N) response tokens of each row (of the step, two_pass) that head 0 has the highest loss on,
    for every head; [B, T, F] float32.
    """
    weigh = partial(topk, keep_fraction=keep_fraction)
    return decide(by_target(ce_BTF), response_BT, shared, weigh, row_B if scope == "two_pass" else None, lag)
