"""Numbers that differ from head to head: by the position that predicts, by the token that is predicted, and whose number decides.

Scores are judged by target token, where a row's heads stand side by side; weights leave as the heads see them.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from wmtp.align import align_future
from wmtp.weighting.lag import Known, recalled

Weigh = Callable[..., Tensor]
"""Scores and the mask of their groups (last axis), and `lag`, to weights: see wmtp.weighting.selection."""
Mode = Callable[[Tensor, Tensor, Weigh, Known | None], Tensor]
"""Which scores make a group: `shared`, `separate`, `pooled` or `pooled_zscore`."""


def by_target(q_BTF: Tensor) -> Tensor:
    """out[b, i, h] = q[b, i-h-1, h], the number that head h has for token i; 0 where no position predicts it."""
    T, F = q_BTF.shape[1:]
    return torch.stack([functional.pad(q_BTF[:, : max(T - h - 1, 0), h], (min(h + 1, T), 0)) for h in range(F)], dim=2)


def by_head(q_BTF: Tensor) -> Tensor:
    """The inverse: align_future for numbers that differ from head to head."""
    F = q_BTF.shape[2]
    return torch.stack([align_future(q_BTF[..., h], F, 0.0)[..., h] for h in range(F)], dim=2)


def targets(response_BT: Tensor, n_future: int) -> Tensor:
    """Which tokens each head is asked for, by target token, bool [B, T, F]: response tokens that have a position h+1 before them."""
    place_T, head_F = (torch.arange(n, device=response_BT.device) for n in (response_BT.shape[1], n_future))
    return response_BT[..., None] & (place_T[:, None] > head_F)


def shared(score_BTF: Tensor, valid_BTF: Tensor, weigh: Weigh, lag: Known | None = None) -> Tensor:
    """Head 0's score of each target token decides, and every head gets its decision; [B, T, F] by target."""
    return weigh(score_BTF[..., 0], valid_BTF[..., 0], lag=lag)[..., None].expand_as(score_BTF)


def separate(score_BTF: Tensor, valid_BTF: Tensor, weigh: Weigh, lag: Known | None = None) -> Tensor:
    """Each head decides among its own targets; [B, T, F] by target."""
    return weigh(score_BTF.transpose(1, 2), valid_BTF.transpose(1, 2), lag=lag).transpose(1, 2)


def pooled(score_BTF: Tensor, valid_BTF: Tensor, weigh: Weigh, lag: Known | None = None) -> Tensor:
    """All targets of all heads of a row compete; [B, T, F] by target."""
    # Flattened token by token, so that of equal scores the earlier token's win.
    return weigh(score_BTF.flatten(1), valid_BTF.flatten(1), lag=lag).view_as(score_BTF)


def pooled_zscore(score_BTF: Tensor, valid_BTF: Tensor, weigh: Weigh, lag: Known | None = None) -> Tensor:
    """`pooled`, after each head's scores have been standardised over the row."""
    return pooled(zscore(score_BTF, valid_BTF, lag), valid_BTF, weigh, lag)


def decide(
    score_BTF: Tensor, response_BT: Tensor, mode: Mode, weigh: Weigh, row_B: Tensor | None = None, lag: Known | None = None
) -> Tensor:
    """Weights [B, T, F] by position, from scores by target. `row_B` makes one population of all rows, in the order of their ids.

    So does an empty `lag`, which then holds that population's statistics; a filled one judges by them, whatever the rows.
    """
    valid_BTF = targets(response_BT, score_BTF.shape[2])
    if lag is not None and not lag:
        mode(*(q_BTF.flatten(0, 1)[None] for q_BTF in (score_BTF, valid_BTF)), weigh, lag)
    if row_B is None or lag is not None:
        return by_head(mode(score_BTF, valid_BTF, weigh, lag))
    order_B = row_B.argsort(stable=True)
    one = [q_BTF[order_B].flatten(0, 1)[None] for q_BTF in (score_BTF, valid_BTF)]
    ordered_BTF = mode(*one, weigh, None).reshape(score_BTF.shape)
    return by_head(torch.empty_like(ordered_BTF).index_copy_(0, order_B, ordered_BTF))


def zscore(score_BTF: Tensor, valid_BTF: Tensor, lag: Known | None = None) -> Tensor:
    """Each head's scores standardised over the row, 0 off the mask; to nine decimals.

    Two heads of a short row can have equal z-scores (1 and -1 where there are two targets); the last bit must not decide between them.
    """
    score_BTF, n_B1F = score_BTF.masked_fill(~valid_BTF, 0.0), valid_BTF.sum(1, keepdim=True).clamp(min=1)
    mean_B1F = recalled(lag, "head_mean", lambda: score_BTF.sum(1, keepdim=True) / n_B1F)
    centred_BTF = (score_BTF - mean_B1F) * valid_BTF
    std_B1F = recalled(lag, "head_std", lambda: (centred_BTF.square().sum(1, keepdim=True) / n_B1F).sqrt())
    return (centred_BTF / std_B1F.clamp(min=1e-6)).round(decimals=9)
