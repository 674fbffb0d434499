"""python -m stages.prepare_and_validate_datasets RAW TOKENIZER_BUNDLE OUT REPORT: records, splits, tokens, validation report."""

import json
from pathlib import Path
from typing import Any

from stages import run
from wmtp import judge, progress, raw_data, references, splits, tokens
from wmtp.records import write_jsonl, write_text


def work(params: Any, track: Any, raw: str, bundle: str, out: str, report: str) -> dict[str, Any]:
    corpus = raw_data.read_raw(Path(raw))
    data, easy = params.data, {"warm_up": params.data.warm_up_difficulty}
    training = splits.without_benchmarks(corpus.training, corpus.benchmarks)
    parts = splits.assign(training, data.splits.model_dump(), params.seed, data.max_problems, easy)
    tokenizer = tokens.Tokenizer(bundle)
    repeated = len(corpus.training) - len(training)
    figures: dict[str, Any] = {"dropped": {**corpus.dropped, "statement of a benchmark problem": repeated}}
    counts = {}
    for name, part in progress.track(parts.items(), "tokenise", unit="splits"):
        rows, dropped = tokens.encode_split(tokenizer, part, corpus.solutions, params.data.template, params.data.max_length)
        counts[name] = tokens.write_split(Path(out) / name, rows, part)
        figures[name] = {**counts[name], "dropped": dropped}
    own_data = params.source.data.kind == "synthetic"
    judge.require_strong(own_data or params.evaluation.accept_weak_sandbox, "set evaluation.accept_weak_sandbox")
    limits = judge.Limits(params.evaluation.cpu_seconds, params.evaluation.wall_seconds, params.evaluation.memory_mb)
    for name, benchmark in progress.track(corpus.benchmarks.items(), "judge references", unit="benchmarks"):
        checked = references.checked(name, benchmark, corpus.alternatives, limits, params.evaluation.workers)
        figures[name] = checked.report
        if failed := checked.report["references_failed"]:
            progress.say(f"{name}: left out, their references fail: {', '.join(failed)}")
        write_jsonl(Path(out) / "benchmarks" / f"{name}.jsonl", checked.problems)
    splits.check_disjoint(parts, corpus.benchmarks)
    tokens.write_manifest(Path(out), tokenizer, params.data.template, counts)
    write_text(report, json.dumps(figures, indent=2) + "\n")
    return {f"{name}.{key}": value for name in counts for key, value in counts[name].items()}


if __name__ == "__main__":
    run(work)
