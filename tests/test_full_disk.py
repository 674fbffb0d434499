"""Every stage on a disk that is full, and on one that fills up while it writes: one clear line, nothing half-written, then it goes on."""

import contextlib
import errno
import hashlib
import re
import shutil
import subprocess

import pytest
import yaml

from tests.pipeline import EACH, environment

pytestmark = pytest.mark.stress
FREE = 48 * 2**20


@pytest.fixture(scope="module")
def disk(finished, tmp_path_factory):
    """A finished run on a file system of its own."""
    folder = tmp_path_factory.mktemp("disk")
    size = sum(path.stat().st_size + 4096 for path in finished.rglob("*") if path.is_file() and ".git" not in path.parts)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size + FREE}", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting needs root: {mounted.stderr.strip()}")
    try:
        shutil.copytree(finished, folder, dirs_exist_ok=True, symlinks=True, ignore=shutil.ignore_patterns(".git", ".dvc", ".done"))
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def filled(folder, left: int):
    """All of the disk taken but for `left` bytes."""
    filler, block = folder / "filler", bytes(2**16)
    try:
        with open(filler, "wb", buffering=0) as file:
            with pytest.raises(OSError, match="No space") as full:
                while file.write(block):
                    pass
            assert full.value.errno == errno.ENOSPC
            file.truncate(max(0, file.tell() - left))
        yield
    finally:
        filler.unlink()


def removed(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def content(path):
    """Hashes of a file, or of all files under a folder, by name."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    return {file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}


@pytest.mark.parametrize("left", [0, 40_000])
@pytest.mark.parametrize("stage", EACH)
def test_a_full_disk_ends_a_stage_with_one_line(disk, finished, stage, left):
    entry = yaml.safe_load((disk / "dvc.lock").read_text())["stages"][stage]
    outs = [disk / out["path"] for out in entry["outs"]]
    before = {out: content(out) for out in outs}
    for out in outs:  # as DVC does before it runs a stage
        removed(out)
    start = {"shell": True, "cwd": disk, "env": environment() | {"DVC_STAGE": stage}, "capture_output": True, "text": True}
    with filled(disk, left):
        full = subprocess.run(entry["cmd"], **start)
        there = {out: content(out) for out in outs if out.exists()}
    again = subprocess.run(entry["cmd"], **start)
    found = {out: content(out) for out in outs}
    for out in outs:  # for the cases that follow, whatever this one found
        removed(out)
        source = finished / out.relative_to(disk)
        shutil.copytree(source, out) if source.is_dir() else shutil.copy2(source, out)
    assert again.returncode == 0, again.stderr[-3000:]
    assert found == before
    assert full.returncode or (left and there == before), "it must fail where its outputs do not fit"
    if full.returncode:
        *_, last = full.stderr.strip().splitlines()
        assert re.search("No space left on device|needs .* of disk", last) and "Traceback" not in full.stderr, full.stderr[-3000:]
    for out, files in there.items():
        assert not files.items() - before[out].items(), f"{out}: half-written"
