"""One module per stage: read, call, write. Paths come from dvc.yaml as arguments."""

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from wmtp import progress, view
from wmtp.tracking import stage_run


def run(work: Callable[..., dict[str, Any] | None]) -> None:
    """Calls `work(params, track, *arguments)`; its result is the stage's summary for the tracker.

    A fault that names itself (a wrong value, file or number) is one line on stderr and exit code 1; anything else is a traceback.
    """
    stage, debug = os.environ.get("DVC_STAGE", Path(sys.argv[0]).stem), False
    # What the imports made stays: to look through it for garbage while torch imports more took half a second of every training.
    gc.freeze()
    try:
        arguments, settings = view.split_arguments(sys.argv[1:])
        visible = view.load(settings=settings)
        debug = visible.log_level == "debug"
        progress.set_level(visible.log_level)
        with stage_run(stage, visible.shaping(), visible.tracking.enabled, visible.tracking.tags) as track:
            track.summary(work(visible, track, *arguments) or {})
    except (ValueError, OSError, ArithmeticError, SafetensorError) as error:
        if debug:
            raise
        sys.exit(f"{stage}: {error}")
    except KeyboardInterrupt:
        print(f"{stage}: stopped from outside; the next dvc repro goes on", file=sys.stderr)
        sys.exit(130)
