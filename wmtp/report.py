"""What a reader of the comparison sees: one page of tables, two pictures, from plain numbers. Equal numbers give equal bytes.

`figures` maps each method, the common start included, to its sections: one a benchmark (metrics/METHOD/eval.json) and `training`
(metrics/METHOD/train.json, empty for the start). Differences are rows of metrics/differences.csv.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

from wmtp.pages import GREY, colour, grid, marker, p_value, panels, paragraph, parameters, points, title

Figures = Mapping[str, Mapping[str, Mapping[str, float]]]
Grid = tuple[list[str], list[list[str]], int]

ALPHA = 0.05
OTHER_BUDGET = (
    " †: the two took other steps, read other tokens (see above) or had other heads to grow, so that the difference is not the weights'"
    " alone; never marked *."
)
FLOPS = (
    "FLOPs: 2 a weight and position forward, 4 backward, at the positions that are computed: heads compute no prompt, the vocabulary is"
    " computed at targets alone; attention between positions and padding are left out. First the policy's own training; in total with the"
    " training of its critic or reference and the forward of that over the policies' data, counted whole for every method that reads it."
    " The warm-up, which all share, is not counted. Wall clock: in MLflow and the logs."
)
COVERED = (
    "The choice of problems only: each method was trained once, with one training seed, and another seed may move its numbers beyond these"
    " intervals."
)
NONE_PASSED = " No program of any method passed its tests: the scores say nothing of the methods."
Z_95 = NormalDist().inv_cdf(0.975)


def table(figures: Figures, differences: Sequence[Mapping[str, Any]], critic: Mapping[str, Any], resamples: int) -> str:
    """The page as GitHub markdown, columns padded for a terminal; `critic` is metrics/critic.json."""
    blocks = [
        "## Methods",
        grid(*scores_grid(figures)),
        paragraph(scores_note(figures)),
        grid(*costs_grid(figures)),
        paragraph(FLOPS),
        f"## Differences from {differences[0]['against']}, and between the other methods",
        grid(*differences_grid(differences)),
        paragraph(differences_note(differences, resamples)),
        "## Critic",
        paragraph(gate_line(critic)),
        "## What the intervals cover",
        paragraph(COVERED),
    ]
    return "\n\n".join(blocks) + "\n"


def scores_note(figures: Figures) -> str:
    counts = {benchmark: next(iter(figures.values()))[benchmark]["n_problems"] for benchmark in _benchmarks(figures)}
    problems = " and ".join(f"{n} problems ({title(benchmark)})" for benchmark, n in counts.items())
    text = f"In percent, ± one standard error over {problems}. CE: cross-entropy of head 0 on held-out programs, nats per token."
    return text + ("" if _any_passed(figures) else NONE_PASSED)


def differences_note(differences: Sequence[Mapping[str, Any]], resamples: int) -> str:
    return (
        f"In points. Interval: percentiles of {resamples:,} paired bootstrap resamples of problems. p: paired bootstrap for pass@1,"
        f" exact McNemar for greedy. Holm p: adjusted for all {len(differences)} rows (*: below {ALPHA:g}). MDE: minimum detectable"
        " effect, the smallest true difference that one unadjusted 5 % test would find with 80 % power; n/a where no problem differs."
        + (OTHER_BUDGET if any(_unequal(one) for one in differences) else "")
    )


def gate_line(critic: Mapping[str, Any]) -> str:
    verdict = "passed" if critic["passed"] else "FAILED, so that weights made from this critic mean nothing"
    text = (
        f"Quality gate {verdict}. AUC on held-out programs {critic['auc']:.3f} (interval {critic['auc_low']:.3f} to"
        f" {critic['auc_high']:.3f}), by length alone {critic['length_auc']:.3f}; standard deviation of value steps"
        f" {critic['delta_std']:.4f}."
    )
    if critic["bug_localisation"] is None:
        return text
    return (
        f"{text} Largest drop at the known fault in {100 * critic['bug_localisation']:.0f} % of {critic['n_bugs']} programs,"
        f" {100 * critic['bug_localisation_by_chance']:.0f} % by chance."
    )


def scores_grid(figures: Figures) -> Grid:
    """Header, rows and the number of columns of words, as wmtp.pages.grid takes them."""
    header, columns = ["method"], []
    for benchmark in _benchmarks(figures):
        keys = _keys(next(iter(figures.values()))[benchmark])
        columns += [(benchmark, key) for key in keys]
        header += [f"{title(benchmark)} {keys[0]}", *keys[1:]]
    rows = []
    for name, sections in figures.items():
        cells = [(100 * sections[benchmark][key], 100 * sections[benchmark][f"{key}_stderr"]) for benchmark, key in columns]
        ce = sections["training"].get("validation_ce_head0")
        rows.append([name, *(f"{score:.1f} ± {stderr:.1f}" for score, stderr in cells), "" if ce is None else f"{ce:.4f}"])
    return [*header, "CE"], rows, 1


def _any_passed(figures: Figures) -> bool:
    sections = [sections[benchmark] for sections in figures.values() for benchmark in _benchmarks(figures)]
    return any(section[key] > 0 for section in sections for key in _keys(section))


def costs_grid(figures: Figures) -> Grid:
    spent = {name: sections["training"] for name, sections in figures.items() if sections["training"]}
    rows = [
        [name, f"{cost['steps']:,}", f"{cost['tokens']:,}", parameters(cost), f"{cost['train_flops']:.2e}", f"{cost['total_flops']:.2e}"]
        for name, cost in spent.items()
    ]
    return ["method", "steps", "tokens", "parameters", "FLOPs", "total FLOPs"], rows, 1


def differences_grid(differences: Sequence[Mapping[str, Any]]) -> Grid:
    usual = differences[0]["against"]
    header = ["method", "benchmark", "measure", "difference", "95 % interval", "p", "Holm p ", "MDE"]
    rows = [
        [
            (one["method"] if one["against"] == usual else f"{one['method']} - {one['against']}") + ("†" if _unequal(one) else ""),
            title(one["benchmark"]), one["measure"], points(one["difference"]),
            f"{points(one['low'])} to {points(one['high'])}", p_value(one["p"]),
            p_value(one["p_holm"]) + ("*" if one["p_holm"] < ALPHA and not _unequal(one) else " "),
            "n/a" if one["mde"] is None else f"{100 * one['mde']:.1f}",
        ]
        for one in differences
    ]  # fmt: skip
    return header, rows, 3


def _unequal(one: Mapping[str, Any]) -> bool:
    return not one["same_budget"]


def _benchmarks(figures: Figures) -> list[str]:
    return [section for section in next(iter(figures.values())) if section != "training"]


def _keys(benchmark: Mapping[str, float]) -> list[str]:
    """pass@1, pass@k of the largest k, greedy: those that were measured."""
    ks = sorted(int(key.removeprefix("pass@")) for key in benchmark if key.startswith("pass@") and not key.endswith("_stderr"))
    return [*(f"pass@{k}" for k in dict.fromkeys([*ks[:1], *ks[-1:]])), "greedy"]


def draw_scores(figures: Figures, start: str, path: Path) -> None:
    """pass@1 with its 95 % interval over problems, one panel a benchmark, the common start as a dashed line; greedy if none was sampled."""
    methods = [name for name in figures if name != start]
    benchmarks = _benchmarks(figures)
    measure = _keys(figures[start][benchmarks[0]])[0]
    with panels(path, (3.6 * len(benchmarks), 3.1), len(benchmarks), sharey=True) as axes:
        for panel, benchmark in zip(axes, benchmarks):
            for place, name in enumerate(methods):
                score, reach = _interval(figures[name][benchmark], measure)
                panel.errorbar(place, score, reach, color=colour(place), marker=marker(place), ms=6, capsize=3, lw=1.6)
                panel.annotate(f"{score:.1f}", (place, score), (7, 0), textcoords="offset points", va="center", fontsize=8.5)
            begun = 100 * figures[start][benchmark][measure]
            panel.axhline(begun, color=GREY, ls=(0, (5, 3)), lw=1.1, zorder=1)
            panel.annotate(
                f"{start} {begun:.1f}", (1, begun), (0, 4), xycoords=("axes fraction", "data"), ha="right", textcoords="offset points",
                color=GREY, fontsize=8.5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
            panel.set_title(f"{title(benchmark)}, {figures[start][benchmark]['n_problems']} problems", loc="left")
            panel.set_xticks(range(len(methods)), methods)
            panel.set_xlim(-0.5, len(methods) - 0.3)
            panel.tick_params(axis="x", length=0)
        axes[0].set_ylim(*_limits(figures, measure))
        axes[0].set_ylabel(f"{measure}, % (95 % interval)")


def draw_training(figures: Figures, logs: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """The loss that each method minimises, the cross-entropy of head 0 that all share, both by step; validation per head at the end."""
    with panels(path, (10.2, 3.1), 3) as (loss, shared, heads):
        for place, name in enumerate(name for name in figures if name in logs):
            look = {"color": colour(place), "label": name, "lw": 1.2}
            loss.plot(logs[name]["step"], logs[name]["loss"], **look)
            shared.plot(logs[name]["step"], logs[name]["ce_head0"], **look)
            training = figures[name]["training"]
            n_heads = sum(key.startswith("validation_ce_head") for key in training)
            ce = [training[f"validation_ce_head{head}"] for head in range(n_heads)]
            heads.plot(range(n_heads), ce, marker=marker(place), ms=5, **look)
        for panel, title in ((loss, "Loss as trained: weighted, all heads"), (shared, "Training: next token, unweighted")):
            panel.set_title(title, loc="left")
            panel.set_xlabel("optimizer step")
            _log_scale(panel)
        heads.set_title("Held-out programs at the end", loc="left")
        heads.set_xlabel("head (0: next token)")
        heads.set_xticks(range(max(len(line.get_xdata()) for line in heads.lines)))
        loss.set_ylabel("cross-entropy, nats per token")
        heads.legend()


def draw_heads(places: Mapping[str, Sequence[Mapping[str, float]]], start: str, path: Path) -> None:
    """Accuracy of each head by place in held-out programs, a panel a head, the common start grey; `places`: rows of heads.csv by model."""
    looks = {name: {"color": colour(at), "marker": marker(at)} for at, name in enumerate(name for name in places if name != start)}
    looks[start] = {"color": GREY, "ls": (0, (5, 3))}
    n_heads = max(sum(key.startswith("ce_head") for key in rows[0]) for rows in places.values())
    with panels(path, (2.7 * n_heads, 2.9), n_heads, sharey=True) as axes:
        for head, panel in enumerate(axes):
            for name, rows in places.items():
                if (key := f"accuracy_at_1_head{head}") in rows[0]:
                    at, accuracy = [100 * row["place"] for row in rows], [100 * row[key] for row in rows]
                    panel.plot(at, accuracy, **looks[name], ms=3.5, lw=1.2, label=name)
            panel.set_title(f"head {head}" + (", next token" if head == 0 else f", {head + 1} ahead"), loc="left")
            panel.set_xlabel("place in the program, %")
        axes[0].set_ylabel("tokens foreseen, %")
        axes[0].legend(loc="lower right")


def draw_weights(logs: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """By step: the effective share of tokens under each method's weights; the share that each head selects where some are left out."""
    selecting = [name for name, log in logs.items() if any(min(column) < 1 for column in _selected(log))]
    with panels(path, (3.4 * (1 + len(selecting)), 2.9), 1 + len(selecting)) as (shares, *selections):
        for place, (name, log) in enumerate(logs.items()):
            shares.plot(log["step"], [100 * share for share in log["weight_ess"]], color=colour(place), label=name, lw=1.2)
        shares.set_title("Effective share of tokens, %", loc="left")
        shares.set_ylim(0, 104)
        shares.legend(loc="lower right")
        for panel, name in zip(selections, selecting):
            for head, column in enumerate(_selected(logs[name])):
                panel.plot(logs[name]["step"], [100 * share for share in column], color=colour(head), label=f"head {head}", lw=1.2)
            panel.set_title(f"Tokens that {name} selects, %", loc="left")
            panel.set_ylim(0, 104)
            panel.legend(loc="lower right")
        for panel in (shares, *selections):
            panel.set_xlabel("optimizer step")


def _selected(log: Mapping[str, Sequence[float]]) -> list[Sequence[float]]:
    return [log[f"weight_selected_head{head}"] for head in range(sum(key.startswith("weight_selected_head") for key in log))]


def _interval(benchmark: Mapping[str, float], measure: str) -> tuple[float, float]:
    """(percent, half the width of its 95 % interval)."""
    return 100 * benchmark[measure], 100 * Z_95 * benchmark[f"{measure}_stderr"]


def _limits(figures: Figures, measure: str) -> tuple[float, float]:
    """Room for every interval with a margin, within 0 to 100."""
    intervals = [_interval(sections[benchmark], measure) for sections in figures.values() for benchmark in _benchmarks(figures)]
    low, high = min(score - reach for score, reach in intervals), max(score + reach for score, reach in intervals)
    margin = max(1.0, 0.06 * (high - low))
    return max(0.0, low - margin), min(100.0, high + margin)


def _log_scale(panel: Any) -> None:
    """Ticks at round numbers, written as such."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_locator(NullLocator())
