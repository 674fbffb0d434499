"""Paired comparison of methods, problem by problem (METHODS, "Statistics"; Miller 2024, 2411.00640).

A score is the share of a problem's samples that pass: `pass@1` of its sampled completions, `greedy` of its greedy one. Problems are the
unit of analysis: intervals and p-values speak of other problems of the same kind, not of another training seed.
"""

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np

from wmtp.passk import estimate, per_problem
from wmtp.records import Verdict, read_jsonl

MEASURES = ("pass@1", "greedy")
ALPHA, POWER = 0.05, 0.8
SEED = 0  # of the resampling; fixed, so that equal verdicts give equal intervals
BLOCK = 1000  # resamples drawn at a time, to bound memory
SHARED_KEYS = {
    "protocol_sha256": "under one protocol", "problems_sha256": "on the same problems", "judge_sha256": "by the same judge",
    "memory": "under one memory limit", "python": "under one Python", "template": "with one template of prompts",
}  # fmt: skip
MORE_KEYS = ("greedy", "greedy_stderr", "tests_passed", "exact_match")
EVALUATION_KEYS = ("greedy", "greedy_stderr", "n_problems", *SHARED_KEYS)
TRAINING_KEYS = (
    "validation_ce_head0", "tokens", "steps", "parameters", "trained_parameters", "grown_heads", "train_flops", "signal_flops",
    "total_flops",
)  # fmt: skip
BUDGET = ("steps", "tokens")
LOG_KEYS = ("step", "loss", "ce_head0")
CRITIC_KEYS = ("passed", "auc", "auc_low", "auc_high", "length_auc", "delta_std", "bug_localisation")

T = TypeVar("T")


class CompareError(ValueError):
    """Results that are missing, contradict each other or were not obtained under the same conditions."""


@dataclass(frozen=True)
class Result:
    """One method: its eval.json, train.json and train.csv (the latter two empty where nothing was trained), and its scores.

    `scores[benchmark, measure]` maps task_id to a share in [0, 1], task_ids sorted.
    """

    name: str
    evaluation: Mapping[str, Mapping[str, Any]]
    scores: Mapping[tuple[str, str], Mapping[str, float]]
    training: Mapping[str, float]
    log: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Difference:
    """score(method) - score(against), mean over problems, as a share of 1, with `low` and `high` of its 95 % interval.

    `better` and `worse` count the problems on which the two differ. `mde`: the smallest true difference that a two-sided 5 % test would
    find with 80 % power at this standard error; None where no problem differs, since then the spread is unknown. `same_budget`: not two
    trainings of other steps or tokens, or of which one had heads to grow, which may differ by that alone.
    """

    method: str
    against: str
    benchmark: str
    measure: str
    n_problems: int
    difference: float
    stderr: float
    low: float
    high: float
    better: int
    worse: int
    test: str
    p: float
    p_holm: float
    mde: float | None
    same_budget: bool


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CompareError(f"{path}: no such file; run the stage that makes it (dvc repro)") from None
    except (ValueError, RecursionError) as error:
        raise CompareError(f"{path}: not valid JSON: {error}; run the stage that makes it again") from None


def _with_keys(figures: dict[str, T], keys: Sequence[str], where: object) -> dict[str, T]:
    if missing := [key for key in keys if key not in figures]:
        raise CompareError(f"{where}: no {', '.join(missing)}, found {', '.join(figures) or 'nothing'}; run the stage that makes it again")
    return figures


def read_differences(path: Path) -> list[dict[str, Any]]:
    """The rows of a differences.csv, numbers as numbers."""
    kinds = {field.name: field.type for field in fields(Difference)}
    as_value: dict[Any, Callable[[str], Any]] = {bool: "True".__eq__, float | None: lambda cell: float(cell) if cell else None}
    return [{name: as_value.get(kinds[name], kinds[name])(cell) for name, cell in row.items()} for row in _rows(path)]


def read_places(path: Path) -> list[dict[str, float]]:
    """The rows of a heads.csv."""
    return [{name: float(cell) for name, cell in row.items()} for row in _rows(path)]


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        raise CompareError(f"{path}: no such file; run the stage that makes it (dvc repro)") from None


def read_critic(path: Path) -> dict[str, Any]:
    return _with_keys(_read_json(path), CRITIC_KEYS, path)


def _read_log(path: Path) -> dict[str, list[float]]:
    """The columns of a training log."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
            columns = dict(zip(header, map(list, zip(*([float(cell) for cell in row] for row in rows), strict=True))))
    except FileNotFoundError:
        raise CompareError(f"{path}: no such file; run the stage that makes it (dvc repro)") from None
    except ValueError as error:
        raise CompareError(f"{path}: not a table of numbers under a header: {error}; train again") from None
    return _with_keys(columns, LOG_KEYS, path)


def read_result(name: str, metrics: Path, verdicts: Path, trained: bool = True) -> Result:
    """The result of `name` from the two folders; verdicts that eval.json does not report are an error."""
    report, source = metrics / name / "eval.json", verdicts / f"{name}.jsonl"
    evaluation, found = _read_json(report), list(read_jsonl(source, Verdict))
    judged = sorted({verdict.benchmark for verdict in found})
    if judged != sorted(evaluation):
        raise CompareError(
            f"{source}: verdicts of {', '.join(judged) or 'nothing'}, but {report} has {', '.join(evaluation)}; evaluate {name} again"
        )
    scores = {}
    for benchmark, figures in evaluation.items():
        _with_keys(figures, EVALUATION_KEYS, f"{report}: {benchmark}")
        kinds = _by_measure(verdict for verdict in found if verdict.benchmark == benchmark)
        told = {measure: figures[measure] for measure in MEASURES if measure in figures}
        counted = {measure: estimate(chosen, [1])["pass@1"] for measure, chosen in kinds.items()}
        if counted.keys() != told.keys() or not all(math.isclose(counted[measure], told[measure], abs_tol=1e-9) for measure in told):
            raise CompareError(f"{source}: {benchmark} comes to {counted}, but {report} says {told}; evaluate {name} again")
        for measure, chosen in kinds.items():
            scores[benchmark, measure] = {task_id: passed / n for task_id, (n, passed) in per_problem(chosen).items()}
    if not trained:
        return Result(name, evaluation, scores, {}, {})
    training = _with_keys(_read_json(metrics / name / "train.json"), TRAINING_KEYS, metrics / name / "train.json")
    return Result(name, evaluation, scores, training, _read_log(metrics / name / "train.csv"))


def _by_measure(verdicts: Iterable[Verdict]) -> dict[str, list[Verdict]]:
    """Sampled and greedy verdicts apart; a kind that was not drawn is left out."""
    kinds: dict[str, list[Verdict]] = {measure: [] for measure in MEASURES}
    for verdict in verdicts:
        kinds["pass@1" if verdict.temperature > 0 else "greedy"].append(verdict)
    return {measure: chosen for measure, chosen in kinds.items() if chosen}


def check_comparable(results: Sequence[Result]) -> None:
    """Same benchmarks, protocols, judges, measures and problems everywhere, or a CompareError that names the first disagreement."""
    first = results[0]
    for other in results[1:]:
        pair = f"{other.name} cannot be compared with {first.name}"
        if sorted(other.evaluation) != sorted(first.evaluation):
            raise CompareError(
                f"{pair}: benchmarks {', '.join(other.evaluation)}, expected {', '.join(first.evaluation)}; evaluate both again"
            )
        for benchmark in first.evaluation:
            for key, words in SHARED_KEYS.items():
                mine, theirs = (result.evaluation[benchmark][key] for result in (first, other))
                if mine != theirs:
                    raise CompareError(f"{pair} on {benchmark}: {key} {theirs}, expected {mine}; evaluate both {words}")
        for benchmark, measure in sorted(first.scores.keys() | other.scores.keys()):
            mine, theirs = (result.scores.get((benchmark, measure), {}).keys() for result in (first, other))
            for has, lacks, absent in ((first, other, mine - theirs), (other, first, theirs - mine)):
                if absent:
                    raise CompareError(
                        f"{pair} on {benchmark}: {lacks.name} has no {measure} verdict for {len(absent)} problems of {has.name},"
                        f" {min(absent)} first; sample and evaluate both on the same problems"
                    )


def resampled_means(d: np.ndarray, resamples: int, seed: int = SEED) -> np.ndarray:
    """Means of `d` [problems] over problems drawn with replacement, [resamples]."""
    rng = np.random.Generator(np.random.PCG64(seed))
    sizes = [min(BLOCK, resamples - done) for done in range(0, resamples, BLOCK)]
    means = np.concatenate([d[rng.integers(len(d), size=(size, len(d)))].mean(1) for size in sizes])
    # Scores are multiples of 1 / samples; without rounding a mean that is exactly 0 falls on either side of it.
    return np.round(means, 12)


def bootstrap_p(means: np.ndarray) -> float:
    """Two-sided: twice the smaller share of resamples on one side of 0, 0 counted on both; the +1 keeps it above 0."""
    return min(1.0, 2 * (1 + min(int((means <= 0).sum()), int((means >= 0).sum()))) / (len(means) + 1))


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided p-value: a fair coin falls `better` to `worse` or further apart."""
    n = better + worse
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(better, worse) + 1)) / 2**n)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for all of `ps` (Holm 1979), in the order given."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = largest
    return adjusted


def minimum_detectable(stderr: float) -> float | None:
    return (NormalDist().inv_cdf(1 - ALPHA / 2) + NormalDist().inv_cdf(POWER)) * stderr if stderr > 0 else None


def difference(method: Result, against: Result, benchmark: str, measure: str, resamples: int) -> Difference:
    """One contrast, p not yet adjusted: exact McNemar for greedy verdicts, paired bootstrap over problems otherwise."""
    ours, theirs = method.scores[benchmark, measure], against.scores[benchmark, measure]
    d = np.round([ours[task_id] - theirs[task_id] for task_id in sorted(ours)], 12)
    if len(d) < 2:
        raise CompareError(f"{benchmark}: {len(d)} problem, expected two at least for a standard error; raise evaluation.max_problems")
    stderr = float(np.sqrt(d.var(ddof=1) / len(d)))
    means = resampled_means(d, resamples)
    low, high = np.quantile(means, [ALPHA / 2, 1 - ALPHA / 2])
    better, worse = int((d > 0).sum()), int((d < 0).sum())
    test, p = ("exact McNemar", mcnemar(better, worse)) if measure == "greedy" else ("paired bootstrap", bootstrap_p(means))
    return Difference(
        method.name, against.name, benchmark, measure, len(d), float(d.mean()), stderr, float(low), float(high), better, worse, test, p, p,
        minimum_detectable(stderr), same_budget(method, against) and same_start(method, against),
    )  # fmt: skip


def same_budget(one: Result, other: Result) -> bool:
    """Whether both trained on as many tokens in as many steps; true where one was not trained."""
    return not (one.training and other.training) or all(one.training[key] == other.training[key] for key in BUDGET)


def same_start(one: Result, other: Result) -> bool:
    """Whether as many heads began as copies of the last block; true where one was not trained."""
    return not (one.training and other.training) or one.training["grown_heads"] == other.training["grown_heads"]


def differences(results: Sequence[Result], against: str, resamples: int, pairs: Sequence[tuple[str, str]] = ()) -> list[Difference]:
    """Every other result against the one named `against`, then each of `pairs`, by measure and benchmark; Holm's adjustment is over all."""
    check_comparable(results)
    base = next((result for result in results if result.name == against), None)
    if base is None:
        raise CompareError(f"methods: {against} is missing, expected it as the one that all others are compared with; add its block")
    kinds = [(benchmark, measure) for measure in MEASURES for benchmark in base.evaluation if (benchmark, measure) in base.scores]
    named = {result.name: result for result in results}
    contrasts = [(other, base) for other in results if other is not base] + [(named[one], named[other]) for one, other in pairs]
    found = [difference(one, other, benchmark, measure, resamples) for benchmark, measure in kinds for one, other in contrasts]
    return [replace(one, p_holm=p) for one, p in zip(found, holm([one.p for one in found]))]


def summary(result: Result) -> dict[str, Any]:
    """The method's row of methods.csv; what was not measured is None."""
    row: dict[str, Any] = {"method": result.name}
    for benchmark, figures in result.evaluation.items():
        row |= {f"{benchmark}_{key}": value for key, value in figures.items() if key.startswith("pass@") or key in MORE_KEYS}
    return row | {key: result.training.get(key) for key in TRAINING_KEYS}


def figures_of(result: Result) -> dict[str, dict[str, float]]:
    """Every number of the method by section: one a benchmark, and `training`, empty where nothing was trained."""
    sections = {**result.evaluation, "training": result.training}
    return {
        name: {key: value for key, value in figures.items() if isinstance(value, int | float) and not isinstance(value, bool)}
        for name, figures in sections.items()
    }
