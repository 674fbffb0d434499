"""python -m stages.compare_study METRICS VERDICTS OUT START [ARM=START...]: arms with their seeds, contrasts with intervals, one picture.

START is the eval.json of the model that the arms start from, ARM=START that of an arm with a start of its own.
"""

import json
from pathlib import Path
from typing import Any

from stages import run
from wmtp import study, study_report
from wmtp.arms import controls
from wmtp.progress import say


def work(params: Any, track: Any, metrics: str, verdicts: str, out: str, start: str, *others: str) -> dict[str, Any]:
    settings, folder = params.study, Path(out)
    against = controls({arm: params.methods[arm] for arm in settings.arms})
    found = study.read_arms(against, settings.seeds, Path(metrics), Path(verdicts))
    own = {arm: path for arm, path in (other.split("=", 1) for other in others) if arm in found}
    starts = {name: json.loads(Path(path).read_text()) for name, path in {"": start, **own}.items()}
    text, contrasts = study_report.write(found, against, params.report.bootstrap, starts, folder)
    track.artifact(folder)
    say(text)
    return {f"{one.benchmark}.{one.arm}-{one.against}": one.difference for one in contrasts}


if __name__ == "__main__":
    run(work)
