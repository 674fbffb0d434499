"""The trusted process of one worker: holds the tests, runs them here, and sends the sample nothing but calls.

Reads JSON lines on stdin, a problem and then programs for it, and writes one outcome a program on stdout. A comparison that a hostile
answer makes endless dies by the alarm set for each job; the parent knows that signal.
"""

import ast
import builtins
import functools
import io
import json
import os
import random
import signal
import sys
import types
from collections.abc import Callable
from typing import NamedTuple

from wmtp import checkers, confine
from wmtp.sandbox import Ended, HarnessError, Limits, Sandbox
from wmtp.session import CannotCross, Names, Raised, Session

Test = Callable[[], object]
Settle = Callable[["Decision"], None]


class Decision(NamedTuple):
    """`starved`: a time-out by the clock with CPU time to spare. `inside`, `passed`: as in the judge's Outcome."""

    verdict: str
    detail: str
    starved: bool = False
    inside: bool = False
    passed: int = 0


@functools.lru_cache(maxsize=4096)
def compiled(source: str, mode: str = "exec") -> types.CodeType:
    """Code of a trusted test; the sandbox is not to blame for a broken one, and neither is the program."""
    try:
        return compile(source, "test", mode, dont_inherit=True, optimize=0)
    except SyntaxError as error:
        raise HarnessError(f"the test is not Python: {error}; mend the problem") from None


@functools.lru_cache(maxsize=4096)
def shadowing(statements: tuple[str, ...]) -> frozenset[str]:
    """Names of the functions under test that are also builtins: where the statements name nothing else, the first that each calls."""
    first: set[str] = set()
    for statement in statements:
        nodes = list(ast.walk(ast.parse(statement)))
        if any(isinstance(node, ast.Name) and not hasattr(builtins, node.id) for node in nodes):
            return frozenset()
        calls = [node.func for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        first.update(call.id for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset))[:1])
    return frozenset(first)


def helpers(prompt: str, names: Names) -> None:
    """Defines what the prompt itself defines, so that tests which use its helpers use the true ones.

    A prompt that is no program even with an empty body is left alone: its names then come from the program.
    """
    for ending in ("", "\n    pass\n"):
        try:
            code = compiled(prompt + ending)
        except HarnessError:
            continue
        exec(code, names)
        return


def run_own(session: Session, code: types.CodeType, names: Names) -> None:
    """Runs a test's own statements. What they raise before they asked the program anything is not the program's doing."""
    asked = session.asked
    try:
        exec(code, names)
    except Exception as error:  # a test is any Python
        if session.asked > asked or isinstance(error, (CannotCross, HarnessError)):
            raise
        raise HarnessError(f"the test itself fails: {type(error).__name__}: {error}; mend the problem") from None


def check_test(session: Session, job: dict, tests: dict) -> list[Test]:
    names = Names(session)
    helpers(job["prompt"], names)
    names.pop(tests["entry_point"], None)
    run_own(session, compiled(tests["test"]), names)
    if "check" not in names:
        raise HarnessError("the test defines no check(candidate); mend the problem")
    return [lambda: names["check"](session.resolve(tests["entry_point"]))]


def with_setup(session: Session, tests: dict, statements: list[str]) -> Names:
    """Names after the setup, which runs on both sides: the program may use what it defines, and the tests must not trust that copy."""
    names = Names(session, shadowing(tuple(statements)))
    if tests["setup"].strip():
        code = compiled(tests["setup"])
        session.run(tests["setup"])
        run_own(session, code, names)
    return names


def assert_tests(session: Session, job: dict, tests: dict) -> list[Test]:
    codes = [compiled(statement) for statement in tests["asserts"]]
    names = with_setup(session, tests, tests["asserts"])
    return [functools.partial(exec, code, names) for code in codes]


def call_tests(session: Session, job: dict, tests: dict) -> list[Test]:
    codes = [compiled(call, "eval") for call in tests["calls"]]
    names = with_setup(session, tests, tests["calls"])

    def check(code: types.CodeType, call: str, expected: str) -> None:
        found = str(eval(code, names))
        assert found == expected, f"{call}: expected {expected[:80]}, found {found[:80]}"

    return [functools.partial(check, *one) for one in zip(codes, tests["calls"], tests["expected"], strict=True)]


TESTS = {"check": check_test, "asserts": assert_tests, "calls": call_tests}


def inside_sources(tests: dict) -> list[str]:
    """Setup, then each test, as statements for the sample, where values cannot cross."""
    if tests["kind"] == "check":
        return [tests["test"], f"check({tests['entry_point']})"]
    if tests["kind"] == "asserts":
        return [tests["setup"], *tests["asserts"]]
    pairs = zip(tests["calls"], tests["expected"], strict=True)
    return [tests["setup"], *(f"assert str({call}) == {expected!r}" for call, expected in pairs)]


def outside(session: Session, job: dict, settle: Settle) -> Decision:
    """Loads the program, then runs the tests on this side; pass only if they ran to their end, else what the first failure decides.

    Tests behind it run where the job wants all of them, as long as the sample lives. They decide nothing any more: `settle` gets the
    decision first, and a test that would have to run inside counts as one that does not pass.
    """
    tests: list[Test] = []

    def begin() -> None:
        session.load(job["program"])
        tests.extend(TESTS[job["tests"]["kind"]](session, job, job["tests"]))

    failure, passed = failure_of(session, begin), 0
    for test in tests:
        if session.sample.ended is not None or (failure and not job["all_tests"]):
            break
        if failure:
            settle(failure._replace(passed=passed))
        try:
            found = failure_of(session, test)
        except CannotCross:
            if failure is None:
                raise
            continue
        passed += found is None
        failure = failure or found
    return (failure or Decision("pass", ""))._replace(passed=passed)


def failure_of(session: Session, step: Test) -> Decision | None:
    """What a step decides against the program, if anything; that a value could not cross counts however the test took it."""
    failure, session.cannot_cross = None, None
    try:
        step()
    except (CannotCross, HarnessError):
        raise
    except Raised as raised:
        failure = Decision("error", str(raised))
    except Exception as error:  # a test is any Python, and fails by whatever it raises
        if hasattr(error, "of_sample"):
            failure = Decision("error", error.of_sample)
        else:
            failure = Decision("fail", f"{type(error).__name__}: {error}".removesuffix(": "))
    if session.cannot_cross is not None:
        raise session.cannot_cross
    if (ended := session.sample.ended) is not None:  # whatever the test made of it
        return Decision(ended.verdict, ended.detail, ended.starved)
    return failure


def inside(session: Session, job: dict, reason: str, settle: Settle) -> Decision:
    """As `outside`, by statements that the sample itself runs, one request each."""
    note = f"tests ran inside the sample: they pass it {reason}"
    setup, *tests = inside_sources(job["tests"])
    failure, passed = refused_inside(session, lambda: (session.load(job["program"]), session.run(setup)), note), 0
    for test in tests if failure is None else []:
        found = refused_inside(session, functools.partial(session.run, test), note)
        passed += found is None
        failure = failure or found
        if found and (session.sample.ended is not None or not job["all_tests"]):
            break
        if failure:
            settle(failure._replace(passed=passed))
    return (failure or Decision("pass", note, inside=True))._replace(passed=passed)


def refused_inside(session: Session, step: Test, note: str) -> Decision | None:
    try:
        step()
    except Raised as raised:
        return Decision("fail" if raised.name == "AssertionError" else "error", f"{raised}; {note}", inside=True)
    except Ended as ended:
        return Decision(ended.verdict, f"{ended.detail}; {note}", ended.starved, inside=True)
    return None


def decide_function(sandbox: Sandbox, job: dict, settle: Settle) -> Decision:
    """Verdict on a program whose functions are called."""
    with open(os.devnull, "r+b") as null:
        try:
            with sandbox.start(null.fileno(), null.fileno()) as sample:
                return outside(Session(sample), job, settle)
        except CannotCross as error:
            with sandbox.start(null.fileno(), null.fileno()) as sample:
                return inside(Session(sample), job, str(error), settle)


def decide_stdio(sandbox: Sandbox, job: dict, settle: Settle) -> Decision:
    """Verdict on a program that reads stdin: a fresh sample for each input, up to the first that does not pass.

    Where the job wants all tests, wrong answers and errors end nothing; a time-out and the like do, since each may cost the whole limit.
    """
    failure, passed = None, 0
    for number in range(len(job["tests"]["inputs"])):
        watch(sandbox.limits)
        found = failure_on(sandbox, job["program"], job["tests"], number)
        passed += found is None
        failure = failure or found
        if found and not (job["all_tests"] and found.verdict in ("fail", "error")):
            failure = failure._replace(starved=found.starved)  # the count is then in doubt, if not the verdict
            break
        if failure:
            settle(failure._replace(passed=passed))
    return (failure or Decision("pass", ""))._replace(passed=passed)


def failure_on(sandbox: Sandbox, program: str, tests: dict, number: int) -> Decision | None:
    given, expected, where = tests["inputs"][number], tests["outputs"][number], f"input {number + 1} of {len(tests['inputs'])}: "
    found = run_stdio(sandbox, program, given)
    if isinstance(found, Decision):
        return found._replace(detail=where + found.detail)
    if checkers.CHECKERS[tests["checker"]](found, expected):
        return None
    return Decision("fail", f"{where}expected {expected.strip()[:80]!r}, found {found.strip()[:80]!r}")


def run_stdio(sandbox: Sandbox, program: str, given: str) -> str | Decision:
    """What the program printed, or the decision where it did not end well."""
    limit = sandbox.limits.output_bytes
    with open(os.memfd_create("stdin"), "w+b", buffering=0) as stdin, open(os.memfd_create("stdout"), "w+b", buffering=0) as stdout:
        stdin.write(given.encode())
        stdin.seek(0)
        with sandbox.start(stdin.fileno(), stdout.fileno()) as sample:
            ending = run_to_end(Session(sample), program)
        if os.fstat(stdout.fileno()).st_size >= limit:
            return Decision("output-limit", f"more than {limit} bytes")
        return ending or os.pread(stdout.fileno(), limit, 0).decode(errors="replace")


def run_to_end(session: Session, program: str) -> Decision | None:
    """None where the program left with exit status 0."""
    try:
        session.load(program, standalone=True)
    except Raised as raised:
        return Decision("error", str(raised))
    except Ended as ended:
        return None if ended.status == 0 else Decision(ended.verdict, ended.detail, ended.starved)
    return Decision("crash", "not an answer")


def watch(limits: Limits) -> None:
    """SIGALRM ends this process when judging takes longer than two samples can."""
    signal.setitimer(signal.ITIMER_REAL, 2 * limits.longest_seconds + limits.wall_seconds + 2.0)


def decide(sandbox: Sandbox, job: dict, settle: Settle = lambda decision: None) -> Decision:
    """The decision on a job. `settle` hears of it early where tests are still to be counted, which may end this process or the sandbox."""
    random.seed(0)
    watch(sandbox.limits)
    try:
        return (decide_stdio if job["tests"]["kind"] == "stdio" else decide_function)(sandbox, job, settle)
    except Ended as ended:
        return Decision(ended.verdict, ended.detail, ended.starved)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def printable(text: str) -> str:
    """One line of bounded length: details quote what programs wrote, which may be anything."""
    return "".join(character if character.isprintable() else "?" for character in text[:400])


def main() -> None:
    """Serves jobs until stdin ends; a HarnessError is reported as such and the fork server started anew."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)  # a test may print
    confine.hide_from_tracers()
    confine.die_with_parent()
    told = json.loads(sys.stdin.readline())
    cpus, limits = confine.keep_to(told["cpu"]), Limits(**told["limits"])
    sandbox = Sandbox(limits, cpus=cpus)
    problem: dict = {}
    for line in sys.stdin:
        fields = json.loads(line)
        if "program" not in fields:
            problem = fields
            continue
        settled: list[Decision] = []

        def settle(decision: Decision, settled: list[Decision] = settled) -> None:
            settled.append(decision)
            reply(replies, decision, final=False)

        try:
            decision = decide(sandbox, problem | fields, settle)
        except HarnessError as error:
            decision = settled[-1] if settled else Decision("harness-error", str(error))
            sandbox.__exit__()
            sandbox = Sandbox(limits, cpus=cpus)
        reply(replies, decision, final=True)
    sandbox.__exit__()


def reply(replies: io.TextIOBase, decision: Decision, final: bool) -> None:
    replies.write(json.dumps([*decision._replace(detail=printable(decision.detail)), final]) + "\n")
    replies.flush()


@functools.lru_cache(maxsize=1024)
def replied(line: bytes) -> tuple[Decision, bool]:
    """What `reply` wrote. Equal lines give one object, so that a hundred thousand programs which pass hold no memory each."""
    *decision, final = json.loads(line)
    return Decision(*decision), final
