"""python -m stages.score_critic CRITIC PROCESSED OUT: the critic's value at every token of the policy's data."""

import json
from pathlib import Path
from typing import Any

import torch

from stages import run
from wmtp import flops, scoring
from wmtp.critic import load_critic
from wmtp.provenance import critic_sha256, learned_from, training_flops
from wmtp.scores import check_out_of_fold
from wmtp.tokens import TokenData, check_same_tokenizer
from wmtp.world import joined


def work(params: Any, track: Any, model: str, processed: str, out: str) -> None:
    with joined(params.run.device) as world:
        data = TokenData(processed, "policy")
        check_same_tokenizer(data.tokenizer_sha256, Path(model) / "trunk", "the critic")
        check_out_of_fold(learned_from(model), data, model)
        critic = load_critic(model, device=world.device, dtype=torch.float32).eval()
        passed, score = json.loads((Path(model) / "gate.json").read_text())["passed"], scoring.critic_value(critic)
        spent = {"training_flops": training_flops(model), "scoring_flops": flops.forward(critic, data.lengths, data.response_start)}
        origin = {"model": Path(model), "gate_passed": passed, "unit": critic.unit, **spent}
        scoring.score_split(score, data, critic_sha256(model), Path(out), world, params.optimizer.micro_batch_tokens, **origin)


if __name__ == "__main__":
    run(work)
