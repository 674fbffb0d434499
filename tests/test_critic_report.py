"""The critic's pictures and their numbers, from values written out here."""

import csv
import math
import warnings
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest

from tests.test_gate import held_out, judged, row
from wmtp import gate as room
from wmtp.critic_report import SHARES, SHOWN, Curve, _window, curves, prefix_rows, typical_pair, visible, write
from wmtp.gate import auc, calibration


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(room, "BOOTSTRAP", 50)


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def a_part(**changes):
    part = held_out(n_problems=20, skill=0.3)
    span = np.array([(5, 7)] * len(part.start))
    return replace(part, span=span, **changes)


def written(folder, part):
    pair = typical_pair(part)
    texts = [[f"t{i}" for i in range(len(part.values[place]) - 1 - part.start[place])] for place in pair]
    write(folder, part, curves(part, pair, texts), 0.95, 3)
    return pair


@pytest.mark.slow
def test_equal_values_give_equal_bytes_and_a_picture_whatever_the_user_has_set(tmp_path):
    written(tmp_path / "a", a_part())
    with matplotlib.rc_context({"figure.facecolor": "red", "font.size": 30}):
        written(tmp_path / "b", a_part())
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["correct.csv", "critic.png", "incorrect.csv", "prefix.csv", "reliability.csv"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    picture = matplotlib.image.imread(tmp_path / "a" / "critic.png")
    assert picture.shape[:2] == (1640, 2040) and picture[..., :3].std() > 0.05
    assert b"Software" not in (tmp_path / "a" / "critic.png").read_bytes()


def test_logits_have_no_reliability(tmp_path):
    written(tmp_path, a_part(unit="logit"))
    assert not (tmp_path / "reliability.csv").exists() and (tmp_path / "critic.png").exists()


def test_the_numbers_are_those_of_the_gate(tmp_path):
    part = a_part()
    written(tmp_path, part)
    rows = read(tmp_path / "prefix.csv")
    assert [int(one["share"]) for one in rows] == list(SHARES)
    for one in rows:
        assert float(one["auc"]) == auc(part.at_share(int(one["share"]) / 100), part.is_correct)
        assert float(one["auc_low"]) <= float(one["auc"]) <= float(one["auc_high"]) and float(one["length_auc"]) == 0.5
    found = [{key: float(value) for key, value in one.items()} for one in read(tmp_path / "reliability.csv")]
    assert found == calibration(part.at_share(1.0), part.is_correct)


def test_values_are_rows_by_tokens_read(tmp_path):
    part = a_part()
    right, wrong = written(tmp_path, part)
    for name, place in (("correct", right), ("incorrect", wrong)):
        own = read(tmp_path / f"{name}.csv")
        assert [float(one["value"]) for one in own] == [float(v) for v in part.values[place][2:-1]]
        assert [one["token"] for one in own] == ["", *[f"t{i}" for i in range(len(own) - 1)]]
        # P = 3, the fault in tokens 5 and 6: the third and fourth of the response, read after as many.
        assert [int(one["read"]) for one in own if one["fault"] == "1"] == [3, 4]


def test_the_typical_pair_has_the_median_difference_and_a_known_fault_where_there_is_one():
    ends = [(1.0, 0.0), (0.75, 0.5), (0.5, 0.25), (0.25, 0.75), (0.875, 0.75)]
    rows = [row(2, 0.5, end) for pair in ends for end in pair]
    part = judged(rows, [2] * 10, [1, 0] * 5, np.arange(10) // 2)
    # Differences 1, 1/4, 1/4, -1/2 and 1/8: the middle one is the first 1/4.
    assert typical_pair(part) == (2, 3)
    span = np.array([(2, 3)] * 2 + [(-1, -1)] * 4 + [(2, 3)] * 2 + [(-1, -1)] * 2)
    assert typical_pair(replace(part, span=span)) == (0, 1)


@pytest.mark.parametrize(
    "piece, shown",
    [
        ("\u2581for", "\u00b7for"), ("<0x0A>", "\u21b5"), ("a\n ", "a\u21b5\u00b7"), ("<0x28>", "("), ("<0xFF>", "\\xff"), ("$", "$"),
        ("\u00e9\u4e2d", "\\xe9\\u4e2d"), ("\t", "\u21e5"), ("<0x09>", "\u21e5"),
    ],
)  # fmt: skip
def test_white_space_is_seen_and_what_a_font_may_lack_is_escaped(piece, shown):
    assert visible(piece) == shown


@pytest.mark.parametrize(
    "n, fault, expected", [(20, (3, 4), (0, 20)), (200, (100, 102), (69, 133)), (200, (199, 200), (136, 200)), (200, None, (136, 200))]
)
def test_a_long_program_is_shown_round_its_fault(n, fault, expected):
    first, end = _window(Curve("incorrect", np.zeros(n), [""] * (n - 1), fault))
    assert (first, end) == expected and end - first <= SHOWN


@pytest.mark.parametrize("unit", ["probability", "logit"])
def test_odd_programs_are_drawn_without_a_warning(tmp_path, unit):
    """Nothing but a prompt's value, text that looks like mathematics, letters that the font lacks, equal values."""
    part = replace(held_out(n_problems=6, noise=0.0, skill=0.0), unit=unit)
    texts = [f"${i}_" for i in range(100)] + ["\u4e2d", "\U0001f600", "\n"]
    long, short = Curve("correct", np.full(104, 0.5), texts, (90, 99)), Curve("incorrect", np.array([0.5]), [], None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(tmp_path, part, [long, short], 0.9, 0)


def test_the_interval_of_logits_is_that_of_the_mean_over_problems():
    part = replace(held_out(skill=0.1), unit="logit")
    for one in prefix_rows(part, 0.95, 0):
        assert one["auc"] == part.auc(part.at_share(one["share"] / 100))
        assert one["auc_low"] <= one["auc"] <= one["auc_high"] and not math.isnan(one["auc_low"])
