"""Rho-1: train on the tokens whose loss most exceeds a reference model's (Lin et al. 2024, 2404.07965, eq. 3)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from wmtp.weighting.heads import by_head, by_target, pooled, separate, shared, targets, zscore
from wmtp.weighting.selection import percentile_emphasis, select_top, tokenskip, topk, weighted

__all__ = ["head_weights", "select_top", "signed_excess", "spread"]

_SELECTIONS = {"topk": topk, "tokenskip": tokenskip, "weighted": weighted, "percentile_emphasis": percentile_emphasis}
_HEAD_MODES = {"shared_target": shared, "per_head": separate, "pooled": pooled}


def head_weights(
    ce_BTF: Tensor, signal_BT: Tensor, response_BT: Tensor, *, selection: str = "topk", head_mode: str = "shared_target", **settings: Any
) -> Tensor:
    """Weights [B, T, F] float32 from the SIGNED excess of the detached training loss `ce_BTF` over the reference's loss by target token.

    Both are in nats. `selection` says how scores become weights (wmtp.weighting.selection has each one's settings); `absolute` is
    topk by |excess|, `softmax_over_heads` shares each token out among the heads and drops none. `head_mode` says whose excess: `spread`.
    Populations are single rows (or a row's head), hence exact with one forward however rows are split. Mean 1 in each of them.
    """
    excess_BTF = signed_excess(ce_BTF, signal_BT)
    valid_BTF = targets(response_BT, ce_BTF.shape[2])
    if selection == "softmax_over_heads":
        return by_head(weighted(excess_BTF, valid_BTF, **settings))
    if selection == "absolute":
        selection, excess_BTF = "topk", excess_BTF.abs()
    return spread(excess_BTF, valid_BTF, head_mode, lambda score, valid: _SELECTIONS[selection](score, valid, **settings))


def signed_excess(ce_BTF: Tensor, reference_BT: Tensor) -> Tensor:
    """ce - reference by target token, float64 [B, T, F]; of no meaning off the response."""
    return by_target(ce_BTF).double() - reference_BT.double()[..., None]


def spread(score_BTF: Tensor, valid_BTF: Tensor, head_mode: str, weigh: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Weights [B, T, F] by position, from scores by target token; `weigh(score, valid)` works on groups along the last axis.

    `shared_target`: head 0 decides for all. A far head's excess holds information about skipped tokens that no training removes, and
    would drown the rest. `per_head`: each head among its own targets. `pooled`: all targets of all heads of a row compete.
    `per_head_zscore`: pooled, after each head's scores have been standardised over the row.
    """
    if head_mode == "per_head_zscore":
        return pooled(zscore(score_BTF, valid_BTF), valid_BTF, weigh)
    return _HEAD_MODES[head_mode](score_BTF, valid_BTF, weigh)
