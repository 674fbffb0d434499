"""The judge's side of an untrusted program: starts the fork server, talks to one sample at a time, times and kills it.

What holds depends on the tier that the fork server found (`Sandbox.tier`); see `wmtp.confine`. Not covered: faults of the kernel itself,
and in the tier `rlimits` acts against other files and processes of the same user.
"""

import contextlib
import dataclasses
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from wmtp import codec, confine

_ROOT = str(Path(__file__).resolve().parents[1])
_START_SECONDS = 60.0
_REAP_SECONDS = 30.0
_FIRST_SAMPLE_USER = 61184
_CHUNK_BYTES = 1 << 16
# A sample under suspicion of a time-out is looked at no more often than this.
_TICK_SECONDS = 0.005


@dataclasses.dataclass(frozen=True)
class Limits:
    """Per program, or per input of a program that reads stdin. CPU time decides; the wall limit catches sleepers.

    wall_seconds: without the time spent waiting for a CPU, where the kernel tells that time, and then at most 4 times as long by the clock.
    memory_mb: address space, interpreter included (about 30 MB). output_bytes: stdout, each file written, and each answer.
    """

    cpu_seconds: float = 3.0
    wall_seconds: float = 10.0
    memory_mb: int = 512
    output_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"limits.{field.name}: expected more than 0, found {getattr(self, field.name)}")

    @property
    def longest_seconds(self) -> float:
        """After this time by the clock a sample is killed however little it ran."""
        return 4 * self.wall_seconds


class HarnessError(RuntimeError):
    """The sandbox itself failed; says nothing about the program."""


class Ended(Exception):
    """The sample gave no answer and will give none.

    `starved`: it hit the wall limit with CPU time to spare. `status`: its exit status, where it left of itself.
    """

    def __init__(self, verdict: str, detail: str, starved: bool = False, status: int | None = None) -> None:
        super().__init__(f"{verdict}: {detail}")
        self.verdict, self.detail, self.starved, self.status = verdict, detail, starved, status


def interpreter(entry: str) -> list[str]:
    """Command for a bare interpreter that runs `entry` (module:function) of this package.

    Like -I, but the environment is read, because it is our own and fixes the hash seed: verdicts must not depend on the order of sets.
    """
    module, function = entry.split(":")
    code = f"import sys; sys.path.insert(0, {_ROOT!r}); from {module} import {function} as entry; entry()"
    return [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", "-c", code]


def environment() -> dict[str, str]:
    # One malloc arena: further ones reserve address space that counts against the memory limit. Bound at the start: no sample binds again.
    own = {"PYTHONHASHSEED": "0", "LD_BIND_NOW": "1"}
    return own | {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/tmp", "TZ": "UTC", "MALLOC_ARENA_MAX": "1"}


class Sandbox:
    """One fork server; `start` gives samples, one at a time. A context manager: leaving it kills whatever is left.

    `tier` is the isolation found in force; `at_most` keeps a stronger one from being tried. `cpus`: those of samples, where this process
    was pinned to fewer.
    """

    def __init__(self, limits: Limits, at_most: str | None = None, cpus: Sequence[int] | None = None) -> None:
        self.limits, self.cpus = limits, cpus
        self.serial = 0
        with contextlib.ExitStack() as stack:  # an interrupt or an exit too must leave neither process nor directory behind
            self.scratch = Path(tempfile.mkdtemp(prefix="wmtp-judge-"))
            stack.callback(lambda: _remove(self.scratch))
            self.scratch.chmod(0o711)
            self.errors = stack.enter_context(tempfile.TemporaryFile())
            self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.callback(self.control.close)
            with theirs:
                self.zygote = subprocess.Popen(
                    [*interpreter("wmtp.zygote:main"), str(theirs.fileno())],
                    env=environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self.errors,
                    pass_fds=[theirs.fileno()],
                    cwd="/",
                    start_new_session=True,
                )
            stack.callback(self.kill)
            self.control.settimeout(_START_SECONDS)
            self.tier = self.ask({"op": "hello", "tier": at_most, **self.settings()})["tier"]
            self.held = stack.pop_all()

    def kill(self) -> None:
        self.zygote.kill()
        self.zygote.wait()

    def settings(self) -> dict:
        """What holds for every sample of this fork server."""
        root = self.scratch / "root"
        root.mkdir()
        root.chmod(0o777)
        user = _FIRST_SAMPLE_USER + os.getpid() % 4000 if os.geteuid() == 0 else None
        return {
            "root": str(root),
            "user": user,
            "cpus": self.cpus,
            "processes": confine.MAX_PROCESSES + (0 if user is not None else confine.processes_of(os.geteuid())),
            "memory_bytes": self.limits.memory_mb << 20,
            "cpu_seconds": self.limits.cpu_seconds,
            "file_bytes": self.limits.output_bytes,
            "scratch_bytes": 4 * self.limits.output_bytes,
        }

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.held.close()

    def ask(self, request: dict, descriptors: tuple[int, ...] = ()) -> dict:
        """One request to the fork server; anything but an answer is a HarnessError that carries its last words."""
        try:
            socket.send_fds(self.control, [codec.dumps(request)], descriptors)
            body = self.control.recv(4096)
        except OSError as error:
            raise HarnessError(f"fork server: no answer to {request['op']}: {error}") from None
        if not body:
            self.errors.seek(0)
            words = self.errors.read().decode(errors="replace").strip().splitlines()
            raise HarnessError(f"fork server ended at {request['op']}: {words[-1] if words else 'no message'}")
        return codec.loads(body)

    def start(self, stdin: int, stdout: int) -> "Sample":
        """A fresh sample over the given descriptors, in an empty directory of its own, ready for its program."""
        directory = None
        if self.tier != confine.NAMESPACES:  # else the sample brings its own
            self.serial += 1
            directory = self.scratch / str(self.serial)
            directory.mkdir()
            directory.chmod(0o777)
        ours, theirs = socket.socketpair()
        with theirs:
            request = {"op": "fork", "directory": str(directory)}
            pid = self.ask(request, (theirs.fileno(), stdin, stdout))["pid"]
        return Sample(self, ours, pid, directory)


def _remove(directory: Path) -> None:
    """Deletes a directory whatever a sample did to the permissions inside it."""
    try:
        directory.rmdir()
        return
    except OSError:
        os.chmod(directory, 0o700)
    for path, inner, _ in os.walk(directory):
        for name in inner:  # before the walk descends; never through a link, which may lead outside
            if not os.path.islink(os.path.join(path, name)):
                os.chmod(os.path.join(path, name), 0o700)
    shutil.rmtree(directory)


class Sample:
    """A running sample. Every wait counts against one total of CPU and wall time; a context manager that kills on leaving."""

    def __init__(self, sandbox: Sandbox, channel: socket.socket, pid: int, directory: Path | None) -> None:
        self.sandbox, self.limits, self.channel, self.pid, self.directory = sandbox, sandbox.limits, channel, pid, directory
        self.clock = ((~pid) << 3) | 2  # the kernel's number for the CPU clock of another process
        self.started = time.monotonic()
        self.ended: Ended | None = None
        self.ending: dict | None = None
        self.unread = bytearray()
        channel.setblocking(False)
        self.poll = select.poll()
        try:
            self.receive()
        except Ended as error:
            self.stop()
            raise HarnessError(f"sample did not start: {error}") from None

    def __enter__(self) -> "Sample":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> dict:
        """Kills the sample and all its descendants; wait status and CPU seconds of the sample."""
        if self.ending is None:
            self.sandbox.control.settimeout(_REAP_SECONDS)
            self.ending = self.sandbox.ask({"op": "reap"})
            self.channel.close()
            if self.directory is not None:
                _remove(self.directory)
        return self.ending

    def wait(self, event: int) -> None:
        """Until the channel is ready for `event`; past a limit the sample ends."""
        self.poll.register(self.channel, event)
        while True:
            cpu = time.clock_gettime(self.clock)
            clock = time.monotonic() - self.started
            wall = clock if clock < self.limits.wall_seconds or clock >= self.limits.longest_seconds else clock - self.queued()
            if cpu >= self.limits.cpu_seconds:
                self.end(Ended("timeout", f"more than {self.limits.cpu_seconds:g} s of CPU time"))
            if wall >= self.limits.wall_seconds:
                self.end(Ended("timeout", f"more than {self.limits.wall_seconds:g} s by the clock", starved=True))
            left = min(self.limits.cpu_seconds - cpu, self.limits.wall_seconds - wall)
            if self.poll.poll(1000 * max(left, _TICK_SECONDS)):
                return

    def queued(self) -> float:
        """Seconds that the sample was ready to run and had no CPU, which a loaded machine must not hold against it; 0 where untold."""
        try:
            with open(f"/proc/{self.pid}/schedstat") as file:
                return int(file.read().split()[1]) / 1e9
        except (OSError, IndexError):
            return 0.0

    def end(self, ended: Ended) -> None:
        """Remembers why, because a test may swallow the exception."""
        self.ended = ended
        raise ended

    def receive(self) -> object:
        size = codec.LENGTH.unpack(self.exactly(codec.LENGTH.size))[0]
        if size > self.limits.output_bytes:
            self.end(Ended("output-limit", f"an answer of {size} bytes, limit {self.limits.output_bytes}"))
        try:
            return codec.loads(self.exactly(size))
        except codec.CodecError as error:
            self.end(Ended("crash", f"not an answer: {error}"))

    def exactly(self, size: int) -> bytes:
        while len(self.unread) < size:
            self.wait(select.POLLIN)
            try:
                part = self.channel.recv(_CHUNK_BYTES)
            except ConnectionResetError:
                part = b""
            if not part:
                self.end(self.death())
            self.unread += part
        found = bytes(self.unread[:size])
        del self.unread[:size]
        return found

    def send(self, message: object) -> None:
        body = codec.dumps(message)
        left = memoryview(codec.LENGTH.pack(len(body)) + body)
        while left:
            try:
                left = left[self.channel.send(left) :]
            except BlockingIOError:
                self.wait(select.POLLOUT)
            except (BrokenPipeError, ConnectionResetError):
                self.end(self.death())

    def request(self, message: dict) -> dict:
        """The sample's answer as it came: untrusted, and perhaps not even a dictionary of the expected keys."""
        if self.ended is not None:
            raise self.ended
        self.send(message)
        answer = self.receive()
        if type(answer) is not dict:
            self.end(Ended("crash", "not an answer"))
        return answer

    def death(self) -> Ended:
        """The verdict on a sample that closed its channel."""
        ending = self.stop()
        return judge_status(ending["status"], ending["cpu"], self.limits)


def judge_status(status: int, cpu: float, limits: Limits) -> Ended:
    if os.WIFEXITED(status):
        return Ended("error", f"left with exit status {os.WEXITSTATUS(status)}", status=os.WEXITSTATUS(status))
    number = os.WTERMSIG(status)
    if cpu >= limits.cpu_seconds and number in (signal.SIGKILL, signal.SIGXCPU):
        return Ended("timeout", f"more than {limits.cpu_seconds:g} s of CPU time")
    if number == signal.SIGXFSZ:
        return Ended("output-limit", f"a file of more than {limits.output_bytes} bytes")
    return Ended("crash", f"killed by signal {signal.Signals(number).name if number in set(signal.Signals) else number}")
