"""Floating-point operations by the usual count: 2 a weight and position forward, 4 backward (Kaplan et al. 2020, 2001.08361, section 2.1).

Of the four, two make the weight's gradient, which a frozen one has none of, and two the gradient of its input, which is made where anything
before it trains.

A matrix counts at the positions that are multiplied with it. The trunk's: every token of a row. A head block's: keys and values at every
token, the rest from the first position that predicts a response token on (`first` in wmtp.model). The output matrix: the targets, head by
head. A value head: where head 0 is computed. Left out are attention between positions, norms and biases, looked-up embeddings, and padding
(what a row computes beyond its own tokens, because others of its micro-batch are longer or have a shorter prompt).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import nn


@dataclass
class Products:
    """Of a weight and a position: in a forward, and in its backward for the gradients of weights and of inputs."""

    forward: int = 0
    weights: int = 0
    inputs: int = 0

    def add(self, modules: Iterable[nn.Module], n_positions: int, flows: bool) -> bool:
        """Side by side, on one input, which has a gradient where `flows`; returns whether what comes behind them has one."""
        modules = list(modules)
        for module in modules:
            for name, weight in module.named_parameters():
                made = weight.numel() * n_positions * (weight.ndim == 2)
                self.forward += made
                self.weights += made * weight.requires_grad
                self.inputs += made * (flows or ".lora_B." in f".{name}")  # what comes before it is its own adapter's A
        return flows or trains(modules)


def trains(modules: Iterable[nn.Module]) -> bool:
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())


def forward(model: nn.Module, length_R: np.ndarray, start_R: np.ndarray) -> int:
    """Of scoring rows of so many tokens, whose responses start there: head blocks compute the prompt too."""
    return 2 * _products(model, length_R, np.zeros_like(start_R), *_targets(length_R, start_R)).forward


def training_forward(model: nn.Module, length_R: np.ndarray, start_R: np.ndarray, all_heads_R: np.ndarray | None = None) -> int:
    """Of the forward that a training makes. Rows that are not in `all_heads_R` (bool) have targets of head 0 alone."""
    return 2 * _products(model, length_R, start_R, *_targets(length_R, start_R, all_heads_R)).forward


def training(model: nn.Module, length_R: np.ndarray, start_R: np.ndarray, all_heads_R: np.ndarray | None = None) -> int:
    """Of forward and backward."""
    made = _products(model, length_R, start_R, *_targets(length_R, start_R, all_heads_R))
    return 2 * (made.forward + made.weights + made.inputs)


def _targets(length_R: np.ndarray, start_R: np.ndarray, all_heads_R: np.ndarray | None = None) -> tuple[int, int]:
    """Of head 0, and of each further head."""
    response_R = length_R - start_R
    return int(response_R.sum()), int(response_R.sum() if all_heads_R is None else response_R[all_heads_R].sum())


def _products(model: nn.Module, length_R: np.ndarray, start_R: np.ndarray, of_first: int, of_further: int) -> Products:
    made, n_tokens = Products(), int(length_R.sum())
    for module in model.modules():
        if hasattr(module, "value"):
            made.add([module.value], _computed(module.trunk, length_R, start_R), trains([module.trunk]))
        if hasattr(module, "extra_heads"):
            n_late, (*trunk, head_0) = _computed(module, length_R, start_R), module.layers
            flows = trains([module.tok_embeddings])
            for block in trunk:
                flows = _block(made, block, n_tokens, n_tokens, flows)
            for number, head in enumerate((head_0, *module.extra_heads)):
                made.add([module.output], of_further if number else of_first, _block(made, head, n_tokens, n_late, flows))
    return made


def _block(made: Products, block: nn.Module, n_read: int, n_late: int, flows: bool) -> bool:
    """Keys and values at `n_read` positions, the rest at `n_late`."""
    attention, feed_forward = block.attention, block.feed_forward
    attended = [made.add([attention.wk, attention.wv], n_read, flows), made.add([attention.wq], n_late, flows)]
    flows = made.add([attention.wo], n_late, any(attended))
    flows = made.add([feed_forward.w1, feed_forward.w3], n_late, flows)
    return made.add([feed_forward.w2], n_late, flows)


def _computed(transformer: nn.Module, length_R: np.ndarray, start_R: np.ndarray) -> int:
    """Positions from `first` on: no head has a target earlier than as many tokens before the response as there are heads."""
    return int((length_R - np.maximum(0, start_R - 1 - len(transformer.extra_heads))).sum())
