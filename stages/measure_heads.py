"""python -m stages.measure_heads MODEL START PROCESSED FIGURES BY_PLACE: what each head knows of held-out programs, and its drift."""

import json
from pathlib import Path
from typing import Any

import torch

from stages import run
from wmtp.drift import drift
from wmtp.measure import DraftFigures, drafts, measure
from wmtp.model import Transformer, load_bundle
from wmtp.progress import say
from wmtp.records import write_rows, write_text
from wmtp.tokens import TokenData, Tokenizer, check_same_tokenizer
from wmtp.world import joined

DRAFTED = 16  # prompts that are completed with drafts and without


def work(params: Any, track: Any, path: str, start: str, processed: str, out: str, by_place: str) -> dict[str, float]:
    with joined(params.run.device) as world:
        data = TokenData(processed, "validation")
        check_same_tokenizer(data.tokenizer_sha256, path, "the model")
        model = load_bundle(path, dtype=torch.float32, device=world.device)
        found = measure(model, data, world, params.optimizer.micro_batch_tokens)
        begun = load_bundle(start, dtype=torch.float32, device=world.device)
        moved = drift(model, begun, data, world, params.optimizer.micro_batch_tokens)
        figures, timed = {head: means | {"kl_from_start": kl} for (head, means), kl in zip(found.whole().items(), moved, strict=True)}, {}
        if world.is_first and model.n_future > 1:
            drafted = _drafted(model, data, Tokenizer(path), params.evaluation.max_tokens)
            names = ("n_prompts", "tokens_per_forward", "n_different")
            figures["drafts"], timed["speed_up"] = {name: getattr(drafted, name) for name in names}, drafted.speed_up
            say(f"{path}: {drafted.tokens_per_forward:.2f} tokens a forward with drafts, {drafted.speed_up:.2f} times as fast by one row")
        if world.is_first:
            write_text(out, json.dumps(figures, indent=2) + "\n")
            write_rows(Path(by_place), found.by_place())
    return timed | {f"{part}.{name}": value for part, means in figures.items() for name, value in means.items()}


def _drafted(model: Transformer, data: TokenData, tokenizer: Tokenizer, max_tokens: int) -> DraftFigures:
    rows = [problem["correct"][0] for problem in data.problems if problem["correct"]][:DRAFTED]
    prompts = [ids[: data.response_start[row]].tolist() for row, ids in zip(rows, data.input_ids(rows))]
    return drafts(model, prompts, max_tokens, tokenizer.eos, len(tokenizer))


if __name__ == "__main__":
    run(work)
