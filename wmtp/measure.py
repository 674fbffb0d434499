"""What each head knows of held-out programs: cross-entropy, perplexity and accuracy, over all tokens and by place in the response."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from wmtp.align import IGNORE, align_future, future_targets
from wmtp.batches import Batch, in_order
from wmtp.bundle import NotFinite
from wmtp.model import Transformer
from wmtp.tokens import TokenData
from wmtp.world import World

PARTS = 10  # equal parts of a response, its end of text in the last
TOP = (1, 5)
NAMES = ("n_tokens", "ce", *(f"accuracy_at_{k}" for k in TOP))


@dataclass(frozen=True)
class HeadFigures:
    """`sums_FPN` [F, PARTS, len(NAMES)] float64: targets, nats, and targets among the k likeliest, by head and part of the response."""

    sums_FPN: Tensor

    def whole(self) -> dict[str, dict[str, float]]:
        """Means of each head over all tokens; perplexity is exp(ce)."""
        return {f"head{h}": _means(sums_N) for h, sums_N in enumerate(self.sums_FPN.sum(1))}

    def by_place(self) -> list[dict[str, float]]:
        """A row for each part of the responses, `place` its middle as a share of a response; parts without a token are left out."""
        rows = []
        for part, sums_FN in enumerate(self.sums_FPN.unbind(1)):
            if bool((sums_FN[:, 0] > 0).all()):
                heads = [_means(sums_N) for sums_N in sums_FN]
                figures = {f"{name}_head{h}": means[name] for h, means in enumerate(heads) for name in means}
                rows.append({"place": (part + 0.5) / PARTS, **figures})
        return rows


def _means(sums_N: Tensor) -> dict[str, float]:
    n, *totals = sums_N.tolist()
    means = dict(zip(NAMES[1:], (total / n for total in totals)))
    return {"n_tokens": int(n), **means, "perplexity": math.exp(means["ce"])}


@torch.no_grad()
def measure(model: Transformer, data: TokenData, world: World, token_budget: int) -> HeadFigures:
    """Of the correct programs of `data`, tokens weighed alike; every rank gets the whole."""
    sums_FPN = torch.zeros(model.n_future, PARTS, len(NAMES), dtype=torch.float64, device=world.device)
    for batch in in_order(data, data.correct_rows(), world.rank, world.size, token_budget):
        _add(model, batch.to(world.device), sums_FPN)
    sums_FPN = world.sum(sums_FPN)
    if not bool(sums_FPN.isfinite().all()):
        raise NotFinite(f"{data.path}: the model's losses there are not finite; train it anew")
    return HeadFigures(sums_FPN)


def _add(model: Transformer, batch: Batch, sums_FPN: Tensor) -> None:
    first = max(0, batch.shortest_prompt - model.n_future)
    targets_BTF = future_targets(batch.tokens_BT, batch.response_BT, model.n_future)[:, first:]
    part_BTF = align_future(_parts(batch.response_BT), model.n_future, 0)[:, first:]
    for h, x_BTD in enumerate(model.hidden(batch.tokens_BT, first=first)):
        valid_BT = targets_BTF[..., h] != IGNORE
        logits_NV, target_N = model.output(x_BTD[valid_BT]), targets_BTF[..., h][valid_BT]
        logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
        ce_N = functional.cross_entropy(logits_NV, target_N, reduction="none")
        likelier_N = (logits_NV > logits_NV.gather(1, target_N[:, None])).sum(1)
        figures_XN = torch.stack([torch.ones_like(ce_N), ce_N, *(likelier_N < k for k in TOP)]).double()
        sums_FPN[h].index_add_(0, part_BTF[..., h][valid_BT], figures_XN.T)


def _parts(response_BT: Tensor) -> Tensor:
    """Which of PARTS equal parts of its response a token stands in, int64 [B, T]."""
    place_BT, length_B1 = response_BT.cumsum(1) - 1, response_BT.sum(1, keepdim=True).clamp(min=1)
    return (place_BT * PARTS // length_B1).clamp(0, PARTS - 1)
