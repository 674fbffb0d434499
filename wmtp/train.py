"""One train step and one loop: for every method, the warm-up, the reference and the critic.

The loss of a step is a sum over all micro-batches and ranks, divided once by a count of the whole step. Every rank derives that count,
and weights that are known before the forward, from the step's rows itself: they are a pure function of the data and the step.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from wmtp import checkpoint, flops, provenance
from wmtp.align import IGNORE, future_targets
from wmtp.batches import Batch, collate, in_order, n_steps, share, step_rows
from wmtp.bundle import NotFinite, bundle_sha256
from wmtp.model import load_bundle
from wmtp.optim import build_optimizer, learning_rate
from wmtp.policy import PolicyObjective, check_faults, check_reached, check_selected, scaled
from wmtp.progress import Bar
from wmtp.records import write_text
from wmtp.scores import problems_of
from wmtp.scratch import fingerprint, held
from wmtp.tokens import TokenData, check_same_tokenizer
from wmtp.weighting import METHODS
from wmtp.world import World


class Objective(Protocol):
    def prepare(self, step: Batch) -> Batch: ...

    def count(self, step: Batch) -> float: ...

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]: ...

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]: ...


@dataclass(frozen=True)
class Plan:
    """What a training reads: `units` [n] or [n, 2] row numbers (pairs stay together), `per_step` units an optimizer step."""

    data: TokenData
    units: np.ndarray
    per_step: int
    n_epochs: float
    learning_rate: float
    seed: int
    signal_of: Callable[[int], np.ndarray] | None = None
    log_every: int = 10
    checkpoint_every: int = 50

    @property
    def n_steps(self) -> int:
        return n_steps(len(self.units), self.per_step, self.n_epochs)

    def step(self, number: int) -> Batch:
        return collate(self.data, step_rows(self.units, self.per_step, self.seed, number).reshape(-1), self.signal_of)

    def rows_read(self) -> np.ndarray:
        """Row numbers in the order in which the whole training reads them."""
        steps = [step_rows(self.units, self.per_step, self.seed, number).reshape(-1) for number in range(self.n_steps)]
        return np.concatenate([np.empty(0, dtype=np.int64), *steps])

    def first_pass(self) -> Iterator[Batch]:
        """The steps in which every unit has come at least once."""
        return (self.step(number) for number in range(n_steps(len(self.units), self.per_step, 1)))


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    step: Batch,
    world: World,
    token_budget: int,
    clip_norm: float,
    mixed: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:
    """One update from one whole step; returns this rank's sums for the log and the gradient norm before clipping.

    `mixed` multiplies in bfloat16; weights, gradients and moments keep the model's own type: a step of 1e-5 is lost on bfloat16 weights.
    """
    step, policy = objective.prepare(step), objective if isinstance(objective, PolicyObjective) else None
    count = objective.count(step)
    batches = share(step, world.rank, world.size, token_budget)
    if policy is not None and policy.scored_first:
        model.eval()  # weights are of the model, not of what dropout leaves of it
        with torch.autocast(world.device.type, torch.bfloat16, enabled=mixed):
            batches = policy.weigh_step(model, step, [batch.to(world.device) for batch in batches], world)
        model.train()
    sums, met = _backward(model, objective, batches, world, count, mixed)
    reached = _reached(sums, met, world)
    factor = count / reached[0] if policy is not None and policy.lag is not None else None
    if factor is not None:
        sums = scaled(sums, factor)
        _multiply_gradients(model, factor)
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    # The one look at the device of a step.
    found, *weighed = torch.cat([norm.double().reshape(1), reached]).tolist()
    if not math.isfinite(found):
        raise _told(found, sums, weighed[0] if factor is not None else None, count)
    if weighed:
        check_reached(*weighed, count, lagged=factor is not None)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if policy is not None:
        policy.remember(step, world)
    return sums, norm


def _told(norm: float, sums: dict[str, Tensor], lagged: float | None, count: float) -> NotFinite:
    """Why the gradient is no number, where its weights say it (a WeightError); `lagged` is their sum before it was made N."""
    if "faults" in sums:
        check_faults(sums["faults"])
    if lagged is not None:
        check_selected(lagged, count)
    return NotFinite(f"gradient norm is {norm}")


def _reached(sums: dict[str, Tensor], met: Tensor, world: World) -> Tensor:
    """Of a step over all ranks, float64 and on the device: the sum of the weights, the loss that weights and losses in the log come to,
    and the loss that was differentiated. Empty for an objective without weights.
    """
    if "wce" not in sums:
        return met.new_zeros(0)
    return world.sum(torch.stack([sums["w"].sum(), sums["wce"].sum() + sums.get("beside", torch.zeros_like(met)), met]))


def _backward(
    model: nn.Module, objective: Objective, batches: list[Batch], world: World, count: float, mixed: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """The gradient of this rank's losses over `count`; returns their sums for the log, and the sum of the losses themselves."""
    # DDP and FSDP average gradients over ranks; this turns the average back into the sum.
    scale, sums, met = world.size / count, {}, torch.zeros((), dtype=torch.float64, device=world.device)
    for number, batch in enumerate(batches):
        with _last_one_synchronises(model, number == len(batches) - 1):
            with torch.autocast(world.device.type, torch.bfloat16, enabled=mixed):
                loss, parts = objective.loss(model, batch.to(world.device))
            (loss * scale).backward()
        met += loss.detach()
        sums = {name: _merged(name, sums[name], part) if sums else part for name, part in parts.items()}
    return sums, met


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    """Dropout is the one thing that is drawn inside a step; a function of the step, it survives an interruption."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def _multiply_gradients(model: nn.Module, factor: Tensor) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            # A sharded gradient's own part shares its memory.
            local = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
            local.mul_(factor.to(local.device, local.dtype))


def _merged(name: str, one: Tensor, other: Tensor) -> Tensor:
    """Numbers for the log add up over micro-batches; of those named max_ the greater stays."""
    return torch.maximum(one, other) if name.startswith("max_") else one + other


def _last_one_synchronises(model: nn.Module, last: bool) -> Any:
    """Gradients cross ranks once a step, with the last micro-batch."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
        return nullcontext()
    return nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()


def fit(
    model: nn.Module,
    objective: Objective,
    plan: Plan,
    settings: Any,
    world: World,
    *,
    parallel: str = "ddp",
    mixed: bool = False,
    scratch: Path | None = None,
    label: str = "train",
    on_log: Callable[[int, dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Trains `model` in place for plan.n_steps; returns the logged records, equal to the byte whether or not it was interrupted.

    `settings` is the optimizer section. With a `scratch` folder the state is saved every plan.checkpoint_every steps and found again.
    """
    model.train()
    wrapped = world.wrap(model, parallel)
    optimizer = build_optimizer(wrapped, settings)
    state = checkpoint.restore(scratch, wrapped, optimizer) if scratch else None
    first, records = (state["step"], state["records"]) if state else (0, [])
    lag = objective.lag if isinstance(objective, PolicyObjective) else None
    if lag is not None:
        lag.load(state["lag"] if state else {}, world.device)
    with Bar(f"{label}{' (resumed)' if first else ''}", plan.n_steps) as bar:
        bar.advance(first)
        for number in range(first, plan.n_steps):
            rate = learning_rate(number, plan.n_steps, plan.learning_rate, settings.warmup_fraction, settings.final_fraction)
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(_dropout_seed(plan.seed, number, world.rank))
            try:
                sums, norm = train_step(
                    wrapped, optimizer, objective, plan.step(number), world, settings.micro_batch_tokens, settings.clip_norm, mixed
                )
            except NotFinite as error:
                raise NotFinite(
                    f"{label}: step {number + 1} of {plan.n_steps}: {error}; weights unchanged, lower the learning rate"
                ) from None
            note = ""
            if (number + 1) % plan.log_every == 0 or number + 1 == plan.n_steps:
                whole = {name: (world.max if name.startswith("max_") else world.sum)(part) for name, part in sums.items()}
                figures = objective.summary(whole)
                records.append({"step": number + 1, **figures, "grad_norm": float(norm), "learning_rate": rate})
                note = f"loss {figures['loss']:.4f}"
                if on_log:
                    on_log(number + 1, records[-1])
            bar.advance(1, note)
            if scratch and (number + 1) % plan.checkpoint_every == 0:
                weighting = {} if lag is None else {"lag": lag.state()}
                checkpoint.save(scratch, wrapped, optimizer, {"step": number + 1, "records": records, **weighting}, world)
    model.eval()
    return records


@contextmanager
def fitted(
    model: nn.Module,
    objective: Objective,
    plan: Plan,
    params: Any,
    world: World,
    *,
    stage: str,
    inputs: Mapping[str, str],
    on_log: Callable[[int, dict[str, float]], None] | None = None,
) -> Iterator[list[dict[str, float]]]:
    """`fit` with its state in a scratch directory named after everything that shapes the run: declared parameters, inputs, world size.

    The block saves the model; the state is kept until it has ended well, so that a full disk costs no training.
    """
    with held(stage, fingerprint(params.shaping(), inputs, world), world) as folder:
        yield fit(
            model, objective, plan, params.optimizer, world, parallel=params.run.parallel, mixed=params.run.dtype == "bfloat16",
            scratch=folder, label=stage, on_log=on_log if world.is_first else None,
        )  # fmt: skip


def tune(
    params: Any,
    section: str,
    split: str,
    start: Path,
    processed: Path,
    out: Path,
    world: World,
    on_log: Callable[[int, dict[str, float]], None],
) -> list[dict[str, float]]:
    """Uniform training on the split's correct programs, every head that the start has: the warm-up and the reference. Writes `out`."""
    settings, data = params[section], TokenData(processed, split)
    check_same_tokenizer(data.tokenizer_sha256, start, f"{section}.start")
    model = load_bundle(start, dtype=torch.float32, device=world.device)
    plan = Plan(
        data,
        data.correct_rows(),
        settings.batch_rows,
        settings.n_epochs,
        settings.learning_rate,
        params.seed,
        checkpoint_every=params.run.checkpoint_every,
    )
    objective = PolicyObjective(METHODS["baseline"], {}, model.n_future)
    inputs = {"start": bundle_sha256(start), "data": data.sha256}
    with fitted(model, objective, plan, params, world, stage=section, inputs=inputs, on_log=on_log) as records:
        checkpoint.save_model(model, start, out, world, {"stage": section, **record(model, plan, start)})
    return records


def record(model: nn.Module, plan: Plan, start: Path) -> dict[str, Any]:
    """What the metadata of a trained model tell of its training."""
    rows = plan.rows_read()
    learned_from = provenance.with_start(problems_of(plan.data, rows), start)
    return {"n_steps": plan.n_steps, "flops": flops.training(model, *_extents(plan.data, rows)), "learned_from": learned_from}


def account(model: nn.Module, objective: Objective, plan: Plan, last: Mapping[str, float], signal_flops: int = 0) -> dict[str, float]:
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


def _scored_first(objective: Objective, plan: Plan) -> np.ndarray:
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
