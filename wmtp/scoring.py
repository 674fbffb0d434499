"""Per-token scores of a whole split by a frozen model: reference cross-entropy by target token, critic values by state."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wmtp.align import future_targets
from wmtp.batches import Batch, in_order
from wmtp.critic import Critic
from wmtp.model import Transformer
from wmtp.progress import Bar
from wmtp.scores import write_scores
from wmtp.tokens import TokenData
from wmtp.world import World


def reference_loss(model: Transformer) -> Callable[[Batch], Tensor]:
    """-log p(x_i | x_<i) in nats [B, T] by TARGET token (the i-th number belongs to token i), 0 outside the response."""

    def score(batch: Batch) -> Tensor:
        targets_BTF = future_targets(batch.tokens_BT, batch.response_BT, 1)
        return torch.nn.functional.pad(model(batch.tokens_BT, targets_BTF)[:, :-1, 0], (1, 0))

    return score


def critic_value(critic: Critic) -> Callable[[Batch], Tensor]:
    """V(x[0..i]) [B, T] by STATE, in the critic's own unit."""
    as_value = torch.sigmoid if critic.unit == "probability" else torch.nn.Identity()
    return lambda batch: as_value(critic(batch.tokens_BT, batch.response_BT)[0])


@torch.no_grad()
def score_rows(
    score: Callable[[Batch], Tensor], data: TokenData, rows: np.ndarray, world: World, token_budget: int
) -> list[np.ndarray] | None:
    """One float32 array per entry of `rows`, as long as that row, on rank 0; None elsewhere."""
    found: dict[int, np.ndarray] = {}
    with Bar("score", len(rows), unit="rows") as bar:
        for batch in in_order(data, rows, world.rank, world.size, token_budget):
            scores = score(batch.to(world.device)).float().cpu().numpy()
            for row, values in zip(batch.row_B.tolist(), scores):
                if row >= 0:  # filler has no row
                    found[row] = values[: data.lengths[row]].copy()
            bar.advance(min(len(scores) * world.size, len(rows) - bar.done))
    parts = world.gather(found)
    if parts is None:
        return None
    merged = {row: values for part in parts for row, values in part.items()}
    return [merged[int(row)] for row in rows]


def score_split(
    score: Callable[[Batch], Tensor], data: TokenData, model_sha256: str, out: Path, world: World, token_budget: int, **origin: Any
) -> None:
    """Every row of `data`; `origin` as wmtp.scores.write_scores takes it."""
    scores = score_rows(score, data, np.arange(len(data)), world, token_budget)
    if scores is not None:
        write_scores(out, scores, data, model_sha256, **origin)
