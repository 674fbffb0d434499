"""What the kernel enforces on a sample: resource limits and privileges, by direct system calls.

Runs in the fork server and in its children, so it imports the standard library alone.
"""

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS = 1, 4, 8
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_CAPABILITY_VERSION_3 = 0x20080522
_CAP_DAC_READ_SEARCH, _CAP_SYS_ADMIN = 2, 21
NO_CAPABILITY, MAKE_NAMESPACES = 0, 1 << _CAP_SYS_ADMIN
_SIGKILL = 9
MAIN_STACK_BYTES = 64 << 20
MAX_OPEN_FILES = 256
MAX_PROCESSES = 128
# From the strongest to the one that always works. What each refuses: the first, all of it; landlock, other files, other processes and the
# network, but not the metadata of the user's own files; seccomp alone, other processes and the network; rlimits, neither.
TIERS = NAMESPACES, LANDLOCK, SECCOMP, RLIMITS = "namespaces+seccomp", "landlock+seccomp", "seccomp", "rlimits"
# Here programs reach the files that their user may touch, and in the last one everything that such a user can do.
WEAK_TIERS = (SECCOMP, RLIMITS)
# What an interpreter needs of the host, beside its own prefix.
SYSTEM_PATHS = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

# PyDLL keeps the interpreter lock over the call, which a forking system call needs.
libc = ctypes.PyDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def checked(result: int, what: str) -> int:
    """The result of a C call, or its errno as an OSError that names the call."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(number: int, *arguments: int | bytes, what: str) -> int:
    """A system call by its number; integers go as C longs."""
    converted = [argument if isinstance(argument, bytes) else ctypes.c_long(argument) for argument in arguments]
    return checked(libc.syscall(ctypes.c_long(number), *converted), what)


def interpreter_prefixes() -> list[str]:
    """Directories outside SYSTEM_PATHS that hold this interpreter and its library."""
    prefixes = {os.path.realpath(sys.base_prefix), os.path.realpath(sys.base_exec_prefix)}
    return sorted(prefix for prefix in prefixes if not prefix.startswith("/usr"))


def prctl(option: int, argument: int = 0) -> None:
    unsigned = ctypes.c_ulong
    checked(libc.prctl(option, unsigned(argument), unsigned(0), unsigned(0), unsigned(0)), f"prctl({option})")


def hide_from_tracers() -> None:
    """No process of the same user may read this one's memory or trace it."""
    prctl(_PR_SET_DUMPABLE, 0)


def adopt_orphans() -> None:
    """Descendants whose parent dies become children of this process, where they can be found and killed."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    prctl(_PR_SET_PDEATHSIG, _SIGKILL)


def set_capabilities(mask: int) -> None:
    """Permitted and effective capabilities become `mask`, inheritable ones none."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    checked(libc.capset(header, data), "capset")


def drop_privileges(user: int | None, readable: str, kept: int = NO_CAPABILITY) -> int:
    """Become `user` (None: stay) for good, with the capabilities `kept` alone and without a way to gain any.

    Where the new user cannot read the standard library at `readable`, the capability to read files is added, else imports would fail;
    returns it as a mask, which is 0 elsewhere.
    """
    if user is not None:
        prctl(_PR_SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    reading = NO_CAPABILITY if user is None or os.access(readable, os.R_OK | os.X_OK) else 1 << _CAP_DAC_READ_SEARCH
    set_capabilities(kept | reading)
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    return reading


def _lower(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (bound, bound))


def set_limits(memory_bytes: int, file_bytes: int) -> None:
    """Those that a fork server can bear itself and leave to its samples."""
    _lower(resource.RLIMIT_AS, memory_bytes)
    _lower(resource.RLIMIT_FSIZE, file_bytes)
    _lower(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_STACK, MAIN_STACK_BYTES)


def set_own_limits(cpu_seconds: float, processes: int) -> None:
    """Those that only a sample can bear. That of CPU time is a backstop: the judge reads the clock from outside and acts first."""
    _lower(resource.RLIMIT_CPU, int(cpu_seconds) + 2)
    _lower(resource.RLIMIT_NPROC, processes)


def run_anywhere(cpus: Sequence[int] | None) -> None:
    """Undoes a pinning that was inherited; CPUs that have gone meanwhile leave it as it is. None: nothing was pinned."""
    if cpus is not None:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cpus)


def keep_to(cpu: int | None) -> list[int] | None:
    """Pins this process and what it starts to `cpu`; the CPUs that it had before, None where nothing is pinned. For speed alone."""
    if cpu is None:
        return None
    before = sorted(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, [cpu])
    return before


def processes_of(user: int) -> int:
    """Threads that `user` has now, which the kernel counts against the limit on processes."""
    total = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                total += len(os.listdir(f"/proc/{entry.name}/task")) if entry.stat().st_uid == user else 0
            except OSError:
                continue  # the process ended while we looked
    return total
