"""Which rows make an optimizer step, and this rank's share of them in padded micro-batches.

Order is a pure function of (seed, step): the state of the data is the step, and every rank knows the whole step without asking.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import ceil

import numpy as np
import torch
from torch import Tensor

from wmtp.tokens import TokenData


@dataclass(frozen=True)
class Batch:
    """Padded rows, shapes as in wmtp.align; padding is token 0, outside `response_BT`. `row_B` numbers rows of the split, -1 for filler.

    `span_B2` holds the token positions [start, end) of a row's known decisive place, -1 where unknown. `place_B` says where
    in its step a row stands, where weights are made for the whole step after a forward. `notes` are numbers about the step's weights,
    for the log.
    """

    row_B: Tensor
    tokens_BT: Tensor
    response_BT: Tensor
    signal_BT: Tensor | None = None
    weight_BT: Tensor | None = None
    is_correct_B: Tensor | None = None
    shortest_prompt: int = 0
    span_B2: Tensor | None = None
    place_B: Tensor | None = None
    weight_BTF: Tensor | None = None
    notes: Mapping[str, float] = field(default_factory=dict)

    def arrays(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> "Batch":
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in self.arrays().items()})

    def take(self, rows: np.ndarray) -> "Batch":
        """These rows, cut to the longest of them."""
        index = torch.as_tensor(rows)
        start_B = self.response_BT[index].int().argmax(1)
        length = int((self.response_BT[index].sum(1) + start_B).max())
        taken = {name: value[index] for name, value in self.arrays().items()}
        taken = {name: value[:, :length] if name.endswith("_BT") else value for name, value in taken.items()}
        return replace(self, **taken, shortest_prompt=int(start_B.min()))


def n_steps(n_rows: int, batch_rows: int, n_epochs: float) -> int:
    """Optimizer steps of `n_epochs` passes; a last partial step counts. Exact for decimal fractions."""
    return ceil(Fraction(str(n_epochs)) * n_rows / batch_rows)


def step_rows(units: np.ndarray, per_step: int, seed: int, step: int) -> np.ndarray:
    """The entries of `units` that step `step` takes: consecutive entries of the passes' seeded permutations, laid end to end."""
    first, taken = step * per_step, []
    while len(taken) < per_step:
        epoch, offset = divmod(first + len(taken), len(units))
        order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(units))
        taken.extend(order[offset : offset + per_step - len(taken)])
    return units[np.array(taken)]


def collate(data: TokenData, rows: np.ndarray, signal_of: Callable[[int], np.ndarray] | None = None) -> Batch:
    """A whole step (or any rows) padded to its longest, on the CPU; `signal_of(row)` gives one number per token of a row."""
    ids = data.input_ids(rows)
    T = max(len(row) for row in ids)
    tokens, response = np.zeros((len(rows), T), dtype=np.int64), np.zeros((len(rows), T), dtype=bool)
    signal = np.zeros((len(rows), T), dtype=np.float32) if signal_of else None
    for place, (number, row) in enumerate(zip(rows, ids)):
        tokens[place, : len(row)] = row
        response[place, data.response_start[number] : len(row)] = True
        if signal_of:
            signal[place, : len(row)] = signal_of(int(number))
    return Batch(
        torch.from_numpy(np.asarray(rows, dtype=np.int64)), torch.from_numpy(tokens), torch.from_numpy(response),
        None if signal is None else torch.from_numpy(signal), None, torch.from_numpy(data.is_correct[rows]),
        int(data.response_start[rows].min()), torch.from_numpy(data.spans()[rows].astype(np.int64)),
    )  # fmt: skip


def share(step: Batch, rank: int, size: int, token_budget: int) -> list[Batch]:
    """This rank's micro-batches: rows sorted by length, dealt in turn, cut where rows x longest would pass `token_budget`.

    Every rank gets the same number of micro-batches, so that all join every collective; one that has fewer gets filler rows that
    hold no target.
    """
    length_B = step.response_BT.sum(1) + step.response_BT.int().argmax(1)
    order = torch.argsort(length_B, descending=True, stable=True).numpy()
    groups = [_groups(order[r::size], length_B.numpy(), token_budget) for r in range(size)]
    most = max(len(of_rank) for of_rank in groups)
    mine = [step.take(group) for group in groups[rank]]
    return mine + [_filler(step)] * (most - len(mine))


def _groups(order: np.ndarray, lengths: np.ndarray, token_budget: int) -> list[np.ndarray]:
    groups: list[list[int]] = []
    for row in order:
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= token_budget:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [np.array(group) for group in groups]


def _filler(step: Batch) -> Batch:
    """A row without targets: its loss is zero, its gradient is zero, its collectives are real."""
    empty = {name: torch.zeros_like(value[:1, :8] if name.endswith("_BT") else value[:1]) for name, value in step.arrays().items()}
    return replace(step, **{**empty, "row_B": torch.tensor([-1])}, shortest_prompt=0)


def in_order(data: TokenData, rows: np.ndarray, rank: int, size: int, token_budget: int) -> Iterator[Batch]:
    """This rank's share of `rows`, each once, similar lengths together: for scoring and validation, where order does not matter."""
    order = rows[np.argsort(-data.lengths[rows], kind="stable")]
    groups = [_groups(order[r::size], data.lengths, token_budget) for r in range(size)]
    for group in groups[rank]:
        yield collate(data, group)
    for _ in range(max(map(len, groups)) - len(groups[rank])):
        yield _filler(collate(data, order[:1]))
