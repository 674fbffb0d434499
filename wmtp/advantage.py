"""Generalised advantage estimation (Schulman et al. 2015) over token prefixes; shapes as in wmtp.align.

Values are state-indexed: v[i] has read x[0..i]. Advantages are target-indexed: A[i] judges token i and starts from v[i-1].
"""

import torch
from torch import Tensor
from torch.nn import functional


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _temporal_differences(values_BT: Tensor, response_BT: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """delta[i] without any reward, 0 outside the response, and the mask of each row's last response token L."""
    after = functional.pad(response_BT[:, 1:], (0, 1), value=False)
    last_BT = response_BT & ~after
    values_BT = values_BT.masked_fill(~after, 0.0)
    before_BT = functional.pad(values_BT[:, :-1], (1, 0))
    delta_BT = gamma * values_BT * (response_BT & after) - before_BT
    return delta_BT * response_BT, last_BT


def _discounted_sum(delta_BT: Tensor, rate_B1: Tensor) -> Tensor:
    """sum over j >= 0 of rate^j * delta[i+j], by doubling: log2(T) steps, no loop over tokens."""
    total, span, rate = delta_BT, 1, rate_B1
    while span < delta_BT.shape[1]:
        total = total + rate * functional.pad(total[:, span:], (0, span))
        span, rate = 2 * span, rate * rate
    return total


def gae(values_BT: Tensor, reward_B: Tensor, response_BT: Tensor, gamma: float = 1.0, lam: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Advantages [B, T] by target token and value targets [B, T] by state, from a reward paid at the last response token.

    `response_BT` (bool) marks one run of tokens P..L a row, P >= 1; rows are not packed.
    `lam` may be one number or one a row.
    Both results are 0 outside their positions: P..L for advantages, P-1..L-1 for value targets (the last prompt token is trained).
    The arithmetic is float32, float64 for float64 values. METHODS: delta, A and G of the critic's section.
    """
    check_starts(response_BT)
    return advantages_and_targets(values_BT, reward_B, response_BT, gamma, lam)


def advantages_and_targets(
    values_BT: Tensor, reward_B: Tensor, response_BT: Tensor, gamma: float = 1.0, lam: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """`gae` of a step that was looked at on the host (`check_starts`): nothing here waits for a device."""
    _check(values_BT, response_BT)
    values_BT = _at_least_float32(values_BT)
    delta_BT, last_BT = _temporal_differences(values_BT, response_BT, gamma)
    delta_BT = delta_BT + reward_B.to(values_BT)[:, None] * last_BT
    advantage_BT = _discounted_sum(delta_BT, _rate(values_BT, gamma, lam)) * response_BT
    state_BT = functional.pad(response_BT[:, 1:], (0, 1), value=False)
    target_BT = values_BT.masked_fill(~state_BT, 0.0) + functional.pad(advantage_BT[:, 1:], (0, 1)) * state_BT
    return advantage_BT, target_BT


def policy_advantage(
    values_BT: Tensor,
    response_BT: Tensor,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    terminal_credit: bool = False,
    reward_B: Tensor | None = None,
) -> Tensor:
    """Advantages [B, T] made of value differences alone: delta[L] = 0 unless `terminal_credit` pays `reward_B` there.

    Without that rule a dead critic (V = 0.5 everywhere) would put all its weight on the end-of-text token through R - v[L-1].
    """
    _check(values_BT, response_BT)
    if terminal_credit:
        if reward_B is None:
            raise ValueError("policy_advantage: terminal_credit needs reward_B, found None")
        return advantages_and_targets(values_BT, reward_B, response_BT, gamma, lam)[0]
    values_BT = _at_least_float32(values_BT)
    delta_BT, last_BT = _temporal_differences(values_BT, response_BT, gamma)
    return _discounted_sum(delta_BT.masked_fill(last_BT, 0.0), _rate(values_BT, gamma, lam)) * response_BT


def value_drops(values_BT: Tensor, response_BT: Tensor) -> Tensor:
    """v[i] - v[i-1] for every response token but the last, 0 elsewhere [B, T]; the most negative one is where the critic sees a fault."""
    delta_BT, last_BT = _temporal_differences(_at_least_float32(values_BT), response_BT, 1.0)
    return delta_BT.masked_fill(last_BT, 0.0)


def _rate(values_BT: Tensor, gamma: float, lam: float | Tensor) -> Tensor:
    # A number is filled in on the device: a copy of it would wait.
    lam_B = lam.to(values_BT) if isinstance(lam, Tensor) else values_BT.new_full((1,), lam)
    return gamma * lam_B.expand(values_BT.shape[0])[:, None]


def check_starts(response_BT: Tensor) -> None:
    """A ValueError where a response has no state before it. It reads the mask: for the host's own step, once, before a device has it."""
    if response_BT[:, :1].any():
        raise ValueError("gae: a response starts at position 0; the first token has no state before it, prompts need at least one token")


def _check(values_BT: Tensor, response_BT: Tensor) -> None:
    if values_BT.shape != response_BT.shape or response_BT.dtype != torch.bool:
        found = f"{tuple(values_BT.shape)} and {tuple(response_BT.shape)} {response_BT.dtype}"
        raise ValueError(f"gae: expected values and a bool response mask of one [B, T] shape, found {found}")
