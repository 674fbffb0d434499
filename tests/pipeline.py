"""A finished tiny run of the pipeline for the tests that call DVC, made once however many workers pytest has."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from wmtp.dependencies import ROOT

METHODS = ("ntp", "baseline", "verifiable", "rho1")
EACH = (
    "fetch-checkpoint", "fetch-data", "convert-meta-checkpoint", "build-micro-model", "prepare-and-validate-datasets",
    "warm-up", "tune-reference", "score-reference", "critic-pretrain", "score-critic", "train@verifiable", "sample@rho1",
    "measure-heads@baseline", "evaluate-humaneval-mbpp@start", "show-weights@rho1",
    "compare", "write-page",
)  # fmt: skip


def environment() -> dict[str, str]:
    """This interpreter first on the path, as an activated environment has it, and nothing of a DVC run that may surround the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "WMTP_", "MLFLOW_", "OMP_"))}
    identity = {f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return {**kept, **identity, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def run(folder: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess:
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert not check or done.returncode == 0, (
        f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done


def copied(folder: Path) -> Path:
    """A repository of its own with this working tree's files."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file() and not name.startswith("metrics/") and not name.endswith("dvc.lock"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    run(folder, "git", "init", "-q", "-b", "main")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "copy")
    return folder


def typed(folder: Path, line: str, check: bool = True) -> subprocess.CompletedProcess:
    """A line as a user types it into a shell, from the root of the repository."""
    return run(folder, "bash", "-c", line, check=check)


def built(shared: Path) -> Path:
    """One whole run under `shared`, committed; the first worker that asks makes it, the others wait."""
    folder = shared / "tiny"
    with open(shared / "tiny.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            # Written, not set by flags, which make block lists of flow lists: tests edit the text of params.yaml.
            typed(copied(folder), "python -m wmtp.overlay presets/tiny.yaml --write params.yaml && git commit -qam tiny && dvc repro")
            run(folder, "git", "add", "-A")
            run(folder, "git", "commit", "-qm", "results")
            (folder / ".git/info/exclude").write_text(".done\n")
            (folder / ".done").touch()
    return folder


def cloned(source: Path, folder: Path) -> Path:
    """A clone of `source` with its results, over the same cache."""
    run(ROOT, "git", "clone", "-q", str(source), str(folder))
    # In git, not --local: an experiment in a directory of its own sees what git has, and without the cache would run everything again.
    run(folder, "dvc", "cache", "dir", run(source, "dvc", "cache", "dir").stdout.strip())
    run(folder, "git", "commit", "-qam", "cache", check=False)
    run(folder, "dvc", "checkout", "-q", "dvc.yaml")
    return folder


def stages_run(done: subprocess.CompletedProcess) -> set[str]:
    return set(re.findall(r"Running stage '([^']+)'", done.stdout + done.stderr))


def after(*methods: str) -> set[str]:
    """The stages that follow a change in the training of these methods."""
    own = ("train", "sample", "measure-heads", "evaluate-humaneval-mbpp", "show-weights")
    return {f"{stage}@{method}" for method in methods for stage in own} | {"compare", "write-page"}


def restored(folder: Path) -> None:
    run(folder, "git", "checkout", "-q", "--", ".")
    run(folder, "dvc", "checkout", "-q", "dvc.yaml")


def processes_in(folder: Path, words: bytes = b"stages.train") -> dict[int, bytes]:
    """Command lines, by process, of those that work in `folder` and have `words` in theirs."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "cwd") == str(folder) and words in (line := (entry / "cmdline").read_bytes()):
                found[int(entry.name)] = line
        except OSError:
            continue
    return found
