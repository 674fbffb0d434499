"""python -m stages.convert_meta_checkpoint RAW BASE REFERENCE_BASE: both checkpoints as bundles."""

from pathlib import Path
from typing import Any

from stages import run
from wmtp.convert import convert


def work(params: Any, track: Any, raw: str, base: str, reference: str) -> None:
    convert(Path(raw) / "policy", Path(base))
    convert(Path(raw) / "reference", Path(reference))


if __name__ == "__main__":
    run(work)
