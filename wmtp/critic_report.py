"""The critic as a reader sees it: calibration, what it knows by share of a program, and its values along two programs of one problem.

Values and what they mean are those of wmtp.gate. Equal values give equal bytes.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wmtp.gate import Judged, calibration, interval
from wmtp.pages import COLOURS, GREY, canvas
from wmtp.records import write_rows

SHARES = range(0, 101, 10)  # of a response, in percent
SHOWN = 64  # tokens of a program, at most
RIGHT, WRONG = COLOURS[0], COLOURS[2]
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
VISIBLE = {"\u2581": "\u00b7", " ": "\u00b7", "\n": "\u21b5", "\t": "\u21e5"}


@dataclass(frozen=True)
class Curve:
    """A program: the value v[P-1] before its first token, then after each token P..L-1; `fault` tokens [start, end) of them, or None."""

    name: str
    values: np.ndarray
    texts: list[str]
    fault: tuple[int, int] | None


def typical_pair(judged: Judged) -> tuple[int, int]:
    """Places of a correct and an incorrect program of one problem, next to each other in `judged`, whose end values differ by the median.

    Of the pairs with a known fault, where there are such.
    """
    places = np.arange(0, len(judged.start), 2)
    known = places[(judged.span[places + 1, 0] >= 0) & (judged.span[places, 0] >= 0)]
    places = known if len(known) else places
    end = judged.at_share(1.0)
    order = places[np.argsort(end[places] - end[places + 1], kind="stable")]
    middle = int(order[len(order) // 2])
    return middle, middle + 1


def curves(judged: Judged, pair: tuple[int, int], texts: Sequence[list[str]]) -> list[Curve]:
    found = []
    for place, text in zip(pair, texts):
        start, (first, end) = int(judged.start[place]), judged.span[place]
        values = judged.values[place][start - 1 : -1].astype(np.float64)
        name = "correct" if judged.is_correct[place] else "incorrect"
        found.append(Curve(name, values, text, None if first < 0 else (int(first) - start, int(end) - start)))
    return found


def prefix_rows(judged: Judged, confidence: float, seed: int) -> list[dict[str, float]]:
    """AUC with its interval after each share of the programs, length alone beside it."""
    length, rows = judged.length_auc(), []
    for share in SHARES:
        score = judged.at_share(share / 100)
        low, high = interval(judged, score, confidence, seed)
        rows.append({"share": share, "auc": judged.auc(score), "auc_low": low, "auc_high": high, "length_auc": length})
    return rows


def write(folder: Path, judged: Judged, pair: Sequence[Curve], confidence: float, seed: int) -> None:
    """FOLDER/critic.png, prefix.csv, correct.csv, incorrect.csv, and reliability.csv where values are probabilities."""
    prefix = prefix_rows(judged, confidence, seed)
    bins = calibration(judged.at_share(1.0), judged.is_correct) if judged.unit == "probability" else []
    write_rows(folder / "prefix.csv", prefix)
    for curve in pair:
        write_rows(folder / f"{curve.name}.csv", list(_value_rows(curve)))
    if bins:
        write_rows(folder / "reliability.csv", bins)
    draw(folder / "critic.png", prefix, bins, pair, judged.unit, confidence)


def _value_rows(curve: Curve) -> Iterator[dict[str, Any]]:
    first, end = curve.fault or (0, 0)
    for place, (text, value) in enumerate(zip(["", *curve.texts], curve.values.tolist())):
        yield {"read": place, "token": visible(text), "value": value, "fault": int(first < place <= end)}


def visible(piece: str) -> str:
    """A vocabulary piece with its white space to be seen, bytes as ASCII where they are; what the font may lack as an escape."""
    letters = BYTE.sub(lambda byte: chr(int(byte[1], 16)), piece)
    return "".join(
        VISIBLE.get(letter, ascii(letter)[1:-1] if not letter.isprintable() or not letter.isascii() else letter) for letter in letters
    )


def draw(
    path: Path, prefix: Sequence[Mapping[str, float]], bins: Sequence[Mapping[str, float]], pair: Sequence[Curve], unit: str,
    confidence: float,
) -> None:  # fmt: skip
    """Reliability (without `bins` left out), AUC by share of the program, and each program's values over its tokens."""
    with canvas(path, (10.2, 8.2)) as figure:
        top, *rows = figure.subfigures(3, 1, height_ratios=(1.1, 1, 1))
        panels = top.subplots(1, 2 if bins else 1, squeeze=False)[0]
        if bins:
            _draw_reliability(panels[0], bins)
        _draw_prefix(panels[-1], prefix, unit, confidence)
        low = min(float(curve.values.min()) for curve in pair)
        high = max(float(curve.values.max()) for curve in pair)
        margin = 0.05 * (high - low) or 1.0
        limits = (-0.04, 1.04) if unit == "probability" else (low - margin, high + margin)
        for part, curve in zip(rows, pair):
            _draw_curve(part.subplots(), curve, unit, limits)


def _draw_reliability(panel: Any, bins: Sequence[Mapping[str, float]]) -> None:
    panel.plot((0, 1), (0, 1), color=GREY, ls=(0, (5, 3)), lw=1.1, zorder=1)
    predicted, observed = ([one[key] for one in bins] for key in ("predicted", "observed"))
    panel.plot(predicted, observed, color=COLOURS[1], marker="o", ms=5, lw=1.2)
    for one in bins:
        side = (7, -3, "left") if one["predicted"] < 0.9 else (-7, -3, "right")
        panel.annotate(
            f"{one['n']}", (one["predicted"], one["observed"]), side[:2], textcoords="offset points", ha=side[2], va="top", fontsize=7.5,
            color="#444444",
        )  # fmt: skip
    panel.set_title("Calibration at the end, with counts", loc="left")
    panel.set_xlabel("predicted probability of passing")
    panel.set_ylabel("observed share")
    panel.set_xlim(-0.03, 1.03)
    panel.set_ylim(-0.12, 1.06)


def _draw_prefix(panel: Any, prefix: Sequence[Mapping[str, float]], unit: str, confidence: float) -> None:
    share, auc, low, high = ([one[key] for one in prefix] for key in ("share", "auc", "auc_low", "auc_high"))
    panel.fill_between(share, low, high, color=COLOURS[1], alpha=0.18, lw=0, label=f"{100 * confidence:g} % interval")
    panel.plot(share, auc, color=COLOURS[1], marker="o", ms=4, lw=1.2, label="critic")
    panel.axhline(prefix[0]["length_auc"], color=GREY, ls=(0, (5, 3)), lw=1.1, zorder=1, label="length alone")
    panel.set_title("AUC by share of the program" + (", within problems" if unit == "logit" else ""), loc="left")
    panel.set_xlabel("program read, %; 0: the prompt alone")
    panel.set_ylabel("AUC")
    panel.set_ylim(min(0.45, *low) - 0.02, 1.02)
    panel.legend(loc="upper left")


def _draw_curve(panel: Any, curve: Curve, unit: str, limits: tuple[float, float]) -> None:
    first, end = _window(curve)
    colour = RIGHT if curve.name == "correct" else WRONG
    if curve.fault:
        panel.axvspan(curve.fault[0] + 0.5, curve.fault[1] + 0.5, color=COLOURS[4], alpha=0.35, lw=0)
        label = "known bug" if curve.name == "incorrect" else "where the other has its bug"
        leftwards = sum(curve.fault) > first + end
        panel.annotate(
            label, (curve.fault[0 if leftwards else 1] + 0.5, 0), (-4 if leftwards else 4, 4), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="right" if leftwards else "left", fontsize=8, annotation_clip=False,
        )  # fmt: skip
    places = range(first, end)
    panel.plot(places, curve.values[first:end], color=colour, marker="o", ms=3, lw=1.2)
    panel.set_xticks(places, ["(prompt)" if place == 0 else visible(curve.texts[place - 1]) for place in places], rotation=90)
    for label in panel.get_xticklabels():
        label.set(family="DejaVu Sans Mono", fontsize=6.5, parse_math=False)
    panel.tick_params(axis="x", length=2)
    panel.set_xlim(first - 0.8, end - 0.2)
    panel.set_ylim(*limits)
    shown = "" if end - first == len(curve.values) else f" (tokens {first} to {end - 1} of {len(curve.texts)})"
    which = "a correct program" if curve.name == "correct" else "an incorrect program of the same problem"
    panel.set_title(f"Value along {which}{shown}", loc="left")
    panel.set_ylabel("value" if unit == "probability" else "value, logit")


def _window(curve: Curve) -> tuple[int, int]:
    """At most SHOWN places, round the fault, or the end where it is not known."""
    middle = curve.fault[0] + 1 if curve.fault else len(curve.values)
    first = max(0, min(middle - SHOWN // 2, len(curve.values) - SHOWN))
    return first, min(len(curve.values), first + SHOWN)
