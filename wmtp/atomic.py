"""A folder that is written whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


class AtomicError(ValueError):
    """A folder that cannot be written: the disk is too small or full, or somebody's files lie there. Nothing was written."""


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def require_space(folder: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise AtomicError(f"{folder.parent}: needs {n_bytes / 1e9:.3f} GB of disk, {free / 1e9:.3f} GB are free; free some and run again")


@contextlib.contextmanager
def atomic_directory(out: str | Path, marker: str | None = None) -> Iterator[Path]:
    """Yields an empty hidden sibling of `out`; on success it is flushed to disk and renamed to `out`, on any error removed.

    An old `out` is replaced when it is empty or holds the path `marker`, else refused: it is somebody's data. The sibling's name is
    fixed, so what a killed process left behind is cleared by the next one.
    """
    out = Path(out).absolute()
    if out.exists() and not out.is_dir():
        raise AtomicError(f"{out}: expected a directory, found a file; remove it or choose another path")
    if out.exists() and any(out.iterdir()) and not (marker and (out / marker).exists()):
        raise AtomicError(f"{out}: holds other files and would be replaced; remove it or choose another path")
    partial, old = (out.with_name(f".{out.name}.{kind}") for kind in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            flush(path)
        if out.exists():
            os.rename(out, old)
        os.rename(partial, out)
        flush(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise AtomicError(f"{out}: nothing written: {one_line(error)}; mend that and run again") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
