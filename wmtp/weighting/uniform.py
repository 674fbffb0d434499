"""Every response token weighs 1: plain MTP (Gloeckle et al. 2024, eq. 2), and next-token prediction with one head."""

from torch import Tensor


def token_weights(response_BT: Tensor) -> Tensor:
    """1 on response tokens, 0 elsewhere [B, T], float32."""
    return response_BT.float()
