"""What each head knows of held-out programs: cross-entropy, perplexity and accuracy, over all tokens and by place in the response; and
what its drafts are worth.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from wmtp.align import IGNORE, align_future, future_targets
from wmtp.batches import Batch, in_order
from wmtp.bundle import NotFinite
from wmtp.generate import Decoding, Request, generate
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
    # Beyond e^700 no float64 holds it, and no text needs it.
    return {"n_tokens": int(n), **means, "perplexity": math.exp(min(means["ce"], 700.0))}


@torch.no_grad()
def measure(model: Transformer, data: TokenData, world: World, token_budget: int) -> HeadFigures:
    """Of the correct programs of `data`, tokens weighed alike; every rank gets the whole."""
    sums_FPN = torch.zeros(model.n_future, PARTS, len(NAMES), dtype=torch.float64, device=world.device)
    for batch in in_order(data, data.correct_rows(), world.rank, world.size, token_budget):
        _add(model, batch.to(world.device), sums_FPN)
    sums_FPN = world.sum(sums_FPN)
    if not bool((sums_FPN[..., 0].sum(1) > 0).all()):
        raise ValueError(f"{data.path}: no correct program to measure a model on, expected one at least; raise the split's share")
    if not bool(sums_FPN.isfinite().all()):
        ce_F = (sums_FPN[..., 1].sum(1) / sums_FPN[..., 0].sum(1)).tolist()
        raise NotFinite(f"{data.path}: the model's loss by head is {ce_F}, expected numbers; lower the learning rate and train it anew")
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
        likelier_N = _likelier(logits_NV, target_N)
        figures_XN = torch.stack([torch.ones_like(ce_N), ce_N, *(likelier_N < k for k in TOP)]).double()
        sums_FPN[h].index_add_(0, part_BTF[..., h][valid_BT], figures_XN.T)


def _likelier(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """How many tokens come before the target in the model's order, [N]; of equals the one of lower number, as arg max takes it."""
    own_N1, token_V = logits_NV.gather(1, target_N[:, None]), torch.arange(logits_NV.shape[1], device=logits_NV.device)
    return ((logits_NV > own_N1) | ((logits_NV == own_N1) & (token_V < target_N[:, None]))).sum(1)


def _parts(response_BT: Tensor) -> Tensor:
    """Which of PARTS equal parts of its response a token stands in, int64 [B, T]."""
    place_BT, length_B1 = response_BT.cumsum(1) - 1, response_BT.sum(1, keepdim=True).clamp(min=1)
    return (place_BT * PARTS // length_B1).clamp(0, PARTS - 1)


@dataclass(frozen=True)
class DraftFigures:
    """Greedy texts with the heads' drafts and without, one after the other. `speed_up` is of this machine, now."""

    n_prompts: int
    tokens_per_forward: float
    n_different: int
    speed_up: float


def drafts(model: Transformer, prompts: Sequence[Sequence[int]], max_tokens: int, eos: int, n_tokens: int) -> DraftFigures:
    """Tokens count the ends of texts, forwards those over prompts; without drafts there is one token a forward."""
    plain, seconds, made = Decoding(max_tokens, eos, n_tokens=n_tokens), [], []
    for decoding in (plain, replace(plain, n_heads=model.n_future)):
        requests = [Request(str(place), 0, prompt, 0.0) for place, prompt in enumerate(prompts)]
        generate(model, [Request("warm", 0, prompts[0], 0.0)], decoding)
        start = time.perf_counter()
        for request in requests:
            generate(model, [request], decoding)
        seconds.append(time.perf_counter() - start)
        made.append(requests)
    without, drafted = made
    n_drafted = sum(len(one.output) + one.ended for one in drafted)
    different = sum((one.output, one.ended) != (other.output, other.ended) for one, other in zip(without, drafted))
    return DraftFigures(len(prompts), n_drafted / sum(one.n_forwards for one in drafted), different, seconds[0] / seconds[1])
