"""Rho-1: train on the tokens whose loss most exceeds a reference model's (Lin et al. 2024, 2404.07965, eq. 3)."""

from functools import partial
from typing import Any

from torch import Tensor

from wmtp.weighting.heads import by_head, by_target, decide, pooled, pooled_zscore, separate, shared, targets
from wmtp.weighting.lag import Known
from wmtp.weighting.selection import percentile_emphasis, select_top, tokenskip, topk, weighted

__all__ = ["HEAD_MODES", "head_weights", "select_top", "signed_excess"]

HEAD_MODES = {"shared_target": shared, "per_head": separate, "per_head_zscore": pooled_zscore, "pooled": pooled}
_SELECTIONS = {"topk": topk, "tokenskip": tokenskip, "weighted": weighted, "percentile_emphasis": percentile_emphasis}


def head_weights(
    ce_BTF: Tensor,
    signal_BT: Tensor,
    response_BT: Tensor,
    row_B: Tensor | None = None,
    *,
    selection: str = "topk",
    head_mode: str = "shared_target",
    scope: str = "sequence",
    lag: Known | None = None,
    **settings: Any,
) -> Tensor:
    """Weights [B, T, F] float32 from the SIGNED excess of the detached training loss `ce_BTF` over the reference's loss by target token.

    Both are in nats. `selection` says how scores become weights (wmtp.weighting.selection has each one's settings); `absolute` is
    topk by |excess|, `softmax_over_heads` shares each token out among the heads and drops none. `head_mode` says whose excess decides.
    `shared_target`: head 0's, for all. A far head's excess holds information about skipped tokens that no training removes, and would
    drown the rest. `per_head`: each head's own. `pooled`: all targets of all heads compete; `per_head_zscore`: the same with scores
    standardised in each head. The population is a row (exact however rows are split), or all rows where `scope` is two_pass: then they
    are a whole step. Its weights have mean 1. With a `lag` the statistics are those of an earlier step (wmtp.weighting.lag).
    """
    excess_BTF = signed_excess(ce_BTF, signal_BT)
    if selection == "softmax_over_heads":
        return by_head(weighted(excess_BTF, targets(response_BT, ce_BTF.shape[2]), **settings))
    if selection == "absolute":
        selection, excess_BTF = "topk", excess_BTF.abs()
    weigh = partial(_SELECTIONS[selection], **settings)
    return decide(excess_BTF, response_BT, HEAD_MODES[head_mode], weigh, row_B if scope == "two_pass" else None, lag)


def signed_excess(ce_BTF: Tensor, reference_BT: Tensor) -> Tensor:
    """ce - reference by target token, float64 [B, T, F]; of no meaning off the response."""
    return by_target(ce_BTF).double() - reference_BT.double()[..., None]
