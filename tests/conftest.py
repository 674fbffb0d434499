"""Small real things that several rooms are tested with: a bundle with its tokenizer, a corpus, token data. Made once a session."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]


class Micro(NamedTuple):
    """Paths of one tiny world: raw checkpoints and data in their sources' layouts, bundles, and token data made from them."""

    raw_checkpoint: Path
    raw_data: Path
    bundle: Path
    reference: Path
    processed: Path


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The machine is shared, and sums must not depend on how many threads made them."""
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A clone, with its results, of one whole tiny run; tests that change it copy it or restore what they change."""
    from tests.pipeline import built, cloned

    base = tmp_path_factory.getbasetemp()
    return cloned(built(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base), tmp_path_factory.mktemp("pipeline") / "clone")


@pytest.fixture(scope="session")
def micro(tmp_path_factory) -> Micro:
    """Three heads, grouped queries, four blocks, vocabulary 400; some sixty programs to train on and a few to validate."""
    from wmtp import convert, sources, synthetic

    root = tmp_path_factory.mktemp("micro")
    sizes = {"dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 400, "multiple_of": 16, "n_future_tokens": 3}
    texts = synthetic.corpus(3, 150)
    sources.write_synthetic(root / "checkpoint", texts=texts, seed=1, reference={"n_layers": 2}, **sizes)
    convert.convert(root / "checkpoint" / "policy", root / "bundle")
    convert.convert(root / "checkpoint" / "reference", root / "reference")
    synthetic.generate(root / "data", seed=2, n_train_compositions=40, n_eval_problems=3, min_operations=1, max_operations=2)
    write_token_data(root / "data", root / "bundle", root / "processed")
    return Micro(root / "checkpoint", root / "data", root / "bundle", root / "reference", root / "processed")


def write_token_data(raw: Path, bundle: Path, processed: Path) -> None:
    from wmtp import raw_data, splits, tokens

    corpus, tokenizer = raw_data.read_raw(raw), tokens.Tokenizer(bundle)
    parts = splits.assign(corpus.training, {"policy": 0.7, "validation": 0.3}, 5, None)
    counts = {}
    for name, part in parts.items():
        rows, _ = tokens.encode_split(tokenizer, part, corpus.solutions, "alpaca", 256)
        counts[name] = tokens.write_split(processed / name, rows, part)
    tokens.write_manifest(processed, tokenizer, "alpaca", counts)


@pytest.fixture(scope="session")
def tokenizer(micro):
    from wmtp.tokens import Tokenizer

    return Tokenizer(micro.bundle)


@pytest.fixture(scope="session")
def corpus(micro):
    from wmtp.raw_data import read_raw

    return read_raw(micro.raw_data)


@pytest.fixture(scope="session")
def data(micro):
    from wmtp.tokens import TokenData

    return TokenData(micro.processed, "policy")


def start(module: str, function: str, *arguments: object, **environment: object) -> subprocess.Popen:
    """`function(*arguments)` of `module` (arguments as text) in a process of its own, one thread, from the root of the repository."""
    code = f"import sys; from {module} import {function}; {function}(*sys.argv[1:])"
    values = {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1, **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, env=os.environ | {name: str(value) for name, value in values.items()},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run_ranks(module: str, function: str, *arguments: object, size: int = 2, seconds: float = 600) -> list[tuple[int | None, str]]:
    """The same on `size` ranks as torchrun would start them; (exit code, stderr) of each, code None where it had to be ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    workers = [start(module, function, *arguments, RANK=rank, LOCAL_RANK=rank, **place) for rank in range(size)]
    ends = []
    for worker in workers:
        try:
            error, code = worker.communicate(timeout=seconds)[1], worker.returncode
        except subprocess.TimeoutExpired:
            worker.kill()
            error, code = worker.communicate()[1], None
        ends.append((code, error))
    return ends


# Minutes each: begun last, one of them would run alone.
LONGEST = (
    "test_pipeline_queue", "test_pipeline_runs", "test_pipeline", "test_study_runs", "test_pipeline_inputs", "test_judge",
    "test_weighting_split", "test_weighting_lagged", "test_train", "test_full_disk",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """What is stress is slow too: `-m "not slow"` replaces the default selection, which leaves stress out. The longest files come first."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        if item.get_closest_marker("stress"):
            item.add_marker(pytest.mark.slow)
