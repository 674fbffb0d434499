"""python -m stages.sample MODEL PROCESSED OUT: completions of every benchmark problem, greedy and sampled."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from stages import run
from wmtp import benchmarks, checkpoint, sampling
from wmtp.bundle import bundle_sha256, read_args
from wmtp.model import load_bundle
from wmtp.progress import say
from wmtp.records import Problem, read_jsonl, sha256_file, write_jsonl
from wmtp.tokens import Tokenizer
from wmtp.world import World, joined


def work(params: Any, track: Any, path: str, processed: str, out: str) -> dict[str, Any]:
    settings, completions, files = params.evaluation, [], {name: Path(processed) / f"{name}.jsonl" for name in benchmarks.NAMES}
    inputs = {"model": bundle_sha256(path), **{name: sha256_file(file) for name, file in files.items()}}
    with joined(params.run.device) as world, _kept(params, inputs, world) as kept:
        n_heads = read_args(path).n_future_tokens if settings.speculate else 1
        model, tokenizer = load_bundle(path, n_future=n_heads, dtype=getattr(torch, params.run.dtype), device=world.device), Tokenizer(path)
        for name, file in files.items():
            problems = list(read_jsonl(file, Problem))[: settings.max_problems]
            protocol = benchmarks.protocol_of(name, settings, limits=False)
            benchmark = sampling.Benchmark(name, protocol, problems, params.data.template)
            made = {"seed": params.training.seed, "batch_rows": settings.batch_rows, "n_heads": n_heads, "kept": kept}
            completions += sampling.complete(model, tokenizer, benchmark, world, **made) or []
        figures = {"speed_up": sampling.speed_up(model, tokenizer, benchmark, n_heads)} if n_heads > 1 else {}
        if world.is_first:
            figures |= sampling.summary(completions)
            say(f"{path}: {', '.join(f'{name} {value:g}' for name, value in figures.items())}")
            write_jsonl(out, completions)
    return figures


def _kept(params: Any, inputs: dict[str, str], world: World) -> AbstractContextManager[Path]:
    """Where an interrupted sampling finds its finished batches, under a name for all that shapes them."""
    return checkpoint.scratch("sample", checkpoint.fingerprint(params.shaping(), inputs, world.size), world)


if __name__ == "__main__":
    run(work)
