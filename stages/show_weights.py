"""python -m stages.show_weights METHOD START PROCESSED SIGNAL OUT: programs with the weights that METHOD's first step gives them."""

import json
from pathlib import Path
from typing import Any

from stages import run
from wmtp import critic
from wmtp.blocks import reads_pairs
from wmtp.examples import examples, first_weights
from wmtp.growth import load_grown
from wmtp.plan import Plan
from wmtp.policy import policy_objective, policy_signal
from wmtp.records import write_text
from wmtp.tokens import TokenData, Tokenizer
from wmtp.world import joined

SHOWN = 6


def work(params: Any, track: Any, method: str, start: str, processed: str, signal: str, out: str) -> None:
    settings, training = params.methods[method], params.training
    with joined(params.run.device) as world:
        data = TokenData(processed, "policy")
        model, _ = load_grown(start, settings.n_future, world.device)
        signal_of, _, _ = policy_signal(method, settings, signal, data, lambda: True)  # shown, whatever the gate said
        units = critic.pairs(data) if reads_pairs(settings) else data.correct_rows()
        plan = Plan(data, units, training.batch_rows // units.ndim, 1, 0.0, training.seed, signal_of)
        objective = policy_objective(method, settings, lambda: training.beta, lambda: training.seed, plan.first_pass)
        step = plan.step(0).to(world.device)
        weight_BTF = first_weights(model, objective, step)
        found = examples(weight_BTF, step, data, Tokenizer(start), objective.method.signal, SHOWN)
        write_text(Path(out), json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run(work)
