"""What a training reads: whole steps of rows, each a pure function of the seed and its number."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from wmtp.batches import Batch, collate, n_steps, step_rows
from wmtp.tokens import TokenData


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
