"""python -m stages.compare METRICS VERDICTS OUT METHOD...: methods as rows, paired differences, the report and its pictures."""

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stages import run
from wmtp import compare, report
from wmtp.progress import say
from wmtp.records import write_rows, write_text

START, AGAINST = "start", "baseline"


def work(params: Any, track: Any, metrics: str, verdicts: str, out: str, *names: str) -> dict[str, Any]:
    settings, folder = params.report, Path(out)
    if settings.method not in names:
        raise compare.CompareError(f"report.method {settings.method!r} is none of the methods compared: {', '.join(names)}")
    start = compare.read_result(START, Path(metrics), Path(verdicts), trained=False)
    methods = [compare.read_result(name, Path(metrics), Path(verdicts)) for name in names]
    critic = compare.read_critic(Path(metrics) / "critic.json")
    others = itertools.combinations([method.name for method in methods if method.name != AGAINST], 2)
    pairs = [(later, earlier) for earlier, later in others]
    found = [asdict(one) for one in compare.differences([start, *methods], AGAINST, settings.bootstrap, pairs)]
    figures = {result.name: compare.figures_of(result) for result in (start, *methods)}
    text = report.table(figures, found, critic, settings.bootstrap)
    write_rows(folder / "methods.csv", [compare.summary(result) for result in (start, *methods)])
    write_rows(folder / "differences.csv", found)
    write_text(folder / "selected.json", json.dumps(figures[settings.method], indent=2) + "\n")
    write_text(folder / "report" / "table.md", text)
    report.draw_scores(figures, START, folder / "report" / "pass_at_k.png")
    report.draw_training(figures, {method.name: method.log for method in methods}, folder / "report" / "training.png")
    track.artifact(folder / "report")
    say(text)
    return {f"{one['benchmark']}.{one['measure']}.{one['method']}-{one['against']}": one["difference"] for one in found}


if __name__ == "__main__":
    run(work)
