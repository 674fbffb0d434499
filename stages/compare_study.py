"""python -m stages.compare_study METRICS VERDICTS OUT START [ARM=START...]: arms with their seeds, contrasts with intervals, one picture.

START is the eval.json of the model that the arms start from, ARM=START that of an arm with a start of its own.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stages import run
from wmtp import study, study_report
from wmtp.arms import controls
from wmtp.progress import say
from wmtp.records import write_rows, write_text


def work(params: Any, track: Any, metrics: str, verdicts: str, out: str, start: str, *others: str) -> dict[str, Any]:
    settings, folder = params.study, Path(out)
    against = controls({arm: params.methods[arm] for arm in settings.arms})
    found = study.read_arms(against, settings.seeds, Path(metrics), Path(verdicts))
    contrasts = study.contrasts(found, against, params.report.bootstrap)
    arms, rows = study.arm_rows(found), [asdict(one) for one in contrasts]
    benchmarks = list(dict.fromkeys(one.benchmark for one in contrasts))
    by_seed = {
        (one.arm, one.against, one.benchmark): study.scores(found[one.arm], one.benchmark).mean(1)
        - study.scores(found[one.against], one.benchmark).mean(1)
        for one in contrasts
    }
    own = {arm: path for arm, path in (other.split("=", 1) for other in others) if arm in found}
    starts = {name: json.loads(Path(path).read_text()) for name, path in {"": start, **own}.items()}
    text = study_report.page(arms, rows, benchmarks, params.report.bootstrap, starts)
    write_rows(folder / "arms.csv", arms)
    write_rows(folder / "contrasts.csv", rows)
    write_text(folder / "table.md", text)
    study_report.draw(rows, by_seed, folder / "differences.png")
    track.artifact(folder)
    say(text)
    return {f"{one.benchmark}.{one.arm}-{one.against}": one.difference for one in contrasts}


if __name__ == "__main__":
    run(work)
