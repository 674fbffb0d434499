"""python -m stages.evaluate_humaneval_mbpp COMPLETIONS PROBLEMS VERDICTS METRICS: every completion judged, pass@k with its error."""

import json
from typing import Any

from stages import run
from wmtp import benchmarks, judge, verdicts
from wmtp.records import Completion, Problem, read_jsonl, sha256_file, write_jsonl, write_text


def work(params: Any, track: Any, completions: str, folder: str, out: str, metrics: str) -> dict[str, Any]:
    settings = params.evaluation
    own_data = params.source.data.kind == "synthetic"
    judge.require_strong(own_data or settings.accept_weak_sandbox, "set evaluation.accept_weak_sandbox")
    limits = judge.Limits(settings.cpu_seconds, settings.wall_seconds, settings.memory_mb)
    found, figures, judged, n_retried = list(read_jsonl(completions, Completion)), {}, [], 0
    for name, file in benchmarks.files_of(settings, folder).items():
        problems = list(read_jsonl(file, Problem))[: settings.max_problems]
        own = [completion for completion in found if completion.benchmark == name]
        protocol = benchmarks.protocol_of(name, settings)
        known = {problem.task_id: problem for problem in problems}
        found_here = verdicts.judged(own, known, protocol, limits, settings.workers, settings.all_tests)
        shared = verdicts.conditions(protocol, sha256_file(file), limits, params.data.template)
        figures[name] = verdicts.metrics_of(found_here, own, protocol, settings.ks, shared)
        judged += found_here.verdicts
        n_retried += found_here.n_retried
    write_jsonl(out, judged)
    write_text(metrics, json.dumps(figures, indent=2) + "\n")
    told = {f"{name}.{key}": value for name in figures for key, value in figures[name].items() if isinstance(value, int | float)}
    return told | {"retried": n_retried}


if __name__ == "__main__":
    run(work)
