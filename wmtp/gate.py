"""The critic's quality report and gate, from values on held-out programs: numpy in, plain numbers out (METHODS, "Critic").

Values are probabilities by state, one array a row; a row's response is P..L with the end of text at L. The last state that judges a
program is L-1, where all of it has been read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BOOTSTRAP = 1000
BINS = 10


@dataclass(frozen=True)
class Judged:
    """Held-out rows: their values by state, P, label, problem number and the known token span [start, end) of a fault (-1: unknown)."""

    values: Sequence[np.ndarray]
    start: np.ndarray
    is_correct: np.ndarray
    problem: np.ndarray
    span: np.ndarray

    def at_share(self, share: float) -> np.ndarray:
        """The value after this share of each response; 0 is the prompt alone, 1 the whole program."""
        return np.array([v[p - 1 + round(share * (len(v) - 2 - (p - 1)))] for v, p in zip(self.values, self.start)])

    def deltas(self) -> list[np.ndarray]:
        """v[i] - v[i-1] for i = P..L-1 of each row."""
        return [np.diff(v[p - 1 : len(v) - 1].astype(np.float64)) for v, p in zip(self.values, self.start)]


def auc(score: np.ndarray, label: np.ndarray) -> float:
    """Probability that a correct row scores above an incorrect one, ties counting half."""
    n_right, n_wrong = int(label.sum()), int((~label).sum())
    if not n_right or not n_wrong:
        raise ValueError(f"AUC: expected rows of both kinds, found {n_right} correct and {n_wrong} incorrect")
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((rank[label].sum() - n_right * (n_right + 1) / 2) / (n_right * n_wrong))


def bootstrap_auc(score: np.ndarray, label: np.ndarray, problem: np.ndarray, confidence: float, seed: int) -> tuple[float, float]:
    """Percentile interval of the AUC; problems are resampled, with all their rows."""
    rng = np.random.Generator(np.random.PCG64(seed))
    rows_of = [np.flatnonzero(problem == p) for p in np.unique(problem)]
    auc(score, label)
    found = []
    while len(found) < BOOTSTRAP:
        rows = np.concatenate([rows_of[i] for i in rng.integers(len(rows_of), size=len(rows_of))])
        if label[rows].any() and not label[rows].all():
            found.append(auc(score[rows], label[rows]))
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def pair_accuracy(score: np.ndarray, label: np.ndarray, problem: np.ndarray) -> float:
    """Share of (correct, incorrect) pairs within a problem that the score orders rightly, ties counting half; NaN without pairs."""
    wins = [
        np.mean(np.sign(score[rows][label[rows]][:, None] - score[rows][~label[rows]][None, :]) / 2 + 0.5)
        for rows in (np.flatnonzero(problem == p) for p in np.unique(problem))
        if label[rows].any() and not label[rows].all()
    ]
    return float(np.mean(wins)) if wins else float("nan")


def calibration(score: np.ndarray, label: np.ndarray) -> list[dict[str, float]]:
    """For each filled bin of predicted probability: its mean prediction, its observed share of correct rows, its count."""
    place = np.minimum((score * BINS).astype(int), BINS - 1)
    return [
        {"predicted": float(score[place == b].mean()), "observed": float(label[place == b].mean()), "n": int((place == b).sum())}
        for b in range(BINS)
        if (place == b).any()
    ]


def localisation(judged: Judged) -> tuple[float, float, int]:
    """(share of wrong programs whose largest value drop lies within one token of the known fault, the same by chance, how many)."""
    hits, chances = [], []
    for delta, p, right, (first, end) in zip(judged.deltas(), judged.start, judged.is_correct, judged.span):
        if right or first < 0 or not len(delta):
            continue
        near = (np.arange(p, p + len(delta)) >= first - 1) & (np.arange(p, p + len(delta)) <= end)
        hits.append(bool(near[np.argmin(delta)]))
        chances.append(near.mean())
    return (float(np.mean(hits)), float(np.mean(chances)), len(hits)) if hits else (float("nan"), float("nan"), 0)


def report(judged: Judged, *, confidence: float, min_delta_std: float, seed: int) -> dict[str, object]:
    """Every figure of the gate and whether it is passed: AUC's lower end above chance and above length alone, and values that move."""
    score, label = judged.at_share(1.0), judged.is_correct
    length = np.array([len(v) - p for v, p in zip(judged.values, judged.start)])
    low, high = bootstrap_auc(score, label, judged.problem, confidence, seed)
    length_auc = max(auc(length, label), auc(-length, label))
    delta_std = float(np.concatenate(judged.deltas()).std())
    found, chance, n_bugs = localisation(judged)
    bins = calibration(score, label)
    figures: dict[str, object] = {"auc": auc(score, label), "auc_low": low, "auc_high": high, "length_auc": length_auc}
    figures |= {f"auc_at_{share}": auc(judged.at_share(share / 100), label) for share in (0, 25, 50, 75)}
    figures |= {
        "pair_accuracy": pair_accuracy(score, label, judged.problem),
        "brier": float(np.mean((score - label) ** 2)),
        "calibration_error": float(sum(b["n"] * abs(b["predicted"] - b["observed"]) for b in bins) / len(score)),
        "delta_std": delta_std,
        "bug_localisation": found,
        "bug_localisation_by_chance": chance,
        "n_bugs": n_bugs,
        "n_programs": len(score),
        "passed": bool(low > max(0.5, length_auc) and delta_std >= min_delta_std),
    }
    return {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in figures.items()}
