"""Where a run that was interrupted finds what it had finished: a folder that one process group holds at a time.

DVC deletes a stage's outputs before it runs, so the state lives in a folder outside DVC, named after a fingerprint of all that shapes the
run. A run that was killed finds it again; a run with other parameters finds another folder.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from wmtp.dependencies import ROOT
from wmtp.world import World


class ScratchBusy(OSError):
    """Another process still works in the same scratch directory."""


def fingerprint(declared: Mapping[str, Any], inputs: Mapping[str, str], world: World) -> str:
    """Of parameters, inputs, processes, threads, device and the project's code: what was begun in other ways must not go on from here."""
    sources = sorted(path for folder in ("stages", "wmtp") for path in (ROOT / folder).rglob("*.py"))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    machine = {"world": world.size, "threads": torch.get_num_threads(), "device": world.device.type, "torch": torch.__version__}
    shaped_by = {"params": dict(declared), "inputs": dict(inputs), **machine, "code": code}
    text = json.dumps(shaped_by, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def held(stage: str, key: str, world: World) -> Iterator[Path]:
    """`.work/<stage>-<key>` under the repository; removed when the block ends well. Rank 0 holds a lock in it."""
    root = Path(os.environ.get("DVC_ROOT", ".")) / ".work"
    folder = root / f"{stage.replace('@', '-')}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(root / f"{folder.name}.lock", "a") as lock:
        if world.is_first:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ScratchBusy(f"{folder}: another process works here; wait for it or end it, then run again") from None
        yield folder
        world.barrier()
        if world.is_first:
            shutil.rmtree(folder)
            Path(lock.name).unlink()
