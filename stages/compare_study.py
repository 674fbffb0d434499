"""python -m stages.compare_study METRICS VERDICTS OUT: arms with their seeds, contrasts with intervals, one picture."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from stages import run
from wmtp import study, study_report
from wmtp.compare import write_rows
from wmtp.progress import say
from wmtp.records import write_text

AGAINST = "baseline"


def work(params: Any, track: Any, metrics: str, verdicts: str, out: str) -> dict[str, Any]:
    settings, folder = params.study, Path(out)
    found = study.read_arms(settings.arms, settings.seeds, Path(metrics), Path(verdicts))
    contrasts = study.contrasts(found, AGAINST, params.report.bootstrap)
    arms, rows = study.arm_rows(found), [asdict(one) for one in contrasts]
    benchmarks = list(found[AGAINST][0].evaluation)
    by_seed = {
        (one.arm, one.against, one.benchmark): study.scores(found[one.arm], one.benchmark).mean(1)
        - study.scores(found[one.against], one.benchmark).mean(1)
        for one in contrasts
    }
    text = study_report.page(arms, rows, benchmarks, params.report.bootstrap)
    write_rows(folder / "arms.csv", arms)
    write_rows(folder / "contrasts.csv", rows)
    write_text(folder / "table.md", text)
    study_report.draw(rows, by_seed, folder / "differences.png")
    track.artifact(folder)
    say(text)
    return {f"{one.benchmark}.{one.arm}-{one.against}": one.difference for one in contrasts}


if __name__ == "__main__":
    run(work)
