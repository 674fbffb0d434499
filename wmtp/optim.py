"""Parameter groups and the learning rate as a pure function of the step."""

import math
from typing import Any

import torch
from torch import nn


def learning_rate(step: int, n_steps: int, peak: float, warmup_fraction: float, final_fraction: float) -> float:
    """Linear warm-up to `peak`, then a cosine to `final_fraction * peak` at the last step. `step` counts from 0."""
    n_warmup = round(warmup_fraction * n_steps)
    if step < n_warmup:
        return peak * (step + 1) / n_warmup
    progress = (step - n_warmup) / max(1, n_steps - 1 - n_warmup)
    return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def build_optimizer(model: nn.Module, settings: Any) -> torch.optim.AdamW:
    """AdamW; matrices decay, norms do not. The learning rate is set at every step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=0.0, betas=tuple(settings.betas), eps=settings.eps, fused=True
    )
