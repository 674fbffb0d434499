"""Completions to verdicts to metrics: what evaluate-humaneval-mbpp does with one method's file."""

from collections.abc import Mapping, Sequence
from typing import Any

from wmtp.benchmarks import BenchmarkError
from wmtp.dependencies import ROOT, code_sha256
from wmtp.judge import Limits, judge, tier
from wmtp.passk import estimate
from wmtp.progress import Bar
from wmtp.protocols import Protocol
from wmtp.records import Completion, Problem, Verdict


def verdicts_of(
    completions: Sequence[Completion], problems: Mapping[str, Problem], protocol: Protocol, limits: Limits, workers: int
) -> list[Verdict]:
    """One verdict a completion, in order. Completions of unknown problems and problems without completions are errors."""
    asked = {completion.task_id for completion in completions}
    if unknown := sorted(asked - set(problems)):
        raise BenchmarkError(f"completions for {len(unknown)} problems that the benchmark does not have, {unknown[0]} first; sample again")
    if missing := sorted(set(problems) - asked):
        raise BenchmarkError(f"no completion for {len(missing)} problems, {missing[0]} first; sample again")
    jobs = [(problems[one.task_id], protocol.program(problems[one.task_id], one.completion)) for one in completions]
    with Bar("judge", len(jobs), unit="programs") as bar:
        outcomes = judge(jobs, limits, workers, on_done=lambda done: bar.advance(done - bar.done))
    return [
        Verdict(
            task_id=one.task_id, benchmark=one.benchmark, temperature=one.temperature, sample=one.sample, verdict=outcome.verdict,
            detail=outcome.detail,
        )
        for one, outcome in zip(completions, outcomes)
    ]  # fmt: skip


def metrics_of(
    verdicts: Sequence[Verdict], completions: Sequence[Completion], protocol: Protocol, problems_sha256: str, ks: Sequence[int]
) -> dict[str, Any]:
    """pass@k of the sampled completions and `greedy` of the greedy ones, each with its standard error; counts; and what results must
    share to be compared: the hashes of protocol, problems and judge.
    """
    sampled = [verdict for verdict in verdicts if verdict.temperature > 0]
    greedy = [verdict for verdict in verdicts if verdict.temperature == 0]
    figures: dict[str, Any] = estimate(sampled, ks) if sampled else {"n_problems": len(greedy), "n_samples": 0}
    alone = estimate(greedy, [1])
    figures |= {"greedy": alone["pass@1"], "greedy_stderr": alone["pass@1_stderr"]}
    figures |= {"truncated": sum(one.truncated for one in completions), "timeouts": sum(one.verdict == "timeout" for one in verdicts)}
    shared = {"protocol_sha256": protocol.sha256[:16], "problems_sha256": problems_sha256[:16], "judge_sha256": judge_sha256()[:16]}
    return figures | {"protocol": protocol.name, **shared, "isolation": tier()}


def judge_sha256() -> str:
    """Of the code that a verdict comes from."""
    return code_sha256(ROOT / "wmtp/judge/__init__.py")
