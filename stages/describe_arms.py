"""python -m stages.describe_arms SCORES OUT START [ARM=START...]: one file an arm with its start, what it alone reads beside its
block, and the hashes of what it alone depends on.

A matrix of DVC cannot name another dependency or parameter for each arm; this file can, and changes only when its arm does.
"""

import json
from pathlib import Path
from typing import Any

from stages import run
from wmtp.arms import controls
from wmtp.blocks import reads_beta
from wmtp.cells import described
from wmtp.records import sha256_file, write_text
from wmtp.weighting import method_of


def work(params: Any, track: Any, scores: str, out: str, start: str, *others: str) -> dict[str, Any]:
    controls({arm: params.methods[arm] for arm in params.study.arms})  # refused here, before anything trains
    starts = dict(other.split("=", 1) for other in others)
    for arm in params.study.arms:
        block, own = params.methods[arm], starts.get(arm, start)
        method = method_of(arm, block)
        score_file = sha256_file(Path(scores) / f"{method.signal}.safetensors") if method.signal else None
        found = {
            **method._asdict(),
            **described(method, score_file, own),
            **({"beta": params.training.beta} if reads_beta(block) else {}),
            **({"train_anyway": params.critic.gate.train_anyway} if method.signal == "critic" else {}),
            "start": own,
        }
        write_text(Path(out) / f"{arm}.json", json.dumps(found, indent=1) + "\n")
    return {"arms": len(params.study.arms)}


if __name__ == "__main__":
    run(work)
