"""Arms times training seeds: what remains of a difference when problems and seeds are both drawn anew (METHODS, "Statistics").

The two arms of a contrast read, with one seed, the same rows in the same order, so it is paired by seed and by problem. All arms share
the critic, the reference, the benchmarks and, but for ntp_full, the warm-up: the intervals speak of other training seeds and other
problems of the same kind, not of another critic, another start or another draw of the training set.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from wmtp.compare import (
    ALPHA,
    BLOCK,
    BUDGET,
    SEED,
    CompareError,
    Result,
    bootstrap_p,
    check_comparable,
    holm,
    mcnemar,
    minimum_detectable,
    read_result,
    same_budget,
)

MEASURE = "pass@1"
ROW_KEYS = ("steps", "tokens", "parameters", "trained_parameters", "grown_heads", "train_flops", "total_flops")
PRIMARY = (("verifiable", "baseline"), ("verifiable", "shuffled"), ("verifiable", "position_only"))


@dataclass(frozen=True)
class Contrast:
    """score(arm) - score(against) as a share of 1, mean over seeds and problems; `low` and `high` of its 95 % interval.

    `p` is the two-way bootstrap's, `p_wilcoxon` and `p_sign` are exact over the seeds' means. `p_holm` adjusts `p` for all contrasts of
    the same table: the primary ones, or all others. `mde`: smallest true difference found with 80 % power at this standard error.
    """

    arm: str
    against: str
    benchmark: str
    primary: bool
    n_seeds: int
    n_problems: int
    difference: float
    stderr: float
    low: float
    high: float
    seeds_better: int
    seeds_worse: int
    seed_sd: float
    p: float
    p_holm: float
    p_wilcoxon: float
    p_sign: float
    mde: float | None


Controls = Mapping[str, str | None]
"""The arm that each is compared with, None for these themselves (wmtp.arms.controls)."""


def read_arms(controls: Controls, seeds: Sequence[int], metrics: Path, verdicts: Path) -> dict[str, list[Result]]:
    """Each arm's results in the order of `seeds`, all under the same conditions, those that are compared with one arm trained on the same
    budget; CompareError where one is missing or differs.
    """
    found = {arm: [read_result(f"{arm}-{seed}", metrics, verdicts) for seed in seeds] for arm in controls}
    check_comparable([result for results in found.values() for result in results])
    for place, seed in enumerate(seeds):
        for arm, control in controls.items():
            one, other = found[arm][place], found[control or arm][place]
            if not same_budget(one, other):
                budgets = {name: {key: result.training[key] for key in BUDGET} for name, result in ((arm, one), (control, other))}
                raise CompareError(
                    f"seed {seed}: the arms differ in {' and '.join(BUDGET)}: {budgets}; train them on the same data and budget"
                )
    return found


def scores(results: Sequence[Result], benchmark: str) -> np.ndarray:
    """Shares of passing samples [seeds, problems], problems in the order of their ids; CompareError where none was sampled."""
    if (benchmark, MEASURE) not in results[0].scores:
        raise CompareError(f"{results[0].name}: no sampled completions of {benchmark}, expected some; raise n_samples above 0")
    return np.array([[result.scores[benchmark, MEASURE][task] for task in sorted(result.scores[benchmark, MEASURE])] for result in results])


def resampled_means(d_SP: np.ndarray, resamples: int) -> np.ndarray:
    """Means over seeds and problems, both drawn with replacement and independently of each other, [resamples]."""
    rng = np.random.Generator(np.random.PCG64(SEED))
    n_seeds, n_problems = d_SP.shape
    found = []
    for done in range(0, resamples, BLOCK):
        size = min(BLOCK, resamples - done)
        seeds_RS = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size)
        problems_RP = rng.multinomial(n_problems, np.full(n_problems, 1 / n_problems), size)
        found.append(((seeds_RS @ d_SP) * problems_RP).sum(1) / (n_seeds * n_problems))
    return np.round(np.concatenate(found), 12)


def wilcoxon(d: Sequence[float]) -> float:
    """Exact two-sided signed-rank p-value over all signs; zeros are dropped, ties share their mean rank."""
    d = np.array([value for value in d if value != 0])
    if not len(d):
        return 1.0
    _, place, counts = np.unique(np.abs(d).round(12), return_inverse=True, return_counts=True)
    doubled = (2 * np.cumsum(counts) - (counts - 1))[place]  # ranks are halves where two are tied
    ways = [1]  # of the 2^n signs, by the sum of the positive doubled ranks
    for rank in doubled.tolist():
        ways = [a + b for a, b in zip([*ways, *[0] * rank], [*[0] * rank, *ways])]
    total, found = int(doubled.sum()), int(doubled[d > 0].sum())
    far = sum(count for sum_, count in enumerate(ways) if abs(2 * sum_ - total) >= abs(2 * found - total))
    return far / 2 ** len(d)


def contrast(arm: str, ours: np.ndarray, against: str, theirs: np.ndarray, benchmark: str, resamples: int) -> Contrast:
    """One difference, p not yet adjusted. `ours` and `theirs` are [seeds, problems] of the same seeds and problems."""
    d_SP = np.round(ours - theirs, 12)
    means, by_seed = resampled_means(d_SP, resamples), np.round(d_SP.mean(1), 12)
    low, high = np.quantile(means, [ALPHA / 2, 1 - ALPHA / 2])
    stderr, p = float(means.std(ddof=1)), bootstrap_p(means)
    better, worse = int((by_seed > 0).sum()), int((by_seed < 0).sum())
    return Contrast(
        arm, against, benchmark, (arm, against) in PRIMARY, *d_SP.shape, float(d_SP.mean()), stderr, float(low), float(high),
        better, worse, float(by_seed.std(ddof=1)) if len(by_seed) > 1 else math.nan,
        p, p, wilcoxon(by_seed), mcnemar(better, worse), minimum_detectable(stderr),
    )  # fmt: skip


def contrasts(found: Mapping[str, Sequence[Result]], controls: Controls, resamples: int) -> list[Contrast]:
    """The primary contrasts whose arms are there and read the same rows, then every other arm against its control; Holm within each."""
    pairs = [(one, other) for one, other in PRIMARY if {one, other} <= set(found) and (controls[one] or one) == (controls[other] or other)]
    others = [(arm, control) for arm, control in controls.items() if control and (arm, control) not in pairs]
    benchmarks = list(next(iter(found.values()))[0].evaluation)
    score = {(arm, benchmark): scores(found[arm], benchmark) for arm in found for benchmark in benchmarks}
    tables = []
    for table in (pairs, others):
        each = [
            contrast(arm, score[arm, benchmark], other, score[other, benchmark], benchmark, resamples)
            for benchmark in benchmarks
            for arm, other in table
        ]
        tables += [replace(one, p_holm=p) for one, p in zip(each, holm([one.p for one in each]))]
    return tables


def arm_rows(found: Mapping[str, Sequence[Result]]) -> list[dict[str, Any]]:
    """One row an arm: pass@1 by benchmark and validation loss, each a mean over seeds with the standard deviation between seeds."""
    rows = []
    for arm, results in found.items():
        row: dict[str, Any] = {"arm": arm, "seeds": len(results)}
        columns = {benchmark: scores(results, benchmark).mean(1) for benchmark in results[0].evaluation}
        columns["validation_ce_head0"] = np.array([result.training["validation_ce_head0"] for result in results])
        for name, values in columns.items():
            row |= {name: float(values.mean()), f"{name}_sd": float(values.std(ddof=1)) if len(values) > 1 else math.nan}
        rows.append(row | {key: results[0].training[key] for key in ROW_KEYS})
    return rows
