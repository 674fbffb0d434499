"""python -m stages.describe_code OUT STAGE...: one file a stage with the hashes of its code.

A matrix of DVC writes each dependency of each cell into dvc.lock, which every dvc command reads: one file stands for twenty there.
"""

import json
from pathlib import Path
from typing import Any

from stages import run
from wmtp.dependencies import ROOT, source_files
from wmtp.records import sha256_file, write_text


def code_of(stage: str) -> dict[str, str]:
    return {name: sha256_file(path) for name, path in source_files(ROOT / "stages" / f"{stage}.py").items()}


def work(params: Any, track: Any, out: str, *stages: str) -> dict[str, Any]:
    for stage in stages:
        write_text(Path(out) / f"{stage}.json", json.dumps(code_of(stage), indent=1) + "\n")
    return {"stages": len(stages)}


if __name__ == "__main__":
    run(work)
