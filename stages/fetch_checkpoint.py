"""python -m stages.fetch_checkpoint OUT: OUT/policy and OUT/reference, from wherever source.checkpoint says."""

from pathlib import Path
from typing import Any

from stages import run
from wmtp import sources, synthetic


def work(params: Any, track: Any, out: str) -> dict[str, Any]:
    source = params.source.checkpoint
    if source.kind == "synthetic":
        shape = source.model_dump(exclude={"kind", "corpus_problems"})
        texts = synthetic.corpus(params.seed, source.corpus_problems)
        reference = {key: shape[key] for key in ("dim", "n_layers", "n_heads", "n_kv_heads")}
        sources.write_synthetic(Path(out), texts=texts, seed=params.seed, reference=reference, **shape)
    elif source.kind == "local":
        sources.copy_checkpoints(Path(out), policy=Path(source.policy), reference=Path(source.reference))
    else:
        sources.download_checkpoints(Path(out), **source.model_dump(exclude={"kind"}))
    return {"bytes": sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file())}


if __name__ == "__main__":
    run(work)
