"""python -m stages.build_micro_model BASE OUT: a small slice of the bundle BASE, with its tokenizer cut to match."""

from pathlib import Path
from typing import Any

from stages import run
from wmtp.slicing import build_micro


def work(params: Any, track: Any, base: str, out: str) -> None:
    build_micro(Path(base), Path(out), **params.micro.model_dump())


if __name__ == "__main__":
    run(work)
