"""What a training tells of itself: its log, what it cost, what it learned from, and its loss on held-out programs."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from wmtp import flops, provenance
from wmtp.align import IGNORE, future_targets
from wmtp.batches import in_order, step_rows
from wmtp.bundle import NotFinite
from wmtp.plan import Plan
from wmtp.records import write_text
from wmtp.scores import problems_of
from wmtp.tokens import TokenData
from wmtp.world import World


def record(model: nn.Module, plan: Plan, start: Path) -> dict[str, Any]:
    """What the metadata of a trained model tell of its training."""
    rows = plan.rows_read()
    learned_from = provenance.with_start(problems_of(plan.data, rows), start)
    return {"n_steps": plan.n_steps, "flops": flops.training(model, *_extents(plan.data, rows)), "learned_from": learned_from}


def account(model: nn.Module, objective: Any, plan: Plan, last: Mapping[str, float], signal_flops: int = 0) -> dict[str, float]:
    """What the training cost and where it ended: steps, tokens read (prompt and response), parameters of the policy, FLOPs.

    `train_flops` are the policy's own, `total_flops` with those of the signal that weighed it.
    """
    data, rows = plan.data, plan.rows_read()
    # With a shared critic, incorrect rows may have targets of head 0 alone, for their running surprise.
    all_heads_R = data.is_correct[rows] if getattr(objective, "policy_on_incorrect", None) == "value_only" else None
    spent = flops.training(model, *_extents(data, rows), all_heads_R)
    spent += flops.training_forward(model, *_extents(data, _scored_first(objective, plan)))
    policy = getattr(model, "trunk", model)
    figures = {
        "steps": plan.n_steps,
        "tokens": int(data.lengths[rows].sum()),
        "parameters": sum(parameter.numel() for name, parameter in policy.named_parameters() if ".lora_" not in name),
        "trained_parameters": sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad),
    }
    figures |= {"train_flops": spent, "signal_flops": signal_flops, "total_flops": spent + signal_flops}
    return figures | {f"last_{key}": last[key] for key in ("loss", "ce", "value_brier", "value_delta_std") if key in last}


def _extents(data: TokenData, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each row, and where its response starts."""
    return data.lengths[rows], data.response_start[rows]


def _scored_first(objective: Any, plan: Plan) -> np.ndarray:
    """Row numbers of the steps that go forward once more, before their losses are taken (PolicyObjective.scored_first)."""
    if getattr(objective, "two_pass", False):
        return plan.rows_read()
    first_step = step_rows(plan.units, plan.per_step, plan.seed, 0).reshape(-1)
    return first_step if getattr(objective, "lag", None) else first_step[:0]


@torch.no_grad()
def validation(model: nn.Module, data: TokenData, world: World, token_budget: int) -> dict[str, float]:
    """Mean cross-entropy in nats per head over the correct programs of `data`, tokens weighed alike.

    `model` is as it was trained, wrapped and with a critic's head if it has one: its forward alone is known here.
    """
    sums_F2 = torch.zeros(model.n_future, 2, dtype=torch.float64, device=world.device)
    for batch in in_order(data, data.correct_rows(), world.rank, world.size, token_budget):
        batch = batch.to(world.device)
        targets_BTF = future_targets(batch.tokens_BT, batch.response_BT, model.n_future)
        ce_BTF = model(batch.tokens_BT, targets_BTF, first=max(0, batch.shortest_prompt - model.n_future))
        sums_F2 += torch.stack([ce_BTF.double().sum((0, 1)), (targets_BTF != IGNORE).sum((0, 1)).double()], dim=1)
    sums_F2 = world.sum(sums_F2)
    if not bool((sums_F2[:, 1] > 0).all()):
        raise ValueError(f"{data.path}: no correct program to measure a model on, expected one at least; raise the split's share")
    ce_F = (sums_F2[:, 0] / sums_F2[:, 1]).tolist()
    if not all(map(math.isfinite, ce_F)):
        raise NotFinite(f"{data.path}: the model's loss by head is {ce_F}, expected numbers; lower the learning rate and train it anew")
    return {f"validation_ce_head{head}": ce for head, ce in enumerate(ce_F)}


def write_log(path: Path, records: list[dict[str, float]]) -> None:
    """CSV for dvc plots, one row a logged step; numbers in full so that equal runs give equal bytes."""
    columns = list(records[0]) if records else ["step"]
    rows = [",".join(columns), *(",".join(json.dumps(record[column]) for column in columns) for record in records)]
    write_text(path, "\n".join(rows) + "\n")
