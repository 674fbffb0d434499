"""python -m stages.sample MODEL PROCESSED OUT: completions of every benchmark problem, greedy and sampled."""

from pathlib import Path
from typing import Any

import torch

from stages import run
from wmtp import benchmarks, sampling
from wmtp.model import load_bundle
from wmtp.records import Problem, read_jsonl, write_jsonl
from wmtp.tokens import Tokenizer
from wmtp.world import joined


def work(params: Any, track: Any, path: str, processed: str, out: str) -> dict[str, Any]:
    settings, completions = params.evaluation, []
    with joined(params.run.device) as world:
        model = load_bundle(path, n_future=1, dtype=getattr(torch, params.run.dtype), device=world.device)
        tokenizer = Tokenizer(path)
        for name in benchmarks.NAMES:
            problems = list(read_jsonl(Path(processed) / f"{name}.jsonl", Problem))[: settings.max_problems]
            benchmark = sampling.Benchmark(name, benchmarks.protocol_of(name, settings, limits=False), problems)
            completions += sampling.complete(
                model, tokenizer, benchmark, params.data.template, world, seed=params.training.seed, batch_rows=settings.batch_rows
            ) or []  # fmt: skip
        if world.is_first:
            write_jsonl(out, completions)
    return {"completions": len(completions), "truncated": sum(one.truncated for one in completions)}


if __name__ == "__main__":
    run(work)
