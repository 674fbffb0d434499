"""The codec, the checkers, the filter, and attacks on the sandbox in every tier that works here: one property each."""

import collections
import contextlib
import dataclasses
import errno
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp import checkers, codec, confine, referee, seccomp
from wmtp.judge import judge
from wmtp.records import AssertTests, Problem
from wmtp.sandbox import HarnessError, Limits, Sandbox

ADD = Problem(
    task_id="add", source="mbpp", group="add", statement="", tests=AssertTests(asserts=["assert add(1, 2) == 3", "assert add(5, 6) == 11"])
)
ONE = ADD.model_copy(update={"tests": AssertTests(asserts=["assert add(1, 2) == 3"])})
RIGHT = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return 0\n"
SHORT = Limits(cpu_seconds=0.5, wall_seconds=1.5, memory_mb=256, output_bytes=1 << 20)


def outcome(program, problem=ADD, limits=SHORT):
    return judge([(problem, program)], limits, 1)[0]


def at(tier):
    """A sandbox of exactly this tier."""
    sandbox = Sandbox(SHORT, tier)
    if sandbox.tier != tier:
        sandbox.__exit__()
        pytest.skip(f"this machine allows {sandbox.tier}, not {tier}")
    return sandbox


def decided(sandbox, program, problem=ADD):
    return referee.decide(sandbox, {"program": program, "prompt": "", "tests": problem.tests.model_dump(), "all_tests": False}).verdict


def refuse(value):
    raise codec.CodecError(f"cannot cross: {type(value).__name__}")


def crossed(value):
    return codec.decode(codec.loads(codec.dumps(codec.encode(value, refuse))), refuse)


numbers = st.booleans() | st.integers() | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False)
scalars = st.none() | numbers | st.text(max_size=8) | st.binary(max_size=8)
hashable = st.recursive(scalars, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=4), max_leaves=4)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.tuples(inner) | st.sets(hashable, max_size=4) | st.dictionaries(hashable, inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(values)
def test_exact_values_cross_unchanged(value):
    made = crossed(value)
    assert made == value
    assert type(made) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        -0.0,
        float("inf"),
        float("nan"),
        True,
        1 << 5000,
        range(0, 10, 3),
        slice(1, None),
        bytearray(b"x"),
        int,
        ValueError,
        "\ud800",
        {1: {2: (3,)}},
        Fraction(1, 3),
        Decimal("1.50"),
        Decimal("nan"),
    ],
)
def test_rarer_values_cross(value):
    assert repr(crossed(value)) == repr(value)
    assert type(crossed(value)) is type(value)


def test_subclasses_leave_their_methods_behind():
    class Agreeable(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

    class Named(collections.namedtuple("Named", "x y")):
        pass

    for value, plain in [
        (Agreeable(7), 7),
        (Named(1, 2), (1, 2)),
        (collections.OrderedDict(a=1), {"a": 1}),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        ({"a": 1}.keys(), {"a"}),
    ]:
        made = crossed(value)
        assert made == plain
        assert type(made) is type(plain)
    assert crossed(Agreeable(7)) != 8


@pytest.mark.parametrize(
    "form",
    [
        ["x", 1],
        ["l"],
        ["l", 3],
        ["d", [[1]]],
        ["d", [[["l", []], 1]]],
        ["i", "zz"],
        ["n", "eval"],
        ["n", "__import__"],
        ["r", [0, 1, 0]],
        ["r", [0, 10**18, 1]],
        ["h", "0"],
        ["h", 99],
        ["q", 1, 0],
        ["q", "1", 2],
        ["D", "1e999999"],
        ["D", "x"],
        {"l": []},
        [],
        [[]],
        ["s", [["l", []]]],
        ["s", list(range(codec.MAX_KEYS + 1))],
    ],
)
def test_messages_outside_the_format_are_refused(form):
    with pytest.raises(codec.CodecError):
        codec.decode(form, refuse)


EXACT = (
    type(None), bool, int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict, range, slice, Fraction, Decimal, type,
    type(len),
)  # fmt: skip
tags = st.sampled_from(list("ltsfdicbBrSqDnhmx")) | st.text(max_size=3)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text("0123456789abcdefe.-+ ", max_size=6)


def tagged(inner):
    return st.tuples(tags, st.lists(inner, max_size=4)).map(lambda both: [both[0], *both[1]])


messages = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.tuples(tags, inner).map(list) | tagged(inner), max_leaves=12)


def all_parts(value):
    yield value
    if type(value) in (list, tuple, set, frozenset, dict):
        for part in value.items() if type(value) is dict else value:
            yield from all_parts(part)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(messages)
def test_any_message_gives_exact_types_or_is_refused(form):
    try:
        made = codec.decode(codec.loads(codec.dumps(form)), refuse)
    except codec.CodecError:
        return
    assert all(type(part) in EXACT for part in all_parts(made))
    codec.encode(made, refuse)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_message_or_refused(body):
    with contextlib.suppress(codec.CodecError):
        codec.decode(codec.loads(body), refuse)


def test_depth_and_size_are_bounded():
    for levels, refused in ((codec.MAX_DEPTH - 1, False), (codec.MAX_DEPTH + 1, True)):
        nested = 0
        for _ in range(levels):
            nested = ["l", [nested]]
        with pytest.raises(codec.CodecError) if refused else contextlib.nullcontext():
            codec.decode(nested, refuse)
    deep = []
    for _ in range(100_000):
        deep = ["l", [deep]]
    with pytest.raises(codec.CodecError):
        codec.decode(deep, refuse)
    with pytest.raises(codec.CodecError):
        codec.encode(object(), refuse)
    for text in (b"[" * 200_000, b"1" * 10_000, b"{", b"\xff"):
        with pytest.raises(codec.CodecError):
            codec.loads(text)


@pytest.mark.parametrize(
    "name, found, expected, same",
    [
        ("exact", "1 2\n3 \n", "1 2\n3", True),
        ("exact", "1  2", "1 2", False),
        ("exact", "1\n2", "1 2", False),
        ("token", "1  2\n3", "1 2 3", True),
        ("token", "yes", "YES", False),
        ("token-caseless", "yes No", "YES\nno", True),
        ("token-float1e-6", "0.3333333", "0.33333333", True),
        ("token-float1e-6", "1e9", "1000000001", True),
        ("token-float1e-6", "0.33", "0.34", False),
        ("token-float1e-6", "nan", "1.0", False),
        ("token-float1e-6", "inf", "1e400", False),
        ("token-float1e-6", "1_0", "10", False),
        ("token-float1e-6", "1 2", "1", False),
        ("token-float1e-6", "abc", "abc", True),
    ],
)
def test_checkers(name, found, expected, same):
    assert checkers.CHECKERS[name](found, expected) is same


def test_limits_must_be_positive():
    with pytest.raises(ValueError, match=r"limits\.cpu_seconds: expected more than 0, found 0"):
        Limits(cpu_seconds=0)
    assert dataclasses.replace(Limits(), memory_mb=1).memory_mb == 1


TIME = {
    "busy loop": "while True: pass",
    "swallowed exceptions": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "ignored signals": "import signal\nfor s in (1, 2, 3, 14, 15, 24):\n    signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    "loop in C": "sum(range(10**12))",
    "busy threads": "import threading\ndef f():\n    while True: pass\nfor _ in range(3): threading.Thread(target=f).start()\nf()",
    "sleep": "import time\ntime.sleep(1000)",
    "self-stop": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nimport time\ntime.sleep(1000)",
    "waits for itself": "import threading\nl = threading.Lock()\nl.acquire()\nl.acquire()",
}


@pytest.mark.slow
@pytest.mark.parametrize("attack", TIME.values(), ids=TIME)
def test_time_is_bounded(attack):
    assert outcome(f"{attack}\n{RIGHT}").verdict == "timeout"
    indented = attack.replace("\n", "\n    ")
    assert outcome(f"def add(a, b):\n    {indented}\n    return a + b\n").verdict == "timeout"


RESOURCES = {
    "memory": ("x = bytearray(10**9)", {"memory"}),
    "memory in steps": ("x = []\nwhile True: x.append('a' * 10**6)", {"memory"}),
    "many small objects": ("x = [[] for _ in range(10**8)]", {"memory", "timeout"}),
    "recursion": ("def f(): return f()\nf()", {"error"}),
    # Out of memory, CPython may have no exception left to raise: a SystemError.
    "recursion without a limit": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
        {"memory", "crash", "timeout", "error: SystemError"},
    ),
    "compiler": ("eval('(' * 10**5)", {"error", "memory", "crash"}),
    "huge integer": ("x = 10 ** 10 ** 9", {"timeout", "memory"}),
    "segmentation fault": ("import ctypes\nctypes.string_at(0)", {"crash"}),
    "abort": ("import os\nos.abort()", {"crash"}),
    "file": ("f = open('big', 'wb')\nwhile True: f.write(b'x' * 10**6)", {"error", "output-limit", "memory"}),
    "descriptors": ("import os\nwhile True: os.dup(0)", {"error"}),
    "raised limits": ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nx = bytearray(10**9)", {"error"}),
    "fork bomb": ("import os\nwhile True:\n    os.fork()", {"error", "timeout", "crash"}),
    "threads": ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()", {"error", "memory"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("attack, verdicts", RESOURCES.values(), ids=RESOURCES)
def test_resources_are_bounded(attack, verdicts):
    # Enough time to reach the bound on a slow machine: 256 MB of fresh pages took more than half a second on one.
    found = outcome(f"{attack}\n{RIGHT}", limits=dataclasses.replace(SHORT, cpu_seconds=4.0, wall_seconds=8.0))
    assert {found.verdict, f"{found.verdict}: {found.detail.split(':')[0]}"} & verdicts, found


def test_huge_answers_are_refused():
    assert outcome("def add(a, b): return 'x' * 10**7").verdict == "output-limit"
    assert outcome("def add(a, b):\n    x = []\n    for _ in range(10**4): x = [x]\n    return x").verdict == "output-limit"
    assert outcome("def add(a, b): return 1 << 10**7").verdict == "output-limit"
    assert outcome("def add(a, b): return range(10**15)").verdict == "output-limit"


def marked(marker):
    """Processes alive whose command line or environment carries the marker."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                with open(f"/proc/{entry.name}/cmdline", "rb") as file:
                    found += [entry.name] if marker.encode() in file.read() else []
            except OSError:
                continue
    return found


@pytest.mark.parametrize("tier", confine.TIERS)
@pytest.mark.parametrize("after", ["", "import os\nos._exit(0)\n"])
def test_no_process_outlives_its_sample(tier, after):
    # A daemon in a session of its own, with every descriptor closed and the parent gone.
    marker = f"wmtp-orphan-{os.getpid()}-{tier}"
    program = f"""
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 200)
        os.execv({os.path.realpath("/bin/sh")!r}, ["sh", "-c", "sleep 100; : {marker}"])
    os._exit(0)
time.sleep(0.3)
{after}
def add(a, b): return {{found}}
"""
    with at(tier) as sandbox:
        assert decided(sandbox, program.format(found="a + b")) == ("error" if after else "pass")
    deadline = time.monotonic() + 5
    while marked(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert marked(marker) == []


def test_nothing_of_the_host_reaches_the_program(monkeypatch):
    monkeypatch.setenv("WMTP_SECRET", "token")
    program = """
import os, sys
assert not [name for name in os.environ if "SECRET" in name or name.startswith(("PYTHON", "LD_"))], os.environ
assert os.listdir(".") == [], os.listdir(".")
assert not any("site-packages" in path for path in sys.path), sys.path
held = []
for descriptor in range(64):
    try:
        os.fstat(descriptor)
        held.append(descriptor)
    except OSError:
        pass
assert len(held) == 4, held
"""
    assert outcome(program + RIGHT) == outcome(RIGHT)


def test_one_program_leaves_nothing_for_the_next():
    plant = """
import builtins, os
open('planted', 'w').write('x')
os.mkdir('d')
open('d/f', 'w').close()
os.chmod('d', 0)
builtins.planted = 1
"""
    look = "import os, builtins\nassert os.listdir('.') == []\nassert not hasattr(builtins, 'planted')\n"
    assert [made.verdict for made in judge([(ADD, plant + RIGHT), (ADD, look + RIGHT)], SHORT, 1)] == ["pass", "pass"]


@pytest.mark.parametrize("tier", confine.TIERS)
def test_nothing_planted_stays_in_any_tier(tier):
    plant = """
import os
os.makedirs('d/e')
open('d/e/f', 'w').close()
os.symlink('/', 'd/link')
for name in ('d/e', 'd', '.'):
    try:
        os.chmod(name, 0)
    except PermissionError:
        assert name == '.'
"""
    look = "import os\nassert os.listdir('.') == []\n"
    with at(tier) as sandbox:
        assert decided(sandbox, plant + RIGHT) == decided(sandbox, look + RIGHT) == "pass"


@pytest.mark.parametrize("tier", confine.TIERS)
def test_every_tier_tells_right_from_wrong(tier):
    threads = "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()\n"
    programs = {RIGHT: "pass", WRONG: "fail", "while True: pass": "timeout", "x = 'x' * 10**9": "memory", threads + RIGHT: "pass"}
    with at(tier) as sandbox:
        assert {program: decided(sandbox, program) for program in programs} == programs


SHARED, FILES, NETWORK = confine.TIERS[:3], confine.TIERS[:2], confine.TIERS[:3]
# Each function returns 3 = add(1, 2) where the act was refused. The tiers are those that promise to refuse it.
ACTS = {
    "signal": ("import os\ndef act(): os.kill({pid}, 0)", SHARED),
    "signal to the group": ("import os\ndef act(): os.killpg(os.getpgid({pid}), 0)", SHARED),
    "signal to all": ("import os\ndef act():\n    os.kill(-1, 0)\n    if os.getpid() == 1: raise OSError", SHARED),
    "trace": ("def act(): check(libc.ptrace(16, {pid}, 0, 0))", SHARED),
    "read memory": ("def act(): denied(libc.syscall({process_vm_readv}, {pid}, 0, 0, 0, 0, 0))", SHARED),
    "change limits": ("import resource\ndef act(): resource.prlimit({pid}, resource.RLIMIT_NOFILE, (9, 9))", SHARED),
    "new namespace": ("def act(): check(libc.unshare(0x10000000))", SHARED),
    "clone into one": ("def act(): denied(libc.syscall({clone}, 0x10000011, 0, 0, 0, 0))", SHARED),
    "own limits": ("import resource\ndef act(): resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))", confine.TIERS),
    "become root": ("import os\ndef act():\n    os.setresuid(0, 0, 0)", confine.TIERS),
    "read a file": ("def act(): open({canary!r}).read()", FILES),
    "write a file": ("def act(): open({canary!r}, 'a').write('x')", FILES),
    "delete a file": ("import os\ndef act(): os.remove({canary!r})", FILES),
    "plant a file": ("def act(): open({canary!r} + '2', 'w').write('x')", FILES),
    "shared memory": ("def act(): denied(libc.shmget(4242, 4096, 0o1666))", SHARED),
    "shared memory by number": ("def act():\n    libc.shmat.restype = ctypes.c_long\n    denied(libc.shmat(0, None, 0))", SHARED),
    "semaphores": ("def act(): denied(libc.semget(4242, 1, 0o1666))", SHARED),
    "message queue": ("def act(): denied(libc.msgget(4242, 0o1666))", SHARED),
    "named message queue": ("def act(): denied(libc.mq_open(b'/wmtp-test', 0o102, 0o666, None))", SHARED),
    "name of a socket": ("import socket\ndef act(): socket.socketpair()[0].bind('\\0wmtp-test-name')", SHARED),
    "list processes": ("import os\ndef act(): open('/proc/{pid}/environ').read()", FILES),
    "connect": ("import socket\ndef act(): socket.create_connection(('127.0.0.1', {port}), 1)", NETWORK),
    "abstract socket": ("import socket\ndef act(): socket.socket(socket.AF_UNIX).connect({abstract!r})", NETWORK),
}
ASIDE = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def check(result):
    if result < 0: raise OSError(ctypes.get_errno(), 'refused')
def denied(result):
    if (result, ctypes.get_errno()) == (-1, 1): raise OSError('refused by the filter')
def add(a, b):
    try:
        act()
    except (OSError, ValueError):
        return a + b
    return 'done'
"""


@pytest.mark.parametrize("tier", confine.TIERS)
def test_acts_on_the_outside_are_refused(tier):
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o777)
        act_on_the_outside(tier, Path(directory))


def act_on_the_outside(tier, directory):
    canary = directory / "canary"
    canary.write_text("alive")
    canary.chmod(0o666)
    abstract = f"\0wmtp-test-{os.getpid()}"
    with at(tier) as sandbox, socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(abstract)
        listener.listen()
        facts = {"pid": os.getpid(), "canary": str(canary), "port": server.getsockname()[1], "abstract": abstract}
        facts |= {name: numbers[seccomp.architecture()] for name, numbers in (seccomp._DENIED | {"clone": seccomp._CLONE}).items()}
        for name, (act, tiers) in ACTS.items():
            source = act.format(**facts) + ASIDE
            if tier in tiers and not (name == "become root" and os.geteuid() != 0 and tier == confine.RLIMITS):
                assert decided(sandbox, source, ONE) == "pass", f"{name} was not refused"
    assert tier not in FILES or (canary.read_text() == "alive" and sorted(directory.iterdir()) == [canary])


def answer_of(code, number, arch, first=0):
    """The answer of a seccomp filter, by the rules of BPF."""
    data = {0: number, 4: arch, 16: first}
    accumulator, place = 0, 0
    while True:
        operation, yes, no, value = struct.unpack_from("=HBBI", code, 8 * place)
        place += 1
        match operation:
            case 0x20:
                accumulator = data[value]
            case 0x06:
                return value
            case 0x15:
                place += yes if accumulator == value else no
            case 0x35:
                place += yes if accumulator >= value else no
            case 0x45:
                place += yes if accumulator & value else no


@pytest.mark.parametrize("which, arch, clone, clone3, kill", [(0, 0xC000003E, 56, 435, 62), (1, 0xC00000B7, 220, 435, 129)])
@pytest.mark.parametrize("own", [None, 42])
def test_the_filters_refuse_exactly_their_list(monkeypatch, which, arch, clone, clone3, kill, own):
    monkeypatch.setattr(seccomp, "architecture", lambda: which)
    parts = [seccomp.WHOLE] if own is not None else [seccomp.SERVER, seccomp.REST]
    codes = [seccomp.program(part, own) for part in parts]
    allow, refuse, absent = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS

    def answer(*call, **first):  # of several filters, the kernel takes the strictest answer
        return min(answer_of(code, *call, **first) for code in codes)

    denied = {numbers[which] for numbers in seccomp._DENIED.values()}
    if own is not None:
        denied |= {numbers[which] for numbers in seccomp._DENIED_SHARED.values()}
    for number in range(500):
        expected = refuse if number in denied else absent if number == clone3 else allow
        assert answer(number, arch, first=0) == expected, number
    assert answer(0, arch ^ 1) == refuse
    assert answer(clone, arch, 0x11) == allow
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert answer(clone, arch, flag | 0x11) == refuse
    assert answer(kill, arch, 42) == allow
    assert answer(kill, arch, 43) == (allow if own is None else refuse)
    if which == 0:
        assert answer(0x40000000 | 1, arch) == refuse


def test_the_fork_server_makes_namespaces_and_nothing_else():
    code = seccomp.program(seccomp.SERVER)
    arch = (0xC000003E, 0xC00000B7)[seccomp.architecture()]
    denied = {name for name, numbers in seccomp._DENIED.items() if numbers[seccomp.architecture()] >= 0}
    refused = {name for name in denied if answer_of(code, seccomp._DENIED[name][seccomp.architecture()], arch) != 0x7FFF0000}
    assert refused == denied - {"mount"}
    with Sandbox(SHORT) as sandbox, open(os.devnull, "r+b") as null:
        if shutil.which("unshare") is None or all(subprocess.run(["unshare", how, "true"]).returncode for how in ("-m", "-mUr")):
            pytest.skip("no namespaces for this user on this machine")
        assert sandbox.tier == confine.NAMESPACES
        with sandbox.start(null.fileno(), null.fileno()) as sample:
            server, inside = status(sandbox.zygote.pid), status(sample.pid)
    reading = 1 << 2  # kept where the new user cannot read the library
    around = int(status(os.getpid())["Seccomp_filters"])  # a container's own
    for found, kept, filters in ((server, 1 << 21, around + 1), (inside, 0, around + 2)):
        assert int(found["CapEff"], 16) & ~reading == int(found["CapPrm"], 16) & ~reading == kept
        assert int(found["CapInh"], 16) == 0 and (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
        assert int(found["Seccomp_filters"]) == filters
        assert "0" not in found["Uid"].split() + found["Gid"].split()


def status(pid):
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)


@pytest.mark.parametrize("tier", confine.TIERS)
def test_a_fork_server_dies_with_its_judge_even_where_it_stands_still(tier, tmp_path):
    code = f"""
import os, signal
from wmtp.sandbox import Limits, Sandbox
sandbox = Sandbox(Limits(), {tier!r})
os.kill(sandbox.zygote.pid, signal.SIGSTOP)
print(sandbox.zygote.pid, flush=True)
os._exit(0)
"""
    made = subprocess.run([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, check=True)
    deadline = time.monotonic() + 5
    while alive(int(made.stdout)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(int(made.stdout))


def alive(pid):
    try:
        return status(pid)["State"][0] not in "ZX"
    except FileNotFoundError:
        return False


def test_what_a_program_forks_draws_numbers_of_its_own():
    program = """
import os, random
ends = os.pipe()
if os.fork() == 0:
    os.write(ends[1], repr(random.random()).encode())
    os._exit(0)
def add(a, b): return a + b if os.read(ends[0], 99) != repr(random.random()).encode() else None
"""
    assert outcome(program, ONE).verdict == "pass"


def test_an_interrupted_start_leaves_neither_directory_nor_process(monkeypatch, tmp_path):
    made = []

    def interrupted(self, *_, **__):
        made.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Sandbox, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Sandbox(SHORT)
    assert list(tmp_path.iterdir()) == [] and made[0].zygote.returncode is not None
    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Sandbox(SHORT)
    assert list(tmp_path.iterdir()) == []


def test_no_name_of_a_socket_outlives_its_sample():
    # A socket on its way through itself is closed by the kernel's own collector, later than its process.
    plant = """
import array, socket
try:
    for n in range(60):
        a, b = socket.socketpair()
        s = socket.socket(socket.AF_UNIX)
        s.bind(f'\\0wmtp-{n}')
        b.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [s.fileno(), a.fileno(), b.fileno()]))])
        for one in (a, b, s): one.close()
except OSError:
    pass
"""
    look = """
import socket
s, seen = socket.socket(socket.AF_UNIX), 0
for n in range(60):
    seen += s.connect_ex(f'\\0wmtp-{n}') != 111
assert not seen, seen
"""
    with Sandbox(SHORT) as sandbox:
        if sandbox.tier != confine.NAMESPACES:
            pytest.skip("no namespaces for this user on this machine")
        assert [decided(sandbox, program + RIGHT) for program in (plant, look) * 5] == ["pass"] * 10


def test_a_dead_fork_server_is_an_error_of_the_harness_and_leaves_no_scratch():
    with Sandbox(SHORT) as sandbox:
        scratch = sandbox.scratch
        sandbox.zygote.kill()
        sandbox.zygote.wait()
        with pytest.raises(HarnessError, match="fork server"), open(os.devnull, "r+b") as null:
            sandbox.start(null.fileno(), null.fileno())
    assert not scratch.exists()
