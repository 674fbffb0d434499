"""The page and the pictures, from numbers written out here."""

import copy
import re

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp import pages, report
from wmtp.pages import grid
from wmtp.report import draw_scores, draw_training, gate_line, table

CRITIC = {
    "auc": 0.934, "auc_low": 0.912, "auc_high": 0.956, "length_auc": 0.52, "delta_std": 0.0834, "bug_localisation": 0.61,
    "bug_localisation_by_chance": 0.05, "n_bugs": 300, "passed": True,
}  # fmt: skip


def benchmark(score):
    figures = {"pass@1": score, "pass@1_stderr": 0.02, "pass@5": 0.7, "pass@5_stderr": 0.03, "pass@10": 0.9, "pass@10_stderr": 0.015}
    return figures | {"n_problems": 200, "greedy": score + 0.05, "greedy_stderr": 0.03}


def training(n_heads):
    heads = {f"validation_ce_head{head}": 0.12 + 0.01 * head for head in range(n_heads)}
    return {
        "steps": 440,
        "tokens": 1234567,
        "parameters": 1400000,
        "trained_parameters": 1400000,
        "train_flops": 12345678901234,
        "total_flops": 15345678901234,
    } | heads


FIGURES = {
    "start": {"humaneval": benchmark(0.1), "mbpp": benchmark(0.15), "training": {}},
    "ntp": {"humaneval": benchmark(0.4), "mbpp": benchmark(0.45), "training": training(1)},
    "baseline": {"humaneval": benchmark(0.5), "mbpp": benchmark(0.55), "training": training(4)},
    "rho1": {"humaneval": benchmark(0.6), "mbpp": benchmark(0.65), "training": training(4)},
}
LOGS = {
    name: {"step": [5, 10, 15, 20], "loss": [0.4 * scale, 0.3, 0.25, 0.2 * scale], "ce_head0": [0.35 * scale, 0.3, 0.2, 0.15]}
    for name, scale in (("ntp", 0.9), ("baseline", 1.0), ("rho1", 1.1))
}


def contrast(method="rho1", **changes):
    row = {"method": method, "against": "baseline", "benchmark": "humaneval", "measure": "pass@1", "n_problems": 200}
    row |= {"difference": 0.1, "stderr": 0.02, "low": 0.06, "high": 0.14, "p": 0.0003, "p_holm": 0.012, "mde": 0.056}
    row |= {"same_budget": True}
    return row | changes


DIFFERENCES = [
    contrast(),
    contrast("ntp", benchmark="mbpp", difference=-0.0004, low=-0.05, high=0.0, p=0.5, p_holm=1.0),
    contrast("start", measure="greedy", difference=0.0, low=0.0, high=0.0, p=1.0, p_holm=1.0, mde=None),
]


def cells(page, first):
    """The cells of the rows whose first cell is `first`, one list a table."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    return [row[1:] for row in rows if row[0] == first]


def page(**changes):
    return table(**({"figures": FIGURES, "differences": DIFFERENCES, "critic": CRITIC, "resamples": 10_000} | changes))


def test_methods_are_rows():
    scores, costs, *_ = cells(page(), "rho1")
    assert scores == ["60.0 ± 2.0", "90.0 ± 1.5", "65.0 ± 3.0", "65.0 ± 2.0", "90.0 ± 1.5", "70.0 ± 3.0", "0.1200"]
    assert costs == ["440", "1,234,567", "1,400,000", "1.23e+13", "1.53e+13"]
    header = cells(page(), "method")[0]
    assert header == ["HumanEval form pass@1", "pass@10", "greedy", "MBPP form pass@1", "pass@10", "greedy", "CE"]


def test_a_table_of_zeros_says_what_it_does_not_say():
    none = {name: {**sections, **{one: dict.fromkeys(sections[one], 0.0) | {"n_problems": 200} for one in ("humaneval", "mbpp")}}
            for name, sections in FIGURES.items()}  # fmt: skip
    assert "No program of any method passed" in page(figures=none) and "No program of any method passed" not in page()
    none["ntp"]["mbpp"]["pass@10"] = 0.01
    assert "No program of any method passed" not in page(figures=none)


def test_the_start_has_scores_but_no_training():
    rows = cells(page(), "start")
    assert len(rows) == 2
    assert rows[0][-1] == ""


def test_differences_are_rows():
    text = page()
    assert cells(text, "rho1")[-1] == ["HumanEval form", "pass@1", "+10.0", "+6.0 to +14.0", "<0.001", "0.012*", "5.6"]
    assert cells(text, "ntp")[-1] == ["MBPP form", "pass@1", "0.0", "-5.0 to 0.0", "0.500", "1.000", "5.6"]
    assert cells(text, "start")[-1] == ["HumanEval form", "greedy", "0.0", "0.0 to 0.0", "1.000", "1.000", "n/a"]


def test_a_difference_of_unequal_budgets_is_marked_and_never_starred():
    text = page(differences=[contrast(same_budget=False), *DIFFERENCES[1:]])
    assert cells(text, "rho1†")[-1] == ["HumanEval form", "pass@1", "+10.0", "+6.0 to +14.0", "<0.001", "0.012", "5.6"]
    assert (
        "†: the two took other steps, read other tokens (see above) or had other heads to grow" in " ".join(text.split())
        and "†" not in page()
    )


def test_the_page_says_what_it_knows_and_what_not():
    text = " ".join(page().split())
    assert "10,000 paired bootstrap resamples of problems" in text
    assert "adjusted for all 3 rows" in text
    assert "200 problems (HumanEval form) and 200 problems (MBPP form)" in text
    assert "one training seed" in text
    assert "Differences from baseline" in text


def test_lines_fit_a_terminal_and_columns_align():
    lines = page().splitlines()
    assert max(map(len, lines)) <= 120
    tables = re.split(r"\n(?!\|)", page())
    for block in tables:
        assert len({len(line) for line in block.splitlines() if line.startswith("|")}) <= 1
    assert not any(line.startswith(("* ", "- ", "+ ")) for line in lines), "a wrapped line that markdown takes for a list"


def test_rule_of_a_grid_aligns_numbers_right():
    assert grid(["a", "bb"], [["word", "1"]], 1) == "| a    | bb |\n|------|---:|\n| word |  1 |"


def test_greedy_alone_where_nothing_was_sampled():
    figures = copy.deepcopy(FIGURES)
    for sections in figures.values():
        for name in ("humaneval", "mbpp"):
            sections[name] = {key: value for key, value in sections[name].items() if not key.startswith("pass@")}
    assert cells(page(figures=figures), "method")[0] == ["HumanEval form greedy", "MBPP form greedy", "CE"]


def test_a_single_k_is_one_column():
    figures = copy.deepcopy(FIGURES)
    for sections in figures.values():
        for name in ("humaneval", "mbpp"):
            sections[name] = {key: value for key, value in sections[name].items() if not key.startswith(("pass@5", "pass@10"))}
    assert cells(page(figures=figures), "method")[0] == ["HumanEval form pass@1", "greedy", "MBPP form pass@1", "greedy", "CE"]


def test_gate_line():
    line = gate_line(CRITIC)
    assert "passed" in line
    assert "0.934 (interval 0.912 to 0.956), by length alone 0.520" in line
    assert "61 % of 300 programs, 5 % by chance" in line
    failed = gate_line(CRITIC | {"passed": False, "bug_localisation": None, "bug_localisation_by_chance": None, "n_bugs": 0})
    assert "FAILED" in failed
    assert "known fault" not in failed


# Pictures.


def pixels(path):
    return np.round(matplotlib.image.imread(path)[..., :3] * 255).astype(int).reshape(-1, 3)


def rgb(colour):
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


NAMES = ("pass_at_k.png", "training.png")


def draw(folder, figures=FIGURES, logs=LOGS):
    draw_scores(figures, "start", folder / "pass_at_k.png")
    draw_training(figures, logs, folder / "training.png")
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("drawn"))


@pytest.mark.parametrize("name", NAMES)
def test_each_method_has_its_colour_in_both_pictures(drawn, name):
    seen = pixels(drawn / name)
    for colour in pages.COLOURS[:3]:
        assert (seen == rgb(colour)).all(1).sum() > 50
    assert not (seen == rgb(pages.COLOURS[3])).all(1).any()


def test_equal_numbers_give_equal_bytes_whatever_the_users_settings(drawn, tmp_path):
    with matplotlib.rc_context({"axes.linewidth": 9.0, "xtick.major.size": 20.0, "savefig.dpi": 30}):
        draw(tmp_path, logs=dict(reversed(LOGS.items())))
        assert matplotlib.rcParams["axes.linewidth"] == 9.0
    for name in NAMES:
        assert (tmp_path / name).read_bytes() == (drawn / name).read_bytes()
        assert matplotlib.__version__.encode() not in (tmp_path / name).read_bytes()


def test_other_numbers_give_another_picture(drawn, tmp_path):
    figures = copy.deepcopy(FIGURES)
    figures["rho1"]["mbpp"]["pass@1"] = 0.3
    logs = copy.deepcopy(LOGS)
    logs["rho1"]["loss"][-1] = 0.1
    draw(tmp_path, figures, logs)
    for name in NAMES:
        assert (tmp_path / name).read_bytes() != (drawn / name).read_bytes()


def test_a_picture_that_fails_leaves_no_file(tmp_path):
    figures = copy.deepcopy(FIGURES)
    del figures["rho1"]["mbpp"]["pass@1"]
    with pytest.raises(KeyError):
        draw_scores(figures, "start", tmp_path / "pass_at_k.png")
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.1)), min_size=1, max_size=5))
def test_limits_hold_every_interval(points):
    figures = {
        f"m{i}": {"humaneval": {"pass@1": score, "pass@1_stderr": stderr}, "training": {}} for i, (score, stderr) in enumerate(points)
    }
    low, high = report._limits(figures, "pass@1")
    assert 0 <= low < high <= 100
    for score, stderr in points:
        assert low <= max(0.0, 100 * (score - 1.9 * stderr))
        assert min(100.0, 100 * (score + 1.9 * stderr)) <= high


def test_parameters_that_adapters_leave_alone_are_told():
    from wmtp.pages import parameters

    assert parameters({"parameters": 1400000, "trained_parameters": 1400000}) == "1,400,000"
    assert parameters({"parameters": 1400000, "trained_parameters": 90000}) == "1,400,000 (90,000 trained)"
