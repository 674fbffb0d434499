"""System calls that no sample needs, refused by a seccomp filter (Linux, x86-64 and aarch64).

A deny list: what the kernel offers a process without privileges stays, ways to look into other processes, to change the system or to make
namespaces go. `clone3` answers ENOSYS, so that the C library falls back to `clone`, whose flags a filter can read.

Three filters: SERVER binds the fork server of the namespaces tier, which makes namespaces and mounts for each sample, and its samples
inherit it; REST refuses a sample these, and costs less than the whole; WHOLE is the whole, for a sample whose fork server is not bound.
"""

import ctypes
import errno
import functools
import platform
import struct

from wmtp import confine

_X86_64, _AARCH64 = 0, 1
# name: (x86-64, aarch64), -1 where the architecture lacks it
_DENIED = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438), "kcmp": (312, 272), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60),
    "personality": (135, 92), "syslog": (103, 116), "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "sethostname": (170, 161), "setdomainname": (171, 162), "vhangup": (153, 58),
    "iopl": (172, -1), "ioperm": (173, -1), "modify_ldt": (154, -1),
    # What these make outlives the process, and the next sample is of the same user and in the same namespaces. A socket that has a name
    # and is on its way through itself is closed later than its process, by the kernel's own collector.
    "bind": (49, 200),
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191),
    "semtimedop": (220, 192), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187),
    "mq_open": (240, 180), "mq_unlink": (241, 181),
}  # fmt: skip
# What SERVER allows; `clone` with the flags of namespaces is the other.
_MOUNT = "mount"
# Without namespaces these reach other processes of the same user, or the network.
_DENIED_SHARED = {
    "socket": (41, 198), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424), "setpriority": (141, 140), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
}  # fmt: skip
# Allowed without namespaces only where the first argument is the caller itself.
_OWN_PROCESS = {"kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261)}
_CLONE, _CLONE3, _SECCOMP = (56, 220), (435, 435), (317, 277)
_NAMESPACE_FLAGS = 0x7E020000
_AUDIT_ARCH = (0xC000003E, 0xC00000B7)
_X32_BIT = 0x40000000

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCH_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_SET_MODE_FILTER, _FLAG_SPEC_ALLOW = 1, 4
SERVER, REST, WHOLE = "server", "rest", "whole"


def architecture() -> int:
    names = {"x86_64": _X86_64, "aarch64": _AARCH64}
    if platform.machine() not in names:
        raise OSError(errno.ENOSYS, f"no seccomp table for {platform.machine()}, expected one of {sorted(names)}")
    return names[platform.machine()]


def program(part: str, own_process: int | None = None) -> bytes:
    """The filter as BPF instructions; `own_process`: for WHOLE, the only process that may be signalled."""
    return _assembled(part, own_process, architecture())


@functools.lru_cache(maxsize=4)
def _assembled(part: str, own_process: int | None, which: int) -> bytes:
    """The fork server asks for REST before it forks, which keeps it for its samples."""
    refuse = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    code = [(_LOAD, 0, 0, _ARCH_AT), (_EQUAL, 1, 0, _AUDIT_ARCH[which]), refuse, (_LOAD, 0, 0, _NUMBER_AT)]
    if which == _X86_64:
        code += [(_AT_LEAST, 0, 1, _X32_BIT), refuse]
    for name, numbers in (_DENIED | (_DENIED_SHARED if part == WHOLE else {})).items():
        wanted = part == WHOLE or (name == _MOUNT) == (part == REST)
        code += [(_EQUAL, 0, 1, numbers[which]), refuse] if wanted and numbers[which] >= 0 else []
    if part != REST:
        code += [(_EQUAL, 0, 1, _CLONE3[which]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    for numbers in _OWN_PROCESS.values() if part == WHOLE else ():
        code += [(_EQUAL, 0, 5, numbers[which]), (_LOAD, 0, 0, _FIRST_ARGUMENT_AT), (_EQUAL, 2, 0, own_process), (_EQUAL, 1, 0, 0)]
        code += [refuse, (_RETURN, 0, 0, _ALLOW)]
    if part != SERVER:
        code += [(_EQUAL, 0, 3, _CLONE[which]), (_LOAD, 0, 0, _FIRST_ARGUMENT_AT), (_ANY_BIT, 0, 1, _NAMESPACE_FLAGS), refuse]
    code += [(_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def install(part: str, own_process: int | None = None) -> None:
    """Binds this process and all it starts, beside what binds it already; needs no_new_privs or CAP_SYS_ADMIN."""
    code = program(part, own_process)
    filtered = _Program(len(code) // 8, code)
    confine.syscall(_SECCOMP[architecture()], _SET_MODE_FILTER, _FLAG_SPEC_ALLOW, ctypes.addressof(filtered), what="seccomp")
