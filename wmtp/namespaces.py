"""A private world for the fork server and one within it for each sample: no network, no host files but the interpreter, no host processes.

The fork server enters user (where it is not root), mount, net, ipc, uts and cgroup namespaces once, over a read-only root that holds the
interpreter and the system's libraries. Each sample is cloned into its own pid and mount namespace with its own scratch directory, which
is also /tmp and /dev/shm. There is no /proc: nothing but facts about the host is there to read.
"""

import ctypes
import os
import signal

from wmtp import confine

_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC, NEWUSER, _NEWPID, _NEWNET = (
    0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MNT_DETACH, _AT_FDCWD, _AT_RECURSIVE = 2, -100, 0x8000
_ATTR_RDONLY_NOSUID = 3
_MOUNT_SETATTR = 442
_CLONE = {"x86_64": 56, "aarch64": 220}
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
# Not 0: a program started by the sample would otherwise look like root to itself.
INSIDE_USER = 1000
SCRATCH = "/scratch"


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [part.encode() if part is not None else None for part in (source, target, kind)]
    data = options.encode() if options is not None else None
    confine.checked(confine.libc.mount(*encoded, ctypes.c_ulong(flags), data), f"mount {target}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _map_user(user: int, group: int) -> None:
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{INSIDE_USER} {user} 1")
    _write("/proc/self/gid_map", f"{INSIDE_USER} {group} 1")


def _bind(path: str, root: str) -> None:
    """Shows a host file, directory or symbolic link at the same place under the new root."""
    target = root + path
    os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, mode=0o755, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(path, target, None, _MS_BIND | _MS_REC)


def _furnish(root: str) -> None:
    for path in (*confine.SYSTEM_PATHS, *confine.DEVICES, *confine.interpreter_prefixes()):
        if os.path.lexists(path):
            _bind(path, root)
    os.mkdir(root + SCRATCH)
    os.mkdir(root + "/proc")
    for place in ("/tmp", "/dev/shm"):
        if not os.path.lexists(root + place):  # the interpreter itself may live under /tmp
            os.symlink(SCRATCH, root + place)


def enter(directory: str) -> bool:
    """Moves this process into its namespaces, with the new root built over the empty `directory`; True if a user namespace was needed.

    Raises OSError where the kernel or the container denies it; this process is then fit for nothing, so try in a child first.
    """
    user, group = os.geteuid(), os.getegid()
    base = _NEWNS | _NEWNET | _NEWIPC | _NEWUTS | _NEWCGROUP
    unprivileged = user != 0 or confine.libc.unshare(base) < 0
    if unprivileged:
        confine.checked(confine.libc.unshare(base | NEWUSER), "unshare")
        _map_user(user, group)
    os.umask(0o022)
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", directory, "tmpfs", _MS_NOSUID, "size=1m,mode=0755")
    _furnish(directory)
    attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY_NOSUID, 0, 0, 0)
    confine.syscall(_MOUNT_SETATTR, _AT_FDCWD, directory.encode(), _AT_RECURSIVE, ctypes.addressof(attributes), 32, what="mount_setattr")
    os.chdir(directory)
    confine.syscall(_PIVOT_ROOT[os.uname().machine], b".", b".", what="pivot_root")
    confine.checked(confine.libc.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/")
    return unprivileged


def fork() -> int:
    """Like os.fork, into a pid and a mount namespace of its own: the child is the first process there, and all others die with it."""
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = confine.libc.syscall(
        ctypes.c_long(_CLONE[os.uname().machine]), ctypes.c_ulong(_NEWPID | _NEWNS | signal.SIGCHLD), None, None, None, None
    )
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    return confine.checked(pid, "clone")


def own_scratch(size: int) -> None:
    """An empty scratch directory of `size` bytes that vanishes with the sample."""
    _mount("tmpfs", SCRATCH, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={size},nr_inodes=4096,mode=1777")
    os.chdir(SCRATCH)
