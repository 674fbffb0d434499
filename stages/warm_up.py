"""python -m stages.warm_up START PROCESSED OUT LOG: short uniform multi-token pre-training, from which every method starts."""

from pathlib import Path
from typing import Any

from stages import run
from wmtp import outcome, train
from wmtp.world import joined


def work(params: Any, track: Any, start: str, processed: str, out: str, log: str) -> dict[str, Any]:
    with joined(params.run.device) as world:
        records = train.tune(params, "warm_up", "warm_up", Path(start), Path(processed), Path(out), world, track.log)
        if world.is_first:
            outcome.write_log(Path(log), records)
    return records[-1] if records else {}


if __name__ == "__main__":
    run(work)
