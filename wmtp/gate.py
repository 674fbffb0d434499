"""The critic's quality report and gate, from values on held-out programs: numpy in, plain numbers out (METHODS, "Critic").

Values are by state, one array a row; a row's response is P..L with the end of text at L. The last state that judges a program is L-1,
where all of it has been read. Of values that are logits (loss `pairwise`) only differences within a problem mean anything: their AUC
compares programs of one problem alone, and they have neither a Brier score nor a calibration.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BOOTSTRAP = 1000
BINS = 10
SHARES = (25, 50, 75, 100)  # of a response, in percent


@dataclass(frozen=True)
class Judged:
    """Held-out rows: their values by state, P, label, problem number and the known token span [start, end) of a fault (-1: unknown).

    `unit` is that of the values, probability or logit.
    """

    values: Sequence[np.ndarray]
    start: np.ndarray
    is_correct: np.ndarray
    problem: np.ndarray
    span: np.ndarray
    unit: str = "probability"

    def auc(self, score: np.ndarray) -> float:
        """Of one score a row: over all programs, or a mean within problems where the level of values means nothing."""
        if self.unit == "logit":
            return pair_accuracy(score, self.is_correct, self.problem)
        return auc(score, self.is_correct)

    def lengths(self) -> np.ndarray:
        """Tokens of each response, the end of text included."""
        return np.array([len(v) - p for v, p in zip(self.values, self.start)])

    def length_auc(self) -> float:
        """AUC of the length alone, whichever way it points."""
        return max(self.auc(self.lengths()), self.auc(-self.lengths()))

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
    return _percentiles(found, confidence)


def bootstrap_mean(values: np.ndarray, problem: np.ndarray, confidence: float, seed: int) -> tuple[float, float]:
    """Percentile interval of the mean over rows; problems are resampled, with all their rows. NaN where there is no row."""
    if not len(values):
        return float("nan"), float("nan")
    rng = np.random.Generator(np.random.PCG64(seed))
    _, place = np.unique(problem, return_inverse=True)
    total, n = np.bincount(place, values), np.bincount(place)
    drawn = rng.integers(len(n), size=(BOOTSTRAP, len(n)))
    return _percentiles(total[drawn].sum(1) / n[drawn].sum(1), confidence)


def _percentiles(found: Sequence[float], confidence: float) -> tuple[float, float]:
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _wins(score: np.ndarray, label: np.ndarray, problem: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each problem with rows of both kinds: the share of its pairs that the score orders rightly, and the problem's number."""
    # Shares of float32 scores would be averaged in float32.
    score = score.astype(np.float64)
    found = [
        (np.mean(np.sign(score[rows][label[rows]][:, None] - score[rows][~label[rows]][None, :]) / 2 + 0.5), problem[rows[0]])
        for rows in (np.flatnonzero(problem == p) for p in np.unique(problem))
        if label[rows].any() and not label[rows].all()
    ]
    return np.array([share for share, _ in found]), np.array([number for _, number in found])


def pair_accuracy(score: np.ndarray, label: np.ndarray, problem: np.ndarray) -> float:
    """Share of (correct, incorrect) pairs within a problem that the score orders rightly, ties counting half, a mean over problems.

    NaN without pairs.
    """
    wins, _ = _wins(score, label, problem)
    return float(np.mean(wins)) if len(wins) else float("nan")


def interval(judged: Judged, score: np.ndarray, confidence: float, seed: int) -> tuple[float, float]:
    """Of `judged.auc(score)`, by resampling problems."""
    if judged.unit == "logit":
        return bootstrap_mean(*_wins(score, judged.is_correct, judged.problem), confidence, seed)
    return bootstrap_auc(score, judged.is_correct, judged.problem, confidence, seed)


def calibration(score: np.ndarray, label: np.ndarray) -> list[dict[str, float]]:
    """For each filled bin of predicted probability: its mean prediction, its observed share of correct rows, its count."""
    place = np.minimum((score * BINS).astype(int), BINS - 1)
    return [
        {"predicted": float(score[place == b].mean()), "observed": float(label[place == b].mean()), "n": int((place == b).sum())}
        for b in range(BINS)
        if (place == b).any()
    ]


@dataclass(frozen=True)
class Localisation:
    """Of each wrong program with a known fault: is its largest value drop within one token of it, the odds by chance, its problem."""

    hit: np.ndarray
    chance: np.ndarray
    problem: np.ndarray

    def figures(self, confidence: float, seed: int) -> dict[str, float]:
        low, high = bootstrap_mean(self.hit, self.problem, confidence, seed)
        found, chance = (float(np.mean(part)) if len(part) else float("nan") for part in (self.hit, self.chance))
        names = ("", "_low", "_high", "_by_chance")
        return {f"bug_localisation{name}": value for name, value in zip(names, (found, low, high, chance))} | {"n_bugs": len(self.hit)}


def localisation(judged: Judged) -> Localisation:
    found = []
    for delta, p, right, problem, (first, end) in zip(judged.deltas(), judged.start, judged.is_correct, judged.problem, judged.span):
        if right or first < 0 or not len(delta):
            continue
        near = (np.arange(p, p + len(delta)) >= first - 1) & (np.arange(p, p + len(delta)) <= end)
        found.append((float(near[np.argmin(delta)]), near.mean(), problem))
    hit, chance, problems = zip(*found) if found else ((), (), ())
    return Localisation(np.array(hit), np.array(chance), np.array(problems))


def report(judged: Judged, *, confidence: float, min_delta_std: float, seed: int) -> dict[str, object]:
    """Every figure of the gate and whether it is passed: AUC's lower end above chance and above length alone, and values that move.

    A figure that is not known is None. `prompt_auc` is that of the value at the last prompt token, before any of the program is read.
    """
    score = judged.at_share(1.0)
    low, high = interval(judged, score, confidence, seed)
    figures: dict[str, object] = {"auc": judged.auc(score), "auc_low": low, "auc_high": high, "length_auc": judged.length_auc()}
    figures |= {"prompt_auc": judged.auc(judged.at_share(0.0))}
    figures |= {f"auc_at_{share}": judged.auc(judged.at_share(share / 100)) for share in SHARES}
    figures |= {"pair_accuracy": pair_accuracy(score, judged.is_correct, judged.problem)}
    if judged.unit == "probability":
        figures |= _probabilities(score, judged.is_correct)
    figures |= {"delta_std": float(np.concatenate(judged.deltas()).std())}
    figures |= localisation(judged).figures(confidence, seed) | {"n_programs": len(score)}
    figures |= {"passed": not failures(figures, min_delta_std)}
    return {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in figures.items()}


def _probabilities(score: np.ndarray, label: np.ndarray) -> dict[str, float]:
    off = sum(b["n"] * abs(b["predicted"] - b["observed"]) for b in calibration(score, label))
    return {"brier": float(np.mean((score - label) ** 2)), "calibration_error": float(off / len(score))}


def failures(figures: Mapping[str, Any], min_delta_std: float) -> list[str]:
    """Why the gate is not passed, in words; empty where it is. A figure that is None or NaN is a reason too."""
    low, length, std = (float("nan") if figures[key] is None else figures[key] for key in ("auc_low", "length_auc", "delta_std"))
    reasons = []
    if not low > max(0.5, length):
        reasons.append(f"the lower end of the AUC's interval is {low:.3f}, not above chance (0.5) and length alone ({length:.3f})")
    if not std >= min_delta_std:
        reasons.append(f"values hardly move: the standard deviation of their steps is {std:.2g}, under the floor of {min_delta_std:g}")
    return reasons
