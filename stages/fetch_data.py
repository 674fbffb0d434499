"""python -m stages.fetch_data OUT: the folders of wmtp.raw_data under OUT, from wherever source.data says."""

from pathlib import Path
from typing import Any

from stages import run
from wmtp import hub_data, raw_data, synthetic


def work(params: Any, track: Any, out: str) -> dict[str, Any]:
    source = params.source.data
    if source.kind == "synthetic":
        return synthetic.generate(Path(out), seed=params.seed, **source.model_dump(exclude={"kind"}))
    if source.kind == "local":
        return raw_data.copy_folders(Path(source.path), source.folders.model_dump(), Path(out))
    return hub_data.download(Path(out), **source.model_dump(exclude={"kind"}))


if __name__ == "__main__":
    run(work)
