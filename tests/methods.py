"""A block of parameters for every row of wmtp.weighting.METHODS, as params.yaml would hold it, and objectives made from them."""

from typing import Any

from pydantic import TypeAdapter

from wmtp.method_schema import AnyMethod
from wmtp.policy import PolicyObjective, policy_objective
from wmtp.weighting import METHODS

BOUNDS = {"weight_clip_min": 0.1, "weight_clip_max": 5.0}
PIPELINE = {
    "beta": None, "policy_on_incorrect": "value_only", "gamma": 1.0, "lam": 0.95, "sigma_floor": 0.01, "z_clip": 5.0, **BOUNDS,
    "concentration_floor": 0.3, "terminal_credit": False,
}  # fmt: skip
CACHED = ("verifiable", "shuffled", "constant_critic", "position_only", "random_matched")
"""Methods whose block says `critic: separate`."""
SHARED = {
    "critic": "shared", "value_coef": 0.5, "value_loss": {"kind": "bce", "gamma": 1.0, "lam": 1.0}, "policy_on_incorrect": "value_only",
}  # fmt: skip
BINARY = {"policy_on_incorrect": "binary", "gamma": 1.0, "lam": 0.95, "terminal_credit": False}
OWN: dict[str, dict[str, Any]] = {
    "verifiable": PIPELINE,
    "rho1": {"selection": "topk", "head_mode": "shared_target", "scope": "sequence", "keep_fraction": 0.6},
    "shuffled": PIPELINE,
    "constant_critic": PIPELINE,
    "position_only": {**PIPELINE, "n_bins": 5},
    "random_matched": PIPELINE,
    "random_k": {"keep_fraction": 0.6},
    "inverted_k": {"head_mode": "shared_target", "scope": "sequence", "keep_fraction": 0.6},
    "oracle": {**BOUNDS, "emphasis": 10.0, "policy_on_incorrect": "value_only"},
    "dft": {"scope": "sequence"},
    "focal": {"scope": "sequence", "focusing": 2.0},
    "entropy_topk": {"scope": "sequence", "keep_fraction": 0.6},
    "loss_topk": {"scope": "sequence", "keep_fraction": 0.6},
    "crr_binary": {"gamma": 1.0, "lam": 0.95},
    "head_decay": {"decay": 0.7},
    "verifiable_shared": {key: value for key, value in PIPELINE.items() if key != "concentration_floor"} | SHARED,
    "uniform_shared": SHARED,
    "adamtp_mask": {"boundary_fraction": 0.2},
}
EXCESS_FORMS: dict[str, dict[str, Any]] = {
    "topk": {"keep_fraction": 0.6},
    "absolute": {"keep_fraction": 0.6},
    "tokenskip": {"drop_fraction": 0.3},
    "weighted": {"temperature": 1.0},
    "percentile_emphasis": {"percentile": 0.6, "alpha": 0.2},
}
SEPARATE = [name for name in METHODS if OWN.get(name, {}).get("critic") != "shared"]
"""Methods whose network is the policy alone."""
HEAD_MODES = ("shared_target", "per_head", "per_head_zscore", "pooled")


def block(name: str, n_future: int = 4, **changes: Any) -> dict[str, Any]:
    common = {"weighting": METHODS[name].weighting, "n_future": n_future, "mix": 1.0, "head_weights": None}
    separate = {"critic": "separate"} if name in CACHED else {}
    return common | separate | OWN.get(name, {}) | changes


def excess_block(selection: str, head_mode: str | None = None, n_future: int = 4, scope: str = "sequence") -> dict[str, Any]:
    common = {"weighting": "excess", "n_future": n_future, "mix": 1.0, "head_weights": None, "selection": selection}
    if selection == "softmax_over_heads":
        return {**common, "temperature": 1.0}
    return {**common, "head_mode": head_mode, "scope": scope, **EXCESS_FORMS[selection]}


def objective(name: str, steps: Any = (), n_future: int = 4, values: dict[str, Any] | None = None, **changes: Any) -> PolicyObjective:
    """The objective of a method as the training stage makes it; `steps` stand for one pass over the split."""
    settings = TypeAdapter(AnyMethod).validate_python(values or block(name, n_future, **changes))
    return policy_objective(name, settings, lambda: 0.9, lambda: 3, lambda: steps)
