"""The critic: V(x[0..i]) = probability that the program begun by this prefix passes its tests (METHODS, "Critic").

A value head on the normed hidden state of its own network, which learns with it: a head on a frozen small trunk learns nothing.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from wmtp.advantage import gae
from wmtp.batches import Batch
from wmtp.bundle import atomic_directory, bundle_sha256, write_bundle
from wmtp.model import Transformer, load_bundle
from wmtp.tokens import TokenData

__all__ = ["Critic", "ValueObjective", "critic_sha256", "gae", "load_critic", "objective", "pairs", "save_critic"]


class Critic(nn.Module):
    """A next-token trunk and a value head; the trunk's vocabulary output is unused and frozen."""

    def __init__(self, trunk: Transformer):
        super().__init__()
        self.trunk = trunk
        self.value = nn.Linear(trunk.args.dim, 1, dtype=trunk.norm.weight.dtype)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)
        trunk.output.requires_grad_(False)

    def forward(self, tokens_BT: Tensor, first: int = 0) -> Tensor:
        """Value logits [B, T] float32 by state, 0 before position `first`; the probability is their sigmoid."""
        logit_BT = self.value(self.trunk.hidden(tokens_BT, n_future=1, first=first)[0]).squeeze(-1)
        logit_BT = logit_BT if logit_BT.dtype == torch.float64 else logit_BT.float()
        return functional.pad(logit_BT, (first, 0))


def load_critic(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Critic:
    """A trained critic: the bundle `path`/trunk and the value head beside it, every key used or an error."""
    critic = Critic(load_bundle(Path(path) / "trunk", n_future=1, dtype=dtype, device=device)).to(device)
    head = load_file(Path(path) / "value_head.safetensors")
    if set(head) != {"weight", "bias"} or head["weight"].shape != critic.value.weight.shape:
        shapes = {name: tuple(tensor.shape) for name, tensor in head.items()}
        raise ValueError(f"{path}/value_head.safetensors: expected weight {tuple(critic.value.weight.shape)} and bias (1,), found {shapes}")
    critic.value.load_state_dict({name: tensor.to(critic.value.weight.dtype) for name, tensor in head.items()})
    return critic


def save_critic(critic: Critic, start: Path, out: Path, gate: dict[str, Any]) -> None:
    """OUT/trunk (a bundle), OUT/value_head.safetensors and OUT/gate.json, all or nothing."""
    with atomic_directory(out, marker="gate.json") as folder:
        trunk = critic.trunk
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trunk.state_dict().items()}
        tokenizer = (Path(start) / "tokenizer.model").read_bytes()
        extra = {"start_sha256": bundle_sha256(start), "stage": "critic"}
        write_bundle(folder / "trunk", trunk.args, tensors, tokenizer, source="wmtp training", dropped=[], extra=extra)
        head = {name: tensor.detach().cpu().contiguous() for name, tensor in critic.value.state_dict().items()}
        save_file(head, folder / "value_head.safetensors")
        (folder / "gate.json").write_text(json.dumps(gate, indent=2) + "\n")


def critic_sha256(path: str | Path) -> str:
    """Identity of a trained critic: its trunk and its head."""
    head = hashlib.sha256((Path(path) / "value_head.safetensors").read_bytes()).hexdigest()
    return hashlib.sha256(f"{bundle_sha256(Path(path) / 'trunk')}{head}".encode()).hexdigest()


def pairs(data: TokenData) -> np.ndarray:
    """[n, 2] row numbers: one correct and one incorrect program of the same problem, of like length, each row used at most once.

    So V(prompt) = 1/2 by construction, and neither the problem nor the length is a shortcut.
    """
    found = []
    for problem in data.problems:
        right, wrong = (sorted(problem[kind], key=lambda row: (data.lengths[row], row)) for kind in ("correct", "incorrect"))
        found += list(zip(right, wrong))
    if not found:
        raise ValueError(f"{data.path}: no problem has both a correct and an incorrect program; the critic cannot learn from it")
    return np.array(found)


@dataclass(frozen=True)
class ValueObjective:
    """Regression of the return on every state P-1..L-1; a mean per sequence, then over the step's sequences."""

    kind: str
    gamma: float
    lam: float

    def prepare(self, step: Batch) -> Batch:
        return step

    def count(self, step: Batch) -> float:
        return float(len(step.row_B))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logit_BT = model(batch.tokens_BT, first=max(0, batch.shortest_prompt - 1))
        value_BT = torch.sigmoid(logit_BT)
        reward_B = batch.is_correct_B.to(value_BT.dtype)
        _, target_BT = gae(value_BT.detach(), reward_B, batch.response_BT, self.gamma, self.lam)
        state_BT = functional.pad(batch.response_BT[:, 1:], (0, 1), value=False)
        loss_BT = self._losses(logit_BT, value_BT, target_BT.clamp(0, 1)) * state_BT
        n_B = state_BT.sum(1).clamp(min=1)
        per_sequence_B = loss_BT.sum(1) / n_B
        brier_B = ((value_BT.detach() - reward_B[:, None]).square() * state_BT).sum(1) / n_B
        real_B = (batch.row_B >= 0).double()
        return per_sequence_B.sum(), {
            "n": real_B.sum(), "loss": per_sequence_B.detach().double().sum(), "brier": (brier_B.double() * real_B).sum()
        }  # fmt: skip

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {"loss": float(sums["loss"] / sums["n"]), "brier": float(sums["brier"] / sums["n"])}

    def _losses(self, logit_BT: Tensor, value_BT: Tensor, target_BT: Tensor) -> Tensor:
        if self.kind == "bce":
            return functional.binary_cross_entropy_with_logits(logit_BT, target_BT, reduction="none")
        if self.kind == "mse":
            return (value_BT - target_BT).square()
        return functional.huber_loss(value_BT, target_BT, reduction="none", delta=0.1)


def objective(settings: Any) -> ValueObjective:
    return ValueObjective(settings.loss, settings.gamma, settings.lam)
