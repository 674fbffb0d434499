"""python -m stages.score_reference MODEL PROCESSED OUT: the reference's cross-entropy of every response token of the policy's data."""

from pathlib import Path
from typing import Any

import torch

from stages import run
from wmtp import scoring
from wmtp.bundle import bundle_sha256
from wmtp.model import load_bundle
from wmtp.tokens import TokenData, check_same_tokenizer
from wmtp.world import joined


def work(params: Any, track: Any, model: str, processed: str, out: str) -> None:
    with joined(params.run.device) as world:
        data = TokenData(processed, "policy")
        check_same_tokenizer(data.tokenizer_sha256, model, "the reference")
        reference = load_bundle(model, n_future=1, dtype=getattr(torch, params.run.dtype), device=world.device)
        score = scoring.reference_loss(reference)
        scoring.score_split(score, data, bundle_sha256(model), Path(out), world, params.optimizer.micro_batch_tokens)


if __name__ == "__main__":
    run(work)
