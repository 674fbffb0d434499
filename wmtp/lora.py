"""Low-rank adapters of a policy (Hu et al. 2021, 2106.09685): W x becomes W x + (alpha / rank) B A x, and W stays as it is.

What peft injects trains; what is kept is the merged model, a bundle like any other, and the adapter in its folder `adapter`, in peft's
own format.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wmtp.bundle import bundle_sha256, check_names, hash_files, open_shard, read_args, read_json, read_metadata, save_tensors
from wmtp.growth import load_grown
from wmtp.model import Transformer

FOLDER, CONFIG, WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"
SETTINGS = {"rank": (int,), "alpha": (int, float), "dropout": (int, float), "targets": (list,)}
FACTS = SETTINGS | {"sha256": (dict,)}  # in metadata.json
ADAPTER = "default"  # peft's name of the only one
PREFIX = "base_model.model."  # what peft puts before a parameter's name on disk
BASE, A, B = ".base_layer.weight", f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


class LoraError(ValueError):
    """peft is not there, or an adapter does not belong where it should go."""


def attach(model: nn.Module, settings: Any, seed: int) -> None:
    """Adapters in place, on the trunk and on every head; all other weights are frozen. Equal seeds give equal bits on every rank.

    B starts at 0: the model computes what it did. settings: rank, alpha, dropout, targets (names of linear layers); None: no adapters.
    """
    if settings is not None:
        _inject(model, *(getattr(settings, key) for key in SETTINGS), where="training.lora", seed=seed)


def _inject(
    model: nn.Module, rank: int, alpha: float, dropout: float, targets: Sequence[str], where: str, seed: int = 0
) -> dict[str, nn.Parameter]:
    """The adapter's parameters under their names on disk, once they are in the model. `where`: who set what comes before it."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise LoraError(f"training.lora needs peft: {error}; pip install -c constraints.txt -e '.[lora]'") from None
    if any(name.endswith((A, B)) for name, _ in model.named_parameters()):
        raise LoraError("the model has adapters already; load its bundle again")
    _check_targets(model, rank, targets, where)
    config, training = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=sorted(targets)), model.training
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU, whatever the model's device
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    model.train(training)  # peft's dropout comes switched on
    return {_on_disk(name): parameter for name, parameter in model.named_parameters() if name.endswith((A, B))}


def _check_targets(model: nn.Module, rank: int, targets: Sequence[str], where: str) -> None:
    """peft passes over a target that nothing is named after, as long as another one is found, and takes any rank."""
    smallest: dict[str, int] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            target = name.rpartition(".")[2]
            smallest[target] = min(*layer.weight.shape, smallest.get(target, layer.in_features))
    for target in targets:
        if target not in smallest:
            raise LoraError(f"{where}.targets: {target}: expected a linear layer of the model, one of {', '.join(smallest)}")
        if rank > smallest[target]:
            raise LoraError(
                f"{where}.rank: expected at most {smallest[target]}, the rank that {target} can have, found {rank};"
                f" lower it, or leave {target} out"
            )


def _on_disk(name: str) -> str:
    return PREFIX + name.replace(f".{ADAPTER}.", ".")


Merge = Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], Callable[[Path], dict[str, Any]]]]


def merging(settings: Any) -> Merge | None:
    """For checkpoint.save_model: from a whole state, which it empties, the merged weights and what writes the adapter beside them.

    LoraError where the state's adapters are not of the rank and on the targets of `settings`.
    """
    if settings is None:
        return None

    def merge(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[Path], dict[str, Any]]]:
        _check_adapters(state, settings)
        merged, adapter = split(state, settings.alpha / settings.rank)
        return merged, lambda bundle: _write(bundle / FOLDER, adapter, {key: getattr(settings, key) for key in SETTINGS})

    return merge


def _check_adapters(state: dict[str, Tensor], settings: Any) -> None:
    """Another rank would merge at another scale, another list of targets would be written than was trained."""
    ranks = {name.removesuffix(A): len(tensor) for name, tensor in state.items() if name.endswith(A)}
    if other := ranks.keys() ^ {name.removesuffix(B) for name in state if name.endswith(B)}:
        raise LoraError(f"{min(other)}: expected both matrices of an adapter, found one")
    targets = sorted({place.rpartition(".")[2] for place in ranks})
    if targets != sorted(settings.targets) or set(ranks.values()) != {settings.rank}:
        raise LoraError(
            f"the model's adapters: expected rank {settings.rank} on {', '.join(sorted(settings.targets))}, found rank"
            f" {', '.join(map(str, sorted(set(ranks.values())))) or 'none'} on {', '.join(targets) or 'none'}"
        )


def split(state: dict[str, Tensor], scale: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(merged weights under the model's own names, adapter under peft's); W + scale * B A, as peft merges. `state` is emptied meanwhile:
    a second copy of all weights may be more than there is room for.
    """
    merged, adapter = {}, {_on_disk(name): tensor for name, tensor in state.items() if name.endswith((A, B))}
    for name in [name for name in state if not name.endswith((A, B))]:
        tensor, place = state.pop(name), name.removesuffix(BASE)
        if place == name:
            merged[name] = tensor
        else:
            merged[f"{place}.weight"] = tensor + (state.pop(place + B) @ state.pop(place + A)) * scale
    return merged, adapter


def _config(facts: dict[str, Any]) -> dict[str, Any]:
    """As peft.PeftModel.from_pretrained reads it."""
    return {
        "peft_type": "LORA", "r": facts["rank"], "lora_alpha": facts["alpha"], "lora_dropout": facts["dropout"],
        "target_modules": sorted(facts["targets"]), "bias": "none", "inference_mode": True,
    }  # fmt: skip


def _write(folder: Path, adapter: dict[str, Tensor], facts: dict[str, Any]) -> dict[str, Any]:
    """What the bundle's metadata tell of it."""
    folder.mkdir()
    save_tensors(adapter, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(_config(facts), indent=2) + "\n")
    return {"lora": {**facts, "sha256": hash_files(folder, [CONFIG, WEIGHTS])}}


def load_adapted(start: str | Path, trained: str | Path, device: str | torch.device = "cpu") -> Transformer:
    """`start` in float32 and evaluation mode with the adapter that the bundle `trained` holds: what was merged, before it was.

    LoraError or BundleError where `trained` has none or started elsewhere, and unless every tensor finds its place and none is missing.
    """
    folder, extra = Path(trained) / FOLDER, read_metadata(trained)["extra"]
    if extra.get("lora") is None:
        raise LoraError(f"{trained}: expected a bundle that was trained with training.lora, found none of it in its metadata.json")
    if (known := extra.get("start_sha256")) != (found := bundle_sha256(start)):
        raise LoraError(f"{start}: expected the bundle that {trained} started from, {str(known)[:12]}, found {found[:12]}")
    facts = _check_facts(Path(trained) / "metadata.json", extra["lora"])
    _check_files(folder, facts)
    model, _ = load_grown(start, read_args(trained).n_future_tokens, device)
    places = _inject(model, *(facts[key] for key in SETTINGS), where=f"{trained}/metadata.json: extra.lora")
    with open_shard(folder / WEIGHTS, "pt") as shard, torch.no_grad():
        check_names(str(folder / WEIGHTS), set(shard.keys()), set(places))
        for name, parameter in places.items():
            parameter.copy_(shard.get_tensor(name))
    return model


def _check_facts(file: Path, facts: Any) -> dict[str, Any]:
    """metadata.json is the one file of a bundle that no hash guards."""
    whole = isinstance(facts, dict) and set(facts) == set(FACTS) and all(type(facts[key]) in kinds for key, kinds in FACTS.items())
    if not whole or set(facts["sha256"]) != {CONFIG, WEIGHTS} or not all(isinstance(target, str) for target in facts["targets"]):
        raise LoraError(
            f"{file}: extra.lora: expected {', '.join(FACTS)} as a training writes them, found {facts!r}; train the model again"
        )
    return facts


def _check_files(folder: Path, facts: dict[str, Any]) -> None:
    if absent := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise LoraError(f"{folder / absent[0]}: missing; train the model again")
    for name, found in hash_files(folder, [CONFIG, WEIGHTS]).items():
        if found != facts["sha256"][name]:
            raise LoraError(f"{folder / name}: SHA256: expected {facts['sha256'][name]}, found {found}; train the model again")
    if (found := read_json(folder / CONFIG)) != _config(facts):
        raise LoraError(f"{folder / CONFIG}: expected {_config(facts)} as in metadata.json, found {found}; train the model again")
