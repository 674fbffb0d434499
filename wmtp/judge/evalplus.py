"""EvalPlus's problem files: their inputs, and the answers of their references as tests.

The files hold inputs and a canonical solution, no answers: it runs here once, in the sandbox, and its answers are kept in the user's
cache directory under the hash of all that they follow from. JSON has no tuples, sets or complex numbers; which of MBPP+'s arguments are
such is a fact of the data set, which its own contracts check.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from wmtp import codec
from wmtp.agreement import nothing, stored
from wmtp.layouts import EvalPlusLine, rows
from wmtp.progress import Bar
from wmtp.records import CheckTests, Problem, RecordError, atomic_path
from wmtp.sandbox import Ended, HarnessError, Limits, Sandbox
from wmtp.session import Raised, Remote, Session

FORMAT = 1
# EvalPlus gives each test max(a floor, 4 times the reference's time), and all tests of a program 60 s. Here the sum is limited.
FLOOR_SECONDS, FACTOR, MOST_SECONDS = 4.0, 4.0, 60.0
REFERENCE_SECONDS = 120.0
EVERY = range(100)
# MBPP+ task: (which arguments, at which depths lists stand for tuples; the argument itself is depth 0).
_TUPLES = {
    ((0, 1, 2, 3), (0,)): (2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596, 616, 630, 726, 740, 744, 809),
    ((0, 1, 2, 3), (1,)): (63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 722, 780),
    ((0,), (1,)): (75, 413, 444, 753),
    ((1,), (0,)): (106, 750),
    ((0,), (0,)): (250, 307, 405, 446, 617, 720, 763, 808),
    ((0, 1, 2, 3), (0, 1)): (259, 278, 401, 445),
    ((0, 1, 2, 3), EVERY): (580, 615, 791),
}  # fmt: skip
TUPLES = {f"Mbpp/{number}": places for places, numbers in _TUPLES.items() for number in numbers}
MBPP_ORACLES = {
    "anything": ("are_equivalent",),
    "or-zero": ("sum_div",),
    "padded-digits": ("digit_distance_nums",),
    "pyramid": ("surface_Area",),
    "present": ("check_str", "text_match_three", "text_starta_endb"),
    "same-items": (
        "similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum", "intersection_array",
        "find_dissimilar", "Diff",
    ),
}  # fmt: skip
ORACLE_OF = {name: oracle for oracle, names in MBPP_ORACLES.items() for name in names}


@dataclass(frozen=True)
class Suites:
    """`base` and `plus` problems by task_id, with the limits of those whose reference needs more than the floor; `left_out` counts the
    inputs by task for which the reference has no answer that can be compared."""

    base: dict[str, Problem]
    plus: dict[str, Problem]
    limits: dict[str, Limits]
    left_out: dict[str, int]


def tupled(value: object, depths: Sequence[int], depth: int = 0) -> object:
    if isinstance(value, dict):
        return {key: tupled(item, depths, depth + 1) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    items = [tupled(item, depths, depth + 1) for item in value]
    return tuple(items) if depth in depths else items


def arguments(task_id: str, given: list) -> list:
    """One call's arguments as the reference expects them."""
    if task_id == "Mbpp/115":
        return [[set(item) if isinstance(item, list) and item else {} for item in given[0]]]
    if task_id == "Mbpp/124":
        return [float(given[0]), complex(given[1])]
    if task_id == "Mbpp/252":
        return [complex(given[0])]
    places, depths = TUPLES.get(task_id, ((), ()))
    return [tupled(value, depths) if place in places else value for place, value in enumerate(given)]


def oracle_of(line: EvalPlusLine) -> str:
    if line.task_id.startswith("Mbpp/"):
        return ORACLE_OF.get(line.entry_point, "equal")
    return "root" if line.entry_point == "find_zero" else "equal"


def read_suites(path: str | Path, limits: Limits, cache: Path | None = None) -> Suites:
    """Of HumanEvalPlus.jsonl or MbppPlus.jsonl, plain or .gz. References that are not in `cache` (default: the user's) run first."""
    lines = [line for _, line in rows(Path(path), EvalPlusLine)]
    suites = Suites({}, {}, {}, {})
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(Bar("references", len(lines), unit="problems"))
        sandbox = References(limits, stack)
        for line in lines:
            add(suites, line, answers(line, sandbox, cache or cache_directory()), limits)
            bar.advance(1)
    return suites


def add(suites: Suites, line: EvalPlusLine, found: dict, limits: Limits) -> None:
    kept = [(given, one) for given, one in zip(forms(line), found["answers"], strict=True)]
    n_base = len(line.base_input)
    if name := unanswered(line, found["answers"]):
        raise RecordError(
            f"{line.task_id}: {name}: the reference answers none of {len(getattr(line, name))} inputs, so any program would pass; mend or"
            " remove the problem, or give it more --memory"
        )
    for suite, cases in ((suites.base, kept[:n_base]), (suites.plus, kept[n_base:])):
        payload = {"atol": line.atol, "oracle": oracle_of(line), "cases": [case for case in cases if case[1] is not None]}
        test = f"from wmtp.agreement import checker\ncheck = checker({json.dumps(payload)!r})\n"
        suite[line.task_id] = Problem(
            task_id=line.task_id,
            source="mbpp" if line.task_id.startswith("Mbpp/") else "humaneval",
            group=line.task_id,
            statement=line.prompt,
            prompt=line.prompt,
            tests=CheckTests(test=test, entry_point=line.entry_point),
            reference=line.prompt + line.canonical_solution,
        )
    if missing := sum(one is None for _, one in kept):
        suites.left_out[line.task_id] = missing
    cpu = min(MOST_SECONDS, max(FLOOR_SECONDS, limits.cpu_seconds, math.ceil(FACTOR * found["cpu"])))
    wall = max(limits.wall_seconds, 3 * cpu, math.ceil(FACTOR * found["wall"]))
    suites.limits[line.task_id] = Limits(cpu, wall, limits.memory_mb, limits.output_bytes)


def unanswered(line: EvalPlusLine, answers: Sequence[object]) -> str | None:
    """The field whose inputs have no answer at all."""
    n_base = len(line.base_input)
    suites = {"base_input": answers[:n_base], "plus_input": answers[n_base:]}
    return next((name for name, found in suites.items() if found and all(one is None for one in found)), None)


def forms(line: EvalPlusLine) -> list:
    return [codec.encode(arguments(line.task_id, given), nothing) for given in [*line.base_input, *line.plus_input]]


def cache_directory() -> Path:
    """The user's; where there is no such thing, a place that cannot be written."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.devnull if home.startswith("~") else home) / "wmtp" / "evalplus"


def answers(line: EvalPlusLine, references: "References", cache: Path) -> dict:
    """{answers: [stored or None, ...], cpu: seconds, wall: seconds} of the reference, from the cache where it is there and whole."""
    text = json.dumps([FORMAT, platform.python_version(), references.limits.memory_mb, line.model_dump()], sort_keys=True)
    place = cache / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(place.read_bytes())
        if len(found["answers"]) == len(line.base_input) + len(line.plus_input) and found["cpu"] >= 0 <= found["wall"]:
            return found
    found = references.run(line)
    if unanswered(line, found["answers"]):  # also what a reference leaves that was killed; asked again, it may answer
        return found
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, no more
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        with atomic_path(place) as temporary:
            temporary.write_text(json.dumps(found))
    return found


class References:
    """Runs references; the sandbox starts with the first that is not cached and closes with `stack`."""

    def __init__(self, limits: Limits, stack: contextlib.ExitStack) -> None:
        self.limits = Limits(REFERENCE_SECONDS, 3 * REFERENCE_SECONDS, limits.memory_mb, limits.output_bytes)
        self.stack = stack
        self.sandbox: Sandbox | None = None

    def run(self, line: EvalPlusLine) -> dict:
        if self.sandbox is None:
            self.sandbox = self.stack.enter_context(Sandbox(self.limits))
        found: list = []
        cpu = 0.0
        started = time.monotonic()
        inputs = [arguments(line.task_id, given) for given in [*line.base_input, *line.plus_input]]
        while len(found) < len(inputs):  # a call that ends the sample costs its own answer alone
            cpu += self.some(line, inputs[len(found) :], found)
        return {"answers": found, "cpu": cpu, "wall": time.monotonic() - started}

    def some(self, line: EvalPlusLine, inputs: list, found: list) -> float:
        """Adds the answers to `found`, up to the first that ends the sample, which is None; CPU seconds used."""
        with open(os.devnull, "r+b") as null, self.sandbox.start(null.fileno(), null.fileno()) as sample:
            try:
                session = Session(sample)
                session.load(line.prompt + line.canonical_solution)
                for one in each(session.resolve(line.entry_point), inputs, line):
                    found.append(one)
            except (Ended, Raised):
                found.append(None)
            return sample.stop()["cpu"]


def each(reference: object, inputs: list, line: EvalPlusLine) -> Iterator[list | None]:
    oracle = oracle_of(line)
    for given in inputs:
        try:
            value = reference(*given)
            value = value is not None if oracle == "present" else list(value) if type(value) is Remote else value
            yield stored(codec.encode(value, nothing), value, line.atol, oracle)
        except (codec.CodecError, Ended, HarnessError):
            raise
        except Exception:  # whatever a reference raises, there is nothing to compare with
            yield None
