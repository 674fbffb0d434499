"""torchrun, tied to the life of its parent: `python -m wmtp.launch --nproc 2 --threads 1 -- stages.train ntp`.

Three generations, each of which ends when the one above it does, however that one ended:

    dvc (or a shell)  ->  launcher, which runs torchrun's agent in this very process  ->  one worker per rank

On Linux the kernel signals a child whose parent died (PR_SET_PDEATHSIG): SIGTERM to the launcher, which then ends its workers in order,
SIGKILL to a worker, because a launcher that died unasked can no longer end it. Elsewhere a thread looks for the parent once a second.

torchrun answers a failed worker with two dozen lines. Here each worker leaves its last word (an uncaught exception, the message of
sys.exit, or the last line on stderr) in the file that torchrun provides for it; the launcher prints the first of them as its last line.

Several nodes: WMTP_NNODES, WMTP_NODE_RANK and WMTP_RDZV_ENDPOINT (host:port of node 0) together replace the single-node rendezvous.
"""

import argparse
import ctypes
import json
import logging
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TextIO

PR_SET_PDEATHSIG = 1
NODE_VARIABLES = ("WMTP_NNODES", "WMTP_NODE_RANK", "WMTP_RDZV_ENDPOINT")
SHUTDOWN_SECONDS = "10"  # from SIGTERM to SIGKILL of a worker; torchrun's own 30 s outlast the patience of most schedulers


def tie_to_parent(parent: int, signum: signal.Signals) -> None:
    """Has this process receive `signum` when process `parent`, its parent, ends; ends at once if it has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum)
    else:
        threading.Thread(target=_watch, args=(parent, signum), daemon=True).start()
    # A parent that died before the line above sends no signal: the process has been handed to another one by then.
    if os.getppid() != parent:
        sys.exit(f"wmtp.launch: parent process {parent} ended before the start; nothing was run")


def _watch(parent: int, signum: signal.Signals, seconds: float = 1.0) -> None:
    while os.getppid() == parent:
        time.sleep(seconds)
    os.kill(os.getpid(), signum)


def rendezvous(environment: Mapping[str, str]) -> list[str]:
    """torchrun's arguments for where ranks meet: one node, or the node that the three variables describe."""
    given = [name for name in NODE_VARIABLES if environment.get(name)]
    if not given:
        return ["--standalone"]
    if missing := [name for name in NODE_VARIABLES if name not in given]:
        sys.exit(f"wmtp.launch: {', '.join(given)} set without {', '.join(missing)}; set all three on every node, or none")
    nodes, rank, endpoint = (environment[name] for name in NODE_VARIABLES)
    # Static rendezvous: ranks follow the node's number, not the order of arrival, so a run can be repeated.
    return ["--nnodes", nodes, "--node-rank", rank, "--rdzv-endpoint", endpoint]


def supervise(nproc: int, module: str, arguments: list[str]) -> int:
    """Runs `module` on `nproc` ranks of this node; exit status for the shell. Prints the first failure as the last line."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if "LOGLEVEL" not in os.environ:  # torchrun's own switch
        logging.disable(logging.ERROR)
    worker = ["-m", __spec__.name, "--worker", str(os.getpid()), module, *arguments]
    try:
        torchrun.run(torchrun.parse_args([*rendezvous(os.environ), "--nproc-per-node", str(nproc), *worker]))
    except ChildFailedError as failed:
        text, status = first_failure(failed.failures)
    except SignalException as stopped:
        text, status = f"stopped by {stopped.sigval.name}", 128 + stopped.sigval
    else:
        return 0
    print(f"wmtp.launch: {module}: {text}", file=sys.stderr, flush=True)
    return status


def first_failure(failures: Mapping[int, Any]) -> tuple[str, int]:
    """(text, exit status) of the rank that failed first; `failures` maps ranks to torchrun's ProcessFailure.

    A rank that torchrun stopped because of another one's failure ends by SIGTERM and comes last.
    """

    def order(rank: int) -> tuple[bool, int, int]:
        failure = failures[rank]
        return failure.exitcode == -signal.SIGTERM, failure.error_file_data.get("time_ns", sys.maxsize), rank

    rank = min(failures, key=order)
    failure = failures[rank]
    if failure.exitcode < 0:
        hint = "; the system may have run out of memory" if failure.exitcode == -signal.SIGKILL else ""
        return f"rank {rank} was killed by {failure.signal_name()}{hint}", 128 - failure.exitcode
    word = failure.error_file_data.get("last_word", "")
    return f"rank {rank} ended with exit code {failure.exitcode}" + (f": {word}" if word else " and said nothing"), failure.exitcode


class LastLine:
    """stderr that remembers the last line written to it by this process."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._text = ""

    def write(self, text: str) -> int:
        self._text = (self._text + text)[-2000:]
        return self._stream.write(text)

    def last(self) -> str:
        lines = self._text.split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def leave_word(text: str) -> None:
    """Writes why this worker ends to the file that the launcher reads; the keys besides ours are torchrun's."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        word = {"last_word": text, "time_ns": time.time_ns(), "message": text, "timestamp": str(int(time.time()))}
        with open(path, "w", encoding="utf-8") as file:
            json.dump(word, file)


def work(agent: int, module: str, arguments: list[str]) -> None:
    """The worker: ties itself to its launcher (process `agent`), then becomes `python -m module arguments`."""
    tie_to_parent(agent, signal.SIGKILL)
    stderr = LastLine(sys.stderr)
    sys.stderr = stderr  # type: ignore[assignment]
    printed = sys.excepthook

    def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        leave_word(f"{kind.__name__}: {error}".splitlines()[0])
        printed(kind, error, trace)

    sys.excepthook = uncaught
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code not in (None, 0):
            leave_word(stderr.last() if isinstance(end.code, int) else str(end.code))
        raise


def become(module: str, arguments: list[str]) -> None:
    """Turns this process into its only worker: nothing to supervise, and torchrun's two seconds are saved. The tie survives execv."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.execv(sys.executable, [sys.executable, "-u", "-m", module, *arguments])


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m wmtp.launch",
        description="Run a stage on several ranks of this machine with torchrun; everything ends when the caller does.",
        epilog=f"example: python -m wmtp.launch --nproc 2 --threads 1 -- stages.train ntp    (several nodes: {', '.join(NODE_VARIABLES)})",
    )
    parser.add_argument("--nproc", type=int, required=True, metavar="N", help="ranks on this node; one per GPU")
    parser.add_argument("--threads", type=int, default=1, metavar="K", help="CPU threads of each rank (OMP_NUM_THREADS); default 1")
    parser.add_argument("module", help="the stage, as for python -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="handed to the stage as they are")
    return parser


def main() -> None:
    # The time from the fork to this line, some 20 ms, is not covered: whose child this was meant to be is not known before.
    tie_to_parent(os.getppid(), signal.SIGTERM)
    parser = command_line()
    given = parser.parse_args()
    if given.nproc < 1 or given.threads < 1:
        parser.error(f"--nproc and --threads count from 1, found {given.nproc} and {given.threads}")
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS)
    if given.nproc == 1 and sys.platform == "linux" and not any(os.environ.get(name) for name in NODE_VARIABLES):
        become(given.module, given.arguments)
    sys.exit(supervise(given.nproc, given.module, given.arguments))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(int(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        main()
