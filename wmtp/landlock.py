"""Files, TCP and signals fenced off by Landlock (Linux 5.13, better from 6.12), for places where namespaces are denied.

Reading stays possible in the system's libraries and the interpreter, writing in one directory. Not covered: metadata such as
permissions of the user's own files.
"""

import ctypes
import os
import struct

from wmtp import confine

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_READ = _EXECUTE | _READ_FILE | _READ_DIR
# File rights known to each version of the interface, as the number of low bits.
_FILE_RIGHTS_BY_VERSION = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_NETWORK_RIGHTS, _SCOPES = 3, 3


def _attributes(version: int) -> bytes:
    """Everything that this version can forbid is forbidden until a rule allows it."""
    files = (1 << _FILE_RIGHTS_BY_VERSION[min(version, max(_FILE_RIGHTS_BY_VERSION))]) - 1
    fields = [files] + [_NETWORK_RIGHTS] * (version >= 4) + [_SCOPES] * (version >= 6)
    return struct.pack(f"={len(fields)}Q", *fields)


def _allow(ruleset: int, path: str, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, descriptor))
    confine.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.addressof(rule), 0, what=f"landlock_add_rule {path}")
    os.close(descriptor)


def install(writable: str) -> None:
    """Binds this process and all it starts; needs no_new_privs."""
    version = confine.syscall(_CREATE_RULESET, 0, 0, _VERSION_FLAG, what="landlock_create_ruleset")
    attributes = _attributes(version)
    every_file_right = struct.unpack_from("=Q", attributes)[0]
    ruleset = confine.syscall(_CREATE_RULESET, attributes, len(attributes), 0, what="landlock_create_ruleset")
    for path in (*confine.SYSTEM_PATHS, *confine.interpreter_prefixes()):
        if os.path.exists(path):
            _allow(ruleset, path, _READ if os.path.isdir(path) else _READ_FILE)
    for path in confine.DEVICES:
        _allow(ruleset, path, _READ_FILE | _WRITE_FILE)
    _allow(ruleset, writable, every_file_right)
    confine.syscall(_RESTRICT_SELF, ruleset, 0, what="landlock_restrict_self")
    os.close(ruleset)
