"""python -m stages.score_reference MODEL PROCESSED OUT: the reference's cross-entropy of every response token of the policy's data."""

from pathlib import Path
from typing import Any

import torch

from stages import run
from wmtp import flops, scoring
from wmtp.bundle import bundle_sha256
from wmtp.model import load_bundle
from wmtp.progress import say
from wmtp.provenance import learned_from, training_flops
from wmtp.scores import check_out_of_fold
from wmtp.tokens import TokenData, check_same_tokenizer
from wmtp.world import joined


def work(params: Any, track: Any, model: str, processed: str, out: str) -> None:
    with joined(params.run.device) as world:
        data = TokenData(processed, "policy")
        check_same_tokenizer(data.tokenizer_sha256, model, "the reference")
        if not (known := learned_from(model))["task_ids"]:
            say(f"{model}: no record of problems that it was tuned on; taken to know none of the policies'")
        check_out_of_fold(known, data, model, "reference")
        reference = load_bundle(model, n_future=1, dtype=getattr(torch, params.run.dtype), device=world.device)
        score = scoring.reference_loss(reference)
        spent = {"training_flops": training_flops(model), "scoring_flops": flops.forward(reference, data.lengths, data.response_start)}
        budget = params.optimizer.micro_batch_tokens
        scoring.score_split(score, data, bundle_sha256(model), Path(out), world, budget, model=Path(model), **spent)


if __name__ == "__main__":
    run(work)
