"""Floating-point operations by the usual count: 2 a weight and position forward, 4 backward (Kaplan et al. 2020, 2001.08361, section 2.1).

A matrix counts at the positions that are multiplied with it. The trunk's: every token of a row. A head block's: keys and values at every
token, the rest from the first position that predicts a response token on (`first` in wmtp.model). The output matrix: the targets, head by
head. A value head: where head 0 is computed. Left out are attention between positions, norms and biases, looked-up embeddings, and padding
(what a row computes beyond its own tokens, because others of its micro-batch are longer or have a shorter prompt).
"""

import numpy as np
from torch import nn

FORWARD, BACKWARD = 2, 4


def forward(model: nn.Module, length_R: np.ndarray, start_R: np.ndarray) -> int:
    """Of scoring rows of so many tokens, whose responses start there: head blocks compute the prompt too."""
    return FORWARD * sum(_products(model, length_R, np.zeros_like(start_R), *_targets(length_R, start_R)))


def training_forward(model: nn.Module, length_R: np.ndarray, start_R: np.ndarray, all_heads_R: np.ndarray | None = None) -> int:
    """Of the forward that a training makes. Rows that are not in `all_heads_R` (bool) have targets of head 0 alone."""
    return FORWARD * sum(_products(model, length_R, start_R, *_targets(length_R, start_R, all_heads_R)))


def training(model: nn.Module, length_R: np.ndarray, start_R: np.ndarray, all_heads_R: np.ndarray | None = None) -> int:
    """Of forward and backward. Frozen weights go forward, and half of backward where adapters train among them: to their inputs."""
    trained, frozen = _products(model, length_R, start_R, *_targets(length_R, start_R, all_heads_R))
    among_adapters = any(".lora_A." in name for name, _ in model.named_parameters())
    return (FORWARD + BACKWARD) * trained + (FORWARD + BACKWARD // 2 * among_adapters) * frozen


def _targets(length_R: np.ndarray, start_R: np.ndarray, all_heads_R: np.ndarray | None = None) -> tuple[int, int]:
    """Of head 0, and of each further head."""
    response_R = length_R - start_R
    return int(response_R.sum()), int(response_R.sum() if all_heads_R is None else response_R[all_heads_R].sum())


def _products(model: nn.Module, length_R: np.ndarray, start_R: np.ndarray, of_first: int, of_further: int) -> tuple[int, int]:
    """Products of a weight and a position in one forward: of weights that train and of those that do not."""
    made = {True: 0, False: 0}

    def add(module: nn.Module, n_positions: int) -> None:
        for parameter in module.parameters():
            made[parameter.requires_grad] += parameter.numel() * n_positions * (parameter.ndim == 2)

    n_tokens = int(length_R.sum())
    for module in model.modules():
        if hasattr(module, "value"):
            add(module.value, _computed(module.trunk, length_R, start_R))
        if hasattr(module, "extra_heads"):
            n_late, (*trunk, head_0) = _computed(module, length_R, start_R), module.layers
            for block in trunk:
                add(block, n_tokens)
            for block in (head_0, *module.extra_heads):
                for part in (block.attention.wk, block.attention.wv):
                    add(part, n_tokens)
                for part in (block.attention.wq, block.attention.wo, block.feed_forward):
                    add(part, n_late)
            add(module.output, of_first + len(module.extra_heads) * of_further)
    return made[True], made[False]


def _computed(transformer: nn.Module, length_R: np.ndarray, start_R: np.ndarray) -> int:
    """Positions from `first` on: no head has a target earlier than as many tokens before the response as there are heads."""
    return int((length_R - np.maximum(0, start_R - 1 - len(transformer.extra_heads))).sum())
