"""How far a training has moved a model from its start: the divergence of their predictions on held-out programs."""

import torch
from torch import Tensor

from wmtp.align import IGNORE, future_targets
from wmtp.batches import Batch, in_order
from wmtp.model import Transformer
from wmtp.tokens import TokenData
from wmtp.world import World


@torch.no_grad()
def drift(model: Transformer, start: Transformer, data: TokenData, world: World, token_budget: int) -> list[float]:
    """KL(model || start) in nats, a mean over the response tokens of the correct programs of `data`, for each head that both have."""
    n_heads = min(model.n_future, start.n_future)
    sums_2F = torch.zeros(2, n_heads, dtype=torch.float64, device=world.device)
    for batch in in_order(data, data.correct_rows(), world.rank, world.size, token_budget):
        _add(model, start, batch.to(world.device), sums_2F)
    total_F, n_F = world.sum(sums_2F)
    return (total_F / n_F).tolist()


def _add(model: Transformer, start: Transformer, batch: Batch, sums_2F: Tensor) -> None:
    n_heads = sums_2F.shape[1]
    first = max(0, batch.shortest_prompt - n_heads)
    valid_BTF = future_targets(batch.tokens_BT, batch.response_BT, n_heads)[:, first:] != IGNORE
    hidden = [each.hidden(batch.tokens_BT, n_future=n_heads, first=first) for each in (model, start)]
    for h, (ours_BTD, theirs_BTD) in enumerate(zip(*hidden)):
        valid_BT = valid_BTF[..., h]
        ours_NV, theirs_NV = (
            each.output(x_BTD[valid_BT]).double().log_softmax(-1) for each, x_BTD in ((model, ours_BTD), (start, theirs_BTD))
        )
        sums_2F[:, h] += torch.stack([(ours_NV.exp() * (ours_NV - theirs_NV)).sum(), valid_BT.sum().double()])
