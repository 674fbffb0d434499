"""python -m stages.measure_heads MODEL PROCESSED FIGURES BY_PLACE: what each head of a model knows of held-out programs."""

import json
from pathlib import Path
from typing import Any

import torch

from stages import run
from wmtp.measure import measure
from wmtp.model import load_bundle
from wmtp.records import write_rows, write_text
from wmtp.tokens import TokenData, check_same_tokenizer
from wmtp.world import joined


def work(params: Any, track: Any, path: str, processed: str, figures: str, by_place: str) -> dict[str, float]:
    with joined(params.run.device) as world:
        data = TokenData(processed, "validation")
        check_same_tokenizer(data.tokenizer_sha256, path, "the model")
        model = load_bundle(path, dtype=torch.float32, device=world.device)
        found = measure(model, data, world, params.optimizer.micro_batch_tokens)
        if world.is_first:
            write_text(figures, json.dumps(found.whole(), indent=2) + "\n")
            write_rows(Path(by_place), found.by_place())
    return {f"{head}.{name}": value for head, means in found.whole().items() for name, value in means.items()}


if __name__ == "__main__":
    run(work)
