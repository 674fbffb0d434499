"""A write that fails is the disk's error, with the path; whatever else fails stays what it was."""

import pytest
import torch

from wmtp import pickled
from wmtp.records import atomic_path


def test_what_was_saved_is_there(tmp_path):
    pickled.save({"a": torch.arange(3)}, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", weights_only=True)["a"].tolist() == [0, 1, 2]


def test_a_full_disk_is_named_with_the_path():
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        pickled.save({"a": torch.zeros(100_000)}, "/dev/full")


def test_a_failing_write_in_an_atomic_path_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*out'"), atomic_path(tmp_path / "out"), open("/dev/full", "wb") as full:
        full.write(b"x")
    assert not list(tmp_path.iterdir())
