"""The page of the comparison: what it shows, that nothing in it is taken for markup, and that a browser shows it."""

import html.parser
import os
import re
import shutil
import subprocess

import pytest

from tests.test_report import CRITIC, DIFFERENCES, FIGURES, LOGS
from wmtp import page
from wmtp.disagreements import Answer, disagreements, greedy_answers
from wmtp.records import AssertTests, Completion, Problem, Verdict
from wmtp.report import draw_heads, draw_scores, draw_training, draw_weights

CHROMIUM = shutil.which("chromium")
NASTY = "def f(xs):\n    return '<script>alert(1)</script> & \"'"
PIECES = ["def", "\u2581f", "(", "xs", "):", "<0x0A>", "\u2581\u2581", "return", "\u2581", "<0xC3>", "<0xA9>", "<"]


def problem(number, source="mbpp"):
    return Problem(
        task_id=str(number), source=source, group="g", statement="Add <b>one</b> & two", tests=AssertTests(asserts=["assert f(1)"])
    )


def example(task_id, kind="critic", place=(2, 4)):
    n = len(PIECES) + 1
    weights = [[0.1 + 0.4 * i, 1.0] for i in range(n)]
    return {
        "task_id": task_id,
        "tokens": PIECES,
        "weights": weights,
        "place": place,
        "kind": kind,
        "signal": [0.5] * (n + 1),
        "prompt": "Add <b>1</b>\n",
    }


def answered(*verdicts):
    return {("mbpp", str(i)): Answer(NASTY, verdict, "boom <i>") for i, verdict in enumerate(verdicts)}


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    draw_scores(FIGURES, "start", folder / "pass_at_k.png")
    draw_training(FIGURES, LOGS, folder / "training.png")
    draw_weights({name: {**log, **WEIGHTS} for name, log in LOGS.items()}, folder / "weights.png")
    draw_heads({"start": PLACES, "baseline": PLACES}, "start", folder / "heads.png")
    shutil.copy(folder / "heads.png", folder / "critic.png")
    pictures = {name: folder / f"{name}.png" for name in ("pass_at_k", "training", "weights", "heads", "critic")}
    apart = disagreements(
        "rho1", "baseline", {"rho1": answered("pass", "fail"), "baseline": answered("error", "pass")},
        {("mbpp", str(i)): problem(i) for i in range(2)}, 2,
    )  # fmt: skip
    examples = {"verifiable": [example("1_a"), example("1_b", place=None)], "rho1": [example("1_a", kind="reference")]}
    return page.document("The <comparison>", page.sections(FIGURES, DIFFERENCES, CRITIC, "landlock", 10_000, examples, apart, pictures))


WEIGHTS = {"weight_ess": [0.5] * 4, "weight_selected_head0": [0.6] * 4, "weight_selected_head1": [1.0] * 4}
PLACES = [
    {"place": 0.1 * i + 0.05, "ce_head0": 0.1, "ce_head1": 0.2, "accuracy_at_1_head0": 0.9, "accuracy_at_1_head1": 0.5} for i in range(10)
]


class Seen(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text, self.links = [], [], "", []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "link", "img", "rect", "line", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("rect", "line", "polyline"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def seen(document):
    reader = Seen()
    reader.feed(document)
    return reader


def test_the_page_is_whole_and_asks_for_nothing_from_outside(seen):
    assert not seen.open and "script" not in seen.tags
    assert (
        all(link.startswith(("data:", "#")) for link in seen.links) and sum(link.startswith("data:image/png") for link in seen.links) == 5
    )


def test_texts_that_look_like_markup_are_shown_as_text(document, seen):
    assert NASTY in seen.text and "Add <b>one</b> & two" in seen.text and "boom <i>" in seen.text and "The <comparison>" in seen.text
    assert "<script" not in document


def test_every_method_every_difference_and_the_gate_stand_there(seen):
    for text in (*FIGURES, "AUC on held-out programs", "Holm p", "isolation landlock"):
        assert text in seen.text


def test_programs_are_shown_token_by_token_on_the_colour_of_their_weight(document):
    programs = re.findall(r'<pre class="code">(.*?)</pre>', document, re.DOTALL)
    assert len(programs) == 3
    spans = re.findall(
        r'<span( class="place")? title="([0-9.]+)" style="background: (.*?)">(.*?)(?=<span title|<span class="place"|$)',
        programs[0],
        re.DOTALL,
    )
    assert [float(weight) for _, weight, _, _ in spans] == pytest.approx([0.1 + 0.4 * i for i in range(len(PIECES) + 1)], abs=0.005)
    assert [bool(place) for place, *_ in spans] == [2 <= i < 4 for i in range(len(PIECES) + 1)]
    assert html.unescape(re.sub("<[^>]+>", "", "".join(text for *_, text in spans))) == "def f(xs):\u21b5\n  return \u00e9<end"
    assert document.count("<svg") == 2, "the critic's values stand under the method that reads them"


@pytest.mark.parametrize(
    "pieces, texts",
    [
        (["\u2581a", "<0x0A>", "b"], [" a", "\n", "b"]),
        (["<0xE2>", "<0x82>", "<0xAC>"], ["", "", "\u20ac"]),
        (["<0xE2>", "x"], ["", "\ufffdx"]),
        ([], []),
    ],
)
def test_pieces_are_the_text_that_they_stand_for(pieces, texts):
    assert page.text_of(pieces) == texts


def test_colours_are_white_at_one_and_grow_with_the_distance():
    depth = [float(page.colour_of(weight).rpartition(", ")[2][:-1]) for weight in (0.0, 0.2, 0.6, 1.0, 1.5, 3.0, 5.0, 9.0)]
    assert depth[3] == 0 and depth[0] == depth[1] > depth[2] > 0 and 0 < depth[4] < depth[5] < depth[6] == depth[7]
    assert page.colour_of(0.5).startswith("rgba(0, 114, 178") and page.colour_of(2).startswith("rgba(213, 94, 0")


def test_values_are_drawn_from_0_to_1_and_logits_from_their_least_to_their_greatest():
    def drawn(values):
        text = page.curve(values, [1, 2], "v")
        marks = re.findall(r">([^<>]+)</text>", text)
        return [float(point.split(",")[1]) for point in re.search(r'points="([^"]+)"', text)[1].split()], marks

    assert drawn([0.5, 0.0, 1.0, 0.25]) == ([48.0, 88.0, 8.0, 68.0], ["1", "0.5", "0"])
    assert drawn([0.5, 2.0, -1.0, -1.0]) == ([48.0, 8.0, 88.0, 88.0], ["2", "0.5", "-1"])
    assert drawn([3.0, 3.0])[1] == ["3", "3", "3"]


def test_disagreements_are_those_of_greedy_completions_both_ways_and_never_of_the_judge():
    answers = {"a": answered("pass", "pass", "fail", "pass", "pass"), "b": answered("fail", "pass", "pass", "harness-error", "timeout")}
    problems = {("mbpp", str(i)): problem(i) for i in range(5)}
    found = disagreements("a", "b", answers, problems, 5)
    assert [(one.problem.task_id, one.better, one.worse) for one in found] == [("0", "a", "b"), ("4", "a", "b"), ("2", "b", "a")]
    assert len(disagreements("a", "b", answers, problems, 1)) == 2


def test_greedy_answers_join_a_completion_with_its_verdict():
    def pair(sample, temperature, verdict):
        named = {"task_id": "1", "benchmark": "mbpp", "temperature": temperature, "sample": sample}
        one = Completion(**named, raw="r", completion=f"c{temperature}", truncated=False, ended=True, n_tokens=1, n_forwards=1)
        return one, Verdict(**named, verdict=verdict, detail="d")

    completions, verdicts = zip(pair(0, 0.0, "pass"), pair(0, 0.8, "fail"))
    assert greedy_answers(completions, verdicts) == {("mbpp", "1"): Answer("c0.0", "pass", "d")}


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no chromium here; .ci/run installs one")
def test_a_browser_shows_the_page_and_has_nothing_to_complain_of(document, tmp_path):
    (tmp_path / "index.html").write_text(document)
    shown = subprocess.run(
        [
            CHROMIUM, "--headless", *(["--no-sandbox"] if os.geteuid() == 0 else []), "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr", "--window-size=1200,1600", "--virtual-time-budget=3000", f"--screenshot={tmp_path / 'page.png'}",
            "--dump-dom", (tmp_path / "index.html").as_uri(),
        ], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "CONSOLE" not in shown.stderr, shown.stderr
    assert "</html>" in shown.stdout and (tmp_path / "page.png").stat().st_size > 20_000
