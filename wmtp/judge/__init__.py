"""Verdicts on untrusted programs: a pool of referees, each with a sandbox of its own.

A verdict is evidence from outside the program: the tests run in the referee, the program only answers calls. What never counts against a
program is kept apart: a failure of the harness is `harness-error`, and a time-out by the clock counts only after a second run alone.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import platform
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

from wmtp import confine
from wmtp.records import Problem
from wmtp.referee import Decision, replied
from wmtp.sandbox import Limits, Sandbox, environment, interpreter

__all__ = ["Limits", "Outcome", "WeakSandbox", "judge", "require_strong", "self_check", "tier"]


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """`verdict`: one of records.VERDICTS. `detail`: one line for people. `inside`: values could not cross the sandbox's border, so the
    tests ran beside the program, where a hostile one could forge them; the detail says so too. `passed`: tests, counted to the first
    failure unless all were asked for. `retried`: the first verdict was in doubt, this is the second."""

    verdict: str
    detail: str
    inside: bool = False
    passed: int = 0
    retried: bool = False


class Referee:
    """One worker process; at most one job in flight. `cpu`: it and its fork server keep to that one; None leaves it to the kernel."""

    def __init__(self, limits: Limits, scratch: str, cpu: int | None) -> None:
        self.limits, self.cpu = limits, cpu
        self.environment = environment() | {"TMPDIR": scratch}
        self.process: subprocess.Popen | None = None
        self.start()

    def start(self) -> None:
        self.told: str | None = None
        self.unread, self.settled = b"", None
        self.process = subprocess.Popen(
            interpreter("wmtp.referee:main"), env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self.write(json.dumps({"cpu": self.cpu, "limits": dataclasses.asdict(self.limits)}))

    def write(self, *lines: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # a dead referee shows at the next reading
            self.process.stdin.write("".join(line + "\n" for line in lines).encode())
            self.process.stdin.flush()

    def give(self, job: tuple[str, str]) -> None:
        """A job of `_jobs`; the problem is sent where it is not the last one."""
        problem, program = job
        self.write(*([] if problem == self.told else [problem]), program)
        self.told = problem

    def read(self) -> Decision | None:
        """The decision on the job in flight, None while the referee still counts tests.

        A referee that died is replaced, and what it had settled decides, else its signal.
        """
        chunk = os.read(self.process.stdout.fileno(), 1 << 16)
        if chunk:
            *lines, self.unread = (self.unread + chunk).split(b"\n")
            for decision, final in map(replied, lines):
                if final:
                    self.settled = None
                    return decision
                self.settled = decision
            return None
        status, settled = self.process.wait(), self.settled
        self.close()
        self.start()
        if settled is not None:
            return settled
        if status == -signal.SIGALRM:
            return Decision("timeout", "comparing the program's answers did not end")
        return Decision("harness-error", f"the judging process ended with status {status}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def _cpus(workers: int) -> list[int | None]:
    """One for each worker where there are as many: a fork is cheaper where its parent never ran elsewhere. Else the kernel balances."""
    ours = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return ours if len(ours) == workers else [None] * workers


def _run(jobs: Sequence[tuple[str, str]], limits: Limits, workers: int, on_done: Callable[[int], None]) -> list[Decision]:
    """Decisions on jobs as `_jobs` makes them, in order; `on_done(index)` after each."""
    decisions: list[Decision | None] = [None] * len(jobs)
    waiting = collections.deque(enumerate(jobs))
    poll = select.poll()
    busy: dict[int, tuple[int, Referee]] = {}

    def give(referee: Referee) -> None:
        if waiting:
            index, job = waiting.popleft()
            referee.give(job)
            wait_for(referee, index)

    def wait_for(referee: Referee, index: int) -> None:
        busy[referee.process.stdout.fileno()] = (index, referee)
        poll.register(referee.process.stdout, select.POLLIN)

    with contextlib.ExitStack() as stack:
        # Referees are killed, not asked to leave, so what they leave behind is removed from here.
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="wmtp-judge-"))
        os.chmod(scratch, 0o711)
        for cpu in _cpus(min(workers, len(jobs))):
            referee = Referee(limits, scratch, cpu)
            stack.callback(referee.close)
            give(referee)
        while busy:
            for descriptor, _ in poll.poll():
                poll.unregister(descriptor)
                index, referee = busy.pop(descriptor)
                decision = referee.read()
                if decision is None:
                    wait_for(referee, index)
                    continue
                decisions[index] = decision
                on_done(index)
                give(referee)
    return decisions


def _jobs(jobs: Sequence[tuple[Problem, str]], all_tests: bool) -> list[tuple[str, str]]:
    """(problem, program) as JSON lines for a referee; jobs of one problem share the first, which may be long."""
    texts: dict[int, str] = {}
    for problem, _ in jobs:
        if id(problem) not in texts:
            told = {"prompt": problem.prompt, "tests": problem.tests.model_dump(), "all_tests": all_tests}
            texts[id(problem)] = json.dumps(told, sort_keys=True)
    return [(texts[id(problem)], json.dumps({"program": program})) for problem, program in jobs]


def judge(
    jobs: Sequence[tuple[Problem, str]],
    limits: Limits,
    workers: int,
    on_done: Callable[[int], None] | None = None,
    all_tests: bool = False,
) -> list[Outcome]:
    """Outcomes in the order of `jobs` (problem, complete program); equal pairs run once. `all_tests` changes no verdict.

    `on_done` gets the number of jobs decided so far, now and then. Time-outs by the clock that used less CPU time than the limit, and
    failures of the harness, are run once more, alone, before they stand.
    """
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, found {workers}")
    if untested := next((problem.task_id for problem, _ in jobs if problem.tests.n_tests == 0), None):
        raise ValueError(f"problem {untested}: no tests, so any program would pass; give it some or leave it out")
    lines = _jobs(jobs, all_tests)
    copies = collections.Counter(lines)
    unique = list(copies)
    done = 0

    def count(index: int) -> None:
        nonlocal done
        done += copies[unique[index]]
        if on_done is not None:
            on_done(done)

    decisions = _run(unique, limits, workers, count)
    doubtful = [index for index, decision in enumerate(decisions) if decision.starved or decision.verdict == "harness-error"]
    retried = set(doubtful)
    for index, decision in zip(doubtful, _run([unique[index] for index in doubtful], limits, 1, lambda _: None), strict=True):
        decisions[index] = decision
    numbers = {line: number for number, line in enumerate(unique)}
    return [_outcome(decisions[number], number in retried) for number in map(numbers.__getitem__, lines)]


@functools.lru_cache(maxsize=1024)
def _outcome(decision: Decision, retried: bool) -> Outcome:
    return Outcome(decision.verdict, decision.detail, decision.inside, decision.passed, retried)


def for_references(limits: Limits) -> Limits:
    """Four times as long: some references come near the usual limit, and a slow machine must not fail them."""
    return dataclasses.replace(limits, cpu_seconds=4 * limits.cpu_seconds, wall_seconds=4 * limits.wall_seconds)


def self_check(problems: Sequence[Problem], limits: Limits, workers: int) -> dict:
    """Judges every reference within `for_references(limits)`.

    n_problems, n_passed, n_inside (tests ran inside the sample), n_without_reference, harness_errors and what the first of them says, the
    sorted task_ids in `failed`, tier, python.
    """
    referenced = [problem for problem in problems if problem.reference is not None]
    outcomes = judge([(problem, problem.reference) for problem in referenced], for_references(limits), workers)
    return {
        "n_problems": len(problems),
        "n_passed": sum(outcome.verdict == "pass" for outcome in outcomes),
        "n_inside": sum(outcome.inside for outcome in outcomes),
        "n_without_reference": len(problems) - len(referenced),
        "harness_errors": sum(outcome.verdict == "harness-error" for outcome in outcomes),
        "harness_detail": next((outcome.detail for outcome in outcomes if outcome.verdict == "harness-error"), ""),
        "failed": sorted(problem.task_id for problem, outcome in zip(referenced, outcomes, strict=True) if outcome.verdict != "pass"),
        "tier": tier(),
        "python": platform.python_version(),
    }


@functools.cache
def tier() -> str:
    """The isolation in force on this machine, found by a self-test: the first of confine.TIERS that works."""
    with Sandbox(Limits()) as sandbox:
        return sandbox.tier


class WeakSandbox(ValueError):
    """This machine confines programs too little to run them unasked."""


def require_strong(accept_weak: bool, switch: str) -> str:
    """The tier; WeakSandbox where it keeps no files from a program, unless `accept_weak`. `switch` tells how to accept it."""
    found = tier()
    if found in confine.WEAK_TIERS and not accept_weak:
        raise WeakSandbox(
            f"isolation: found {found}, under which programs reach this user's files; expected one of "
            f"{', '.join(one for one in confine.TIERS if one not in confine.WEAK_TIERS)}. Allow namespaces or Landlock, or {switch}"
        )
    if found in confine.WEAK_TIERS:
        print(f"isolation {found}: programs can reach this user's files", file=sys.stderr)
    return found
