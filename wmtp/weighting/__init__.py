"""Which tokens weigh how much. One file per idea, each a pure function of arrays; METHODS is the table.

A file has `token_weights(...) -> [B, T]` when the weights of a whole optimizer step are known before its first forward, or
`head_weights(...) -> [B, T, F]` when they need the forward. The names of its positional parameters choose arrays of the step
(signal_BT, response_BT, row_B, span_B2, is_correct_B; with the forward also ce_BTF and entropy_BTF). Its keyword parameters are the
settings of the method's block, and what it asks for by name: `beta` and `seed` of the training section, `notes` (a dict that takes
numbers for the log), and `fitted`, what the file's own `fit(steps, **settings)` found in one pass over the split before the training.
"""

import ast
import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from torch import Tensor

from wmtp.weighting.projection import concentration, project_mean_one

__all__ = ["METHODS", "Method", "array_names", "concentration", "keywords", "project_mean_one"]


@cache
def _parameters(function: Callable[..., Any]) -> tuple[tuple[str, ...], frozenset[str]]:
    found = inspect.signature(function).parameters.values()
    return (
        tuple(one.name for one in found if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)),
        frozenset(one.name for one in found if one.kind == one.KEYWORD_ONLY),
    )


def array_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """The arrays that a weighting asks for, in its own order."""
    return _parameters(function)[0]


def keywords(function: Callable[..., Any]) -> frozenset[str]:
    """The keyword parameters that a weighting names."""
    return _parameters(function)[1]


class Method(NamedTuple):
    """A file of this package, the cached signal that it reads, and whether its weights need the training forward."""

    weighting: str
    signal: Literal["critic", "reference"] | None = None
    needs_forward: bool = False

    def module(self) -> ModuleType:
        """Imported on use: a method depends on its own file and what that imports."""
        return importlib.import_module(f"wmtp.weighting.{self.weighting}")

    def source_files(self) -> list[Path]:
        """The weighting's own file and those of wmtp that it imports, at any depth: what its weights depend on beside its settings."""
        root, found, waiting = Path(__file__).parents[1], set(), [Path(__file__).with_name(f"{self.weighting}.py")]
        while waiting:
            found.add(file := waiting.pop())
            names = [node.module for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom) and node.module]
            files = {root.joinpath(*name.split(".")[1:]).with_suffix(".py") for name in names if name.startswith("wmtp.")}
            waiting += [file for file in files if file.is_file() and file not in found]
        return sorted(found)

    def function(self) -> Callable[..., Tensor]:
        return self.module().head_weights if self.needs_forward else self.module().token_weights

    def weigh(self, arrays: Mapping[str, Any], settings: Mapping[str, Any]) -> Tensor:
        """The function's weights of a batch whose arrays are given by name."""
        function = self.function()
        unknown = [name for name in array_names(function) if name not in arrays]
        if unknown:
            raise ValueError(f"wmtp.weighting.{self.weighting} asks for {', '.join(unknown)}; a step has {', '.join(arrays)}")
        return function(*(arrays[name] for name in array_names(function)), **settings)


METHODS: dict[str, Method] = {
    "ntp": Method("uniform"),
    "baseline": Method("uniform"),
    "verifiable": Method("advantage", signal="critic"),
    "rho1": Method("excess", signal="reference", needs_forward=True),
    # Next tokens at full depth: as many blocks as the others have with their extra heads.
    "ntp_full": Method("uniform"),
    # Controls: is it the signal, or any weights that are not uniform?
    "shuffled": Method("shuffled", signal="critic"),
    "constant_critic": Method("constant_critic"),
    "position_only": Method("position_only", signal="critic"),
    "random_matched": Method("random_matched", signal="critic"),
    "random_k": Method("random_k"),
    "inverted_k": Method("inverted_k", signal="reference", needs_forward=True),
    "oracle": Method("oracle"),
    # Weightings that need no model beside the policy, and one more of the critic's.
    "dft": Method("dft", needs_forward=True),
    "focal": Method("focal", needs_forward=True),
    "entropy_topk": Method("entropy_topk", needs_forward=True),
    "loss_topk": Method("loss_topk", needs_forward=True),
    "crr_binary": Method("crr_binary", signal="critic"),
    "head_decay": Method("head_decay", needs_forward=True),
    # One network that is policy and critic (wmtp.shared): values of the same forward, and the same value loss without their weights.
    "verifiable_shared": Method("advantage", needs_forward=True),
    "uniform_shared": Method("uniform"),
    "adamtp_mask": Method("adamtp_mask", needs_forward=True),
}
