"""Training state on disk: saved atomically, restored exactly, held by one process group at a time.

DVC deletes a stage's outputs before it runs, so the state lives in a scratch directory outside DVC, keyed by a fingerprint of all
that shapes the run. A run that was killed finds it again; a run with other parameters finds another directory.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wmtp import pickled
from wmtp.bundle import NotFinite, bundle_sha256, tensor_shapes, write_bundle
from wmtp.dependencies import ROOT
from wmtp.records import atomic_path
from wmtp.world import World


class ScratchBusy(OSError):
    """Another process still trains from the same scratch directory."""


def fingerprint(declared: dict[str, Any], inputs: dict[str, str], world_size: int) -> str:
    """Of parameters, inputs, world size and the project's code: an edited program must not go on with another one's state."""
    sources = sorted(path for folder in ("stages", "wmtp") for path in (ROOT / folder).rglob("*.py"))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    shaped_by = {"params": declared, "inputs": inputs, "world": world_size, "torch": torch.__version__, "code": code}
    text = json.dumps(shaped_by, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def scratch(stage: str, key: str, world: World) -> Iterator[Path]:
    """`.work/<stage>-<key>` under the repository; removed when the block ends well. Rank 0 holds a lock in it."""
    root = Path(os.environ.get("DVC_ROOT", ".")) / ".work"
    folder = root / f"{stage.replace('@', '-')}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(root / f"{folder.name}.lock", "a") as lock:
        if world.is_first:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ScratchBusy(f"{folder}: another process is training here; wait for it or end it, then run again") from None
        yield folder
        world.barrier()
        if world.is_first:
            shutil.rmtree(folder)
            Path(lock.name).unlink()


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

    options = StateDictOptions(full_state_dict=True)
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=options)
    return json.loads(saved["state"])


def _full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    model_state, optimizer_state = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {"model": model_state, "optimizer": optimizer_state}


def full_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter whole, on the CPU of rank 0; with sharded parameters a collective, so every rank calls it. A NotFinite where one has
    lost its meaning: no such model may be saved.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if broken := [name for name, tensor in whole.items() if not bool(tensor.isfinite().all())]:
        raise NotFinite(
            f"{broken[0]}, among {len(broken)} of {len(whole)} tensors, holds numbers that are not finite; nothing was written, lower the"
            " learning rate"
        )
    return whole


def save_model(model: nn.Module, start: Path, out: Path, world: World, extra: dict[str, Any]) -> None:
    """The trained model as a bundle: tokenizer of the bundle it started from, the start's identity in the metadata."""
    state = full_state(model)
    if world.is_first:
        tokenizer = (Path(start) / "tokenizer.model").read_bytes()
        extra = {"start_sha256": bundle_sha256(start), **extra}
        tensors = {name: state[name] for name in tensor_shapes(model.args)}
        write_bundle(out, model.args, tensors, tokenizer, source="wmtp training", dropped=[], extra=extra)
