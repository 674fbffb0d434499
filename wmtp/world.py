"""Ranks and how a model is wrapped for them; sums over ranks. Everything works with one process too."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """This process among its peers. `size` 1 without torchrun."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over ranks, in float64; every rank must call it, also with nothing to add."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """Element-wise maximum over ranks, in float64; every rank must call it, with -inf where it has nothing."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: Tensor, operation: Any) -> Tensor:
        total = values.detach().double()
        if self.size > 1:
            # MPS knows no float64 and gloo no MPS: a few numbers go through the CPU there.
            total = total.to("cpu" if self.device.type == "mps" else self.device)
            dist.all_reduce(total, operation)
        return total

    def gather(self, value: Any) -> list[Any] | None:
        """Python objects of all ranks, in rank order, on rank 0; None elsewhere."""
        if self.size == 1:
            return [value]
        gathered = [None] * self.size if self.is_first else None
        dist.gather_object(value, gathered)
        return gathered

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def wrap(self, model: nn.Module, parallel: str) -> nn.Module:
        """DDP, or FSDP2 over each block; a single process needs neither. Gradients come out averaged over ranks."""
        if self.size == 1:
            return model
        if parallel == "ddp":
            ids = [self.device.index] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [block for name in ("layers", "extra_heads") for module in model.modules() for block in getattr(module, name, [])]


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Joins torchrun's group if there is one and leaves it at the end; `device` auto takes cuda, then mps, then cpu."""
    yield _join(device)
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(device: str) -> World:
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    kind = pick_device(device, local_size)
    place = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(place)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(minutes=30))
    return World(rank, size, place)


def pick_device(device: str, local_size: int) -> str:
    """`auto` takes accelerators only where each of this machine's `local_size` ranks has one of its own, else the CPU."""
    found = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": local_size}
    if device == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if found[kind] >= local_size)
    if found[device] < local_size:
        raise ValueError(
            f"run.device {device}: {local_size} processes on this machine, found {found[device]} of them; lower run.n_processes"
        )
    return device
