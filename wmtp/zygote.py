"""The fork server: one small interpreter per worker that forks a child for each program, and the runtime inside such a child.

Nothing here is trusted by the judge and nothing here is secret: no test, no expected value and no inherited environment. A program that
takes over this code can at most send other answers, and answers are compared outside.
"""

import array
import contextlib
import ctypes
import errno
import functools
import gc
import importlib
import os
import signal
import socket
import sys
from collections.abc import Callable

from wmtp import codec, confine, landlock, namespaces, seccomp

CHANNEL = 3
HUGE_BYTES, MADV_COLLAPSE = 1 << 21, 25
LIBRARY = os.path.dirname(os.__file__)
# What programs import most; a forked child finds it loaded. Not hashlib: every fork would copy the page tables of a library of 5 MB.
PRELOADED = """abc array ast atexit bisect calendar cmath collections collections.abc contextlib copy dataclasses datetime decimal enum
fractions functools heapq inspect io itertools json keyword math numbers operator os.path pickle queue random re statistics
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
    """Where samples are born: the tier decides how they are forked and confined.

    What a sample can inherit binds this process too, once: each further step in a child costs it copies of the pages that it touches.
    """

    def __init__(self, tier: str, settings: dict) -> None:
        self.tier = tier
        self.settings = settings
        confine.set_limits(settings["memory_bytes"], settings["file_bytes"])
        if tier == confine.NAMESPACES:
            mapped = namespaces.enter(settings["root"])  # then no second user exists
            self.kept = confine.drop_privileges(None if mapped else settings["user"], LIBRARY, confine.MAKE_NAMESPACES)
            confine.die_with_parent()  # the change of user undid it
            seccomp.install(seccomp.SERVER)
            seccomp.program(seccomp.REST)

    def fork(self) -> int:
        return namespaces.fork() if self.tier == confine.NAMESPACES else os.fork()

    def confine(self, directory: str) -> None:
        """Binds this process, a fresh child, for good."""
        settings = self.settings
        confine.run_anywhere(settings["cpus"])
        confine.set_own_limits(settings["cpu_seconds"], settings["processes"])
        if self.tier == confine.NAMESPACES:
            namespaces.own_scratch(settings["scratch_bytes"])
            confine.set_capabilities(self.kept)
        else:
            os.chdir(directory)
            confine.drop_privileges(settings["user"], LIBRARY)
        confine.die_with_parent()
        if self.tier == confine.LANDLOCK:
            landlock.install(directory)
        if self.tier == confine.NAMESPACES:
            seccomp.install(seccomp.REST)
        elif self.tier != confine.RLIMITS:
            seccomp.install(seccomp.WHOLE, os.getpid())


def find_world(settings: dict) -> World:
    """The strongest tier that a rehearsal in a child shows to work here, but none above `settings["tier"]` where that names one."""
    first = confine.TIERS.index(settings["tier"]) if settings["tier"] is not None else 0
    working = (tier for tier in confine.TIERS[first:-1] if succeeds(os.fork, functools.partial(rehearse, tier, settings)))
    return World(next(working, confine.RLIMITS), settings)


def succeeds(fork: Callable[[], int], action: Callable[[], None]) -> bool:
    """Whether `action` ends well in a forked child; else its last words go to stderr."""
    pid = fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except (OSError, AssertionError) as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def rehearse(tier: str, settings: dict) -> None:
    world = World(tier, settings)

    def sample() -> None:
        world.confine(settings["root"])
        prove(tier)

    assert succeeds(world.fork, sample), f"tier {tier} does not work here"


def prove(tier: str) -> None:
    """What the tier promises, tried from inside."""
    assert confine.libc.unshare(namespaces.NEWUSER) < 0, "a new user namespace was granted"
    with open("probe", "w"):
        pass
    if tier == confine.LANDLOCK:
        assert not readable("/etc/passwd"), "the host's files are in sight"
    if tier == confine.NAMESPACES:
        assert os.getpid() == 1, "other processes are in sight"
        assert not os.access("/", os.W_OK) and not os.path.exists("/etc/passwd"), "the host's files are in sight"
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", 9)) == errno.ENETUNREACH, "the host's network is in sight"


def readable(path: str) -> bool:
    try:
        with open(path, "rb"):
            return True
    except PermissionError:
        return False


def start(world: World, request: dict, descriptors: list[int], control: socket.socket, fork_hooks: list[dict]) -> int:
    """Forks a sample; the child never returns. `fork_hooks`: of `load`, for what the sample itself forks."""
    from wmtp import runtime

    pid = world.fork()
    if pid == 0:
        try:
            control.close()
            os.setsid()
            take(descriptors)
            world.confine(request["directory"])
            for hooks in fork_hooks:
                os.register_at_fork(**hooks)
            runtime.serve(socket.socket(fileno=CHANNEL))
        finally:
            os._exit(1)
    for descriptor in descriptors:
        os.close(descriptor)
    return pid


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


def load() -> list[dict]:
    """Imports what samples use. What this registers to run after a fork is returned and not run here: half a millisecond a sample."""
    hooks: list[dict] = []
    register, os.register_at_fork = os.register_at_fork, lambda **given: hooks.append(given)
    for name in PRELOADED.split():
        importlib.import_module(name)
    from wmtp import runtime  # noqa: F401 - not before, for it registers too

    os.register_at_fork = register
    return hooks


def collapse_heap() -> None:
    """Asks for huge pages behind the heap, whose page tables a fork copies in larger pieces; where there are none, nothing is lost."""
    with open("/proc/self/maps") as maps:
        private = [fields[0] for fields in map(str.split, maps) if fields[1] == "rw-p" and fields[5:] in ([], ["[heap]"])]
    for span in private:
        first, end = (int(bound, 16) for bound in span.split("-"))
        first, end = -(-first // HUGE_BYTES) * HUGE_BYTES, end // HUGE_BYTES * HUGE_BYTES
        if first < end:
            confine.libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), MADV_COLLAPSE)


def prepare() -> socket.socket:
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path[:] = [entry for entry in sys.path if entry != package]
    sys.executable = os.path.realpath(sys.executable)  # a virtual environment's link leads nowhere under a private root
    for name in ("PYTHONHASHSEED", "LD_BIND_NOW"):
        os.environ.pop(name)
    confine.adopt_orphans()
    confine.die_with_parent()
    return socket.socket(fileno=int(sys.argv[1]))


def main() -> None:
    """Serves requests on the descriptor that argv names, one sample at a time, until the judge closes it."""
    fork_hooks, control = load(), prepare()
    gc.collect()
    with contextlib.suppress(OSError):
        collapse_heap()
    world, pid = None, 0
    while (received := receive(control)) is not None:
        request, descriptors = received
        if request["op"] == "hello":
            world = find_world(request)
            gc.collect()
            gc.freeze()  # children neither scan nor copy what was loaded before them
            send(control, {"tier": world.tier})
        elif request["op"] == "fork":
            pid = start(world, request, descriptors, control, fork_hooks)
            send(control, {"pid": pid})
        else:
            send(control, reap(pid))
    os._exit(0)
