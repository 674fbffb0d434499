"""A model with more heads than its bundle holds: each further one starts as a copy of the last block, which is head 0."""

from pathlib import Path

import torch

from wmtp.bundle import read_args, read_tensors, tensor_shapes, verify
from wmtp.model import Transformer, load_bundle
from wmtp.progress import say
from wmtp.slicing import grown_from


def load_grown(path: str | Path, n_future: int, device: str | torch.device) -> tuple[Transformer, int]:
    """(model in float32 with `n_future` heads, how many of them the bundle lacks)."""
    args = read_args(path)
    if n_future <= args.n_future_tokens:
        return load_bundle(path, n_future=n_future, dtype=torch.float32, device=device), 0
    verify(path)
    with torch.device("meta"):
        model = Transformer(args.with_heads(n_future))
    sources, state = grown_from(args, n_future), {}
    held = {name: tensor.to(device=device, dtype=torch.float32) for name, tensor in read_tensors(path)}
    for name in tensor_shapes(model.args):
        state[name] = held[sources[name]] if sources[name] == name else held[sources[name]].clone()
    model.load_state_dict(state, strict=True, assign=True)
    say(f"{path}: {args.n_future_tokens} of {n_future} heads; the others start as copies of its last block")
    return model.requires_grad_(True).eval(), n_future - args.n_future_tokens
