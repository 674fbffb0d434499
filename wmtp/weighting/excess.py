"""Rho-1: train on the tokens whose loss most exceeds a reference model's (Lin et al. 2024, 2404.07965, eq. 3)."""

import torch
from torch import Tensor

from wmtp.align import align_future


def head_weights(ce_BTF: Tensor, reference_BT: Tensor, response_BT: Tensor, *, keep_fraction: float) -> Tensor:
    """Weights [B, T, F] float32: N / m on the m = ceil(k * N) response tokens of highest SIGNED excess in each row, 0 elsewhere.

    `ce_BTF` is the detached training loss in nats, `reference_BT` the reference's loss by target token. Head 0 decides and every head
    gets its decision (`shared_target`): a far head's excess holds information that no training removes, and would drown the rest.
    Selection is per row, hence exact with one forward however rows are split. Ties go to the earlier token.
    """
    policy_BT = torch.nn.functional.pad(ce_BTF[:, :-1, 0], (1, 0))
    excess_BT = policy_BT.double() - reference_BT.double()
    chosen_BT = select_top(excess_BT, response_BT, keep_fraction)
    n_B1, m_B1 = response_BT.sum(1, keepdim=True), chosen_BT.sum(1, keepdim=True)
    weight_BT = torch.where(chosen_BT, n_B1 / m_B1.clamp(min=1), 0.0).float()
    return align_future(weight_BT, ce_BTF.shape[2], 0.0)


def select_top(score_BT: Tensor, valid_BT: Tensor, keep_fraction: float) -> Tensor:
    """The ceil(keep_fraction * N) valid entries of highest score in each row, bool [B, T]; exact under ties, stable."""
    order_BT = score_BT.masked_fill(~valid_BT, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank_BT = torch.empty_like(order_BT).scatter_(1, order_BT, torch.arange(score_BT.shape[1], device=order_BT.device).expand_as(order_BT))
    # 0.55 * 100 is 55.00000000000001 in binary; the slack keeps ceil from counting that as 56.
    budget_B1 = torch.ceil(valid_BT.sum(1, keepdim=True).double() * keep_fraction - 1e-9).clamp(min=1)
    return (rank_BT < budget_B1) & valid_BT
