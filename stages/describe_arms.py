"""python -m stages.describe_arms SCORES OUT: one file an arm with the hashes of what it alone depends on, its weighting and its signal.

A matrix of DVC cannot name another dependency for each arm; this file can, and changes only when its arm does.
"""

import json
from pathlib import Path
from typing import Any

from stages import run
from wmtp.records import sha256_file, write_text
from wmtp.weighting import METHODS


def work(params: Any, track: Any, scores: str, out: str) -> dict[str, Any]:
    for arm in params.study.arms:
        method = METHODS[arm]
        files = {path.name: sha256_file(path) for path in method.source_files()}
        signal = sha256_file(Path(scores) / f"{method.signal}.safetensors") if method.signal else None
        write_text(Path(out) / f"{arm}.json", json.dumps({**method._asdict(), "files": files, "scores": signal}, indent=1) + "\n")
    return {"arms": len(params.study.arms)}


if __name__ == "__main__":
    run(work)
