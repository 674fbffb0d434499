"""Floating-point operations by the usual count: 2 a weight and token forward, 4 backward (Kaplan et al. 2020, 2001.08361, section 2.1).

A weight counts as often as a token is multiplied with it: an embedding's row is looked up, the output matrix serves every head. What
attention does between positions is left out.
"""

from torch import nn

FORWARD, BACKWARD = 2, 4


def forward(model: nn.Module, n_tokens: int) -> int:
    """Of one forward over `n_tokens` tokens, prompts included."""
    return FORWARD * sum(_weights(model)) * n_tokens


def training(model: nn.Module, n_tokens: int) -> int:
    """Of forward and backward; frozen weights go forward alone."""
    return forward(model, n_tokens) + BACKWARD * _weights(model)[0] * n_tokens


def _weights(model: nn.Module) -> tuple[int, int]:
    """Weights that a token meets in one forward: those that train and those that do not."""
    met = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        met[parameter.requires_grad] += parameter.numel() * ("tok_embeddings" not in name)
    for module in model.modules():
        if further := len(getattr(module, "extra_heads", ())):
            met[module.output.weight.requires_grad] += further * module.output.weight.numel()
    return met[True], met[False]
