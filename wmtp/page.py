"""The comparison as one HTML page that needs no network: tables, pictures, programs coloured by weight, answers that differ.

Pictures lie in the page as data; there is no script. Equal inputs give equal bytes.
"""

import base64
import html
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wmtp import report
from wmtp.disagreements import Disagreement
from wmtp.pages import title
from wmtp.protocols import instruction_of

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
STYLE = """
:root { --ink: #1a1a1a; --soft: #595959; --line: #d9d9d9; --paper: #ffffff; --shade: #f6f6f4; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 5rem; max-width: 68rem; color: var(--ink); background: var(--paper);
       font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; } h2 { font-size: 1.2rem; margin: 3rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p { margin: .6rem 0; max-width: 46rem; } .soft, figcaption, caption { color: var(--soft); font-size: .86rem; }
nav { margin: 1rem 0 0; font-size: .9rem; } nav a { margin-right: 1.1rem; color: #0b57a4; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem .28rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; border-bottom: 1.5px solid #8c8c8c; } th.word, td.word { text-align: left; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; display: block; }
pre { margin: .3rem 0; white-space: pre-wrap; padding: .7rem .9rem; background: var(--shade); border-radius: 4px; overflow-x: auto;
      font: 13.5px/1.6 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
pre.code span { border-radius: 2px; padding: .08em 0; } pre.code span.place { outline: 2px solid #1a1a1a; outline-offset: -1px; }
.one { border-top: 1px solid var(--line); margin-top: 1.4rem; padding-top: .7rem; } .one h3 { margin: .7rem 0 .3rem; }
.end { color: var(--soft); font-size: .8em; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: .4rem 1.4rem; }
.verdict { font-weight: 600; } .pass { color: #0b6b3a; } .miss { color: #a32100; }
.scale { display: inline-block; width: 12rem; height: .8rem; vertical-align: middle; margin: 0 .5rem; border-radius: 2px; }
details { margin: .8rem 0; } summary { cursor: pointer; color: #0b57a4; }
svg { display: block; max-width: 100%; height: auto; }
@media print { body { max-width: none; padding: 0; } h2 { break-after: avoid; } figure, .pair { break-inside: avoid; } }
"""
SOFT, WORD = ' class="soft"', ' class="word"'
HEAVY, LIGHT = (213, 94, 0), (0, 114, 178)  # Okabe and Ito's vermilion and blue


def paragraph(text: str, soft: bool = False) -> str:
    return f"<p{SOFT if soft else ''}>{html.escape(text)}</p>\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], n_left: int) -> str:
    """As wmtp.pages.grid takes it: the first `n_left` columns hold words."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{WORD if i < n_left else ''}>{html.escape(cell)}</{tag}>" for i, cell in enumerate(cells))

    lines = "".join(f"<tr>{line(row, 'td')}</tr>\n" for row in rows)
    return f'<div class="wide"><table><thead><tr>{line(header, "th")}</tr></thead><tbody>\n{lines}</tbody></table></div>\n'


def picture(path: Path, words: str) -> str:
    """A PNG inside the page, letters of one size in all; `words` for those who cannot see it."""
    content = path.read_bytes()
    width = struct.unpack(">I", content[16:20])[0] // 2
    data = base64.b64encode(content).decode()
    return f'<figure><img width="{width}" alt="{html.escape(words)}" src="data:image/png;base64,{data}"></figure>\n'


def folded(summary: str, inside: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>\n{inside}</details>\n"


def text_of(pieces: Sequence[str]) -> list[str]:
    """What each piece of a SentencePiece vocabulary stands for; a character of several byte pieces stands with the last of them."""
    found, waiting = [], b""
    for piece in pieces:
        if match := BYTE.fullmatch(piece):
            waiting += bytes([int(match[1], 16)])
            try:
                found.append(waiting.decode())
                waiting = b""
            except UnicodeDecodeError:
                found.append("")
        else:
            found.append((waiting.decode(errors="replace") if waiting else "") + piece.replace("\u2581", " "))
            waiting = b""
    return found


def colour_of(weight: float) -> str:
    """A background: white at 1, blue below, vermilion above, as far as at a fifth and at five."""
    heavy = weight >= 1
    share = min(1.0, (weight - 1) / 4 if heavy else (1 - weight) / 0.8)
    return f"rgba({', '.join(map(str, HEAVY if heavy else LIGHT))}, {0.62 * share**0.7:.3f})"


def scale() -> str:
    stops = ", ".join(colour_of(weight) for weight in (0.2, 0.6, 1, 2, 3, 4, 5))
    return (
        f'<p class="soft">weight 0.2 or less<span class="scale" style="background: linear-gradient(to right, {stops})"></span>5 or more;'
        " white: 1, as all tokens have in the baseline. Outlined: where an incorrect program of the same problem first differs.</p>\n"
    )


def coloured(example: Mapping[str, Any], head: int = 0) -> str:
    """A program, each token on the colour of its weight in `head`; its number shows under the pointer."""
    first, end = example["place"] or (0, 0)
    spans = []
    texts = [html.escape(text).replace("\n", "\u21b5\n") for text in text_of(example["tokens"])]  # a line's end has no width to colour
    for i, (shown, weights) in enumerate(zip([*texts, '<span class="end">end</span>'], example["weights"])):
        place = ' class="place"' if first <= i < end else ""
        spans.append(f'<span{place} title="{weights[head]:.2f}" style="background: {colour_of(weights[head])}">{shown}</span>')
    return f'<pre class="code">{"".join(spans)}</pre>\n'


def curve(values: Sequence[float], place: Sequence[int] | None, words: str) -> str:
    """Values by state as a line, the last prompt token's first; the tokens of `place` are shaded. From 0 to 1, or, where values lie beyond
    (a pairwise critic's are logits), from their least to their greatest.
    """
    low, high = (0.0, 1.0) if all(0 <= v <= 1 for v in values) else (min(values), max(values))
    width, height, left = 640.0, 96.0, 34.0
    step = (width - left - 6) / max(1, len(values) - 1)
    at = [(left + i * step, 8 + (height - 16) * (high - v) / ((high - low) or 1.0)) for i, v in enumerate(values)]
    shade = ""
    if place:
        x, w = left + (place[0] + 0.5) * step, (place[1] - place[0]) * step
        shade = f'<rect x="{x:.1f}" y="4" width="{w:.1f}" height="{height - 8:.0f}" fill="#E69F00" opacity=".35"/>'
    grid = "".join(
        f'<line x1="{left:.0f}" x2="{width:.0f}" y1="{y:.0f}" y2="{y:.0f}" stroke="#d9d9d9"/>'
        f'<text x="{left - 6:.0f}" y="{y + 4:.0f}" text-anchor="end" font-size="11" fill="#595959">{name}</text>'
        for name, y in ((f"{high:.3g}", 8.0), (f"{(low + high) / 2:.3g}", height / 2), (f"{low:.3g}", height - 8))
    )
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    return (
        f'<svg {size} role="img" aria-label="{html.escape(words)}">'
        f'{grid}{shade}<polyline points="{line}" fill="none" stroke="#0072B2" stroke-width="1.6"/></svg>\n'
    )


def weights(examples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Programs side by side for each method, the critic's values below where those are what a method reads."""
    shown = [scale()]
    methods = {name: {one["task_id"]: one for one in found} for name, found in examples.items()}
    for task_id in dict.fromkeys(task for found in methods.values() for task in found):
        parts = []
        for name, found in methods.items():
            if one := found.get(task_id):
                line = curve(one["signal"][:-1], one["place"], f"the critic's value along {task_id}") if one["kind"] == "critic" else ""
                parts.append(f"<div><h3>{html.escape(name)}, head 0</h3>{coloured(one)}{line}</div>")
        asked = html.escape(next(found[task_id]["prompt"] for found in methods.values() if task_id in found).strip())
        shown.append(
            f'<div class="one"><p class="soft">{html.escape(task_id)}</p><pre>{asked}</pre><div class="pair">{"".join(parts)}</div></div>\n'
        )
    return "".join(shown)


def answers(found: Sequence[Disagreement]) -> str:
    """Statements with what the two methods wrote."""
    parts = []
    for one in found:
        statement, given = instruction_of(one.problem)
        columns = "".join(
            f'<div><h3>{html.escape(name)}: <span class="verdict {"pass" if answer.verdict == "pass" else "miss"}">'
            f"{html.escape(answer.verdict)}</span></h3><pre>{html.escape(answer.text)}</pre>"
            f'<p class="soft">{html.escape(answer.detail)}</p></div>'
            for name, answer in one.answers.items()
        )
        words = html.escape("\n".join(part for part in (statement, given) if part))
        name = html.escape(f"{title(one.problem.source)}, {one.problem.task_id}: solved by {one.better} alone")
        parts.append(f'<div class="one"><p class="soft">{name}</p><pre>{words}</pre><div class="pair">{columns}</div></div>\n')
    return "".join(parts) or paragraph("None: their greedy completions pass and fail on the same problems.")


FIRST_STEP = "Those of the first step, from the common start, before mix and head_weights; hover for the number."
Section = tuple[str, str]
"""A title and what stands below it, as HTML."""


def sections(
    figures: report.Figures,
    differences: Sequence[Mapping[str, Any]],
    critic: Mapping[str, Any],
    isolation: str,
    resamples: int,
    examples: Mapping[str, Sequence[Mapping[str, Any]]],
    apart: Sequence[Disagreement],
    pictures: Mapping[str, Path],
) -> list[Section]:
    """All of the page, in order. `isolation` is the judge's; `examples` by method (wmtp.examples), `pictures` by subject."""
    header, rows, n_left = report.differences_grid(differences)
    main = [row for row, one in zip(rows, differences) if one["measure"] == "pass@1" and one["against"] == differences[0]["against"]]
    return [
        ("Methods", table(*report.scores_grid(figures)) + paragraph(report.scores_note(figures), soft=True)
         + picture(pictures["pass_at_k"], "pass@1 by method with 95 % intervals")
         + folded("What each training cost", table(*report.costs_grid(figures)) + paragraph(report.FLOPS, soft=True))
         + paragraph(f"Programs were judged under isolation {isolation}.", soft=True)),
        (f"Differences from {differences[0]['against']}", table(header, main or rows, n_left)
         + folded("All differences, greedy and between the other methods", table(header, rows, n_left))
         + paragraph(report.differences_note(differences, resamples), soft=True) + paragraph(report.COVERED, soft=True)),
        ("Training", picture(pictures["training"], "loss and cross-entropy by step, cross-entropy by head at the end")
         + picture(pictures["weights"], "effective share of tokens by step, selected share by head")),
        ("Heads", picture(pictures["heads"], "accuracy of each head by place in the program")
         + paragraph("Held-out correct programs; a place is a tenth of the program, the end of text in the last.", soft=True)),
        ("Weights", weights(examples) + paragraph(FIRST_STEP, soft=True)),
        ("Critic", paragraph(report.gate_line(critic)) + picture(pictures["critic"], "calibration, AUC by prefix, two programs' values")),
        ("Answers that differ", paragraph("Greedy completions: those it wins, then those it loses.", soft=True) + answers(apart)),
    ]  # fmt: skip


def document(heading: str, sections: Sequence[Section]) -> str:
    names = [re.sub(r"[^a-z]+", "-", name.lower()).strip("-") for name, _ in sections]
    links = "".join(f'<a href="#{key}">{html.escape(name)}</a>' for key, (name, _) in zip(names, sections))
    body = "\n".join(f'<section id="{key}"><h2>{html.escape(name)}</h2>\n{text}</section>' for key, (name, text) in zip(names, sections))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{html.escape(heading)}</title><style>{STYLE}</style></head>\n'
        f"<body><h1>{html.escape(heading)}</h1><nav>{links}</nav>\n{body}\n</body></html>\n"
    )
