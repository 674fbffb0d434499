"""MLflow runs, best effort: a stage never waits for the tracker and never fails because of it.

One experiment of DVC is one parent run, found by its tag (DVC_EXP_NAME, or workspace-<git revision>); each stage run is a child of it.
The store is MLFLOW_TRACKING_URI where that is set, else a database and an artifact folder under .mlflow/ of the repository (DVC_ROOT).

Two processes. The stage appends its records to a file in .mlflow/outbox/, which costs microseconds. A writer, started with the stage
in a session of its own and holding none of its pipes, imports mlflow (two seconds), follows that file, and lives on for at most
LINGER seconds after the stage. What it could not deliver in that time, because the container stopped or the machine was busy,
the next stage's writer delivers. A stage that was killed leaves its run in state RUNNING.

The first error ends the tracking of that stage: one line on stderr, or, if the stage is over, at the start of the next one.
"""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from wmtp.runstore import Run, flat

WAIT_LIMIT = 30.0  # seconds that a stage may lose to its calls in all, on a file system that hangs
LINGER = 20.0  # seconds that a writer may outlive its stage
POLL = 1.0  # seconds between two looks at the stage's records; what has gathered is one batch
ADOPT_AFTER = 60.0  # seconds without a record after which a box without a writer counts as left behind
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # mlflow's defaults block for four minutes on a closed port
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}


class TrackingError(Exception):
    """What ended the tracking of one stage; never leaves this module."""


def stage_run(stage: str, params: Mapping[str, Any], enabled: bool, tags: Mapping[str, str] | None = None) -> "StageRun":
    """`with stage_run("train@ntp", params, enabled) as run:`; silent on ranks other than 0. The run is FAILED if the block raises."""
    return StageRun(stage, params, enabled and os.environ.get("RANK", "0") == "0", tags or {})


class StageRun:
    """One child run. Every method returns at once, and does nothing once tracking is off."""

    def __init__(self, stage: str, params: Mapping[str, Any], enabled: bool, tags: Mapping[str, str]):
        self.enabled = enabled
        self._stage, self._params, self._tags = stage, params, tags
        self._file: IO[str] | None = None
        self._writer: subprocess.Popen[bytes] | None = None
        self._box = Path()
        self._waited, self._step = 0.0, 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step = step
        self._send({"step": step, "metrics": metrics})

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Figures of the whole run, recorded at the last step that was logged."""
        self._send({"step": self._step, "metrics": metrics})

    def artifact(self, path: str | Path) -> None:
        """A file or folder as it is now: pages, tables, pictures. Large models belong to DVC's remote."""
        self._send({"artifact": path})

    def __enter__(self) -> Self:
        with self._in_time():
            if self.enabled:
                self._open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        good = kind is None or (isinstance(error, SystemExit) and error.code in (None, 0))
        with self._in_time():
            if self._file:  # a run whose tracking went off, over an artifact that was not there, has an end all the same
                self._write({"end": "FINISHED" if good else "FAILED"})
                self._file.close()

    def _open(self) -> None:
        root, revision = repository()
        outbox = root / ".mlflow" / "outbox"
        self._box = outbox / f"{self._stage.replace('/', '_')}-{uuid.uuid4().hex[:12]}"
        self._box.mkdir(parents=True)
        report_losses(outbox)
        self._file = open(self._box / "records.jsonl", "w", encoding="utf-8", buffering=1)  # noqa: SIM115 (open as long as the run)
        key = os.environ.get("DVC_EXP_NAME") or f"workspace-{revision[:12] or 'uncommitted'}"
        tags = {"stage": self._stage, "mlflow.source.git.commit": revision, **self._tags}
        self._write({"stage": self._stage, "key": key, "params": flat(self._params), "tags": tags})
        self._writer = start_writer(self._box, root)

    def _send(self, record: dict[str, Any]) -> None:
        with self._in_time():
            if self.enabled and self._file:
                self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        if self._writer and self._writer.poll() is not None:
            raise TrackingError(take_loss(self._box) or f"its writer ended with exit code {self._writer.returncode}")
        if "artifact" in record:
            record = {"artifact": str(snapshot(Path(record["artifact"]), self._box))}
        if "metrics" in record:
            record = record | {"metrics": {key: float(value) for key, value in record["metrics"].items()}}
        self._file.write(json.dumps(record | {"time": int(time.time() * 1000)}) + "\n")

    @contextlib.contextmanager
    def _in_time(self) -> Iterator[None]:
        started = time.monotonic()
        with best_effort(self._off):
            yield
        self._waited += time.monotonic() - started
        if self._waited > WAIT_LIMIT:
            self._off(f"its calls took {self._waited:.0f} s")

    def _off(self, reason: str) -> None:
        if self.enabled:
            print(f"tracking: off for the rest of {self._stage}: {reason}", file=sys.stderr, flush=True)
        self.enabled = False


def start_writer(box: Path, root: Path) -> "subprocess.Popen[bytes]":
    """Starts this module as the writer of `box`; it holds no pipe of this process, so nobody who waits for one waits for it."""
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    nothing = subprocess.DEVNULL
    return subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, str(box), str(os.getpid())],
        cwd=root,
        env=ENVIRONMENT | os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        stdin=nothing,
        stdout=nothing,
        stderr=nothing,
        start_new_session=True,
    )


@contextlib.contextmanager
def best_effort(give_up: Callable[[str], None]) -> Iterator[None]:
    """The one place that catches everything: hours of training are worth more than whatever a tracker, server or disk has to say."""
    try:
        yield
    except Exception as error:
        text = str(error) if isinstance(error, TrackingError) else f"{type(error).__name__}: {error}"
        give_up(" ".join(text.split())[:300])


def repository() -> tuple[Path, str]:
    """(root, git revision): DVC_ROOT, which is the real repository in a temporary run too, or git's, or the working directory."""

    def git(*arguments: str) -> str:
        if not shutil.which("git"):
            return ""
        done = subprocess.run(["git", "rev-parse", *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    root = os.environ.get("DVC_ROOT") or git("--show-toplevel") or os.getcwd()
    return Path(root).resolve(), git("--verify", "HEAD")


def snapshot(path: Path, box: Path) -> Path:
    """A hard link to the file in `box`, or a copy: a later version that replaces `path` by renaming does not change it."""
    kept = box / "artifacts" / uuid.uuid4().hex[:8] / path.name
    kept.parent.mkdir(parents=True)
    if path.is_dir():
        shutil.copytree(path, kept, copy_function=_link)
    else:
        _link(path, kept)
    return kept


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def take_loss(box: Path) -> str:
    """Why the box was given up, or an empty text if it was not; a box that was given up is removed."""
    try:
        text = (box / "loss.txt").read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    shutil.rmtree(box, ignore_errors=True)
    return text


def report_losses(outbox: Path) -> None:
    for box in sorted(outbox.iterdir()):
        if reason := take_loss(box):
            print(f"tracking: an earlier run of {box.name.rpartition('-')[0]} was not recorded: {reason}", file=sys.stderr, flush=True)


# The writer's side.


def deliver(box: Path, alive: Callable[[], bool]) -> None:
    """Follows a box until its stage has ended or is no longer `alive`, sends what it says, and removes it."""
    with open(box / "records.jsonl", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # another writer has it
        if not box.exists():
            return  # another writer had it
        run: Run | None = None
        rest, over = "", False
        while not over:
            over = not alive()  # asked before reading: what the stage wrote while it lived is read
            *lines, rest = (rest + file.read()).split("\n")
            if lines:
                records = [json.loads(line) for line in lines]
                run = run or Run(box.parents[1], records[0], box / "run_id")
                over |= run.write(records)
            if not over:
                time.sleep(POLL)
        shutil.rmtree(box)


def left_behind(outbox: Path) -> Iterator[Path]:
    """Boxes that are old and were not given up; the lock tells whether one has a writer after all."""
    for records in sorted(outbox.glob("*/records.jsonl")):
        with contextlib.suppress(FileNotFoundError):  # another writer has just removed it
            if records.stat().st_mtime < time.time() - ADOPT_AFTER and not (records.parent / "loss.txt").exists():
                yield records.parent


def _end_after(stage: int) -> None:
    while os.getppid() == stage:
        time.sleep(POLL)
    time.sleep(LINGER)
    os._exit(1)


def attempt(box: Path, alive: Callable[[], bool]) -> bool:
    """Whether the box could be delivered; if not, the reason is left in it."""
    lost: list[str] = []
    with best_effort(lost.append):
        deliver(box, alive)
    if lost and box.exists():
        (box / "loss.txt").write_text(lost[0], encoding="utf-8")
    return not lost


def main(box: Path, stage: int) -> int:
    """The writer of one box, child of the process `stage`; afterwards it takes on the boxes that were left behind."""
    os.nice(10)  # a training beside it keeps its core
    threading.Thread(target=_end_after, args=(stage,), daemon=True).start()
    delivered = attempt(box, lambda: os.getppid() == stage)
    for other in left_behind(box.parent):
        attempt(other, lambda: False)
    return 0 if delivered else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
