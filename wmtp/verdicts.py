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
    """`exact`: whether a completion is the reference up to comments and layout, None where that is not asked. `n_inside`: verdicts of tests
    that ran beside the program, `n_retried`: verdicts that were in doubt at first, which hangs on the machine's load."""

    verdicts: list[Verdict]
    exact: list[bool | None]
    n_inside: int
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
    exact = [is_exact(problems[one.task_id], one.completion) for one in completions]
    return Judged(verdicts, exact, sum(outcome.inside for outcome in outcomes), sum(outcome.retried for outcome in outcomes))


def is_exact(problem: Problem, completion: str) -> bool | None:
    """Of MBPP, whose references are whole programs as a completion is under each of its protocols: whether both have one syntax tree."""
    if not isinstance(problem.tests, AssertTests) or problem.reference is None:
        return None
    return _tree(completion) == _tree(problem.reference)


@functools.lru_cache(maxsize=1024)
def _tree(program: str) -> str:
    """The text itself where it is not Python, or nested too deeply to be written out."""
    tree = parsed(program)
    try:
        return program if tree is None else ast.dump(tree)
    except RecursionError:
        return program


def metrics_of(
    found: Judged, completions: Sequence[Completion], protocol: Protocol, ks: Sequence[int], shared: Mapping[str, str]
) -> dict[str, Any]:
    """pass@k of the sampled completions and `greedy` of the greedy ones, each with its standard error; counts; what results must share
    to be compared (`conditions`); and the isolation that was in force.
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
    figures |= {"inside": found.n_inside, "tokens_per_forward": tokens_per_forward(completions)}
    return figures | {"protocol": protocol.name, **shared, "isolation": tier()}


def conditions(protocol: Protocol, problems_sha256: str, limits: Limits, template: str) -> dict[str, str]:
    """What two results must have had in common to be compared: hashes of protocol, problems and the judge's code, its memory limit (the
    others are the protocol's), its Python, and the template of the prompts where the protocol has none of its own.
    """
    return {
        "protocol_sha256": protocol.sha256[:16],
        "problems_sha256": problems_sha256[:16],
        "judge_sha256": code_sha256(ROOT / "wmtp/verdicts.py")[:16],
        "memory": f"{limits.memory_mb} MiB",
        "python": platform.python_version(),
        "template": template if protocol.prompt_form == "instruction" else "the protocol's",
    }


def shares(found: Sequence[tuple[Verdict, bool | None]]) -> dict[str, float]:
    """Means over completions, of which every problem has as many: of the share of tests passed, and of exact matches, where known."""
    columns = {"tests_passed": [verdict.tests_passed for verdict, _ in found], "exact_match": [exact for _, exact in found]}
    return {name: math.fsum(values) / len(values) for name, values in columns.items() if values and None not in values}


def tokens_per_forward(completions: Sequence[Completion]) -> float:
    """Tokens that a forward of the model chose for one completion, ends of text among them: above 1 where heads drafted."""
    return sum(one.n_tokens + one.ended for one in completions) / sum(one.n_forwards for one in completions)
