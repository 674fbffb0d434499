"""python -m stages.critic_pretrain START PROCESSED OUT LOG REPORT: the value network and its quality gate on held-out problems."""

import json
from pathlib import Path
from typing import Any

import torch

from stages import run
from wmtp import critic, gate, scoring, train
from wmtp.bundle import bundle_sha256
from wmtp.model import load_bundle
from wmtp.records import write_text
from wmtp.tokens import TokenData, check_same_tokenizer
from wmtp.world import joined


def work(params: Any, track: Any, start: str, processed: str, out: str, log: str, report: str) -> dict[str, Any]:
    settings = params.critic
    with joined(params.run.device) as world:
        data, held_out = TokenData(processed, "critic"), TokenData(processed, "validation")
        check_same_tokenizer(data.tokenizer_sha256, start, "critic.start")
        model = critic.Critic(load_bundle(start, n_future=1, dtype=torch.float32, device=world.device)).to(world.device)
        plan = train.Plan(
            data, critic.pairs(data), settings.batch_rows // 2, settings.n_epochs, settings.learning_rate, params.seed,
            checkpoint_every=params.run.checkpoint_every,
        )  # fmt: skip
        fitted = {"stage": "critic", "inputs": {"start": bundle_sha256(start), "data": data.sha256}, "on_log": track.log}
        figures: dict[str, Any] = {}
        with train.fitted(model, critic.objective(settings), plan, params, world, **fitted) as records:
            for name, part in (("held_out", held_out), ("in_fold", data)):
                rows = critic.pairs(part)[:1000].reshape(-1)
                values = scoring.score_rows(scoring.critic_value(model), part, rows, world, params.optimizer.micro_batch_tokens)
                if values is not None:
                    judged = gate.Judged(
                        values, part.response_start[rows], part.is_correct[rows], part.problem_of[rows], part.spans()[rows]
                    )
                    found = gate.report(
                        judged, seed=params.seed, confidence=settings.gate.confidence, min_delta_std=settings.gate.min_delta_std
                    )
                    figures |= found if name == "held_out" else {"auc_in_fold": found["auc"]}
            critic.save_critic(model, Path(start), Path(out), figures, world)
            if world.is_first:
                train.write_log(Path(log), records)
                write_text(report, json.dumps(figures, indent=2) + "\n")
    return {key: float(value) for key, value in figures.items() if value is not None}


if __name__ == "__main__":
    run(work)
