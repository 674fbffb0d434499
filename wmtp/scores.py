"""Scores: one float per token of the rows they belong to, computed once and kept (reference losses, critic values).

A score file is keyed by the token data, the model and the tokenizer that made it. A mismatch is an error, never a zero. Scores are
out of fold: a critic or reference that trained on a problem has memorised the very programs that it would weigh there.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wmtp.progress import detail
from wmtp.provenance import model_sha256
from wmtp.records import atomic_path, sha256_file
from wmtp.tokens import TokenData


class ScoreError(ValueError):
    """A score file that is absent, damaged or belongs to other data."""


JUDGED = {"critic": "values", "reference": "losses"}


def problems_of(data: TokenData, rows: np.ndarray) -> dict[str, list[str]]:
    """`task_ids` and `groups` of the problems that these rows belong to, sorted, each once."""
    wanted = set(rows.tolist())
    entries = [entry for entry in data.problems if not wanted.isdisjoint([*entry["correct"], *entry["incorrect"]])]
    return {"task_ids": sorted(entry["task_id"] for entry in entries), "groups": sorted({entry["group"] for entry in entries})}


def check_out_of_fold(
    trained_on: Mapping[str, Sequence[str]], data: TokenData, where: object, kind: Literal["critic", "reference"] = "critic"
) -> None:
    """A ScoreError if a problem of `data`, or one of its group, is among those that the critic or reference trained on."""
    own = problems_of(data, np.arange(len(data)))
    for key, names in (("task_ids", "problems"), ("groups", "groups")):
        if both := sorted(set(trained_on[key]) & set(own[key])):
            raise ScoreError(
                f"{where}: the {kind} trained on {len(both)} of the {len(own[key])} {names} of {data.path} that it is to judge, {both[0]}"
                f" for one; its {JUDGED[kind]} must be out of fold: part the splits by problem and group (prepare-and-validate-datasets)"
            )


def write_scores(
    path: Path,
    scores: list[np.ndarray],
    data: TokenData,
    model_sha256: str,
    *,
    model: Path | None = None,
    gate_passed: bool = True,
    unit: str = "nats",
    training_flops: int = 0,
    scoring_flops: int = 0,
) -> None:
    """`scores[r]` has one float32 per token of row r; `model` is the folder of what made them, `training_flops` the cost of that.

    All else travels with them, so that whoever trains on them knows.
    """
    from safetensors.numpy import save_file

    flat = np.concatenate(scores).astype(np.float32)
    if [len(row) for row in scores] != data.lengths.tolist():
        raise ScoreError(
            f"{path}: expected one score for each of {data.lengths.sum()} tokens, row by row, found {len(flat)} or other lengths"
        )
    if not np.isfinite(flat).all():
        row = int(np.searchsorted(np.cumsum(data.lengths), np.flatnonzero(~np.isfinite(flat))[0], side="right"))
        raise ScoreError(f"{path}: a score of row {row} is not finite; the model that scores is broken")
    key = {"data_sha256": data.sha256, "tokenizer_sha256": data.tokenizer_sha256, "model_sha256": model_sha256}
    # By its place beside the scores: equal in every copy of the repository, and found from any working directory.
    key |= {"model": model and os.path.relpath(model, Path(path).parent), "gate_passed": gate_passed, "unit": unit}
    key |= {"training_flops": training_flops, "scoring_flops": scoring_flops}
    with atomic_path(path) as temporary:
        save_file({"scores": flat}, str(temporary), metadata={"key": json.dumps(key)})


KEY = {"data_sha256", "tokenizer_sha256", "model_sha256", "model", "gate_passed", "unit", "training_flops", "scoring_flops"}


def _read_key(text: str) -> dict[str, Any]:
    key = json.loads(text)
    if missing := KEY - set(key):
        raise ValueError(f"its key lacks {', '.join(sorted(missing))}")
    return key


def _check_current(path: Path, key: Mapping[str, Any]) -> None:
    """A ScoreError if the model that made the scores has since been replaced by another; it may be gone."""
    folder = Path(os.path.normpath(path.parent / key["model"]))
    if not folder.exists():
        return detail(f"{path}: {folder} is not there; taken to be the model that made these scores")
    if (found := model_sha256(folder)) != key["model_sha256"]:
        raise ScoreError(
            f"{path}: made by model {key['model_sha256'][:12]}, but {folder} now holds {found[:12]}: stale scores; run dvc repro"
        )


class Scores:
    """The scores of a split, checked to be those of `data`, and of the model that now lies where the one lay that made them.

    `unit` is nats, probability or logit; of logits only differences within a problem mean anything. `flops` is what they cost: the
    training of the model that made them and its forward over the split.
    """

    def __init__(self, path: str | Path, data: TokenData):
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise ScoreError(f"{path}: no scores there; run the stage that makes them (dvc repro)")
        try:
            with safe_open(str(path), framework="np") as file:
                key = _read_key(file.metadata()["key"])
                self.flat = file.get_tensor("scores")
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ScoreError(f"{path}: not a whole score file: {error}; run dvc repro") from None
        for name, expected in (("data_sha256", data.sha256), ("tokenizer_sha256", data.tokenizer_sha256)):
            if key[name] != expected:
                raise ScoreError(f"{path}: {name} is {key[name][:12]}, expected {expected[:12]}: stale scores; run dvc repro")
        if key["model"] is not None:
            _check_current(Path(path), key)
        if len(self.flat) != data.lengths.sum():
            raise ScoreError(f"{path}: expected {data.lengths.sum()} scores, found {len(self.flat)}")
        if not np.isfinite(self.flat).all():
            raise ScoreError(f"{path}: a score is not finite; run dvc repro")
        self.model_sha256: str = key["model_sha256"]
        self.gate_passed: bool = key["gate_passed"]
        self.unit: str = key["unit"]
        self.flops: int = key["training_flops"] + key["scoring_flops"]
        self.sha256 = sha256_file(path)
        self.ends = np.cumsum(data.lengths)

    def row(self, number: int) -> np.ndarray:
        start = self.ends[number - 1] if number else 0
        return self.flat[start : self.ends[number]]
