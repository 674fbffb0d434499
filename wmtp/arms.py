"""Arms of a study: which is compared with which."""

from collections.abc import Mapping
from typing import Any

from wmtp.blocks import reads_pairs


def controls(arms: Mapping[str, Any]) -> dict[str, str | None]:
    """The arm of a study that each of `arms`, blocks by name, is compared with; None for those arms themselves.

    Arms are compared where they read the same rows: those that read correct programs with the baseline, those that read pairs with the
    arm of uniform weights on these pairs, for a shared critic one that has its value loss too. ValueError where an arm has no such arm,
    and where there is none but such arms.
    """
    found = {name: _kind(block) for name, block in arms.items()}
    base = {_kind(block): name for name, block in reversed(arms.items()) if _uniform(name, block)}
    if alone := [name for name, kind in found.items() if kind not in base]:
        raise ValueError(
            f"study.arms: {alone[0]} reads {found[alone[0]]}, and no arm beside it does so with uniform weights; expected"
            f" {CONTROLS[found[alone[0]]]}; add it to study.arms"
        )
    if len(base) == len(found):
        raise ValueError(f"study.arms: {', '.join(found)}: each is what others are compared with; expected at least one arm beside them")
    return {name: None if name == base[kind] else base[kind] for name, kind in found.items()}


CORRECT, PAIRS, SHARED_PAIRS = "correct programs", "pairs", "pairs with a shared critic"
CONTROLS = {
    CORRECT: "baseline",
    PAIRS: "a block with weighting constant_critic, policy_on_incorrect weighted, gamma 1.0 and no terminal_credit",
    SHARED_PAIRS: "a block with weighting uniform and critic shared, as uniform_shared",
}


def _kind(block: Any) -> str:
    return CORRECT if not reads_pairs(block) else SHARED_PAIRS if getattr(block, "critic", None) == "shared" else PAIRS


def _uniform(name: str, block: Any) -> bool:
    if _kind(block) == PAIRS:
        # With a discount or a reward at the end even a constant critic's weights are not all 1.
        flat = getattr(block, "gamma", None) == 1.0 and not getattr(block, "terminal_credit", True)
        return flat and block.weighting == "constant_critic" and getattr(block, "policy_on_incorrect", None) == "weighted"
    return name == "baseline" if _kind(block) == CORRECT else block.weighting == "uniform"
