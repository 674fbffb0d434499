"""Problems that one method solves and another does not, with what both wrote: what a difference in the table looks like."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wmtp.records import Completion, Problem, Verdict


@dataclass(frozen=True)
class Answer:
    """One method's greedy completion and what became of it."""

    text: str
    verdict: str
    detail: str


@dataclass(frozen=True)
class Disagreement:
    """`better` solves the problem and `worse` does not, each by its greedy completion; `answers` by method."""

    problem: Problem
    better: str
    worse: str
    answers: Mapping[str, Answer]


def greedy_answers(completions: Sequence[Completion], verdicts: Sequence[Verdict]) -> dict[tuple[str, str], Answer]:
    """Of one method, by (benchmark, task_id)."""
    texts = {(one.benchmark, one.task_id): one.completion for one in completions if one.temperature == 0}
    judged = {(one.benchmark, one.task_id): one for one in verdicts if one.temperature == 0}
    return {key: Answer(texts[key], judged[key].verdict, judged[key].detail) for key in texts.keys() & judged.keys()}


def disagreements(
    method: str, against: str, answers: Mapping[str, Mapping[tuple[str, str], Answer]], problems: Mapping[tuple[str, str], Problem], n: int
) -> list[Disagreement]:
    """The first `n` problems either way, in the order of `problems`: those that `method` alone solves, then those that `against` does."""
    found = []
    for better, worse in ((method, against), (against, method)):
        alone = [
            key for key in problems
            if key in answers[better] and key in answers[worse]
            and answers[better][key].verdict == "pass" and answers[worse][key].verdict not in ("pass", "harness-error")
        ]  # fmt: skip
        found += [Disagreement(problems[key], better, worse, {name: answers[name][key] for name in (method, against)}) for key in alone[:n]]
    return found
