"""Binary critic-regularised regression: train on the tokens of positive advantage, 1[A > 0] (Wang et al. 2020, 2006.15134)."""

from torch import Tensor

from wmtp.weighting import advantage


def token_weights(signal_BT: Tensor, response_BT: Tensor, *, gamma: float, lam: float | str) -> Tensor:
    """N / m on the m response tokens of the step with A > 0 and on each row's last, 0 elsewhere [B, T] float32.

    `signal_BT` are the critic's values by state, the rows a whole optimizer step. The last token, the end of text, has no advantage by
    construction; without it the policy would never learn to stop. A step without any A > 0 is an error.
    """
    return advantage.token_weights(signal_BT, response_BT, gamma=gamma, lam=lam, policy_on_incorrect="binary")
