"""Verdicts: right programs pass, whatever their habits; wrong ones never do, whatever they try."""

import gzip
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from tests.real import real
from wmtp import confine
from wmtp import judge as judging
from wmtp.judge import Limits, judge, self_check, tier
from wmtp.problems import read_humaneval, read_mbpp, read_sanitized_mbpp
from wmtp.records import VERDICTS, AssertTests, CallTests, CheckTests, Problem, StdioTests, Verdict
from wmtp.verdicts import is_exact

LIMITS = Limits(cpu_seconds=1.0, wall_seconds=3.0, memory_mb=256, output_bytes=1 << 20)


def problem(tests, task_id="task", **fields):
    return Problem(task_id=task_id, source="mbpp", group=task_id, statement="", tests=tests, **fields)


ASSERTS = problem(AssertTests(asserts=["assert add(1, 2) == 3", "assert add([5], [6]) == [5, 6]", "assert add(b=1, a=0.5) == 1.5"]))
CHECK = problem(
    CheckTests(test="def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate('a', 'b') == 'ab'\n", entry_point="add")
)
CALLS = problem(CallTests(setup="from math import pi\nTEN = 10\n", calls=["add(TEN, 5)", "add([1], [])"], expected=["15", "[1]"]))
STDIO = problem(StdioTests(inputs=["1 2\n", "5 6\n"], outputs=["3\n", "11\n"], checker="exact"))
FUNCTIONS = {"asserts": ASSERTS, "check": CHECK, "calls": CALLS}
RIGHT = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return 0\n"
PRINTS = "print(sum(map(int, input().split())))\n"


def outcome(task, program, limits=LIMITS):
    return judge([(task, program)], limits, 1)[0]


@pytest.mark.parametrize("task", FUNCTIONS.values(), ids=FUNCTIONS)
def test_function_verdicts(task):
    programs = {
        RIGHT: "pass",
        WRONG: "fail",
        "": "error",
        "def other(): pass": "error",
        "add = 3": "fail",
        "def add(a, b) return a": "error",
        "raise ValueError('x')\n" + RIGHT: "error",
        "def add(a, b): return a / 0": "error",
        "def add(a, b): assert False": "error",
        "def add(a): return a": "error",
        "def add(a, b): return None": "fail",
    }
    assert [made.verdict for made in judge([(task, program) for program in programs], LIMITS, 2)] == list(programs.values())


ANSWERS = ["return a + b", "return 3", "return [5, 6]", "return 0", "raise ValueError", "return a / 0 if a == 1 else a + b"]
ENDINGS = ["import os; os._exit(0)", "while True: pass"]


@pytest.mark.parametrize("task", FUNCTIONS.values(), ids=FUNCTIONS)
def test_all_tests_change_no_verdict_and_count_those_that_pass_alone(task):
    """By judging each test of a problem as a problem of its own; a program that ends in one passes none behind it."""
    programs = [f"def add(a, b):\n    {answer}\n" for answer in ANSWERS] + ["", "def add(a, b) return a"]
    programs += [f"def add(a, b):\n    if a == 1: {ending}\n    return a + b\n" for ending in ENDINGS]
    programs += [f"def add(a, b):\n    if a != 1: {ending}\n    return a + b\n" for ending in ENDINGS]
    first, every = (judge([(task, one) for one in programs], LIMITS, 2, all_tests=all_tests) for all_tests in (False, True))
    assert [(one.verdict, one.detail) for one in first] == [(one.verdict, one.detail) for one in every]
    tests = task.tests.model_dump()
    names = [key for key in ("asserts", "calls", "expected") if key in tests]
    alone = [type(task.tests)(**tests | {key: [tests[key][i]] for key in names}) for i in range(task.tests.n_tests)]
    passed = [[outcome(problem(one), program).verdict == "pass" for one in alone] for program in programs]
    for program, made, shown, until_first in zip(programs, passed, every, first):
        dies = any(ending in program for ending in ENDINGS) and False in made
        assert shown.passed == (made.index(False) if dies else sum(made)), program
        assert until_first.passed == [*made, False].index(False)


def test_all_inputs_are_tried_until_a_limit_is_met():
    task = problem(StdioTests(inputs=["1", "2", "3", "4"], outputs=["1", "0", "3", "4"], checker="exact"))
    programs = {
        "print(input())": ("fail", 3),
        "print(1 // (int(input()) - 1) or 3)": ("error", 1),
        "x = input()\nwhile x == '3': pass\nprint(x)": ("fail", 1),
        "x = input()\nwhile x == '1': pass\nprint(x)": ("timeout", 0),
        "print(": ("error", 0),
        "x = input()\nprint(x if x != '2' else 0)": ("pass", 4),
    }
    jobs = [(task, one) for one in programs]
    made = judge(jobs, LIMITS, 2, all_tests=True)
    assert [(one.verdict, one.passed) for one in made] == list(programs.values())
    assert [(one.verdict, one.detail) for one in judge(jobs, LIMITS, 2)] == [(one.verdict, one.detail) for one in made]


@pytest.mark.parametrize(
    "name", ["lib2to3.__main__", "unittest.__main__", "idlelib.idle", "antigravity", "this", "os", "ctypes", "no.such.module"]
)
def test_a_program_cannot_choose_what_the_judge_imports(name):
    program = f"import types\nf = types.ModuleType({name!r})"
    assert outcome(problem(AssertTests(asserts=["assert f(1) == 1"])), program).verdict in ("error", "fail")


def test_a_test_that_swallows_everything_cannot_hide_that_a_value_does_not_cross():
    for test in (
        "import contextlib\nwith contextlib.suppress(Exception): assert f(lambda: 1) == 7",
        "try:\n    right = f(lambda: 1) == 7\nexcept BaseException:\n    right = True\nassert right",
    ):
        made = outcome(problem(AssertTests(asserts=[test])), "def f(g): return 0")
        assert made.inside and (made.verdict == "fail" or "suppress" in test), "inside, such a test passes what it swallows"


def test_a_module_in_place_of_a_value_is_no_reason_to_run_tests_inside():
    forged = "import math as items\nclass Same:\n    __eq__ = lambda self, other: True\ndef total(xs): return Same()"
    made = outcome(problem(AssertTests(asserts=["assert total(items) == 6"])), forged)
    assert made.verdict == "fail" and not made.inside and "has a module, math" in made.detail


def test_what_a_first_failure_settled_outlives_the_tests_behind_it():
    """A comparison without end, and a fork server that dies, both behind the failure that decides."""
    endless = problem(AssertTests(asserts=["assert f(1) == 1", "assert f(2) == 1", "assert max(range(f(3))) == 3"]))
    limits = Limits(cpu_seconds=0.2, wall_seconds=0.3)
    program = "def f(x): return {1: 1, 2: 0, 3: 10**15}[x]"
    plain, counted = (judge([(endless, program)], limits, 1, all_tests=all_tests)[0] for all_tests in (False, True))
    assert (plain.verdict, plain.detail) == (counted.verdict, counted.detail) == ("fail", "AssertionError") and counted.passed == 1
    asserts = [
        "assert f() == 1",
        "import os, signal\nos.killpg(int(open('/proc/self/task/' + str(os.getpid()) + '/children').read().split()[0]), 9)",
    ]
    dying = problem(AssertTests(asserts=[*asserts, "assert f() == 0"]))
    plain, counted = (judge([(dying, "def f(): return 0")] * 1, LIMITS, 1, all_tests=all_tests)[0] for all_tests in (False, True))
    assert plain.verdict == counted.verdict == "fail"


def test_tests_that_run_inside_are_counted_one_by_one():
    task = problem(AssertTests(asserts=["assert f(lambda: 1) == 1", "assert f(lambda: 2) == 1", "assert f(lambda: 3) == 3"]))
    made = judge([(task, "def f(g): return g()")], LIMITS, 1, all_tests=True)[0]
    assert (made.verdict, made.inside, made.passed) == ("fail", True, 2)
    mixed = problem(AssertTests(asserts=["assert f(lambda: 2) == 1", "assert g() == 1", "assert f(lambda: 3) == 3", "assert g() == 0"]))
    program = "def g(): return 0\ndef f(h): return h()"
    assert judge([(mixed, program)], LIMITS, 1, all_tests=True)[0].passed == 2


def test_nothing_is_judged_by_no_tests():
    for tests in (AssertTests(asserts=[]), CallTests(calls=[], expected=[]), StdioTests(inputs=[], outputs=[])):
        with pytest.raises(ValueError, match="problem task: no tests, so any program would pass"):
            judge([(problem(tests), RIGHT)], LIMITS, 1)


def test_programs_nested_too_deeply_to_be_written_out_match_nothing():
    task = problem(AssertTests(asserts=["assert f(1) == 2"]), reference="def f(x):\n    return x + 1")
    deep = "if x: pass\n" + "elif x: pass\n" * 3000
    assert [is_exact(task, text) for text in (deep, "x=" + "-" * 985 + "1", "lambda:" * 985 + "1")] == [False, False, False]


def test_exact_match_is_of_programs_not_of_their_layout():
    task = problem(AssertTests(asserts=["assert f(1) == 2"]), reference="def f(x):\r\n    return x+1 # more")
    found = {"def f(x):\n\n  return (x + 1)\n": True, "def f(y):\n    return y + 1\n": False, "def f(x) return": False, "": False}
    assert [is_exact(task, program) for program in found] == list(found.values())
    assert is_exact(task.model_copy(update={"reference": None}), "") is is_exact(CHECK, RIGHT) is None


def test_stdio_verdicts():
    programs = {
        PRINTS: "pass",
        "print(3)": "fail",
        "print('3', end='')\nprint(input())": "fail",
        "import sys\nsys.stdin.read()\nprint(1 / 0)": "error",
        PRINTS + "import sys\nsys.exit(3)": "error",
        PRINTS + "exit('bad')": "error",
        "print(": "error",
        "input()\ninput()": "error",
        PRINTS + "while True: pass": "timeout",
        "while True: print('x' * 10000)": "output-limit",
        "x = 'x' * 10**9": "memory",
        PRINTS + "import os\nos.abort()": "crash",
    }
    made = judge([(STDIO, program) for program in programs], LIMITS, 2)
    assert dict(zip(programs, [each.verdict for each in made])) == programs
    assert made[1].detail == "input 2 of 2: expected '11', found '3'"


FORGERIES = {
    "exit": "import sys\nsys.exit(0)",
    "exit by name": "exit()",
    "os._exit": "import os\nos._exit(0)",
    "system call": "import ctypes\nctypes.CDLL(None)._exit(0)",
    "killed": "import os\nos.kill(os.getpid(), 9)",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit",
    "excepthook": "import sys, os\nsys.excepthook = lambda *_: os._exit(0)\n1 / 0",
    "verdicts on stdout": 'print(\'pass\'); print(\'{"verdict":"pass","detail":"","starved":false}\', flush=True)',
    "verdicts on every descriptor": """
import os
for descriptor in range(64):
    try:
        os.write(descriptor, b'{"verdict":"pass","detail":"","starved":false}\\n' * 50)
    except OSError:
        pass""",
    "messages on the channel": """
import json, os, struct
body = json.dumps({"value": True}).encode()
for descriptor in range(3, 64):
    try:
        os.write(descriptor, (struct.pack("<I", len(body)) + body) * 50)
    except OSError:
        pass""",
    "patched builtins": """
import builtins
builtins.isinstance = lambda *_: True
builtins.AssertionError = type('A', (BaseException,), {})
builtins.repr = builtins.str = lambda *_: '3'""",
    "patched codec": """
import sys
for name, module in list(sys.modules.items()):
    if name.startswith('wmtp'):
        module.encode = lambda *_: True""",
    "tracing": "import sys\nsys.settrace(lambda *_: None)\nsys.setprofile(lambda *_: None)",
    "import hook": "import sys\nsys.meta_path.insert(0, type('F', (), {'find_spec': lambda *a: None})())\nsys.modules.clear()",
    "constants by ctypes": "import ctypes\nctypes.memmove(id(3) + 24, id(0) + 24, 4)",
}


@pytest.mark.parametrize("task", FUNCTIONS.values(), ids=FUNCTIONS)
def test_forgeries_in_the_module_never_pass(task):
    made = judge([(task, f"{attack}\n{WRONG}") for attack in FORGERIES.values()], LIMITS, 2)
    assert {name: each for name, each in zip(FORGERIES, made) if each.verdict in ("pass", "harness-error")} == {}


@pytest.mark.parametrize("task", FUNCTIONS.values(), ids=FUNCTIONS)
def test_forgeries_in_the_call_never_pass(task):
    bodies = [attack.replace("\n", "\n    ") for attack in FORGERIES.values()]
    made = judge([(task, f"def add(a, b):\n    {body}\n    return 0\n") for body in bodies], LIMITS, 2)
    assert {name: each for name, each in zip(FORGERIES, made) if each.verdict in ("pass", "harness-error")} == {}


AGREEABLE = {
    "object": "class Yes:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n    __hash__ = None\n",
    **{
        kind: f"class Yes({kind}):\n    def __eq__(self, other): return True\n    def __str__(self): return '15'\n    __hash__ = None\n"
        for kind in ("int", "float", "str", "list", "tuple", "dict")
    },
    "metaclass": """
class Meta(type):
    def __eq__(self, other): return True
    __hash__ = None
class Made(metaclass=Meta): pass
def Yes(): return Made
""",
    "class property": "class Yes:\n    __class__ = property(lambda self: int)\n    def __eq__(self, other): return True\n",
    "reduce": "class Yes:\n    def __reduce__(self): return (exec, ('raise SystemExit',))\n    def __eq__(self, other): return True\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("source", AGREEABLE.values(), ids=AGREEABLE)
def test_values_that_agree_with_everything_fail(source):
    for task in (ASSERTS, CHECK):
        assert outcome(task, f"{source}\ndef add(a, b): return Yes()\n").verdict == "fail"
        assert outcome(task, f"{source}\ndef add(a, b): return [Yes()]\n").verdict == "fail"


# Walks frames, garbage and files for the expected values of the test, which lie in no process the program can read.
SEARCH = """
import gc, os, sys
def add(a, b):
    found = []
    frame = sys._getframe()
    while frame:
        found.append(repr(frame.f_locals) + repr(frame.f_globals)[:100000])
        frame = frame.f_back
    for thing in gc.get_objects():
        if isinstance(thing, (str, bytes, list, dict, tuple)):
            try:
                found.append(repr(thing))
            except Exception:
                pass
    text = ''.join(found) + open('/proc/self/cmdline').read() if os.path.exists('/proc/self/cmdline') else ''.join(found)
    return 8123456789 - 1 + 1 if chr(45).join(['EXPECTED', 'MARK']) in text else 0
"""


def test_expected_values_lie_outside_the_program():
    task = problem(AssertTests(asserts=["assert add(1, 2) == 8123456789, 'EXPECTED-MARK'"]))
    assert outcome(task, SEARCH).verdict == "fail"
    # The search itself works: it finds the mark where the program holds it.
    assert outcome(task, SEARCH + "\nheld = ['EXPECTED-MARK']\n").verdict == "pass"


def test_helpers_of_the_prompt_are_the_true_ones():
    prompt = "def encode(x):\n    return x[::-1]\n\ndef decode(x):\n"
    test = "def check(candidate):\n    assert candidate(encode('ab')) == 'ab'\n"
    task = problem(CheckTests(test=test, entry_point="decode"), prompt=prompt)
    assert outcome(task, prompt + "    return x[::-1]\n").verdict == "pass"
    assert outcome(task, prompt + "    return x\ndef encode(x):\n    return x\n").verdict == "fail"


def test_a_program_cannot_replace_the_builtins_of_the_test():
    task = problem(AssertTests(asserts=["assert abs(f(1) - 5) < 1", "assert sorted(f(1)) == [1]"]))
    assert outcome(task, "def f(x): return 0\ndef abs(x): return 0\ndef sorted(x): return [1]\n").verdict == "fail"
    shadowing = problem(AssertTests(asserts=["assert sum(10, 15) == 25", "assert sum(1, 2) == 3"]))
    assert outcome(shadowing, "def sum(a, b): return a + b\n").verdict == "pass"
    assert outcome(shadowing, "def sum(a, b): return a\n").verdict == "fail"


GOOD = {
    "working directory": "import os\nassert os.getcwd()\nopen('f', 'w').write('x')\nassert open('f').read() == 'x'",
    "main guard": "if __name__ == '__main__':\n    import sys\n    sys.exit(input())",
    "dataclass and pickle": """
import pickle
from dataclasses import dataclass
@dataclass
class P:
    x: int
assert pickle.loads(pickle.dumps(P(1))) == P(1)""",
    "threads": """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    assert list(pool.map(abs, [-1, 2])) == [1, 2]""",
    "subclass of Popen": "import subprocess\nclass P(subprocess.Popen): pass",
    "noise": """
import sys, os
print('x' * 10**6)
print('y', file=sys.stderr)
os.write(1, bytes([255, 254]))
sys.stdout.buffer.write(bytes([255]))""",
    "swapped stdout": "import io, sys\nsys.stdout = io.StringIO()\nprint('x')\nsys.stdin = None",
    "deep recursion": "import sys\nsys.setrecursionlimit(100000)\ndef depth(n): return n and depth(n - 1)\nassert depth(50000) == 0",
    "names of the harness": "codec = runtime = inside = answer = request = channel = send = None\ndef check(x): pass\nclass Session: pass",
    "shadowed modules": "import sys\nsys.modules['json'] = sys.modules['struct'] = None",
    "temporary files": """
import tempfile
with tempfile.NamedTemporaryFile() as f:
    f.write(b'x')
with tempfile.TemporaryDirectory():
    pass""",
    "lazy imports": "import xml.dom.minidom, sqlite3, urllib.parse, zoneinfo, difflib",
    "annotations": "from __future__ import annotations\nfrom typing import NamedTuple\nclass P(NamedTuple):\n    x: Missing = 1",
    "child process": "import os\npid = os.fork()\nif pid == 0: os._exit(0)\nassert os.waitpid(pid, 0)[1] == 0",
    "multiprocessing": "import multiprocessing\nlock = multiprocessing.get_context('fork').Lock()\nwith lock: pass",
    "alarm": "import signal\nsignal.signal(signal.SIGALRM, lambda *_: None)\nsignal.alarm(0)",
    "exit caught": "import sys\ntry:\n    sys.exit(1)\nexcept SystemExit:\n    pass",
    "line ends": "x = 1\r\ny = 2\r\n",
    "unusual text": "# -*- coding: utf-8 -*-\né = '\\ud800 \U0001f600'",
}


@pytest.mark.parametrize("habit", GOOD.values(), ids=GOOD)
def test_right_programs_with_habits_pass(habit):
    made = judge([(task, f"{habit}\n{RIGHT}") for task in FUNCTIONS.values()], LIMITS, 1)
    assert {each.verdict for each in made} == {"pass"}, made


STANDALONE = {
    "attributes of streams": f"import sys\nassert (sys.stdin.mode, sys.stdout.mode, sys.stdin.fileno()) == ('r', 'w', 0)\n{PRINTS}",
    "main guard": f"def main():\n    {PRINTS}if __name__ == '__main__':\n    main()\n    exit()",
    "file 0": "print(sum(map(int, open(0).read().split())))",
    "os.read": "import os\nos.write(1, str(sum(map(int, os.read(0, 99).split()))).encode())",
    "buffers": "import sys\nsys.stdout.buffer.write(b'%d' % sum(map(int, sys.stdin.buffer.readline().split())))",
    "written at exit": f"""
import atexit, io, sys
out = sys.stdout
sys.stdout = io.StringIO()
atexit.register(lambda: out.write(sys.stdout.getvalue()))
{PRINTS}""",
    "closed stdout": "import sys\nwith sys.stdin as i, sys.stdout as o:\n    print(sum(map(int, i.read().split())), file=o)",
    "unflushed file": "f = open(1, 'w')\nf.write(str(sum(map(int, input().split()))))",
    "big thread stack": f"""
import sys, threading
threading.stack_size(1 << 26)
sys.setrecursionlimit(10**6)
def depth(n): return n and depth(n - 1)
def main():
    depth(10**5)
    {PRINTS}
threading.Thread(target=main).start()""",
    "own buffered output": f"""
import io, os
class Output(io.IOBase):
    def __init__(self): self.parts = []
    def write(self, text): self.parts.append(text)
    def flush(self): os.write(1, ''.join(self.parts).encode()), self.parts.clear()
import sys
sys.stdout = Output()
kept = sys.stdout
sys.stdout = Output()
{PRINTS}""",
    "text left behind": f"{PRINTS}import io, sys\nsys.stdout = sys.__stdout__ = io.StringIO()",
    "taken buffer": f"import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.detach(), 'ascii')\n{PRINTS}",
    "buffer alone": "import sys\nout = sys.stdout.detach()\nout.write(b'%d' % sum(map(int, input().split())))",
    "reopened streams": f"import io, os, sys\nsys.stdin = io.TextIOWrapper(io.BytesIO(os.read(0, 10**6)))\n{PRINTS}",
    "stream without closed": f"""
import sys
class Output:
    def __init__(self, file): self.write, self.flush = file.write, file.flush
sys.stdout = Output(sys.stdout)
{PRINTS}""",
    "no stream at the end": f"import sys\n{PRINTS}sys.stdout.flush()\ndel sys.stdout",
    "told and sought": f"import sys\nassert sys.stdin.tell() == 0\nsys.stdin.read()\nsys.stdin.seek(0)\n{PRINTS}",
    "long integers": f"str(10 ** 10000)\n{PRINTS}",
    "os._exit": f"import os, sys\n{PRINTS}sys.stdout.flush()\nos._exit(0)",
    "exit in a thread": f"import threading, sys\nt = threading.Thread(target=sys.exit)\nt.start()\n{PRINTS}",
}


@pytest.mark.slow
@pytest.mark.parametrize("program", STANDALONE.values(), ids=STANDALONE)
def test_right_standalone_programs_pass(program):
    assert outcome(STDIO, program).verdict == "pass"


def test_line_ends_reach_a_program_as_they_reach_an_interpreter():
    task = problem(StdioTests(inputs=["a\r\nb"], outputs=["'a\\r\\nb'"], checker="exact"))
    assert outcome(task, "import sys\nprint(repr(sys.stdin.read()))").verdict == "pass"


@pytest.mark.parametrize(
    ("before", "verdict", "told"),
    [
        ("import nosuchmodule", "harness-error", "the test itself fails: ModuleNotFoundError: No module named 'nosuchmodule'; mend"),
        ("{}['x']", "harness-error", "the test itself fails: KeyError: 'x'; mend the problem"),
        ("assert add(1, 2) == 4", "fail", "AssertionError"),
        ("missing(1)", "error", "NameError: name 'missing' is not defined"),
        ("add(1, 'a')", "error", "TypeError"),
    ],
)
def test_a_test_that_fails_of_itself_is_no_failure_of_the_program(before, verdict, told):
    text = f"{before}\ndef check(candidate):\n    assert candidate(1, 2) == 3\n"
    made = outcome(problem(CheckTests(entry_point="add", test=text)), RIGHT)
    assert made.verdict == verdict and told in made.detail, made


def test_verdicts_that_say_the_same_are_one_object():
    made = judge([(task, f"{RIGHT}# {number}\n") for number in range(3) for task in FUNCTIONS.values()], LIMITS, 1)
    assert len({id(each) for each in made}) == len(set(made)) == len(FUNCTIONS)


def test_each_worker_keeps_to_a_cpu_where_there_is_one_for_each(monkeypatch):
    before = os.sched_getaffinity(0)
    ours = sorted(before)[:2]
    task = problem(CallTests(calls=["cpus()"], expected=[str(ours)]))
    program = "import os\ndef cpus(): return sorted(os.sched_getaffinity(0))\n"
    kept, read = [], judging.Referee.read

    def noting(referee):
        kept.append(sorted(os.sched_getaffinity(referee.process.pid)))
        return read(referee)

    monkeypatch.setattr(judging.Referee, "read", noting)
    os.sched_setaffinity(0, ours)
    try:
        for workers in (1, len(ours), len(ours) + 1):
            kept.clear()
            made = judge([(task, f"{program}# {number}") for number in range(2 * workers)], LIMITS, workers)
            assert {each.verdict for each in made} == {"pass"}, made  # what a program sees does not hang on the number of workers
            assert set(map(tuple, kept)) == ({(cpu,) for cpu in ours} if workers == len(ours) else {tuple(ours)})
    finally:
        os.sched_setaffinity(0, before)


def test_a_cpu_that_has_gone_costs_no_verdict(monkeypatch):
    monkeypatch.setattr(judging, "_cpus", lambda workers: [4095] * workers)
    assert outcome(CHECK, RIGHT).verdict == "pass"


@pytest.mark.slow
def test_what_a_replaced_stream_held_comes_before_what_its_successor_got():
    task = problem(StdioTests(inputs=["5 7\n"], outputs=["12\n"], checker="exact"))
    program = """
import sys
first, second = str(sum(map(int, input().split())))
print(first, end='')
sys.stdout = sys.__stdout__ = open(1, 'w')
print(second)"""
    assert outcome(task, program).verdict == "pass"


def test_objects_of_the_program_travel_as_handles():
    task = problem(
        AssertTests(
            setup="root = Node(1)\nroot.next = Node(2)\n",
            asserts=[
                "assert total(root) == 3",
                "assert total([Node(4)][0]) == 4",
                "assert root.next.value == 2",
                "assert len(Many()) == 2",
            ],
        )
    )
    program = """
class Node:
    def __init__(self, value):
        self.value, self.next = value, None
class Many:
    def __len__(self): return 2
def total(node):
    return node.value + total(node.next) if node else 0
"""
    made = outcome(task, program)
    assert (made.verdict, made.detail, made.inside) == ("pass", "", False)


def test_lazy_results_types_and_standard_modules_cross():
    task = problem(
        AssertTests(
            asserts=["assert list(evens(5)) == [0, 2, 4]", "assert keep((1, 'a', 2.5), int) == [1]", "assert size() == sys.getsizeof(())"]
        )
    )
    program = """
import sys
def evens(n):
    for i in range(0, n, 2): yield i
def keep(xs, kind): return [x for x in xs if isinstance(x, kind)]
"""
    assert outcome(task, program + "def size(): return sys.getsizeof(())").verdict == "pass"
    lying = "import types\nsys = types.ModuleType('sys')\nsys.getsizeof = lambda x: 1\ndef size(): return 1\n"
    assert outcome(task, program + lying).verdict == "fail"


def test_where_values_cannot_cross_the_tests_run_inside_and_the_detail_says_so():
    task = problem(AssertTests(asserts=["assert apply(lambda x: x + 1, 2) == 3"]))
    made = judge([(task, f"def apply(f, x): return {body}\n") for body in ("f(x)", "0", "1 / 0", "exit()")], LIMITS, 1)
    assert [each.verdict for each in made] == ["pass", "fail", "error", "error"]
    assert all("inside" in each.detail and each.inside for each in made)
    assert self_check([task.model_copy(update={"reference": "def apply(f, x): return f(x)\n"})], LIMITS, 1)["n_inside"] == 1


def test_exceptions_of_the_program_reach_tests_that_expect_them():
    statement = "try:\n    f(-1)\nexcept ValueError:\n    pass\nelse:\n    assert False"
    task = problem(AssertTests(asserts=[statement]))
    assert outcome(task, "def f(x): raise ValueError(x)").verdict == "pass"
    assert outcome(task, "def f(x): raise TypeError(x)").verdict == "error"
    assert outcome(task, "def f(x): return x").verdict == "fail"
    assert outcome(task, "import os\ndef f(x): os._exit(0)").verdict == "error"


def test_a_test_that_swallows_everything_cannot_hide_the_end_of_a_program():
    task = problem(AssertTests(asserts=["try:\n    f()\nexcept BaseException:\n    pass"]))
    assert outcome(task, "import os\ndef f(): os._exit(0)").verdict == "error"
    assert outcome(task, "def f():\n    while True: pass").verdict == "timeout"


@pytest.mark.slow
def test_answers_that_make_comparing_endless_cost_the_program_its_verdict():
    task = problem(AssertTests(asserts=["x = f()\nwhile x: pass", "assert True"]))
    limits = Limits(cpu_seconds=0.2, wall_seconds=0.3)
    jobs = judging._jobs([(task, f"def f(): return {value}") for value in ("0", "1", "False")], False)
    made = judging._run(jobs, limits, 1, lambda _: None)
    assert [each.verdict for each in made] == ["pass", "timeout", "pass"], "the next referee is told the problem anew"


def test_details_of_hostile_programs_stay_one_printable_line():
    raising = "def add(a, b): raise ValueError('\\ud800\\n\\x1b[2J' + 'x' * 10**6)"
    named = "class E(Exception): pass\nE.__name__ = '\\ud800' * 10**6\ndef add(a, b): raise E"
    printing = "print('\\n\\x00' + 'y' * 10**5)"
    for made in judge([(ASSERTS, raising), (ASSERTS, named), (STDIO, printing)], LIMITS, 1):
        verdict = Verdict(task_id="t", benchmark="b", temperature=0, sample=0, verdict=made.verdict, detail=made.detail)
        assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict
        assert made.detail.isprintable()
        assert len(made.detail) <= 400


def test_a_broken_test_is_not_held_against_the_program():
    for tests in (AssertTests(asserts=["assert ("]), CheckTests(test="def chek(candidate): pass", entry_point="add")):
        made = outcome(problem(tests), RIGHT + "def check(candidate): pass\n")
        assert (made.verdict, "mend the problem" in made.detail) == ("harness-error", True)


def test_order_copies_and_progress():
    jobs = [(ASSERTS, RIGHT), (CHECK, WRONG), (ASSERTS, RIGHT), (STDIO, PRINTS), (ASSERTS, WRONG)] * 3
    seen = []
    made = judge(jobs, LIMITS, 2, seen.append)
    assert [each.verdict for each in made] == ["pass", "fail", "pass", "pass", "fail"] * 3
    assert len(seen) == 4
    assert seen == sorted(seen)
    assert seen[-1] == len(jobs)
    assert judge(jobs, LIMITS, 1) == made
    assert judge([], LIMITS, 2) == []
    assert {each.verdict for each in made} <= set(VERDICTS)
    with pytest.raises(ValueError, match="workers: expected at least 1, found 0"):
        judge(jobs, LIMITS, 0)


def test_verdicts_do_not_depend_on_hash_seeds_or_neighbours():
    program = "import random\ndef add(a, b):\n    return (a + b, list({'a', 'b', 'c', 'd', 'e'}), random.random(), hash('x'))\n"
    first = [outcome(ASSERTS, program), *judge([(CHECK, RIGHT), (ASSERTS, program)], LIMITS, 1)[1:]]
    task = problem(CallTests(calls=["add(1, 2)"], expected=["?"]))
    details = {outcome(task, program).detail for _ in range(2)}
    assert first[0] == first[1]
    assert len(details) == 1


def test_a_referee_that_dies_is_replaced_and_never_counts_as_a_fail(monkeypatch):
    started = []
    real = judging.Referee.start

    def start(self):
        real(self)
        started.append(self.process)
        if len(started) == 1:
            self.process.kill()

    monkeypatch.setattr(judging.Referee, "start", start)
    assert [each.verdict for each in judge([(ASSERTS, RIGHT), (CHECK, RIGHT)], LIMITS, 1)] == ["pass", "pass"]
    monkeypatch.setattr(judging.Referee, "start", lambda self: (real(self), self.process.kill()))
    made = judge([(ASSERTS, RIGHT)], LIMITS, 1)[0]
    assert made.verdict == "harness-error"
    assert "judging process ended" in made.detail


def test_nothing_stays_in_the_directory_for_temporary_files(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path.parent).chmod(0o755)
    assert outcome(ASSERTS, RIGHT).verdict == "pass"
    assert list(tmp_path.iterdir()) == []


def test_self_check_counts_and_names_what_does_not_pass():
    problems = [
        ASSERTS.model_copy(update={"task_id": "b", "reference": WRONG}),
        ASSERTS.model_copy(update={"task_id": "a", "reference": "1 / 0"}),
        CHECK.model_copy(update={"task_id": "c", "reference": RIGHT}),
        STDIO.model_copy(update={"task_id": "d"}),
    ]
    report = self_check(problems, LIMITS, 2)
    assert report["failed"] == ["a", "b"]
    assert (report["n_problems"], report["n_passed"], report["n_without_reference"], report["harness_errors"]) == (4, 1, 1, 0)
    assert report["tier"] == tier()


@pytest.mark.parametrize("found", confine.TIERS)
@pytest.mark.parametrize("accepted", [False, True])
def test_a_weak_tier_is_refused_unless_accepted(monkeypatch, found, accepted):
    monkeypatch.setattr(judging, "tier", lambda: found)
    if found in ("seccomp", "rlimits") and not accepted:
        with pytest.raises(judging.WeakSandbox, match=rf"found {found}, .* or set the key"):
            judging.require_strong(accepted, "set the key")
    else:
        assert judging.require_strong(accepted, "set the key") == found


@pytest.mark.parametrize(("kind", "accepted", "refused"), [("synthetic", False, False), ("local", False, True), ("local", True, False)])
def test_the_stages_ask_for_a_strong_tier_but_for_the_projects_own_problems(monkeypatch, tmp_path, kind, accepted, refused):
    from stages import evaluate_humaneval_mbpp

    class Judged(Exception):
        pass

    def stop(*_):
        raise Judged

    evaluation = types.SimpleNamespace(accept_weak_sandbox=accepted, cpu_seconds=3.0, wall_seconds=10.0, memory_mb=512)
    params = types.SimpleNamespace(evaluation=evaluation, source=types.SimpleNamespace(data=types.SimpleNamespace(kind=kind)))
    monkeypatch.setattr(judging, "tier", lambda: "rlimits")
    monkeypatch.setattr(evaluate_humaneval_mbpp, "read_jsonl", stop)
    with pytest.raises(judging.WeakSandbox if refused else Judged):
        evaluate_humaneval_mbpp.work(params, None, "c", "f", "o", "m")


def test_judging_imports_no_torch():
    code = "import sys, wmtp.judge, wmtp.passk, wmtp.referee, wmtp.zygote; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(judging.__file__).parents[1]).returncode == 0


def lines(path):
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as file:
        return [json.loads(line) for line in file]


def humaneval():
    return read_humaneval(real("humaneval/HumanEval.jsonl.gz"))


def mbpp():
    return read_mbpp(real("mbpp/mbpp.jsonl"))


def test_a_reference_has_four_times_the_limits_and_a_program_has_not():
    slow = "import time\nwhile time.process_time() < 0.9: pass\n" + RIGHT
    task, limits = problem(AssertTests(asserts=["assert add(1, 2) == 3"]), reference=slow), Limits(cpu_seconds=0.5)
    assert judge([(task, slow)], limits, 1)[0].verdict == "timeout"
    assert self_check([task], limits, 1)["n_passed"] == 1


def test_references_of_humaneval_pass():
    report = self_check(humaneval(), Limits(), 2)
    assert (report["n_passed"], report["n_inside"], report["failed"]) == (164, 0, [])


def test_empty_bodies_of_humaneval_fail():
    tasks = humaneval()
    made = judge([(task, task.prompt + "    return None\n") for task in tasks], Limits(), 2)
    assert [task.task_id for task, each in zip(tasks, made) if each.verdict == "pass"] == []


def test_references_of_odd_mbpp_tasks_pass():
    odd = {f"mbpp/{number}" for number in (126, 367, 533, 596, 601, 912, 927, *range(1, 975, 20))}
    tasks = [task for task in mbpp() if task.task_id in odd]
    made = judge([(task, task.reference) for task in tasks], Limits(), 2)
    assert [(task.task_id, each) for task, each in zip(tasks, made) if each.verdict != "pass" or each.detail] == []


@pytest.mark.slow
def test_references_of_mbpp_pass():
    """All of them with the tests outside: what cannot cross as a value crosses as a handle."""
    report = self_check(mbpp(), Limits(), 2)
    assert (report["n_passed"], report["n_inside"], report["failed"]) == (974, 0, [])


@pytest.mark.slow
def test_references_of_sanitized_mbpp_pass():
    report = self_check(read_sanitized_mbpp(real("mbpp/sanitized-mbpp.json")), Limits(), 2)
    assert (report["n_passed"], report["n_inside"], report["failed"]) == (427, 0, [])


@pytest.mark.slow
@pytest.mark.parametrize("number", [367, 927])
def test_mbpp_setup_before_the_code_fails(number):
    """The set-up code uses a class that the solution defines: with the other order the reference does not even load."""
    task = next(task for task in mbpp() if task.task_id == f"mbpp/{number}")
    early = task.model_copy(update={"tests": task.tests.model_copy(update={"setup": ""})})
    assert judge([(early, f"{task.tests.setup}\n{task.reference}")], Limits(), 1)[0].verdict == "error"


@pytest.mark.slow
def test_every_fourth_contest_solution_gets_its_verdict():
    path = real("codecontests_slice/problems.jsonl.gz")
    tasks = {}
    for row in lines(path):
        if row["checker"] != "unverified" and row["reference_seconds_max"] < 1:
            tests = StdioTests(inputs=row["test_cases"]["input"], outputs=row["test_cases"]["output"], checker=row["checker"])
            tasks[row["task_id"]] = problem(tests, row["task_id"])
    rows = lines(path.with_name("solutions.jsonl.gz"))
    rows = [row for row in rows if row["task_id"] in tasks][::4]
    made = judge([(tasks[row["task_id"]], row["output"]) for row in rows], Limits(), 2)
    assert [(row["solution_id"], each) for row, each in zip(rows, made) if (each.verdict == "pass") != row["is_correct"]] == []


@pytest.mark.stress
def test_stored_samples_get_their_stored_verdicts():
    folder = real("codet_samples")
    prompts = {row["task_id"]: row for row in lines(folder / "HumanEval_for_code_generation.jsonl")}
    by_prompt = {row["prompt"]: row["task_id"] for row in prompts.values()}
    tasks = {task.task_id: task for task in humaneval()}
    expected = {(row["task_id"], row["sample"]): row["verdict"] for row in lines(folder / "verdicts.jsonl.gz")}
    jobs, keys = [], []
    for row in lines(next(folder.glob("*code_solution.jsonl.gz"))):
        task = tasks[by_prompt[row["prompt"]]]
        for sample, raw in enumerate(row["samples"]):
            stops = [place for stop in ("\nclass", "\ndef", "\n#", "\nif", "\nprint") if (place := raw.find(stop)) >= 0]
            jobs.append((task, row["prompt"] + raw[: min(stops, default=len(raw))]))
            keys.append((task.task_id, sample))
    made = judge(jobs, Limits(), 2)
    odd = [(key, each, expected[key]) for key, each in zip(keys, made) if (each.verdict == "pass") != (expected[key] == "pass")]
    assert odd == []


def test_the_judge_survives_a_program_that_kills_all_it_can(tmp_path):
    canary = tmp_path / "canary"
    canary.write_text("alive")
    os.chmod(canary, 0o600)
    program = f"""
import os, signal, shutil
for pid in [os.getppid(), -1] + list(range(2, 3000)) if {tier().startswith("namespaces")} else [os.getppid()]:
    if pid != os.getpid():
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
shutil.rmtree({str(tmp_path)!r}, ignore_errors=True)
"""
    made = judge([(ASSERTS, program + RIGHT), (ASSERTS, RIGHT)], LIMITS, 1)
    assert made[1].verdict == "pass"
    if tier() != "rlimits" or os.geteuid() == 0:
        assert made[0].verdict == "pass"
        assert canary.read_text() == "alive"


@pytest.mark.slow
def test_a_time_out_by_the_clock_is_run_again_alone():
    # Asleep past the wall limit at the first run, awake within it at the second.
    program = f"import time\ntime.sleep(max(0.0, {time.time() + 1.9!r} - time.time()))\n{RIGHT}"
    seen = []
    limits = Limits(cpu_seconds=0.5, wall_seconds=1.0)
    assert [each.verdict for each in judge([(ASSERTS, program)], limits, 1, seen.append)] == ["pass"]
    assert seen == [1]


def test_time_counts_cpu_not_the_clock():
    """A program of honest work passes beside seven busy neighbours whose load would break a limit by the clock."""
    work = "import time\nstart = time.process_time()\nwhile time.process_time() - start < 0.3: pass\n"
    limits = Limits(cpu_seconds=0.6, wall_seconds=30)
    before = time.monotonic()
    made = judge([(ASSERTS, f"{work}# {i}\n{RIGHT}") for i in range(8)], limits, 8)
    assert {each.verdict for each in made} == {"pass"}
    assert time.monotonic() > before


@pytest.mark.slow
def test_waiting_for_a_processor_is_not_held_against_a_program():
    """Sixteen workers share the processors: by the clock each program takes far longer than its wall limit."""
    work = "import time\nstart = time.process_time()\nwhile time.process_time() - start < 0.5: pass\n"
    jobs = judging._jobs([(ASSERTS, f"{work}# {i}\n{RIGHT}") for i in range(16)], False)
    made = judging._run(jobs, Limits(cpu_seconds=2.0, wall_seconds=2.0), 16, lambda _: None)
    assert {each.verdict for each in made} == {"pass"}
