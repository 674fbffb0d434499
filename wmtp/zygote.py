"""The fork server: one small interpreter per worker that forks a child for each program, and the runtime inside such a child.

Nothing here is trusted by the judge and nothing here is secret: no test, no expected value and no inherited environment. A program that
takes over this code can at most send other answers, and answers are compared outside.
"""

import array
import gc
import importlib
import os
import signal
import socket
import sys

from wmtp import codec, confine, runtime

CHANNEL = 3
# What programs import most; a forked child finds it loaded.
PRELOADED = """abc array ast atexit bisect calendar cmath collections collections.abc contextlib copy dataclasses datetime decimal enum
fractions functools hashlib heapq inspect io itertools json keyword math numbers operator os.path pickle queue random re statistics
string struct textwrap threading time timeit traceback types typing unicodedata"""


def send(control: socket.socket, message: dict) -> None:
    control.send(codec.dumps(message))


def receive(control: socket.socket) -> tuple[dict, list[int]] | None:
    """One request and the descriptors that came with it; None when the judge has gone."""
    room = array.array("i")
    body, ancillary, _, _ = control.recvmsg(65536, socket.CMSG_LEN(8 * room.itemsize))
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            room.frombytes(data[: len(data) - len(data) % room.itemsize])
    return (codec.loads(body), list(room)) if body else None


class World:
    """Where samples are born: the tier decides how they are forked, confined and killed."""

    def __init__(self, directory: str) -> None:
        self.unprivileged = False
        self.tier = next(tier for tier in TIERS if works(tier, directory))
        self.enter(directory)

    def enter(self, directory: str) -> None:
        if self.tier == NAMESPACES:
            self.unprivileged = namespaces.enter(directory)

    def fork(self, request: dict, descriptors: list[int], control: socket.socket) -> int:
        pid = namespaces.fork() if self.tier == NAMESPACES else os.fork()
        if pid == 0:
            try:
                self.child(request, descriptors, control)
            finally:
                os._exit(1)
        for descriptor in descriptors:
            os.close(descriptor)
        return pid

    def child(self, request: dict, descriptors: list[int], control: socket.socket) -> None:
        """Turns the forked process into the sample; never returns."""
        control.close()
        os.setsid()
        confine.die_with_parent()
        take(descriptors)
        self.confine(request)
        runtime.serve(socket.socket(fileno=CHANNEL))

    def confine(self, request: dict) -> None:
        if self.tier == NAMESPACES:
            namespaces.own_scratch(request["scratch_bytes"])
        else:
            os.chdir(request["directory"])
        confine.set_limits(request["memory_bytes"], request["cpu_seconds"], request["file_bytes"], request["processes"])
        confine.drop_privileges(None if self.unprivileged else request["user"], os.path.dirname(os.__file__))
        if self.tier != RLIMITS:
            seccomp.install(None if self.tier == NAMESPACES else os.getpid())


def take(descriptors: list[int]) -> None:
    """Standard streams and the channel in their places, everything else closed."""
    channel, stdin, stdout = descriptors
    for source, target in ((stdin, 0), (stdout, 1), (os.open(os.devnull, os.O_WRONLY), 2)):
        os.dup2(source, target)
    os.dup2(channel, CHANNEL)
    os.closerange(CHANNEL + 1, max(descriptors) + 2)


def reap(pid: int) -> dict:
    """Kills the child and every process that descends from it; returns the child's wait status and CPU seconds.

    In namespaces the kernel does the latter; elsewhere orphans have become children of this process.
    """
    os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    while True:
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return {"status": status, "cpu": usage.ru_utime + usage.ru_stime}
        if ended == 0:
            with open(f"/proc/self/task/{os.getpid()}/children") as children:
                for orphan in children.read().split():
                    os.kill(int(orphan), signal.SIGKILL)


def main() -> None:
    """Serves requests on the descriptor that argv names, one sample at a time, until the judge closes it."""
    for name in PRELOADED.split():
        importlib.import_module(name)
    sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    os.environ.pop("PYTHONHASHSEED", None)
    control = socket.socket(fileno=int(sys.argv[1]))
    confine.adopt_orphans()
    confine.die_with_parent()
    world = World(sys.argv[2])
    gc.collect()
    gc.freeze()  # children neither scan nor copy what was loaded before them
    pid = 0
    while (received := receive(control)) is not None:
        request, descriptors = received
        if request["op"] == "hello":
            send(control, {"tier": world.tier})
        elif request["op"] == "fork":
            pid = world.fork(request, descriptors, control)
            send(control, {"pid": pid})
        else:
            send(control, reap(pid))
    os._exit(0)


if __name__ == "__main__":
    main()
