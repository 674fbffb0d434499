"""The critic: V(x[0..i]) = probability that the program begun by this prefix passes its tests (METHODS, "Critic").

A token-level verifier (Cobbe et al. 2021, 2110.14168): its network starts from the base, learns values from correct and incorrect
programs and goes on learning language from the correct ones. Its value head reads the normed hidden state and the running surprise,
the sum of -log p of the response's tokens so far under the critic's own next-token head: a state that has read a token cannot compare
it with what the last block predicted one position earlier, so without that number the comparison would have to be learned anew below.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from wmtp.advantage import advantages_and_targets, check_starts, gae
from wmtp.align import future_targets
from wmtp.atomic import atomic_directory
from wmtp.batches import Batch
from wmtp.bundle import bundle_sha256, save_tensors, write_bundle
from wmtp.checkpoint import full_state
from wmtp.model import Transformer, load_bundle
from wmtp.provenance import CARD, CriticError, read_card
from wmtp.tokens import TokenData
from wmtp.world import World

__all__ = ["Critic", "CriticError", "ValueObjective", "gae", "load_critic", "pairs", "save_critic"]


LENGTH_BIN = 0.25  # of the longer program's tokens, its end of text included
HUBER = 0.1  # distance of a value from its target at which the squared loss becomes a straight line
Unit = Literal["probability", "logit"]


class Critic(nn.Module):
    """A next-token model and a value head of D + 1 inputs.

    `unit` says what its values are: probabilities, or logits of which only differences within a problem mean anything (`pairwise`).
    """

    def __init__(self, trunk: Transformer, unit: Unit = "probability"):
        super().__init__()
        self.trunk, self.unit = trunk, unit
        self.value = nn.Linear(trunk.args.dim + 1, 1, dtype=trunk.norm.weight.dtype, device=trunk.norm.weight.device)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, tokens_BT: Tensor, response_BT: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """Value logits by state and next-token loss in nats by position, each [B, T], at least float32, 0 before `first`.

        A probability is its logit's sigmoid. No gradient of the value flows through the surprise: the language model must not learn
        to be surprised.
        """
        hidden_BTD = self.trunk.hidden(tokens_BT, n_future=1, first=first)[0]
        ce_BT = self.trunk.cross_entropy(hidden_BTD, future_targets(tokens_BT, response_BT, 1)[:, first:, 0])
        return functional.pad(self.value_logits(hidden_BTD, ce_BT), (first, 0)), functional.pad(ce_BT, (first, 0))

    def value_logits(self, hidden_BTD: Tensor, ce_BT: Tensor) -> Tensor:
        """Value logits [B, T] from the normed output of head 0 and its next-token loss of the response, both by position.

        Never by autocast: weights are made of differences between neighbouring values, which bfloat16 rounds to 0.
        """
        surprise_BT1 = functional.pad(ce_BT.detach()[:, :-1], (1, 0)).cumsum(1).unsqueeze(-1)
        read = torch.cat([hidden_BTD.to(ce_BT.dtype), surprise_BT1], -1)
        with torch.autocast(read.device.type, enabled=False):
            return functional.linear(read, self.value.weight.to(read.dtype), self.value.bias.to(read.dtype)).squeeze(-1)


def load_critic(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Critic:
    """A trained critic: the bundle `path`/trunk and the value head beside it, every key used or an error."""
    trunk = load_bundle(Path(path) / "trunk", n_future=1, dtype=dtype, device=device)
    critic = Critic(trunk, read_card(path)["unit"]).to(device)
    head, file = load_file(Path(path) / "value_head.safetensors"), f"{path}/value_head.safetensors"
    found, expected = ({name: tuple(tensor.shape) for name, tensor in state.items()} for state in (head, critic.value.state_dict()))
    if found != expected:
        raise CriticError(f"{file}: expected {expected}, found {found}; run critic-pretrain again (dvc repro)")
    critic.value.load_state_dict({name: tensor.to(critic.value.weight.dtype) for name, tensor in head.items()})
    return critic


def save_critic(
    critic: Critic, start: Path, out: Path, gate: dict[str, Any], trained_on: Mapping[str, list[str]], world: World, n_flops: int = 0
) -> None:
    """OUT/trunk (a bundle), value_head.safetensors, critic.json and gate.json, all or nothing. Every rank calls it, rank 0 writes.

    `trained_on` names the problems behind the critic's rows (wmtp.scores.problems_of): it must not judge these. `n_flops` is what its
    training cost.
    """
    state = full_state(critic)
    if not world.is_first:
        return
    parts = {
        part: {name.removeprefix(f"{part}."): t for name, t in state.items() if name.startswith(f"{part}.")} for part in ("trunk", "value")
    }
    with atomic_directory(out, marker="gate.json") as folder:
        tokenizer = (Path(start) / "tokenizer.model").read_bytes()
        extra = {"start_sha256": bundle_sha256(start), "stage": "critic", "flops": n_flops}
        write_bundle(
            folder / "trunk", critic.trunk.args, parts["trunk"], tokenizer, source="wmtp training", dropped=[], extra=extra
        )  # fmt: skip
        save_tensors(parts["value"], folder / "value_head.safetensors")
        (folder / CARD).write_text(json.dumps({"unit": critic.unit, **trained_on}, indent=1) + "\n")
        (folder / "gate.json").write_text(json.dumps(gate, indent=2) + "\n")


def pairs(data: TokenData) -> np.ndarray:
    """[n, 2] row numbers: one correct and one incorrect program of the same problem, of like length, each row used at most once.

    So V(prompt) = 1/2 by construction, and neither the problem nor the length is a shortcut. Nor is the prompt: where a statement was cut
    to make room for a longer program, the two have different ones and make no pair.
    """
    # Responses alone: under a long statement a share of the whole row would let any two lengths pass for alike.
    length_R = data.lengths - data.response_start
    found = [
        pair for problem in data.problems for right, wrong in _like_prompts(problem, data) for pair in _like_length(right, wrong, length_R)
    ]
    if not found:
        raise ValueError(
            f"{data.path}: no problem has both a correct and an incorrect program of like length; the critic cannot learn from it"
        )
    return np.array(found)


def _like_prompts(problem: dict[str, Any], data: TokenData) -> list[tuple[list[int], list[int]]]:
    """A problem's correct and incorrect rows, those of one prompt together."""
    kinds = [problem["correct"], problem["incorrect"]]
    if not all(kinds):
        return []
    by_prompt: dict[bytes, tuple[list[int], list[int]]] = {}
    for place, rows in enumerate(kinds):
        for row, ids in zip(rows, data.input_ids(np.array(rows))):
            by_prompt.setdefault(np.asarray(ids)[: data.response_start[row]].tobytes(), ([], []))[place].append(row)
    return list(by_prompt.values())


def _like_length(right: list[int], wrong: list[int], lengths: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of one problem, nearest lengths first; lengths further apart than LENGTH_BIN make no pair."""
    near = [(abs(int(lengths[r]) - int(lengths[w])), r, w) for r in right for w in wrong]
    chosen: dict[int, int] = {}
    taken: set[int] = set()
    for distance, r, w in sorted(near):
        if r not in chosen and w not in taken and distance <= LENGTH_BIN * max(lengths[r], lengths[w]):
            chosen[r] = w
            taken.add(w)
    return sorted(chosen.items())


def _states(batch: Batch) -> Tensor:
    """The states P-1..L-1, bool [B, T]."""
    return functional.pad(batch.response_BT[:, 1:], (0, 1), value=False)


def _bce(logit: Tensor, target: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logit, target, reduction="none")


def _mse(logit: Tensor, target: Tensor) -> Tensor:
    return (torch.sigmoid(logit) - target).square()


def _huber(logit: Tensor, target: Tensor) -> Tensor:
    return functional.huber_loss(torch.sigmoid(logit), target, reduction="none", delta=HUBER)


REGRESSIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"bce": _bce, "mse": _mse, "huber": _huber}
"""Loss of a value logit against its target in 0..1, entry by entry."""


@dataclass(frozen=True)
class ValueObjective:
    """Regression of the return on every state P-1..L-1, and `lm_coef` times the next-token loss of the correct rows.

    Each is a mean per sequence, then over the step's sequences, so that long programs do not dominate.
    """

    kind: str
    gamma: float = 1.0
    lam: float = 1.0
    lm_coef: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in REGRESSIONS:
            raise CriticError(
                f"critic.loss.kind: found {self.kind!r}, expected one of {', '.join(REGRESSIONS)} (pairwise has its own form)"
            )

    def prepare(self, step: Batch) -> Batch:
        check_starts(step.response_BT)
        return step

    def count(self, step: Batch) -> float:
        return float(len(step.row_B))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logit_BT, ce_BT, *others = model(batch.tokens_BT, batch.response_BT, first=max(0, batch.shortest_prompt - 1))
        value_loss_B, sums = self.regression(logit_BT, batch, *others)
        reward_B = batch.is_correct_B.to(value_loss_B.dtype)
        language_loss_B = ce_BT.sum(1) / _states(batch).sum(1).clamp(min=1) * reward_B
        rows = {"n_correct": (batch.row_B >= 0).double() * reward_B, "language": language_loss_B}
        total = (value_loss_B + self.lm_coef * language_loss_B).sum()
        return total, sums | {name: part.detach().double().sum() for name, part in rows.items()}

    def regression(self, logit_BT: Tensor, batch: Batch, *others: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Each row's value loss [B], and detached float64 sums of rows, losses and squared errors against the reward."""
        value_BT = torch.sigmoid(logit_BT.detach())
        reward_B = batch.is_correct_B.to(value_BT.dtype)
        _, target_BT = advantages_and_targets(value_BT, reward_B, batch.response_BT, self.gamma, self.lam)
        state_BT = _states(batch)
        n_B = state_BT.sum(1).clamp(min=1)
        value_loss_B = (self.state_loss(logit_BT, target_BT.clamp(0, 1), *others) * state_BT).sum(1) / n_B
        brier_B = ((value_BT - reward_B[:, None]).square() * state_BT).sum(1) / n_B
        real_B = (batch.row_B >= 0).double()
        sums = {"n": real_B, "loss": value_loss_B, "brier": brier_B * real_B}
        return value_loss_B, {name: part.detach().double().sum() for name, part in sums.items()}

    def state_loss(self, logit_BT: Tensor, target_BT: Tensor) -> Tensor:
        return REGRESSIONS[self.kind](logit_BT, target_BT)

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        language = float(sums["language"] / sums["n_correct"].clamp(min=1))
        return {"loss": float(sums["loss"] / sums["n"]), "brier": float(sums["brier"] / sums["n"]), "ce": language}
