"""python -m bench.convert [--scale S]: converting, loading and slicing a checkpoint of 7B_1T_4's true shape, beside copying and hashing it.

Makes the checkpoint (13.5 GB of random float16 in Meta's layout) in a temporary folder under --folder and deletes it at the end. Memory
is what a process has of its own (RssAnon), read every 20 ms: mapped pages of files are the kernel's to drop. Each step is a fresh process.
Results go to bench/results/convert.json. `--scale 8` takes an eighth of all widths, to try the script.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentencepiece import sentencepiece_model_pb2 as schema

from wmtp.bundle import ModelArgs, tensor_shapes
from wmtp.records import write_text
from wmtp.sources import train_tokenizer, write_meta
from wmtp.synthetic import corpus

FULL = ModelArgs(
    dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, vocab_size=32000, multiple_of=256, ffn_dim_multiplier=1.0, norm_eps=1e-5,
    rope_theta=10000.0, n_future_tokens=4,
)  # fmt: skip
SLICE = {"dim": 512, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4, "vocab_size": 8000, "multiple_of": 256, "max_megabytes": 50.0}
BLOCK = 1 << 25  # random values, repeated: what they are does not matter here
STEPS = {
    "copy and hash": "shutil.copyfile(raw / FILE, raw / 'copy'); sha256_file(raw / 'copy')",
    "convert": "from wmtp.convert import convert; convert(raw, folder / 'bundle')",
    "load": "from wmtp.model import load_bundle; load_bundle(folder / 'bundle')",
    "load without extra heads": "from wmtp.model import load_bundle; load_bundle(folder / 'bundle', n_future=1)",
    "slice": "from wmtp.slicing import build_micro; build_micro(folder / 'bundle', folder / 'micro', **SLICE)",
}


def scaled(args: ModelArgs, scale: int) -> ModelArgs:
    sizes = {"dim": args.dim // scale, "n_heads": args.n_heads // scale, "n_kv_heads": args.n_kv_heads // scale}
    return ModelArgs(**{**vars(args), **sizes})


def make(folder: Path, args: ModelArgs) -> None:
    """Meta's files. The weights are mapped from a file, so that making them needs no memory either."""
    sizes = {name: torch.Size(shape).numel() for name, shape in tensor_shapes(args).items()}
    total, values = sum(sizes.values()), folder / "values"
    bits = np.random.default_rng(0).normal(0, 0.02, BLOCK).astype(np.float16)
    with open(values, "wb") as file:
        for start in range(0, total, BLOCK):
            bits[: min(BLOCK, total - start)].tofile(file)
    start, tensors = 0, {}
    for name, shape in tensor_shapes(args).items():
        tensors[name] = torch.from_numpy(np.memmap(values, np.float16, "r+", 2 * start, shape))
        start += sizes[name]
    (folder / "raw").mkdir()
    write_meta(folder / "raw", args, tensors)
    values.unlink()
    (folder / "raw/tokenizer.model").write_bytes(tokenizer(args.vocab_size))


def tokenizer(n_pieces: int) -> bytes:
    """A small one, filled up with pieces that no text has."""
    model = schema.ModelProto.FromString(train_tokenizer(corpus(1, 2000), 640))
    for number in range(len(model.pieces), n_pieces):
        model.pieces.add(piece=f"\u2581{number}\u2581", score=-float(number), type=1)
    return model.SerializeToString()


def run(name: str, folder: Path) -> dict[str, float]:
    """Seconds of a fresh process and the most memory that it had of its own, less what it had when all was imported."""
    start = "import shutil, sys, torch, wmtp.convert, wmtp.model, wmtp.slicing; from pathlib import Path; folder = Path(sys.argv[1])"
    start += "; from wmtp.records import sha256_file"
    code = f"{start}; raw = folder / 'raw'; FILE = 'consolidated.pth'; SLICE = {SLICE}; print('ready', flush=True); sys.stdin.readline()"
    command = [sys.executable, "-c", f"{code}; {STEPS[name]}", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        idle = most = anonymous(process.pid)
        began = time.perf_counter()
        process.stdin.write("\n")
        process.stdin.close()
        while process.poll() is None:
            most = max(most, anonymous(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - began
    if process.returncode:
        sys.exit(f"bench.convert: {name} ended with {process.returncode}")
    return {"seconds": round(seconds, 2), "gib": round((most - idle) / 2**30, 3)}


def anonymous(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=int, default=1, choices=(1, 2, 4, 8), help="divide all widths by this (default: %(default)s)")
    parser.add_argument("--folder", default=".work", help="where there is room for three times the checkpoint (default: %(default)s)")
    given = parser.parse_args()
    Path(given.folder).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder, args = Path(name).resolve(), scaled(FULL, given.scale)
        make(folder, args)
        size = (folder / "raw/consolidated.pth").stat().st_size
        found: dict[str, Any] = {step: run(step, folder) for step in STEPS if step != "slice" or args.dim >= SLICE["dim"]}
        bundle = sum(file.stat().st_size for file in (folder / "bundle").iterdir())
    for step, figures in found.items():
        print(f"{step:26} {figures['seconds']:8.1f} s {figures['gib']:8.3f} GiB")
    ratio = found["convert"]["seconds"] / found["copy and hash"]["seconds"]
    print(
        f"checkpoint {size / 1e9:.2f} GB, bundle {bundle / 1e9:.2f} GB; converting takes {ratio:.2f} times as long as copying and hashing"
    )
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    facts = {**machine, "torch": torch.__version__, "checkpoint_bytes": size, "bundle_bytes": bundle, "ratio": round(ratio, 3)}
    write_text(Path("bench/results/convert.json"), json.dumps({**facts, "steps": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
