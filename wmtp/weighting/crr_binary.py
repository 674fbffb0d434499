"""Binary critic-regularised regression: train on the tokens of positive advantage, 1[A > 0] (Wang et al. 2020, 2006.15134)."""

from torch import Tensor

from wmtp.advantage import policy_advantage
from wmtp.align import last_BT
from wmtp.weighting.advantage import positive_weights, row_lam


def token_weights(signal_BT: Tensor, response_BT: Tensor, *, gamma: float, lam: float | str) -> Tensor:
    """N / m on the m response tokens of the step with A > 0 and on each row's last, 0 elsewhere [B, T] float32.

    `signal_BT` are the critic's values by state, the rows a whole optimizer step. The last token, the end of text, has no advantage by
    construction; without it the policy would never learn to stop. A step without any A > 0 is an error.
    """
    advantage_BT = policy_advantage(signal_BT.detach().double(), response_BT, gamma, row_lam(lam, response_BT))
    return positive_weights(advantage_BT, response_BT, last_BT(response_BT))
