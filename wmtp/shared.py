"""One network that is policy and critic: a value head on the policy's trunk, trained beside it (METHODS, "Critic", `shared`).

The value loss's gradient reaches the trunk: detached, the head would read a trunk that learns nothing of values. The head starts from
zero, that is from V = 1/2 everywhere and uniform weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from wmtp.advantage import value_drops
from wmtp.align import IGNORE, future_targets
from wmtp.batches import Batch
from wmtp.critic import Critic, ValueObjective
from wmtp.model import Transformer
from wmtp.policy import PolicyObjective
from wmtp.progress import say

DEAD = 0.01  # as critic.gate.min_delta_std, for values that no gate judges


class SharedPolicy(Critic):
    """`trunk` is the policy with all its heads; the value head reads what head 0 reads its next token from."""

    @property
    def n_future(self) -> int:
        return self.trunk.n_future

    def forward(self, tokens_BT: Tensor, targets_BTF: Tensor, first: int = 0, with_values: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The policy's loss [B, T, F] as Transformer.forward gives it; `with_values` adds value logits by state [B, T].

        Head 0's targets must then be all response tokens of every row: their losses are the running surprise.
        """
        hidden = self.trunk.hidden(tokens_BT, n_future=self.n_future, first=first)
        ce_BTF = torch.stack([self.trunk.cross_entropy(x_BTD, targets_BTF[:, first:, h]) for h, x_BTD in enumerate(hidden)], dim=2)
        placed_BTF = functional.pad(ce_BTF, (0, 0, first, 0))
        if not with_values:
            return placed_BTF
        return placed_BTF, functional.pad(self.value_logits(hidden[0], ce_BTF[..., 0]), (first, 0))


@dataclass(frozen=True)
class SharedStep(Batch):
    """`trains_B` (bool): rows that train the policy. `value_rate_B`: what a row's value loss counts beside one target's policy loss."""

    trains_B: Tensor | None = None
    value_rate_B: Tensor | None = None

    def policy_part(self) -> "SharedStep":
        """The same without the responses that do not train the policy."""
        return replace(self, response_BT=self.response_BT & self.trains_B[:, None])


@dataclass(frozen=True)
class SharedObjective:
    """sum(w * ce) / N + value_coef * mean over rows of the value loss; N, mean and clip are of the targets that train the policy."""

    policy: PolicyObjective
    value: ValueObjective
    value_coef: float
    policy_on_incorrect: str

    def prepare(self, step: Batch) -> SharedStep:
        trains_B = step.is_correct_B | (self.policy_on_incorrect == "weighted")
        shared = SharedStep(**vars(step), trains_B=trains_B)
        ready = self.policy.prepare(shared.policy_part())
        self.value.prepare(shared)
        rate = self.value_coef * self.count(shared) / len(step.row_B)
        rate_B = torch.full(step.row_B.shape, rate, dtype=torch.float64)
        return replace(shared, weight_BT=ready.weight_BT, notes=ready.notes, value_rate_B=rate_B)

    def count(self, step: SharedStep) -> float:
        """Targets that train the policy, of the whole step and all heads."""
        return self.policy.count(step.policy_part())

    def loss(self, model: nn.Module, batch: SharedStep) -> tuple[Tensor, dict[str, Tensor]]:
        part, n_future = batch.policy_part(), self.policy.n_future
        targets_BTF = future_targets(batch.tokens_BT, part.response_BT, n_future)
        whole_BT1 = future_targets(batch.tokens_BT, batch.response_BT, 1)
        read_BTF, valid_BTF = torch.cat([whole_BT1, targets_BTF[..., 1:]], -1), targets_BTF != IGNORE
        ce_BTF, logit_BT = model(batch.tokens_BT, read_BTF, first=max(0, batch.shortest_prompt - n_future), with_values=True)
        value_loss_B, value_sums = self.value.regression(logit_BT, batch)
        if self.policy.method.needs_forward:
            part = replace(part, signal_BT=torch.sigmoid(logit_BT.detach()))
        total, sums = self.policy.weighted(part, ce_BTF * valid_BTF, None, valid_BTF)
        value_sums |= _steps(torch.sigmoid(logit_BT.detach()), batch.response_BT)
        value = (batch.value_rate_B.to(value_loss_B.dtype) * value_loss_B).sum()
        beside = {"beside": value.detach().double()}
        return total + value, sums | beside | {f"value_{name}": part for name, part in value_sums.items()}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The policy's numbers, of the targets that train it, and of all rows the value's mean loss and Brier score, and the standard
        deviation of its steps from token to token.
        """
        n_rows, n = sums["value_n"], sums["value_n_steps"].clamp(min=1)
        variance = sums["value_squared_step"] / n - (sums["value_step"] / n).square()
        value = {"value_loss": sums["value_loss"] / n_rows, "value_brier": sums["value_brier"] / n_rows}
        value |= {"value_delta_std": variance.clamp(min=0).sqrt()}
        return self.policy.summary(sums) | {name: float(figure) for name, figure in value.items()}


def _steps(value_BT: Tensor, response_BT: Tensor) -> dict[str, Tensor]:
    """v[i] - v[i-1] of all tokens but the last of each row: how many, their sum and that of their squares."""
    drop_BT = value_drops(value_BT, response_BT).double()
    n = response_BT.sum() - response_BT.any(1).sum()
    return {"n_steps": n.double(), "step": drop_BT.sum(), "squared_step": drop_BT.square().sum()}


def warn_if_dead(records: Sequence[Mapping[str, float]], label: str) -> None:
    """A line where a shared critic ended as one that sees nothing: no gate judges it."""
    std = records[-1].get("value_delta_std", DEAD) if records else DEAD
    if std < DEAD:
        say(
            f"{label}: the shared critic is DEAD: the standard deviation of its values' steps is {std:.2g}, under {DEAD:g}; weights made of"
            " them are near uniform, train longer or raise value_coef"
        )


def network(settings: Any, model: Transformer) -> Transformer | SharedPolicy:
    """`settings` is a method's block; the policy itself where its critic is not shared."""
    return SharedPolicy(model) if hasattr(settings, "value_coef") else model


def objective(settings: Any, policy: PolicyObjective) -> PolicyObjective | SharedObjective:
    """`settings` is a method's block, `policy` its objective without a value loss."""
    if not hasattr(settings, "value_coef"):
        return policy
    loss = settings.value_loss
    return SharedObjective(policy, ValueObjective(loss.kind, loss.gamma, loss.lam), settings.value_coef, settings.policy_on_incorrect)
