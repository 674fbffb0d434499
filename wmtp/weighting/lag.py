"""Statistics of an earlier population, by which scope `lagged` weighs the next step (METHODS, "From signal to weight").

Weights that need the forward cannot know their whole step while its micro-batches pass. Lagged, they are judged by what the step before
measured: a threshold, a mean. Their own mean is then near 1 and not 1; the step is scaled once, when its sum is known.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Known = dict[str, Tensor]
"""Statistics by name, float64, each with as many axes as the groups that it is compared with."""


def recalled(lag: Known | None, name: str, measure: Callable[[], Tensor]) -> Tensor:
    """What `lag` holds under `name`; where it has no such entry, `measure()`, which it then holds. None remembers nothing."""
    if lag is None:
        return measure()
    if name not in lag:
        lag[name] = measure()
    return lag[name]


@dataclass
class Lag:
    """`known`: statistics of the last step's whole population, or the running mean ema * known + (1 - ema) * new, which starts from the
    first step's. `seen`: of this step's micro-batches, what the next step's are measured from. `known` goes into the checkpoint.
    """

    ema: float = 0.0
    known: Known = field(default_factory=dict)
    seen: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)

    def update(self, found: Known) -> None:
        self.known = {name: torch.lerp(new, self.known[name], self.ema) if self.known else new for name, new in found.items()}

    def state(self) -> dict[str, Any]:
        """Plain numbers, which JSON carries exactly."""
        return {name: value.tolist() for name, value in self.known.items()}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        self.known = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in state.items()}
        self.seen.clear()
