"""Which tokens weigh how much. One file per idea, each a pure function of arrays; METHODS is the table.

A file has `token_weights(signal_BT, response_BT, **settings) -> [B, T]` when the weights of a whole optimizer step are known before
its first forward, or `head_weights(ce_BTF, signal_BT, response_BT, **settings) -> [B, T, F]` when they need the forward.
"""

import importlib
from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

from wmtp.weighting.projection import concentration, project_mean_one

__all__ = ["METHODS", "Method", "concentration", "project_mean_one"]


class Method(NamedTuple):
    """A file of this package, the cached signal that it reads, and whether its weights need the training forward."""

    weighting: str
    signal: Literal["critic", "reference"] | None = None
    needs_forward: bool = False

    def function(self) -> Callable[..., Tensor]:
        """Imported on use: a method depends on its own file alone."""
        module = importlib.import_module(f"wmtp.weighting.{self.weighting}")
        return module.head_weights if self.needs_forward else module.token_weights


METHODS: dict[str, Method] = {
    "ntp": Method("uniform"),
    "baseline": Method("uniform"),
    "verifiable": Method("advantage", signal="critic"),
    "rho1": Method("excess", signal="reference", needs_forward=True),
}
