"""What a method's block asks for beside its own keys: rows, and a temperature. These decide what a training reads, hence are part of its
code, which the schema is not (wmtp.dependencies)."""

from typing import Any


def reads_pairs(block: Any) -> bool:
    """Whether a method reads pairs of a correct and an incorrect program (wmtp.critic.pairs), or correct programs alone."""
    return getattr(block, "critic", "separate") == "shared" or getattr(block, "policy_on_incorrect", "value_only") != "value_only"


def reads_beta(block: Any) -> bool:
    """Whether a method's block takes training.beta: its weights are exponential, and it sets no beta of its own."""
    return getattr(block, "beta", 0.0) is None
