"""What a reader of a study sees: arms and contrasts as tables, one picture of differences with every seed in it, from plain rows."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wmtp import study
from wmtp.compare import Result
from wmtp.pages import GREY, colour, grid, p_value, panels, paragraph, parameters, points, title
from wmtp.records import write_rows, write_text

ALPHA = 0.05
OWN_START = "; †: from a start of its own, see below, so that the difference is not the methods' alone: never marked *"


def write(
    found: Mapping[str, Sequence[Result]],
    against: study.Controls,
    resamples: int,
    starts: Mapping[str, Mapping[str, Mapping[str, float]]],
    folder: Path,
) -> tuple[str, list[study.Contrast]]:
    """FOLDER/arms.csv, contrasts.csv, table.md and differences.png; returns the page and the contrasts."""
    contrasts = study.contrasts(found, against, resamples)
    arms, rows = study.arm_rows(found), [asdict(one) for one in contrasts]
    benchmarks = list(dict.fromkeys(one.benchmark for one in contrasts))
    by_seed = {
        (one.arm, one.against, one.benchmark): study.scores(found[one.arm], one.benchmark).mean(1)
        - study.scores(found[one.against], one.benchmark).mean(1)
        for one in contrasts
    }
    text = page(arms, rows, benchmarks, resamples, starts)
    write_rows(folder / "arms.csv", arms)
    write_rows(folder / "contrasts.csv", rows)
    write_text(folder / "table.md", text)
    draw(rows, by_seed, folder / "differences.png")
    return text, contrasts


def page(
    arms: Sequence[Mapping[str, Any]],
    contrasts: Sequence[Mapping[str, Any]],
    benchmarks: Sequence[str],
    resamples: int,
    starts: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> str:
    """The page as GitHub markdown from rows of arms.csv and contrasts.csv.

    `starts` holds the evaluation of the models that trainings start from: "" the common one, else the arm's own.
    """
    n_seeds, primary = arms[0]["seeds"], [one for one in contrasts if one["primary"]]
    others = [one for one in contrasts if not one["primary"]]
    counts = " and ".join(f"{one} problems ({title(name)})" for name, one in {c["benchmark"]: c["n_problems"] for c in contrasts}.items())
    blocks = [
        "## Arms",
        grid(*_arms(arms, benchmarks)),
        paragraph(
            f"{_budgets(arms)}. FLOPs of the positions that are computed, without attention between them and padding: the policy's own"
            " training; in total with its critic or reference."
        ),
        paragraph(
            f"pass@1 in percent, mean of {n_seeds} training seeds ± their standard deviation; {counts}. CE: head 0, held-out programs."
        ),
    ]
    for heading, rows in (
        ("## Primary contrasts", primary),
        (f"## Every other arm against {' or '.join(dict.fromkeys(one['against'] for one in others))}", others),
    ):
        blocks += [heading, grid(*_contrasts(rows, starts))] if rows else []
    blocks += [
        paragraph(
            f"Differences of pass@1 in points, paired by seed and problem; seed sd: their standard deviation between seeds. Interval, p:"
            f" {resamples:,} bootstrap resamples of seeds and of problems, drawn independently. Holm p: p adjusted for all rows of its"
            f" table (*: below {ALPHA:g}, and Wilcoxon's too{OWN_START if _own(starts) else ''}). Wilcoxon, sign: exact tests over the"
            f" seeds' means, which with {n_seeds} seeds cannot fall below {2 / 2**n_seeds:.3f}. MDE: minimum detectable effect, the"
            " smallest true difference that one unadjusted 5 % test would find with 80 % power, by normal quantiles. Drawn in this way the"
            f" noise of one run on one problem counts about three times, the variance between seeds {n_seeds - 1}/{n_seeds} times (the"
            " pigeonhole bootstrap, Owen 2007): intervals, p and MDE are too wide where the former is most of it, a little too narrow"
            " where the latter is."
        ),
        "## What the intervals cover",
        paragraph(
            "Training seeds (the order of the rows, and sampling) and the choice of problems. One critic, one reference, one start and"
            " one draw of the training data stand behind all arms: another critic may move these numbers beyond the intervals."
            + "".join(
                f" {arm} has a start of its own, which its contrasts hold too: {_scores(starts[arm], benchmarks)}; the others'"
                f" {_scores(starts[''], benchmarks)}."
                for arm in _own(starts)
            )
            + "".join(
                f" {arm['arm']} began with {arm['grown_heads']:.0f} heads as copies of its last block."
                for arm in arms
                if arm["grown_heads"]
            )
        ),
    ]
    return "\n\n".join(blocks) + "\n"


def _own(starts: Mapping[str, Any]) -> list[str]:
    """Arms with a start of their own."""
    return [arm for arm in starts if arm]


def _scores(evaluation: Mapping[str, Mapping[str, float]], benchmarks: Sequence[str]) -> str:
    return " and ".join(f"{100 * evaluation[name]['pass@1']:.1f} % ({title(name)})" for name in benchmarks)


def _budgets(arms: Sequence[Mapping[str, Any]]) -> str:
    """Who took how many steps over how many tokens: all arms the same, but for those that read pairs."""
    named: dict[str, list[str]] = {}
    for arm in arms:
        named.setdefault(f"{arm['steps']:.0f} steps, {arm['tokens']:,.0f} tokens", []).append(arm["arm"])
    return "; ".join(f"{'Every arm' if len(named) == 1 else ', '.join(names)}: {budget}" for budget, names in named.items())


def _arms(arms: Sequence[Mapping[str, Any]], benchmarks: Sequence[str]) -> tuple[list[str], list[list[str]], int]:
    header = ["arm", *(f"{title(benchmark)} pass@1" for benchmark in benchmarks), "CE", "parameters", "FLOPs", "total FLOPs"]
    rows = [
        [
            arm["arm"], *(f"{100 * arm[benchmark]:.1f} ± {100 * arm[f'{benchmark}_sd']:.1f}" for benchmark in benchmarks),
            f"{arm['validation_ce_head0']:.4f} ± {arm['validation_ce_head0_sd']:.4f}",
            parameters(arm), f"{arm['train_flops']:.2e}", f"{arm['total_flops']:.2e}",
        ]
        for arm in arms
    ]  # fmt: skip
    return header, rows, 1


def _contrasts(rows: Sequence[Mapping[str, Any]], starts: Mapping[str, Any]) -> tuple[list[str], list[list[str]], int]:
    header = ["contrast", "benchmark", "difference", "95 % interval", "seed sd", "p", "Holm p ", "Wilcoxon", "sign", "MDE"]
    cells = [
        [
            f"{one['arm']} - {one['against']}", title(one["benchmark"]), points(one["difference"]),
            f"{points(one['low'])} to {points(one['high'])}", f"{100 * one['seed_sd']:.1f}",
            p_value(one["p"]), p_value(one["p_holm"]) + _mark(one, starts),
            p_value(one["p_wilcoxon"]), p_value(one["p_sign"]),
            "n/a" if one["mde"] is None else f"{100 * one['mde']:.1f}",
        ]
        for one in rows
    ]  # fmt: skip
    return header, cells, 2


def _mark(one: Mapping[str, Any], starts: Mapping[str, Any]) -> str:
    """A star only where nothing but the methods differs."""
    if {one["arm"], one["against"]} & set(_own(starts)):
        return "†"
    return "*" if max(one["p_holm"], one["p_wilcoxon"]) < ALPHA else " "


def draw(contrasts: Sequence[Mapping[str, Any]], by_seed: Mapping[tuple[str, str, str], Sequence[float]], path: Path) -> None:
    """Each contrast with its 95 % interval, one panel a benchmark; small marks are the seeds' own differences."""
    benchmarks = list(dict.fromkeys(one["benchmark"] for one in contrasts))
    labels = list(dict.fromkeys((one["arm"], one["against"]) for one in contrasts))
    size = (4.4 * len(benchmarks), 1.0 + 0.3 * len(labels))
    with panels(path, size, len(benchmarks), sharey=True) as axes:
        for panel, benchmark in zip(axes, benchmarks):
            for one in (one for one in contrasts if one["benchmark"] == benchmark):
                place = labels.index((one["arm"], one["against"]))
                seeds = [100 * d for d in by_seed[one["arm"], one["against"], benchmark]]
                reach = [[100 * (one["difference"] - one["low"])], [100 * (one["high"] - one["difference"])]]
                shade = colour(2 if one["primary"] else 1)
                panel.plot(seeds, [place] * len(seeds), "|", color=GREY, ms=7, mew=1)
                panel.errorbar(100 * one["difference"], place, xerr=reach, color=shade, marker="o", ms=5, capsize=3, lw=1.6)
            panel.axvline(0, color=GREY, lw=1)
            panel.grid(axis="x")
            panel.grid(axis="y", visible=False)
            panel.set_title(title(benchmark), loc="left")
            panel.set_xlabel("difference of pass@1, points (95 % interval)")
            panel.set_yticks(range(len(labels)), [f"{arm} - {against}" for arm, against in labels])
        axes[0].set_ylim(len(labels) - 0.5, -0.5)
