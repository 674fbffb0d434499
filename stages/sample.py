"""python -m stages.sample MODEL PROCESSED OUT: completions of every benchmark problem, greedy and sampled."""

from pathlib import Path
from typing import Any

import torch

from stages import run
from wmtp import benchmarks, sampling, scratch
from wmtp.bundle import bundle_sha256
from wmtp.model import load_bundle
from wmtp.records import Problem, read_jsonl, sha256_file, write_jsonl
from wmtp.tokens import Tokenizer
from wmtp.world import joined


def work(params: Any, track: Any, path: str, processed: str, out: str) -> dict[str, Any]:
    settings, completions = params.evaluation, []
    files = benchmarks.files_of(settings, processed)
    inputs = {"model": bundle_sha256(path), **{name: sha256_file(file) for name, file in files.items()}}
    with joined(params.run.device) as world:
        # Named after what it writes: two equal models, as two arms of a study may be, must not meet in one folder.
        key = scratch.fingerprint(params.shaping(), inputs, world)
        with scratch.held(f"sample-{Path(out).stem}", key, world) as kept:
            n_heads = None if settings.draft_rows else 1
            model = load_bundle(path, n_future=n_heads, dtype=getattr(torch, params.run.dtype), device=world.device)
            for name, file in files.items():
                problems = list(read_jsonl(file, Problem))[: settings.max_problems]
                protocol = benchmarks.protocol_of(name, settings, limits=False)
                benchmark = sampling.Benchmark(name, protocol, problems, params.data.template)
                completions += sampling.complete(
                    model, Tokenizer(path), benchmark, world, seed=params.training.seed, batch_rows=settings.batch_rows,
                    draft_rows=settings.draft_rows, kept=kept,
                ) or []  # fmt: skip
            if world.is_first:
                write_jsonl(out, completions)
    return {"completions": len(completions), "truncated": sum(one.truncated for one in completions)}


if __name__ == "__main__":
    run(work)
