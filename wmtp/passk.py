"""pass@k: the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, equation 1) and its error over problems."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction

from wmtp.records import Verdict


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold one of the c that pass: 1 - C(n-c, k) / C(n, k), rounded once."""
    if k < 1:
        raise ValueError(f"pass@k needs k >= 1, got k = {k}")
    if n < k:
        raise ValueError(f"pass@{k} needs at least {k} samples, got n = {n}; draw more samples or leave this k out")
    if not 0 <= c <= n:
        raise ValueError(f"passing samples must lie between 0 and n = {n}, got c = {c}")
    return float(1 - Fraction(math.comb(n - c, k), math.comb(n, k)))


def per_problem(verdicts: Iterable[Verdict]) -> dict[str, tuple[int, int]]:
    """(samples, passing samples) by task_id, keys sorted; a sample judged twice or a verdict that the harness failed to give raises."""
    passed: dict[str, dict[int, bool]] = defaultdict(dict)
    for verdict in verdicts:
        where = f"{verdict.benchmark} {verdict.task_id} sample {verdict.sample}"
        if verdict.verdict == "harness-error":
            raise ValueError(f"{where}: the judge itself failed ({verdict.detail}); judge again, such a sample cannot be scored")
        if verdict.sample in passed[verdict.task_id]:
            raise ValueError(f"{where}: two verdicts for one sample, expected one; pass verdicts of a single run")
        passed[verdict.task_id][verdict.sample] = verdict.verdict == "pass"
    return {task_id: (len(samples), sum(samples.values())) for task_id, samples in sorted(passed.items())}


def estimate(verdicts: Iterable[Verdict], ks: Sequence[int]) -> dict[str, float | int]:
    """Mean of pass@k over problems and its standard error, for verdicts of one benchmark at one temperature.

    Returns pass@k and pass@k_stderr for each k that every problem has samples for, then n_problems and n_samples. The standard error is
    sqrt(sample variance over problems / n_problems), and 0 for a single problem, whose spread is unknown.
    """
    verdicts = list(verdicts)
    origins = sorted({(verdict.benchmark, verdict.temperature) for verdict in verdicts})
    if len(origins) != 1:
        raise ValueError(f"pass@k needs verdicts of one benchmark at one temperature, got {origins or 'none'}")
    counts = per_problem(verdicts)
    scores: dict[str, float | int] = {}
    fewest = min(n for n, _ in counts.values())
    for k in sorted({k for k in ks if k <= fewest}):
        values = [pass_at_k(n, c, k) for n, c in counts.values()]
        mean = math.fsum(values) / len(values)
        spread = math.fsum((value - mean) ** 2 for value in values)
        scores[f"pass@{k}"] = mean
        scores[f"pass@{k}_stderr"] = math.sqrt(spread / (len(values) - 1) / len(values)) if len(values) > 1 else 0.0
    return scores | {"n_problems": len(counts), "n_samples": sum(n for n, _ in counts.values())}
