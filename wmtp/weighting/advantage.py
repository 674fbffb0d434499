"""Tokens weigh by a critic's advantage: w proportional to exp(z / beta), mean 1, within bounds (METHODS, "From signal to weight").

The critic's values are out of fold and cached, so the weights of a whole optimizer step are known before its first forward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wmtp.advantage import policy_advantage
from wmtp.align import align_future, last_BT
from wmtp.weighting.projection import concentration, project_mean_one, shares_at_bounds, total

_BETA_BISECTIONS = 40


def token_weights(
    signal_BT: Tensor,
    response_BT: Tensor,
    is_correct_B: Tensor | None = None,
    *,
    gamma: float,
    lam: float | str,
    terminal_credit: bool = False,
    policy_on_incorrect: str = "value_only",
    notes: dict[str, float] | None = None,
    **exponential: Any,
) -> Tensor:
    """Weights [B, T] float32 with mean 1 over the response tokens of all B rows, which are a whole optimizer step over all ranks.

    `signal_BT` are the critic's values by state (probabilities of passing, 0..1); only their differences enter. `terminal_credit` pays
    `is_correct_B` as the reward at the last token. `exponential` are the settings of `exponential_weights`; `policy_on_incorrect`
    `binary` has none and takes 1[A > 0] for every row in their place, and the last token of correct ones. Which rows a step has is not
    decided here.
    """
    advantage_BT = _advantage(signal_BT, response_BT, is_correct_B, gamma, lam, terminal_credit)
    if policy_on_incorrect == "binary":
        # The end of text has the advantage 0 by construction; never selected, it would never be learnt, and no program would end. Where an
        # incorrect one stops is none of what a policy should learn.
        ends_BT = last_BT(response_BT)
        return positive_weights(advantage_BT, response_BT, ends_BT if is_correct_B is None else ends_BT & is_correct_B[:, None])
    return exponential_weights(advantage_BT, response_BT, notes=notes, **exponential)


def exponential_weights(
    advantage_BT: Tensor,
    response_BT: Tensor,
    *,
    beta: float,
    sigma_floor: float,
    z_clip: float,
    weight_clip_min: float,
    weight_clip_max: float,
    concentration_floor: float,
    notes: dict[str, float] | None = None,
) -> Tensor:
    """exp(z / beta), projected [B, T] float32. `beta` is the temperature (usual 0.3 to 1; towards infinity: uniform).

    `sigma_floor` keeps a dead critic from being whitened into confident weights. When the weights' concentration falls below its floor,
    beta is raised by bisection until it holds. `notes` takes the beta that was used and the shares of tokens at either bound.
    """
    z_BT = standardise(advantage_BT, response_BT, sigma_floor).clamp(-z_clip, z_clip)

    def weights(temperature: Tensor) -> Tensor:
        return project_mean_one(torch.exp((z_BT - z_BT.max()) / temperature), response_BT, weight_clip_min, weight_clip_max)

    used = _raised(torch.tensor(beta, dtype=torch.float64, device=advantage_BT.device), weights, response_BT, concentration_floor)
    weight_BT = weights(used)
    if notes is not None:
        notes |= {"beta": float(used)} | shares_at_bounds(weight_BT, response_BT, weight_clip_min, weight_clip_max)
    return weight_BT.float()


def positive_weights(advantage_BT: Tensor, response_BT: Tensor, always_BT: Tensor | None = None) -> Tensor:
    """1[A > 0] scaled to mean 1: N / m on the m response tokens of the step with A > 0 or in `always_BT`, 0 elsewhere [B, T] float32.

    A step with tokens but without one of positive advantage is an error.
    """
    positive_BT, n = (advantage_BT > 0) & response_BT, int(response_BT.sum())
    if n and not bool(positive_BT.any()):
        raise ValueError(f"A > 0 on none of the step's {n} tokens, expected some; is the critic constant? see metrics/critic.json")
    chosen_BT = positive_BT if always_BT is None else positive_BT | (always_BT & response_BT)
    return chosen_BT.float() * (n / max(int(chosen_BT.sum()), 1))


def head_weights(
    ce_BTF: Tensor,
    signal_BT: Tensor,
    response_BT: Tensor,
    is_correct_B: Tensor | None = None,
    *,
    beta: float,
    gamma: float,
    lam: float | str,
    sigma_floor: float,
    z_clip: float,
    weight_clip_min: float,
    weight_clip_max: float,
    terminal_credit: bool = False,
) -> Tensor:
    """`token_weights` for values of the forward itself: mean, standardisation and projection are of each row; [B, T, F] float32.

    There is no floor of concentration: its search would wait for the device, and within the usual bounds it does not bind.
    """
    advantage_BT = _advantage(signal_BT, response_BT, is_correct_B, gamma, lam, terminal_credit)
    z_BT = standardise(advantage_BT, response_BT, sigma_floor, by_row=True).clamp(-z_clip, z_clip)
    u_BT = torch.exp((z_BT - z_BT.amax(1, keepdim=True)) / beta)
    weight_BT = project_mean_one(u_BT, response_BT, weight_clip_min, weight_clip_max, by_row=True)
    return align_future(weight_BT.float(), ce_BTF.shape[2], 0.0)


def _advantage(
    signal_BT: Tensor, response_BT: Tensor, is_correct_B: Tensor | None, gamma: float, lam: float | str, terminal_credit: bool
) -> Tensor:
    reward_B = is_correct_B.double() if terminal_credit and is_correct_B is not None else None
    return policy_advantage(signal_BT.detach().double(), response_BT, gamma, row_lam(lam, response_BT), terminal_credit, reward_B)


def _raised(beta: Tensor, weights: Callable[[Tensor], Tensor], valid_BT: Tensor, floor: float) -> Tensor:
    """The least beta, from the given one upwards, whose weights keep the floor of concentration."""
    if floor == 0 or bool(concentration(weights(beta), valid_BT) >= floor) or not bool(valid_BT.any()):
        return beta
    low, high = beta, beta * 1e6
    for _ in range(_BETA_BISECTIONS):
        middle = (low * high).sqrt()
        enough = concentration(weights(middle), valid_BT) >= floor
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return high


def standardise(q_BT: Tensor, valid_BT: Tensor, sigma_floor: float, by_row: bool = False) -> Tensor:
    """(q - mean) / max(std, sigma_floor) over the valid entries, or those of each row, float64, 0 elsewhere."""
    q_BT, n = q_BT.double() * valid_BT, total(valid_BT, by_row).clamp(min=1)
    centred = (q_BT - total(q_BT, by_row) / n) * valid_BT
    sigma = (total(centred.square(), by_row) / n).sqrt()
    return centred / sigma.clamp(min=sigma_floor)


def row_lam(lam: float | str, response_BT: Tensor) -> float | Tensor:
    """A number as it is; `length_adaptive` is max(0, 1 - 1 / (0.05 * response length)) per row (VAPO, 2504.05118)."""
    if lam != "length_adaptive":
        return lam
    length_B = response_BT.sum(1).clamp(min=1).double()
    return (1 - 1 / (0.05 * length_B)).clamp(min=0)
