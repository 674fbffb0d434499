"""Where the real files are, and what a test does that needs them: strangers skip it, and WMTP_REAL_DATA=require makes it fail."""

import os
from pathlib import Path

import pytest

from wmtp.dependencies import ROOT

DATASETS = Path(os.environ.get("WMTP_DATASETS", ROOT.parent / "shared" / "datasets"))


def real(name: str) -> Path:
    """The file or folder `name`; skips the test that asks where it is absent and not required."""
    path = DATASETS / name
    if not path.exists() and os.environ.get("WMTP_REAL_DATA") != "require":
        pytest.skip(f"{name} is not in {DATASETS}")
    assert path.exists(), f"{path} is absent; WMTP_REAL_DATA=require needs it"
    return path
