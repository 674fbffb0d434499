"""One train step and one loop: for every method, the warm-up, the reference and the critic.

The loss of a step is a sum over all micro-batches and ranks, divided once by a count of the whole step. Every rank derives that count,
and weights that are known before the forward, from the step's rows itself: they are a pure function of the data and the step.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from wmtp import checkpoint
from wmtp.batches import Batch, share
from wmtp.bundle import NotFinite, bundle_sha256
from wmtp.model import load_bundle
from wmtp.optim import build_optimizer, learning_rate
from wmtp.outcome import record
from wmtp.plan import Plan
from wmtp.policy import PolicyObjective, check_faults, check_reached, check_selected, scaled
from wmtp.progress import Bar
from wmtp.scratch import fingerprint, held
from wmtp.tokens import TokenData, check_same_tokenizer
from wmtp.weighting import METHODS
from wmtp.world import World


class Objective(Protocol):
    def prepare(self, step: Batch) -> Batch: ...

    def count(self, step: Batch) -> float: ...

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]: ...

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]: ...


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
