"""Scores: one float per token of the rows they belong to, computed once and kept (reference losses, critic values).

A score file is keyed by the token data, the model and the tokenizer that made it. A mismatch is an error, never a zero.
"""

import json
from pathlib import Path

import numpy as np

from wmtp.records import atomic_path, sha256_file
from wmtp.tokens import TokenData


class ScoreError(ValueError):
    """A score file that is absent, damaged or belongs to other data."""


def write_scores(path: Path, scores: list[np.ndarray], data: TokenData, model_sha256: str, *, gate_passed: bool = True) -> None:
    """`scores[r]` has one float32 per token of row r. `gate_passed` travels with the scores, so that whoever trains on them knows."""
    from safetensors.numpy import save_file

    flat = np.concatenate(scores).astype(np.float32)
    if [len(row) for row in scores] != data.lengths.tolist():
        raise ScoreError(
            f"{path}: expected one score for each of {data.lengths.sum()} tokens, row by row, found {len(flat)} or other lengths"
        )
    if not np.isfinite(flat).all():
        row = int(np.searchsorted(np.cumsum(data.lengths), np.flatnonzero(~np.isfinite(flat))[0], side="right"))
        raise ScoreError(f"{path}: a score of row {row} is not finite; the model that scores is broken")
    key = {"data_sha256": data.sha256, "tokenizer_sha256": data.tokenizer_sha256, "model_sha256": model_sha256, "gate_passed": gate_passed}
    with atomic_path(path) as temporary:
        save_file({"scores": flat}, str(temporary), metadata={"key": json.dumps(key)})


class Scores:
    """The scores of a split, checked to be those of `data`."""

    def __init__(self, path: str | Path, data: TokenData):
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise ScoreError(f"{path}: no scores there; run the stage that makes them (dvc repro)")
        try:
            with safe_open(str(path), framework="np") as file:
                key = json.loads(file.metadata()["key"])
                self.flat = file.get_tensor("scores")
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ScoreError(f"{path}: not a whole score file: {error}; run dvc repro") from None
        for name, expected in (("data_sha256", data.sha256), ("tokenizer_sha256", data.tokenizer_sha256)):
            if key[name] != expected:
                raise ScoreError(f"{path}: {name} is {key[name][:12]}, expected {expected[:12]}: stale scores; run dvc repro")
        if len(self.flat) != data.lengths.sum():
            raise ScoreError(f"{path}: expected {data.lengths.sum()} scores, found {len(self.flat)}")
        if not np.isfinite(self.flat).all():
            raise ScoreError(f"{path}: a score is not finite; run dvc repro")
        self.model_sha256: str = key["model_sha256"]
        self.gate_passed: bool = key["gate_passed"]
        self.sha256 = sha256_file(path)
        self.ends = np.cumsum(data.lengths)

    def row(self, number: int) -> np.ndarray:
        start = self.ends[number - 1] if number else 0
        return self.flat[start : self.ends[number]]
