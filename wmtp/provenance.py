"""A model folder's account of itself: which weights, which of this pipeline's problems they learned from, at what cost.

The folder is a bundle, or a critic: a bundle `trunk`, a value head and a card, critic.json. Only small files are read: a bundle's
metadata.json holds the hashes of its weights.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wmtp.bundle import bundle_sha256, read_metadata

CARD = "critic.json"
GATE = "gate.json"


class CriticError(ValueError):
    """A critic on disk that is not what it should be, or a value loss that does not exist."""


def read_card(path: str | Path) -> dict[str, Any]:
    """OUT/critic.json: the critic's `unit`, and the `task_ids` and `groups` of the problems that it or its start trained on."""
    file = Path(path) / CARD
    try:
        card = json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise CriticError(f"{file}: no readable description of the critic ({error}); run critic-pretrain again (dvc repro)") from None
    if missing := {"unit", "task_ids", "groups"} - set(card):
        raise CriticError(f"{file}: lacks {', '.join(sorted(missing))}; run critic-pretrain again (dvc repro)")
    return card


def critic_sha256(path: str | Path) -> str:
    """Identity of a trained critic: its trunk, its head, what its card says of them, and whether it passed its gate."""
    parts = [hashlib.sha256((Path(path) / name).read_bytes()).hexdigest() for name in ("value_head.safetensors", CARD, GATE)]
    return hashlib.sha256("".join([bundle_sha256(Path(path) / "trunk"), *parts]).encode()).hexdigest()


def is_critic(path: str | Path) -> bool:
    return (Path(path) / CARD).is_file() or (Path(path) / "trunk").is_dir()


def model_sha256(path: str | Path) -> str:
    return critic_sha256(path) if is_critic(path) else bundle_sha256(path)


def learned_from(path: str | Path) -> dict[str, list[str]]:
    """`task_ids` and `groups` of the problems that this pipeline trained the model on, or its start; empty where nothing is recorded."""
    record = read_card(path) if is_critic(path) else read_metadata(path)["extra"].get("learned_from", {})
    return {key: record.get(key, []) for key in ("task_ids", "groups")}


def training_flops(path: str | Path) -> int:
    """What its last training cost, without that of its start; 0 where nothing is recorded."""
    return read_metadata(Path(path) / "trunk" if is_critic(path) else path)["extra"].get("flops", 0)


def with_start(own: Mapping[str, list[str]], start: str | Path) -> dict[str, list[str]]:
    """The problems of a training and of what it started from, each once: a start that memorised a program hands it on."""
    return {key: sorted({*own[key], *names}) for key, names in learned_from(start).items()}
