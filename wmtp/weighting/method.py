"""A row of the table of methods: a weighting's file, found and called by the names of its parameters."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from torch import Tensor

from wmtp import dependencies


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

    def source_files(self) -> dict[str, Path]:
        """What its weights depend on beside its settings: its own file and those that it imports at any depth, by path in the project."""
        return dependencies.source_files(Path(__file__).with_name(f"{self.weighting}.py"))

    def function(self) -> Callable[..., Tensor]:
        return self.module().head_weights if self.needs_forward else self.module().token_weights

    def weigh(self, arrays: Mapping[str, Any], settings: Mapping[str, Any]) -> Tensor:
        """The function's weights of a batch whose arrays are given by name."""
        function = self.function()
        unknown = [name for name in array_names(function) if name not in arrays]
        if unknown:
            raise ValueError(f"wmtp.weighting.{self.weighting} asks for {', '.join(unknown)}; a step has {', '.join(arrays)}")
        return function(*(arrays[name] for name in array_names(function)), **settings)
