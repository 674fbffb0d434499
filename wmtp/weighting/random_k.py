"""Control: Rho-1's budget on random tokens of each row."""

from torch import Tensor

from wmtp import noise
from wmtp.weighting.selection import topk


def token_weights(response_BT: Tensor, row_B: Tensor, *, keep_fraction: float, seed: int) -> Tensor:
    """N / m on m = ceil(keep_fraction * N) response tokens of each row, drawn by (seed, row id); 0 elsewhere [B, T] float32."""
    return topk(noise.uniform(seed, row_B, response_BT.shape[1], "random_k"), response_BT, keep_fraction=keep_fraction)
