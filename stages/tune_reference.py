"""python -m stages.tune_reference START PROCESSED OUT LOG: the reference, tuned on other problems than the policies'."""

from pathlib import Path
from typing import Any

from stages import run
from wmtp import outcome, train
from wmtp.world import joined


def work(params: Any, track: Any, start: str, processed: str, out: str, log: str) -> dict[str, Any]:
    with joined(params.run.device) as world:
        records = train.tune(params, "reference", "reference", Path(start), Path(processed), Path(out), world, track.log)
        if world.is_first:
            outcome.write_log(Path(log), records)
    return records[-1] if records else {}


if __name__ == "__main__":
    run(work)
