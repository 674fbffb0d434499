"""Which tokens weigh how much. One file per idea, each a pure function of arrays; METHODS is the table.

A file has `token_weights(...) -> [B, T]` when the weights of a whole optimizer step are known before its first forward, or
`head_weights(...) -> [B, T, F]` when they need the forward. The names of its positional parameters choose arrays of the step
(signal_BT, response_BT, row_B, span_B2, is_correct_B; with the forward also ce_BTF and entropy_BTF). Its keyword parameters are the
settings of the method's block, and what it asks for by name: `beta` and `seed` of the training section, `notes` (a dict that takes
numbers for the log), and `fitted`, what the file's own `fit(steps, **settings)` found in one pass over the split before the training.
"""

from wmtp.weighting.method import Method, array_names, keywords
from wmtp.weighting.projection import concentration, project_mean_one

__all__ = ["METHODS", "Method", "array_names", "concentration", "keywords", "project_mean_one"]

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
