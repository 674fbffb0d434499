"""python -m stages.critic_pretrain START PROCESSED OUT LOG REPORT PICTURES: the value network and its quality gate on held-out problems."""

import json
from pathlib import Path
from typing import Any

import torch

from stages import run
from wmtp import critic, critic_report, flops, gate, outcome, pretrain, provenance, scores, train
from wmtp.bundle import bundle_sha256
from wmtp.model import load_bundle
from wmtp.plan import Plan
from wmtp.progress import say
from wmtp.records import write_text
from wmtp.tokens import TokenData, check_same_tokenizer
from wmtp.world import joined


def work(params: Any, track: Any, start: str, processed: str, out: str, log: str, report: str, pictures: str) -> dict[str, Any]:
    settings, budget, folder = params.critic, params.optimizer.micro_batch_tokens, Path(pictures)
    judging = {"seed": params.seed, "confidence": settings.gate.confidence}
    with joined(params.run.device) as world:
        data, held_out = TokenData(processed, "critic"), TokenData(processed, "validation")
        tokenizer = check_same_tokenizer(data.tokenizer_sha256, start, "critic.start")
        pairs = critic.pairs(data)
        trained_on = provenance.with_start(scores.problems_of(data, pairs.reshape(-1)), start)
        scores.check_out_of_fold(trained_on, held_out, "the gate")
        trunk = load_bundle(start, n_future=1, dtype=torch.float32, device=world.device)
        model = pretrain.network(settings.loss, trunk).to(world.device)
        plan = Plan(
            data, pairs, settings.batch_rows // 2, settings.n_epochs, settings.learning_rate, params.seed,
            checkpoint_every=params.run.checkpoint_every,
        )  # fmt: skip
        fitted = {"stage": "critic", "inputs": {"start": bundle_sha256(start), "data": data.sha256}, "on_log": track.log}
        figures: dict[str, Any] = {}
        with train.fitted(model, pretrain.objective(settings.loss, settings.lm_coef), plan, params, world, **fitted) as records:
            rows, judged = pretrain.judge(model, held_out, world, budget)
            _, known = pretrain.judge(model, data, world, budget)
            if world.is_first:
                figures = gate.report(judged, min_delta_std=settings.gate.min_delta_std, **judging)
                figures |= {"auc_in_fold": known.auc(known.at_share(1.0))}
                pair = critic_report.typical_pair(judged)
                texts = pretrain.response_texts(tokenizer, held_out, rows[list(pair)])
                critic_report.write(folder, judged, critic_report.curves(judged, pair, texts), **judging)
                outcome.write_log(Path(log), records)
                write_text(report, json.dumps(figures, indent=2) + "\n")
                for reason in gate.failures(figures, settings.gate.min_delta_std):
                    say(f"critic: the quality gate FAILED: {reason}")
            read = plan.rows_read()
            spent = flops.training(model, data.lengths[read], data.response_start[read])
            critic.save_critic(model, Path(start), Path(out), figures, trained_on, world, spent)
    return {key: float(value) for key, value in figures.items() if value is not None}


if __name__ == "__main__":
    run(work)
