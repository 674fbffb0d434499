"""Which tokens weigh how much. One file per idea, each a pure function of arrays; METHODS is the table.

A file has `token_weights(...) -> [B, T]` when the weights of a whole optimizer step are known before its first forward, or
`head_weights(...) -> [B, T, F]` when they need the forward. The names of its positional parameters choose arrays of the step
(signal_BT, response_BT, row_B, span_B2, is_correct_B; with the forward also ce_BTF and entropy_BTF). Its keyword parameters are the
settings of the method's block, and what it asks for by name: `seed` of the training section, `notes` (a dict that takes numbers for the
log), and `fitted`, what the file's own `fit(steps, **settings)` found in one pass over the split before the training. One with a `scope`
takes `lag` too: None, or the statistics of an earlier step by which it judges this one (wmtp.weighting.lag).
"""

from typing import Any

from wmtp.weighting.method import Method, array_names, keywords
from wmtp.weighting.projection import concentration, project_mean_one

__all__ = ["METHODS", "Method", "MethodError", "array_names", "concentration", "keywords", "method_of", "project_mean_one"]

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


class MethodError(ValueError):
    """A method's block for which METHODS has no row, or whose name has a row of another kind."""


def method_of(name: str, block: Any) -> Method:
    """The row of methods.`name`, else the row with its block's weighting: a weighting may have many blocks, each an arm of its own.

    A name whose row reads a critic's cached values keeps it when its block says `critic: shared`: the row is then that of the same
    weighting by the values of the forward. `block` has the attribute `weighting`, and `critic` (separate | shared) where its form has one.
    """
    named = METHODS.get(name)
    if named and _fits(named, block):
        return named
    if named and not (named.weighting == block.weighting and getattr(block, "critic", None) == "shared"):
        raise MethodError(
            f"methods.{name}: {_told(block)}; wmtp.weighting.METHODS has {named.weighting!r} with signal {named.signal} under that name;"
            " give the block another name"
        )
    fitting = [row for row in METHODS.values() if _fits(row, block)]
    if not fitting:
        raise MethodError(f"methods.{name}: {_told(block)}; wmtp.weighting.METHODS has no such row, only {', '.join(METHODS)}; add one")
    return fitting[0]


def _fits(row: Method, block: Any) -> bool:
    critic = getattr(block, "critic", None)
    # Values of a critic of its own are cached and known before the forward; those of a shared one are the forward's.
    other = (critic == "shared" and row.signal is not None) or (critic == "separate" and row.needs_forward)
    return row.weighting == block.weighting and not other


def _told(block: Any) -> str:
    return f"weighting {block.weighting!r}" + (f" with critic {block.critic!r}" if hasattr(block, "critic") else "")
