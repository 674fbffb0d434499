"""python -m stages.write_page METRICS DATA OUT SHOWN METHOD...: the comparison as one HTML page, OUT/index.html, and its pictures.

SHOWN: the methods, separated by commas, whose programs are shown in the colours of their weights (stages.show_weights).
"""

import json
from pathlib import Path
from typing import Any

from stages import run
from wmtp import compare, page, report
from wmtp.disagreements import disagreements, greedy_answers
from wmtp.records import Completion, Problem, Verdict, read_jsonl, write_text

START, AGAINST, EACH = "start", "baseline", 2


def work(params: Any, track: Any, metrics: str, data: str, out: str, shown: str, *names: str) -> None:
    figures_of, held, folder = Path(metrics), Path(data), Path(out)
    results = [compare.read_result(name, figures_of, held / "verdicts", trained=name != START) for name in (START, *names)]
    figures = {result.name: compare.figures_of(result) for result in results}
    logs = {result.name: result.log for result in results if result.name != START}
    differences = compare.read_differences(figures_of / "differences.csv")
    examples = {name: json.loads((held / f"examples/{name}.json").read_text()) for name in shown.split(",")}
    critic, places = compare.read_critic(figures_of / "critic.json"), {}
    for name in figures:
        places[name] = compare.read_places(figures_of / name / "heads.csv")
    report.draw_heads(places, START, folder / "heads.png")
    report.draw_weights(logs, folder / "weights.png")
    files = {name: held / f"processed/benchmarks/{name}.jsonl" for name in results[0].evaluation}
    problems = {(name, one.task_id): one for name, file in files.items() for one in read_jsonl(file, Problem)}
    written = {name: greedy_answers(*_texts(held, name)) for name in names}
    apart = [one for name in names if name != AGAINST for one in disagreements(name, AGAINST, written, problems, EACH)]
    isolation = " and ".join(sorted({str(one.get("isolation")) for result in results for one in result.evaluation.values()}))
    sections = page.sections(
        figures, differences, critic, isolation, params.report.bootstrap, examples, apart,
        {
            "pass_at_k": figures_of / "report" / "pass_at_k.png", "training": figures_of / "report" / "training.png",
            "critic": figures_of / "critic" / "critic.png", "heads": folder / "heads.png", "weights": folder / "weights.png",
        },
    )  # fmt: skip
    write_text(folder / "index.html", page.document("Weighted multi-token prediction: the comparison", sections))
    track.artifact(folder)


def _texts(held: Path, name: str) -> tuple[list[Completion], list[Verdict]]:
    return tuple(list(read_jsonl(held / f"{kind}/{name}.jsonl", record)) for kind, record in KINDS.items())


KINDS = {"completions": Completion, "verdicts": Verdict}

if __name__ == "__main__":
    run(work)
