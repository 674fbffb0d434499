"""Completions to verdicts to metrics: what evaluate-humaneval-mbpp does with one method's file."""

import ast
import functools
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wmtp.benchmarks import BenchmarkError
from wmtp.dependencies import ROOT, code_sha256
from wmtp.judge import Limits, judge, tier
from wmtp.passk import estimate
from wmtp.progress import Bar
from wmtp.protocols import Protocol, parsed
from wmtp.records import AssertTests, Completion, Problem, Verdict


@dataclass(frozen=True)
class Judged:
    """`exact`: whether the program is the reference's up to comments and layout, None where that is not asked; `n_retried`: verdicts that
    were in doubt at first."""

    verdicts: list[Verdict]
    exact: list[bool | None]
    n_retried: int


def judged(
    completions: Sequence[Completion],
    problems: Mapping[str, Problem],
    protocol: Protocol,
    limits: Limits,
    workers: int,
    all_tests: bool = False,
) -> Judged:
    """One verdict a completion, in order. Completions of unknown problems and problems without completions are errors."""
    asked = {completion.task_id for completion in completions}
    if unknown := sorted(asked - set(problems)):
        raise BenchmarkError(f"completions for {len(unknown)} problems that the benchmark does not have, {unknown[0]} first; sample again")
    if missing := sorted(set(problems) - asked):
        raise BenchmarkError(f"no completion for {len(missing)} problems, {missing[0]} first; sample again")
    jobs = [(problems[one.task_id], protocol.program(problems[one.task_id], one.completion)) for one in completions]
    with Bar("judge", len(jobs), unit="programs") as bar:
        outcomes = judge(jobs, limits, workers, on_done=lambda done: bar.advance(done - bar.done), all_tests=all_tests)
    verdicts = [
        Verdict(
            task_id=one.task_id, benchmark=one.benchmark, temperature=one.temperature, sample=one.sample, verdict=outcome.verdict,
            detail=outcome.detail, tests_passed=outcome.passed / problem.tests.n_tests if all_tests else None,
        )
        for one, outcome, (problem, _) in zip(completions, outcomes, jobs)
    ]  # fmt: skip
    exact = [is_exact(problem, program) for problem, program in jobs]
    return Judged(verdicts, exact, sum(outcome.retried for outcome in outcomes))


def is_exact(problem: Problem, program: str) -> bool | None:
    """Of MBPP, whose references are whole programs as a completion is: whether both have one syntax tree."""
    if not isinstance(problem.tests, AssertTests) or problem.reference is None:
        return None
    return _tree(program) == _tree(problem.reference)


@functools.lru_cache(maxsize=1024)
def _tree(program: str) -> str:
    """The text itself where it is not Python."""
    tree = parsed(program)
    return program if tree is None else ast.dump(tree)


def metrics_of(
    found: Judged, completions: Sequence[Completion], protocol: Protocol, problems_sha256: str, ks: Sequence[int], limits: Limits
) -> dict[str, Any]:
    """pass@k of the sampled completions and `greedy` of the greedy ones, each with its standard error; counts; what results must share
    to be compared: the hashes of protocol, problems and judge; and under what they were judged.
    """
    kinds = {"": [], "greedy_": []}
    for one in zip(found.verdicts, found.exact):
        kinds["greedy_" if one[0].temperature == 0 else ""].append(one)
    sampled, greedy = ([verdict for verdict, _ in chosen] for chosen in kinds.values())
    figures: dict[str, Any] = estimate(sampled, ks) if sampled else {"n_problems": len(greedy), "n_samples": 0}
    alone = estimate(greedy, [1])
    figures |= {"greedy": alone["pass@1"], "greedy_stderr": alone["pass@1_stderr"]}
    for prefix, chosen in kinds.items():
        figures |= {f"{prefix}{name}": value for name, value in shares(chosen).items()}
    figures |= {"truncated": sum(one.truncated for one in completions), "timeouts": sum(one.verdict == "timeout" for one in found.verdicts)}
    figures |= {"tokens_per_forward": tokens_per_forward(completions), "retried": found.n_retried}
    shared = {"protocol_sha256": protocol.sha256[:16], "problems_sha256": problems_sha256[:16], "judge_sha256": judge_sha256()[:16]}
    bounds = {"cpu_seconds": limits.cpu_seconds, "wall_seconds": limits.wall_seconds, "memory_mb": limits.memory_mb}
    return figures | {"protocol": protocol.name, **shared, "isolation": tier(), "python": platform.python_version(), "limits": bounds}


def shares(found: Sequence[tuple[Verdict, bool | None]]) -> dict[str, float]:
    """Means over completions, of which every problem has as many: of the share of tests passed, and of exact matches, where known."""
    columns = {"tests_passed": [verdict.tests_passed for verdict, _ in found], "exact_match": [exact for _, exact in found]}
    return {name: math.fsum(values) / len(values) for name, values in columns.items() if values and None not in values}


def tokens_per_forward(completions: Sequence[Completion]) -> float:
    """Tokens that a forward of the model chose for one completion, ends of text among them: above 1 where heads drafted."""
    return sum(one.n_tokens + one.ended for one in completions) / sum(one.n_forwards for one in completions)


def judge_sha256() -> str:
    """Of the code that a verdict comes from."""
    return code_sha256(ROOT / "wmtp/judge/__init__.py")
