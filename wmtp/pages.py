"""What every page of results shares: markdown tables, numbers as text, one look for all pictures. Equal numbers give equal bytes."""

import contextlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wmtp.records import atomic_path

TITLES = {"humaneval": "HumanEval form", "mbpp": "MBPP form"}
LINE = 108  # characters of a line of text, about the width of the widest table
# Okabe and Ito's colours, told apart by colour-blind readers; by the method's place, so that both pictures agree.
COLOURS = ("#009E73", "#0072B2", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
GREY = "#777777"
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "legend.fontsize": 8.5,
    "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#444444", "xtick.color": "#444444",
    "ytick.color": "#444444", "xtick.labelcolor": "black", "ytick.labelcolor": "black", "axes.grid": True, "axes.grid.axis": "y",
    "grid.color": "#E4E4E4", "grid.linewidth": 0.7, "axes.axisbelow": True, "savefig.dpi": 200,
}  # fmt: skip


def grid(header: Sequence[str], rows: Sequence[Sequence[str]], n_left: int) -> str:
    """A markdown table; the first `n_left` columns hold words, the others numbers, aligned right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.ljust(width) if i < n_left else cell.rjust(width) for i, (cell, width) in enumerate(zip(cells, widths))]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 2) if i < n_left else "-" * (width + 1) + ":" for i, width in enumerate(widths))
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])


def title(benchmark: str) -> str:
    return TITLES.get(benchmark, benchmark)


def points(share: float) -> str:
    return f"{100 * share:+z.1f}".replace("+0.0", "0.0")


def p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def paragraph(text: str) -> str:
    return textwrap.fill(text, LINE, break_long_words=False, break_on_hyphens=False)


def colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def marker(place: int) -> str:
    return MARKERS[place % len(MARKERS)]


@contextlib.contextmanager
def canvas(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """Yields a figure; afterwards it is a PNG at `path`. The user's own matplotlib settings do not count."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        page = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(page)
        yield page
        with atomic_path(path) as temporary:
            # The library's version, which it writes by default, would make equal pictures differ.
            page.savefig(temporary, format="png", metadata={"Software": None})


@contextlib.contextmanager
def panels(path: Path, size: tuple[float, float], n_panels: int, **options: Any) -> Iterator[Any]:
    """Yields `n_panels` axes side by side on a canvas."""
    with canvas(path, size) as page:
        yield page.subplots(1, n_panels, squeeze=False, **options)[0]


def parameters(cost: Mapping[str, Any]) -> str:
    """Of the policy; with those that were trained where adapters are."""
    trained = cost["trained_parameters"]
    return f"{cost['parameters']:,}" + (f" ({trained:,} trained)" if trained != cost["parameters"] else "")
