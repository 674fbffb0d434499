"""The policy's objective: loss = sum(w * ce) / number of targets, for every method (METHODS, "Loss"; 2404.19737 eq. 2)."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wmtp.align import IGNORE, align_future, future_targets
from wmtp.batches import Batch
from wmtp.scores import Scores
from wmtp.tokens import TokenData
from wmtp.weighting import METHODS, Method


class WeightError(ValueError):
    """Weights that break their promise: finite, not negative, mean 1 over the targets, 0 elsewhere."""


@dataclass(frozen=True)
class PolicyObjective:
    """Weighted multi-token cross-entropy. `settings` are the weighting's own keyword arguments; `mix` blends with uniform weights."""

    method: Method
    settings: Mapping[str, Any]
    n_future: int
    mix: float = 1.0

    def prepare(self, step: Batch) -> Batch:
        """The whole step, over all ranks, with its weights where they are known before the forward."""
        starts_B = step.response_BT.int().argmax(1)
        if bool((starts_B < self.n_future).any()):
            raise WeightError(
                f"a prompt of {int(starts_B.min())} tokens is shorter than the {self.n_future} heads: some heads would not see its first"
                " response tokens; lengthen the prompt or lower n_future"
            )
        if self.method.needs_forward:
            return step
        weight_BT = self.method.function()(step.signal_BT, step.response_BT, **self.settings)
        return replace(step, weight_BT=check_weights(self._mixed(weight_BT, step.response_BT), step.response_BT))

    def count(self, step: Batch) -> float:
        """Targets of the whole step, all heads."""
        return float((future_targets(step.tokens_BT, step.response_BT, self.n_future) != IGNORE).sum())

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of w * ce over this micro-batch, and detached float64 sums for the log, each [F]."""
        targets_BTF = future_targets(batch.tokens_BT, batch.response_BT, self.n_future)
        ce_BTF = model(batch.tokens_BT, targets_BTF, first=max(0, batch.shortest_prompt - self.n_future))
        valid_BTF = targets_BTF != IGNORE
        if self.method.needs_forward:
            weight_BTF = self.method.function()(ce_BTF.detach(), batch.signal_BT, batch.response_BT, **self.settings)
            # On a GPU this waits once a micro-batch; weights known before the forward are checked on the CPU.
            weight_BTF = check_weights(self._mixed(weight_BTF, valid_BTF), valid_BTF)
        else:
            weight_BTF = align_future(batch.weight_BT, self.n_future, 0.0)
        total = (weight_BTF * ce_BTF * valid_BTF).sum()
        return total, _sums(ce_BTF.detach(), weight_BTF, valid_BTF)

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Readable numbers from sums over all micro-batches and ranks."""
        n_F, w_F = sums["n"], sums["w"]
        n, w, w2 = float(n_F.sum()), float(w_F.sum()), float(sums["w2"].sum())
        figures = {"loss": float(sums["wce"].sum()) / n, "ce": float(sums["ce"].sum()) / n}
        figures |= {f"ce_head{h}": float(sums["ce"][h] / n_F[h]) for h in range(self.n_future)}
        figures |= {"weight_mean": w / n, "weight_std": max(0.0, w2 / n - (w / n) ** 2) ** 0.5, "weight_ess": w * w / (n * w2)}
        return figures | {"weight_selected": float(sums["selected"].sum()) / n}

    def _mixed(self, weight: Tensor, valid: Tensor) -> Tensor:
        return weight if self.mix == 1 else (1 + self.mix * (weight - 1)) * valid


STRUCTURE = {"weighting", "n_future", "mix"}
"""Keys of a method's block that shape its model or loss; all others are its weighting's own arguments."""


def policy_objective(name: str, settings: Any, beta: Callable[[], float]) -> PolicyObjective:
    """The objective of methods.`name`; `beta` is asked only for a weighting that takes one, so that no other method depends on it."""
    method = METHODS.get(name)
    if method is None or method.weighting != settings.weighting:
        known = f"{method.weighting!r}" if method else f"one of {', '.join(METHODS)}"
        raise WeightError(f"methods.{name}: weighting {settings.weighting!r}; wmtp.weighting.METHODS has {known}")
    arguments = settings.model_dump(exclude=STRUCTURE)
    if "beta" in inspect.signature(method.function()).parameters:
        arguments["beta"] = beta()
    return PolicyObjective(method, arguments, settings.n_future, settings.mix)


def policy_signal(
    name: str, path: str, data: TokenData, train_anyway: Callable[[], bool]
) -> tuple[Callable[[int], np.ndarray] | None, dict[str, str]]:
    """The method's cached signal by row and the hashes that it adds to the run's inputs; a critic that failed its gate is refused."""
    if METHODS[name].signal is None:
        return None, {}
    scores = Scores(path, data)
    if METHODS[name].signal == "critic" and not scores.gate_passed and not train_anyway():
        raise WeightError(
            f"{path}: its critic failed the quality gate (see metrics/critic.json); train it longer, or set critic.gate.train_anyway: true"
        )
    return scores.row, {"signal": scores.sha256}


def check_weights(weight_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """The weights themselves, or a WeightError; the step is still on the CPU, so nothing waits for a device."""
    n = int(valid_BT.sum())
    mean = float(weight_BT.double().sum()) / max(n, 1)
    if not torch.isfinite(weight_BT).all() or (weight_BT < 0).any():
        raise WeightError("a weight is negative, infinite or not a number; look at the signal that it was made from")
    if (n and abs(mean - 1) > 1e-4) or bool((weight_BT[~valid_BT] != 0).any()):
        raise WeightError(f"weights have mean {mean:.6f} over {n} targets or reach beyond them, expected mean 1 on the targets alone")
    return weight_BT


def _sums(ce_BTF: Tensor, weight_BTF: Tensor, valid_BTF: Tensor) -> dict[str, Tensor]:
    ce, w = ce_BTF.double(), weight_BTF.double() * valid_BTF
    return {
        "n": valid_BTF.sum((0, 1)).double(), "ce": ce.sum((0, 1)), "wce": (w * ce).sum((0, 1)), "w": w.sum((0, 1)),
        "w2": w.square().sum((0, 1)), "selected": (w > 0).sum((0, 1)).double(),
    }  # fmt: skip
