"""The policy's objective: loss = sum(w * ce) / number of targets, for every method (METHODS, "Loss"; 2404.19737 eq. 2)."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wmtp.align import IGNORE, align_future, future_targets, last_BT
from wmtp.batches import Batch
from wmtp.blocks import reads_beta
from wmtp.scores import Scores
from wmtp.tokens import TokenData
from wmtp.weighting import Method, array_names, keywords, method_of
from wmtp.weighting.lag import Known, Lag
from wmtp.world import World


class WeightError(ValueError):
    """Weights that break their promise: finite, not negative, mean 1 over the targets, 0 elsewhere."""


@dataclass(frozen=True)
class PolicyObjective:
    """Weighted multi-token cross-entropy. `settings` are the weighting's own keyword arguments; `mix` blends with uniform weights.

    `head_weights`, one number a head, scale the heads' losses. They are divided by their mean: every head has the same targets, so the
    mean weight over all targets stays 1. Where a weighting gives the heads unequal shares, each row (the step,
    two_pass) is scaled back to mean 1 instead.

    With a `lag` weights are judged by the step before; the step is scaled to mean 1 once its sum is known (`scaled`).
    """

    method: Method
    settings: Mapping[str, Any]
    n_future: int
    mix: float = 1.0
    head_weights: tuple[float, ...] | None = None
    lag: Lag | None = None

    def prepare(self, step: Batch) -> Batch:
        """The whole step, over all ranks, with its weights where they are known before the forward."""
        starts_B = step.response_BT.int().argmax(1)
        short_B = (starts_B < self.n_future) & step.response_BT.any(1)
        if bool(short_B.any()):
            raise WeightError(
                f"a prompt of {int(starts_B[short_B].min())} tokens is shorter than the {self.n_future} heads: some heads would not see"
                " its first response tokens; lengthen the prompt or lower n_future"
            )
        if self.lag is not None:
            self.lag.seen = []
        if self.method.needs_forward:
            return step if self._population == ROWS else replace(step, place_B=torch.arange(len(step.row_B)))
        notes: dict[str, float] = {}
        wanted = {"notes": notes} if "notes" in keywords(self.method.function()) else {}
        weight_BT = self._mixed(self.method.weigh(vars(step), {**self.settings, **wanted}), step.response_BT)
        return replace(step, weight_BT=check_weights(weight_BT, step.response_BT, self._clips), notes=notes)

    def count(self, step: Batch) -> float:
        """Targets of the whole step, all heads."""
        return float((future_targets(step.tokens_BT, step.response_BT, self.n_future) != IGNORE).sum())

    @property
    def scored_first(self) -> bool:
        """Whether a step must be scored before its losses are taken: every one under two_pass, the first one under lagged."""
        return self.two_pass or (self.lag is not None and not self.lag.known)

    @torch.no_grad()
    def weigh_step(self, model: nn.Module, step: Batch, batches: list[Batch], world: World) -> list[Batch]:
        """This rank's micro-batches with weights whose population is the whole step: a forward without gradients comes first, and the
        losses of all ranks are put together. Every rank joins and finds the same weights; they are checked at once. Lagged, the
        statistics of the step are found in their place.
        """
        step, needs_entropy = step.to(world.device), self._needs_entropy
        whole = self._whole(step, [(one.place_B, *self._forward(model, one, self._targets(one), needs_entropy)) for one in batches], world)
        if self.lag is not None:
            self.lag.update(self._measured(step, whole))
            return batches
        valid_BTF = self._targets(step) != IGNORE
        weight_BTF = check_weights(self._weigh(step, whole[0], whole[-1], valid_BTF), valid_BTF)
        own = [(batch, self._targets(batch) != IGNORE) for batch in batches]
        return [replace(batch, weight_BTF=weight_BTF[batch.place_B, : valid.shape[1]] * valid) for batch, valid in own]

    @torch.no_grad()
    def remember(self, step: Batch, world: World) -> None:
        """Lagged: what this step's losses say of the next. After the optimizer's step; every rank joins."""
        if self.lag is not None:
            step, seen = step.to(world.device), self.lag.seen
            self.lag.seen = []
            self.lag.update(self._measured(step, self._whole(step, seen, world)))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of w * ce over this micro-batch, and detached float64 sums for the log, [F] each where they are by head.

        Weights that need the forward are checked on the device without waiting for it: `faults` counts what is wrong with them, and a
        fault makes loss and gradient no numbers, so that every rank stops before its optimizer. `check_faults` then tells what it was.
        """
        targets_BTF = self._targets(batch)
        valid_BTF = targets_BTF != IGNORE
        ce_BTF, entropy_BTF = self._forward(model, batch, targets_BTF, self._needs_entropy and not self._known(batch))
        if self.lag is not None and torch.is_grad_enabled():
            self.lag.seen.append((batch.place_B, ce_BTF.detach(), entropy_BTF))
        return self.weighted(batch, ce_BTF, entropy_BTF, valid_BTF)

    def weighted(self, batch: Batch, ce_BTF: Tensor, entropy_BTF: Tensor | None, valid_BTF: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`loss` after its forward."""
        if self._known(batch):
            weight_BTF = batch.weight_BTF
            if weight_BTF is None:
                weight_BTF = self._by_head(align_future(batch.weight_BT, self.n_future, 0.0), valid_BTF)
            return (weight_BTF * ce_BTF * valid_BTF).sum(), _sums(ce_BTF.detach(), weight_BTF, valid_BTF, batch)
        given_BTF = self._given(batch, ce_BTF.detach(), entropy_BTF)
        mixed_BTF = self._mixed(given_BTF, valid_BTF)
        weight_BTF = self._by_head(mixed_BTF, valid_BTF)
        faults = _faults(weight_BTF, valid_BTF, self._population, _outside(mixed_BTF, valid_BTF, self._clips))
        total = (weight_BTF * ce_BTF * valid_BTF).sum() * torch.where(faults[:5].any(), torch.nan, 1.0)
        sums = _sums(ce_BTF.detach(), weight_BTF, valid_BTF, batch) | self._at_bounds(given_BTF, valid_BTF)
        return total, sums | {"faults": faults}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Readable numbers from sums over all micro-batches and ranks; those that begin with `max_` are maxima."""
        n_F, heads = sums["n"], range(self.n_future)
        n, w, w2 = (float(sums[name].sum()) for name in ("n", "w", "w2"))
        # exp(entropy of w / sum(w)) / N, from sum(w log w).
        concentration = np.exp(np.log(w) - float(sums["wlogw"].sum()) / w) / n
        return {
            "loss": float(sums["wce"].sum()) / n, "ce": float(sums["ce"].sum()) / n,
            **{f"ce_head{h}": float(sums["ce"][h] / n_F[h]) for h in heads},
            "weight_mean": w / n, "weight_std": max(0.0, w2 / n - (w / n) ** 2) ** 0.5,
            "weight_min": -float(sums["max_negative_w"].max()), "weight_max": float(sums["max_w"].max()),
            "weight_ess": w * w / (n * w2), "weight_concentration": float(concentration),
            "weight_selected": float(sums["selected"].sum()) / n,
            **{f"weight_selected_head{h}": float(sums["selected"][h] / n_F[h]) for h in heads},
            "weight_at_end": float(sums["w_end"] / sums["n_end"].clamp(min=1)),
            "weight_on_incorrect": float(sums["w_incorrect"].sum()) / w,
            **{f"weight_{name.removeprefix('note_')}": float(sums[name]) / n for name in sums if name.startswith("note_")},
        }  # fmt: skip

    @property
    def two_pass(self) -> bool:
        return self.settings.get("scope") == "two_pass"

    @property
    def _clips(self) -> tuple[float, float] | None:
        """Where the weighting's bounds lie once its weights are mixed with uniform ones; None without bounds."""
        if "weight_clip_min" not in self.settings:
            return None
        low, high = (1 + self.mix * (self.settings[f"weight_clip_{end}"] - 1) for end in ("min", "max"))
        return low, high

    @property
    def _population(self) -> tuple[int, ...]:
        """The axes of [B, T, F] over which weights have mean 1; none where a single micro-batch cannot tell."""
        return () if self.lag is not None else STEP if self.two_pass else ROWS

    @property
    def _needs_entropy(self) -> bool:
        return "entropy_BTF" in array_names(self.method.function())

    def _known(self, batch: Batch) -> bool:
        return not self.method.needs_forward or batch.weight_BTF is not None

    def _targets(self, batch: Batch) -> Tensor:
        return future_targets(batch.tokens_BT, batch.response_BT, self.n_future)

    def _forward(self, model: nn.Module, batch: Batch, targets_BTF: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        """Loss and, where it is asked for, entropy, [B, T, F] each."""
        first = max(0, batch.shortest_prompt - self.n_future)
        if with_entropy:
            return model(batch.tokens_BT, targets_BTF, first=first, with_entropy=True)
        return model(batch.tokens_BT, targets_BTF, first=first), None

    def _whole(self, step: Batch, parts: Iterable[tuple[Tensor, Tensor, Tensor | None]], world: World) -> Tensor:
        """Losses and, where they are needed, entropies of the whole step, float64 [1 or 2, B, T, F], from all micro-batches and ranks."""
        whole = torch.zeros(1 + self._needs_entropy, *step.tokens_BT.shape, self.n_future, dtype=torch.float64, device=world.device)
        for place_B, *found in parts:
            # zip ends where there is no entropy; filler adds its zeros to the first row.
            for part_BTF, q_BTF in zip(whole, found):
                part_BTF[place_B, : q_BTF.shape[1]] += q_BTF
        return world.sum(whole)

    def _measured(self, step: Batch, whole: Tensor) -> Known:
        found: Known = {}
        self.method.weigh(vars(step) | {"ce_BTF": whole[0], "entropy_BTF": whole[-1]}, {**self.settings, "lag": found})
        return found

    def _weigh(self, batch: Batch, ce_BTF: Tensor, entropy_BTF: Tensor | None, valid_BTF: Tensor) -> Tensor:
        return self._by_head(self._mixed(self._given(batch, ce_BTF, entropy_BTF), valid_BTF), valid_BTF)

    def _given(self, batch: Batch, ce_BTF: Tensor, entropy_BTF: Tensor | None) -> Tensor:
        """The weighting's own weights, neither mixed nor scaled by head."""
        lagged = {} if self.lag is None else {"lag": self.lag.known}
        return self.method.weigh(vars(batch) | {"ce_BTF": ce_BTF, "entropy_BTF": entropy_BTF}, {**self.settings, **lagged})

    def _at_bounds(self, given_BTF: Tensor, valid_BTF: Tensor) -> dict[str, Tensor]:
        """How many targets' weights lie on a bound, where the weighting has bounds; counted on the device, as `notes` cannot be."""
        if "weight_clip_min" not in self.settings:
            return {}
        low_BTF, high_BTF = given_BTF <= self.settings["weight_clip_min"], given_BTF >= self.settings["weight_clip_max"]
        return {f"note_at_clip_{end}": (at & valid_BTF).sum().double() for end, at in (("min", low_BTF), ("max", high_BTF))}

    def _mixed(self, weight: Tensor, valid: Tensor) -> Tensor:
        return weight if self.mix == 1 else (1 + self.mix * (weight - 1)) * valid

    def _by_head(self, weight_BTF: Tensor, valid_BTF: Tensor) -> Tensor:
        if self.head_weights is None:
            return weight_BTF
        mean = sum(self.head_weights) / self.n_future
        # Numbers, not a tensor: a copy to the device would wait for it.
        scaled_BTF = torch.stack([weight_BTF[..., h].double() * (one / mean) for h, one in enumerate(self.head_weights)], dim=2)
        if self.method.needs_forward and self._population:
            n, total = (part.sum(self._population, keepdim=True, dtype=torch.float64) for part in (valid_BTF, scaled_BTF))
            scaled_BTF = scaled_BTF * (n / total.clamp(min=1e-300))
        return scaled_BTF.to(weight_BTF.dtype)


ROWS, STEP = (1, 2), (0, 1, 2)

STRUCTURE = {"weighting", "n_future", "mix", "head_weights", "critic", "value_coef", "value_loss"}
"""Keys of a method's block that shape its model or loss; all others are its weighting's own arguments."""


def policy_objective(
    name: str, settings: Any, beta: Callable[[], float], seed: Callable[[], int], steps: Callable[[], Iterable[Batch]]
) -> PolicyObjective:
    """The objective of methods.`name`, whose block is `settings`. What is not in the block is asked for only where it is read, so that no
    other method depends on it: `beta` where the block's own is null, and, where its weighting names them, `seed` and the `steps` of one
    pass over the split that it is fitted to first.
    """
    method = method_of(name, settings)
    # With a shared critic wmtp.shared decides which rows train the policy.
    arguments = settings.model_dump(exclude=STRUCTURE | ({"policy_on_incorrect"} if hasattr(settings, "value_coef") else set()))
    named = keywords(method.function())
    arguments |= {"beta": beta()} if reads_beta(settings) else {}
    arguments |= {"seed": seed()} if "seed" in named else {}
    if "fitted" in named:
        arguments["fitted"] = method.module().fit((vars(step) for step in steps()), **arguments)
    head_weights = None if settings.head_weights is None else tuple(settings.head_weights)
    lagged = isinstance(arguments.get("scope"), Mapping)
    lag = Lag(arguments.pop("scope")["ema"]) if lagged else None
    return PolicyObjective(method, arguments, settings.n_future, settings.mix, head_weights, lag)


UNITS = {"critic": ("probability", "logit"), "reference": ("nats",)}


def policy_signal(
    name: str, settings: Any, path: str, data: TokenData, train_anyway: Callable[[], bool]
) -> tuple[Callable[[int], np.ndarray] | None, dict[str, str], int]:
    """The method's cached signal by row, the hashes that it adds to the run's inputs, and the FLOPs behind it.

    A critic that failed its gate is refused. `settings` is the method's block, `path` is the score file, or a folder that holds one for
    each signal.
    """
    kind = method_of(name, settings).signal
    if kind is None:
        return None, {}, 0
    path = str(Path(path) / f"{kind}.safetensors") if Path(path).is_dir() else path
    scores = Scores(path, data)
    if scores.unit not in UNITS[kind]:
        raise WeightError(f"{path}: scores in units of {scores.unit}, expected {' or '.join(UNITS[kind])}: another signal's file")
    if kind == "critic" and not scores.gate_passed and not train_anyway():
        raise WeightError(
            f"{path}: its critic failed the quality gate (see metrics/critic.json); train it longer, or set critic.gate.train_anyway: true"
        )
    if getattr(settings, "terminal_credit", False) and scores.unit != "probability":
        raise WeightError(
            f"methods.{name}.terminal_credit pays a reward of 0 or 1, but {path} holds values in units of {scores.unit}, of which only"
            " differences mean anything; set it to false, or train the critic with another loss than pairwise"
        )
    return scores.row, {"signal": scores.sha256}, scores.flops


def check_weights(weight_BT: Tensor, valid_BT: Tensor, clips: tuple[float, float] | None = None) -> Tensor:
    """The weights themselves, or a WeightError; the step is still on the CPU, so nothing waits for a device."""
    check_faults(_faults(weight_BT, valid_BT, outside=_outside(weight_BT, valid_BT, clips)))
    return weight_BT


def check_reached(w: float, told: float, met: float, n: float, lagged: bool = False) -> None:
    """A WeightError unless the weights of a whole step, over all ranks, have mean 1 over its `n` targets and are those in its gradient.

    `w` sums the weights; `told` is the loss that the log's sums come to, `met` the one that was differentiated.
    Lagged weights have mean 1 only after `scaled`.
    """
    if not lagged and not abs(w / max(n, 1.0) - 1) <= 1e-4:
        raise WeightError(f"the weights that reached the loss have mean {w / max(n, 1.0):.6f} over {n:.0f} targets, expected 1")
    if not abs(met - told) <= 1e-4 * told:
        raise WeightError(
            f"the step's weighted loss is {told:.6g}, but its gradient is that of a loss of {met:.6g}: the weights did not reach it"
        )


def check_faults(faults: Tensor) -> None:
    """A WeightError where the `faults` of a step's losses say that weights broke their promise."""
    bad, beyond, empty, off_mean, outside, w, n = faults.tolist()
    if bad:
        raise WeightError("a weight is negative, infinite or not a number; look at the signal that it was made from")
    if empty:
        raise WeightError(f"of {empty:.0f} populations that have targets none is selected, expected at least one target each;{NOTHING}")
    if beyond or off_mean:
        raise WeightError(
            f"weights have mean {w / max(n, 1):.6f} over {n:.0f} targets or reach beyond them, expected mean 1 on the targets alone"
        )
    if outside:
        raise WeightError(f"{outside:.0f} of {n:.0f} weights lie outside their clips (weight_clip_min, weight_clip_max, drawn in by mix)")


NOTHING = " let the method's block select more (keep_fraction, percentile, alpha), or look at the signal"


def check_selected(w: float, n: float) -> None:
    """A WeightError where a whole step, over all ranks, has `n` targets and no weight."""
    if n and w == 0:
        raise WeightError(f"none of the step's {n:.0f} targets is selected by the statistics of the step before, expected some;{NOTHING}")


def _outside(weight: Tensor, valid: Tensor, clips: tuple[float, float] | None) -> Tensor:
    """How many of the targets' weights lie beyond `clips`, further than rounding takes them."""
    low, high = clips or (-torch.inf, torch.inf)
    return (((weight < low - 1e-5) | (weight > high + 1e-5)) & valid).sum()


def _faults(weight: Tensor, valid: Tensor, population: tuple[int, ...] | None = None, outside: Tensor | None = None) -> Tensor:
    """[7] float64: weights negative or not finite, weights off the mask, populations with targets of which none has a weight, whether the
    mean is not 1, how many are `outside` their clips; and for the message sum(w) and N.

    `population` are the axes of one, all where None; without any (empty) neither a population nor the mean is judged. Weights of another
    type than float32 or float64, or part of a graph, are an error at once.
    """
    if weight.requires_grad or weight.dtype not in (torch.float32, torch.float64):
        graph = ", part of a graph" if weight.requires_grad else ""
        raise WeightError(f"weights are {str(weight.dtype).removeprefix('torch.')}{graph}, expected float32 or float64 and detached")
    outside = weight.new_zeros(()) if outside is None else outside
    bad, beyond, n, w = ~torch.isfinite(weight) | (weight < 0), (weight != 0) & ~valid, valid.sum(), weight.double().sum()
    axes = tuple(range(weight.ndim)) if population is None else population
    empty, off_mean = valid.any(axes) & ~((weight != 0) & valid).any(axes), (n > 0) & ~((w / n.clamp(min=1) - 1).abs() <= 1e-4)
    judged = float(axes != ())
    return torch.stack([part.double() for part in (bad.sum(), beyond.sum(), empty.sum() * judged, off_mean * judged, outside, w, n)])


SCALED = ("w", "wce", "w_incorrect", "w_end", "max_w", "max_negative_w")


def scaled(sums: Mapping[str, Tensor], factor: Tensor) -> dict[str, Tensor]:
    """The sums of a step's losses as they are when every weight is multiplied by `factor`, which goes into the log too."""
    found = {name: part * factor if name in SCALED else part for name, part in sums.items()}
    found["w2"], found["wlogw"] = sums["w2"] * factor.square(), factor * (sums["wlogw"] + factor.log() * sums["w"])
    return found | {"note_rescale": sums["n"].sum() * factor}


def _sums(ce_BTF: Tensor, weight_BTF: Tensor, valid_BTF: Tensor, batch: Batch) -> dict[str, Tensor]:
    ce, w = ce_BTF.double(), weight_BTF.double() * valid_BTF
    n_F, incorrect_B11 = valid_BTF.sum((0, 1)).double(), ~batch.is_correct_B[:, None, None]
    nowhere = torch.where(valid_BTF, 0.0, -torch.inf)
    end_BTF = align_future(last_BT(batch.response_BT).double(), valid_BTF.shape[2], 0.0)
    sums = {
        "n": n_F, "ce": ce.sum((0, 1)), "wce": (w * ce).sum((0, 1)), "w": w.sum((0, 1)), "w2": w.square().sum((0, 1)),
        "wlogw": torch.xlogy(w, w).sum((0, 1)), "selected": (w > 0).sum((0, 1)).double(), "w_incorrect": (w * incorrect_B11).sum((0, 1)),
        "n_end": end_BTF.sum(), "w_end": (w * end_BTF).sum(),
        "max_w": (nowhere + w).amax((0, 1)), "max_negative_w": (nowhere - w).amax((0, 1)),
    }  # fmt: skip
    return sums | {f"note_{name}": n_F.sum() * value for name, value in batch.notes.items()}
