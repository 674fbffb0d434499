"""Low-rank adapters of a policy (Hu et al. 2021, 2106.09685): W x becomes W x + (alpha / rank) B A x, and W stays as it is.

What peft injects trains; what is kept is the merged model, a bundle like any other, and the adapter beside it in peft's own format.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wmtp.atomic import atomic_directory
from wmtp.bundle import check_names, open_shard, read_json

ADAPTER = "default"  # peft's name of the only one
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what peft puts before a parameter's name on disk
BASE, A, B = ".base_layer.weight", f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


class LoraError(ValueError):
    """peft is not there, or an adapter does not fit its model."""


def attach(model: nn.Module, settings: Any, seed: int) -> None:
    """Adapters in place, on the trunk and on every head; all other weights are frozen. Equal seeds give equal bits on every rank.

    B starts at 0: the model computes what it did. settings: rank, alpha, dropout, targets (names of linear layers); None: no adapters.
    """
    if settings is None:
        return
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU, whatever the model's device
        torch.manual_seed(seed)
        _inject(model, settings.rank, settings.alpha, settings.dropout, settings.targets)


def _inject(model: nn.Module, rank: int, alpha: float, dropout: float, targets: Sequence[str]) -> dict[str, nn.Parameter]:
    """The adapter's parameters under their names on disk, once they are in the model."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise LoraError(f"training.lora needs peft: {error}; pip install -c constraints.txt -e '.[lora]'") from None
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=sorted(targets), bias="none")
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    return {_on_disk(name): parameter for name, parameter in model.named_parameters() if name.endswith((A, B))}


def _on_disk(name: str) -> str:
    return PREFIX + name.replace(f".{ADAPTER}.", ".")


def split(state: Mapping[str, Tensor], settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(merged weights under the model's own names, adapter under peft's) of a whole state; W + (alpha / rank) B A, as peft merges."""
    merged, adapter = {}, {}
    for name, tensor in state.items():
        if name.endswith(BASE):
            place = name.removesuffix(BASE)
            delta = state[place + B] @ state[place + A]
            merged[f"{place}.weight"] = tensor + delta * (settings.alpha / settings.rank)
        elif name.endswith((A, B)):
            adapter[_on_disk(name)] = tensor
        else:
            merged[name] = tensor
    return merged, adapter


def write_adapter(out: Path, adapter: Mapping[str, Tensor], settings: Any) -> None:
    """A folder that `peft.PeftModel.from_pretrained` reads."""
    from safetensors.torch import save_file

    config = {
        "peft_type": "LORA", "r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout,
        "target_modules": sorted(settings.targets), "bias": "none", "inference_mode": True,
    }  # fmt: skip
    with atomic_directory(out, CONFIG) as folder:
        save_file(dict(adapter), folder / WEIGHTS, metadata={"format": "pt"})
        (folder / WEIGHTS).chmod(0o644)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Puts a written adapter into the model that it was trained from; LoraError unless every tensor finds its place and none is missing."""
    file, folder = Path(folder) / CONFIG, Path(folder)
    config = read_json(file)
    if absent := [key for key in ("r", "lora_alpha", "lora_dropout", "target_modules") if key not in config]:
        raise LoraError(f"{file}: {absent[0]}: missing; expected peft's configuration of a LoRA adapter")
    expected = _inject(model, config["r"], config["lora_alpha"], config["lora_dropout"], config["target_modules"])
    with open_shard(folder / WEIGHTS, "pt") as shard, torch.no_grad():
        check_names(str(folder / WEIGHTS), set(shard.keys()), set(expected))
        for name, parameter in expected.items():
            found = shard.get_tensor(name)
            if found.shape != parameter.shape:
                raise LoraError(f"{folder / WEIGHTS}: {name}: expected {tuple(parameter.shape)}, found {tuple(found.shape)}")
            parameter.copy_(found)
