"""python -m stages.train METHOD START PROCESSED SIGNAL OUT LOG REPORT: one method's policy.

START is a bundle, or the description of a study's arm (stages.describe_arms). SIGNAL is a score file, or a folder that holds all.
"""

import json
from pathlib import Path
from typing import Any

from stages import run
from wmtp import critic, lora, outcome, shared, train
from wmtp.blocks import reads_pairs
from wmtp.bundle import bundle_sha256
from wmtp.cells import check_described
from wmtp.checkpoint import save_model
from wmtp.growth import load_grown
from wmtp.plan import Plan
from wmtp.policy import policy_objective, policy_signal
from wmtp.records import sha256_file, write_text
from wmtp.tokens import TokenData, check_same_tokenizer
from wmtp.weighting import method_of
from wmtp.world import joined


def work(params: Any, track: Any, method: str, start: str, processed: str, signal: str, out: str, log: str, report: str) -> dict[str, Any]:
    settings, training = params.methods[method], params.training
    with joined(params.run.device) as world:
        arm = json.loads(Path(start).read_text()) if start.endswith(".json") else {}
        described, start = start, arm.get("start", start)
        data = TokenData(processed, "policy")
        check_same_tokenizer(data.tokenizer_sha256, start, "policy.start")
        policy, n_grown = load_grown(start, settings.n_future, world.device)
        lora.attach(policy, training.lora, training.seed)
        model = shared.network(settings, policy)
        train_anyway = (lambda: arm["train_anyway"]) if arm else (lambda: params.critic.gate.train_anyway)
        signal_of, signal_input, signal_flops = policy_signal(method, settings, signal, data, train_anyway)
        check_described(arm, method_of(method, settings), signal_input.get("signal"), method)
        units = critic.pairs(data) if reads_pairs(settings) else data.correct_rows()
        plan = Plan(
            data, units, training.batch_rows // units.ndim, training.n_epochs, training.learning_rate, training.seed, signal_of,
            training.log_every, params.run.checkpoint_every,
        )  # fmt: skip
        beta = (lambda: arm["beta"]) if arm else (lambda: training.beta)
        objective = shared.objective(settings, policy_objective(method, settings, beta, lambda: training.seed, plan.first_pass))
        inputs = signal_input | {"start": bundle_sha256(start), "data": data.sha256} | ({"arm": sha256_file(described)} if arm else {})
        with train.fitted(model, objective, plan, params, world, stage=f"train-{method}", inputs=inputs, on_log=track.log) as records:
            shared.warn_if_dead(records, f"train-{method}")
            figures = outcome.account(model, objective, plan, records[-1], signal_flops) | {"grown_heads": n_grown}
            figures |= outcome.validation(model, TokenData(processed, "validation"), world, params.optimizer.micro_batch_tokens)
            facts = {"stage": "train", "method": method, "grown_heads": n_grown} | outcome.record(model, plan, start)
            save_model(policy, Path(start), Path(out), world, facts, lora.merging(training.lora))
            if world.is_first:
                outcome.write_log(Path(log), records)
                write_text(report, json.dumps(figures, indent=2) + "\n")
    return figures


if __name__ == "__main__":
    run(work)
