"""Arms of a study: which is compared with which."""

from collections.abc import Mapping
from typing import Any

from wmtp.blocks import reads_pairs


def controls(arms: Mapping[str, Any]) -> dict[str, str | None]:
    """The arm of a study that each of `arms`, blocks by name, is compared with; None for those arms themselves.

    Weights are compared with uniform ones over the same rows and heads: arms that read correct programs with the baseline, or another
    uniform arm of as many heads, those that read pairs with the arm of uniform weights on these pairs, for a shared critic one that has
    its value loss too. Uniform arms of other heads or depth, next-token prediction among them, are compared with the baseline. ValueError
    where an arm has no such arm, and where there is none but such arms.
    """
    found = {name: _control(name, block, arms) for name, block in arms.items()}
    if not any(found.values()):
        raise ValueError(f"study.arms: {', '.join(found)}: each is what others are compared with; expected at least one arm beside them")
    return found


def _control(name: str, block: Any, arms: Mapping[str, Any]) -> str | None:
    kind = _kind(block)
    if kind == CORRECT and block.weighting == "uniform":
        return None if name == "baseline" else "baseline"
    if _uniform(block):
        return None
    like = [other for other, beside in arms.items() if _kind(beside) == kind and _uniform(beside) and _shape(beside) == _shape(block)]
    if not like:
        shape = ", ".join(f"{key} {value}" for key, value in _shape(block).items())
        raise ValueError(
            f"study.arms: {name} reads {kind} ({shape}), and no arm beside it does so with uniform weights; expected {CONTROLS[kind]},"
            " equal in these; add it to study.arms"
        )
    return "baseline" if "baseline" in like else like[0]


CORRECT, PAIRS, SHARED_PAIRS = "correct programs", "pairs", "pairs with a shared critic"
CONTROLS = {
    CORRECT: "baseline, or a block with weighting uniform",
    PAIRS: "a block with weighting constant_critic, policy_on_incorrect weighted, gamma 1.0 and no terminal_credit",
    SHARED_PAIRS: "a block with weighting uniform and critic shared, as uniform_shared",
}


def _kind(block: Any) -> str:
    return CORRECT if not reads_pairs(block) else SHARED_PAIRS if getattr(block, "critic", None) == "shared" else PAIRS


def _shape(block: Any) -> dict[str, Any]:
    """What an arm and its control must have in common beside the rows: heads, and what a shared critic adds to the loss."""
    keys = ("n_future", *(("policy_on_incorrect", "value_coef", "value_loss") if _kind(block) == SHARED_PAIRS else ()))
    return {key: getattr(block, key) for key in keys}


def _uniform(block: Any) -> bool:
    if _kind(block) == PAIRS:
        # With a discount or a reward at the end even a constant critic's weights are not all 1.
        flat = getattr(block, "gamma", None) == 1.0 and not getattr(block, "terminal_credit", True)
        return flat and block.weighting == "constant_critic" and getattr(block, "policy_on_incorrect", None) == "weighted"
    return block.weighting == "uniform"
