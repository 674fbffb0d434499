"""What a study's arm alone depends on, as hashes by which DVC knows its cells."""

from collections.abc import Mapping
from typing import Any

from wmtp.bundle import bundle_sha256
from wmtp.records import sha256_file
from wmtp.weighting import Method


def described(method: Method, scores_sha256: str | None, start: str) -> dict[str, Any]:
    """Hashes of the weighting's files, the scores and the start."""
    files = {name: sha256_file(path) for name, path in method.source_files().items()}
    return {"files": files, "scores": scores_sha256, "start_sha256": bundle_sha256(start)}


def check_described(arm: Mapping[str, Any], method: Method, scores_sha256: str | None, name: str) -> None:
    """ValueError unless the description `arm` is of what a training would read now."""
    if arm:
        for key, found in described(method, scores_sha256, arm["start"]).items():
            if arm.get(key) != found:
                raise ValueError(f"arm {name}: its {key} changed after it was described; run launch/study again")
