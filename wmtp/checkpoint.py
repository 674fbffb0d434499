"""Training state on disk: saved atomically, restored exactly; a trained model as a bundle."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wmtp import pickled
from wmtp.bundle import NotFinite, bundle_sha256, write_bundle
from wmtp.records import atomic_path
from wmtp.world import World


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], world: World) -> None:
    """`state` is plain data: step, log records, weighting state. Rank 0 writes; with sharded parameters all ranks must call it."""
    tensors = _full_state(model, optimizer)
    if world.is_first:
        with atomic_path(folder / "state.pt") as temporary:
            pickled.save({**tensors, "state": json.dumps(state)}, temporary)


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Fills model and optimizer; returns the plain state, or None where nothing was saved."""
    path = folder / "state.pt"
    if not path.is_file():
        return None
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    only_trained = _only_trained(model)
    kept = {name.removeprefix("module.") for name, one in model.named_parameters() if one.requires_grad or not only_trained}
    if other := kept ^ set(saved["model"]):
        raise RuntimeError(f"{path}: {min(other)}: expected in the saved state and in the model; remove that folder and train again")
    options = StateDictOptions(full_state_dict=True, strict=not only_trained)
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=options)
    return json.loads(saved["state"])


def _only_trained(model: nn.Module) -> bool:
    """What is frozen beside adapters is still the start's; elsewhere it may be an average that moves."""
    return any(".lora_A." in name for name, _ in model.named_parameters())


def _full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=_only_trained(model))
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    return {"model": model_state, "optimizer": optimizer_state}


def full_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter whole, on the CPU of rank 0; with sharded parameters a collective, so every rank calls it. A NotFinite where one has
    lost its meaning: no such model may be saved.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    _check_finite(whole)
    return whole


def _check_finite(state: Mapping[str, torch.Tensor]) -> None:
    if broken := [name for name, tensor in state.items() if not bool(tensor.isfinite().all())]:
        raise NotFinite(
            f"{broken[0]}, among {len(broken)} of {len(state)} tensors, holds numbers that are not finite; such a model is not"
            " saved, lower the learning rate"
        )


def save_model(
    model: nn.Module, start: Path, out: Path, world: World, extra: dict[str, Any], merge: Callable[[dict], tuple[dict, Any]] | None = None
) -> None:
    """The trained model as a bundle: tokenizer of the bundle it started from, the start's identity in the metadata.

    `merge` makes the model's own tensors of a state that holds more, and what bundle.write_bundle takes as `beside` (lora.merging).
    """
    state = full_state(model)
    if world.is_first:
        beside = None
        if merge is not None:
            state, beside = merge(state)
            _check_finite(state)
        tokenizer = (Path(start) / "tokenizer.model").read_bytes()
        extra = {"start_sha256": bundle_sha256(start), **extra}
        write_bundle(out, model.args, state, tokenizer, source="wmtp training", dropped=[], extra=extra, beside=beside)
