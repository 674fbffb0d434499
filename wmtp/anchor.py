"""A critic whose values are kept near those of a slow copy: an exponential moving average of its own weights.

On states where the copy's value is v', the loss is max(l(v), l(clip(v, v' - c, v' + c))) + coef * (v - v')^2: value clipping as in PPO
(Schulman et al. 2017; its old policy's values are v' here, since the data are offline), and a quadratic pull.
"""

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from wmtp.batches import Batch
from wmtp.critic import Critic, ValueObjective
from wmtp.model import Transformer


class AnchoredCritic(Critic):
    """A critic and `average`, a copy of it at the start, which no gradient moves."""

    def __init__(self, trunk: Transformer):
        super().__init__(trunk)
        self.average = Critic(copy.deepcopy(trunk)).requires_grad_(False)

    def forward(self, tokens_BT: Tensor, response_BT: Tensor, first: int = 0) -> tuple[Tensor, ...]:
        """As a critic's, and the average's value logits [B, T]."""
        with torch.no_grad():
            average_BT = self.average(tokens_BT, response_BT, first)[0]
        return *super().forward(tokens_BT, response_BT, first), average_BT

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """average <- decay * average + (1 - decay) * weights."""
        weights = dict(self.named_parameters())
        for name, slow in self.average.named_parameters():
            slow.lerp_(weights[name], 1 - decay)


@dataclass(frozen=True)
class AnchoredObjective(ValueObjective):
    """`value_clip` None does not clip. The average moves once an optimizer step, before its first forward."""

    decay: float = 0.99
    coef: float = 0.0
    value_clip: float | None = None
    _due: list[bool] = field(default_factory=lambda: [False], compare=False, repr=False)

    def prepare(self, step: Batch) -> Batch:
        self._due[0] = True
        return super().prepare(step)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self._due[0]:
            getattr(model, "module", model).follow(self.decay)  # DDP keeps the model in `module`
            self._due[0] = False
        return super().loss(model, batch)

    def state_loss(self, logit_BT: Tensor, target_BT: Tensor, average_BT: Tensor) -> Tensor:
        value_BT, slow_BT = torch.sigmoid(logit_BT), torch.sigmoid(average_BT)
        loss_BT = super().state_loss(logit_BT, target_BT)
        if self.value_clip is not None:
            low_BT, high_BT = (torch.logit((slow_BT + reach).clamp(0, 1)) for reach in (-self.value_clip, self.value_clip))
            loss_BT = torch.maximum(loss_BT, super().state_loss(logit_BT.clamp(low_BT, high_BT), target_BT))
        return loss_BT + self.coef * (value_BT - slow_BT).square()
