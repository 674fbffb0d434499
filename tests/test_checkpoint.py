import json
import os
import pickle
import shutil
import subprocess
import sys
from typing import get_args

import pytest
import torch

from tests.conftest import ROOT
from tests.test_model import GROUPED, random_model, random_targets, random_tokens
from wmtp import scratch
from wmtp.bundle import bundle_sha256, read_metadata, verify
from wmtp.checkpoint import restore, save, save_model
from wmtp.model import load_bundle
from wmtp.params import Run
from wmtp.scratch import ScratchBusy, fingerprint, held
from wmtp.world import World

ALONE = World(0, 1, torch.device("cpu"))
SECOND = World(1, 1, torch.device("cpu"))


def update(model, optimizer, seed):
    tokens = random_tokens(GROUPED, 2, 6, seed=seed)
    model(tokens, random_targets(GROUPED, 2, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(dtype=torch.float32, steps=3):
    model = random_model(dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(steps):
        update(model, optimizer, step)
    return model, optimizer


def same_bits(a, b):
    a, b = (module.state_dict() for module in (a, b))
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_restored_training_goes_on_bit_for_bit(tmp_path, dtype):
    model, optimizer = trained(dtype)
    state = {"step": 3, "records": [{"step": 1, "loss": 0.1 + 0.2}]}
    save(tmp_path, model, optimizer, state, ALONE)
    other = random_model(dtype=dtype, seed=9)
    found = torch.optim.AdamW(other.parameters(), lr=0.5, weight_decay=0.1)
    assert restore(tmp_path, other, found) == state
    assert same_bits(model, other)
    for step in range(3, 6):
        update(model, optimizer, step)
        update(other, found, step)
    assert same_bits(model, other)


def test_nothing_saved_restores_nothing(tmp_path):
    model, optimizer = trained(steps=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert restore(tmp_path, model, optimizer) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_save_replaces_the_last_one_and_leaves_one_file(tmp_path):
    model, optimizer = trained(steps=1)
    save(tmp_path, model, optimizer, {"step": 1}, ALONE)
    update(model, optimizer, 1)
    save(tmp_path, model, optimizer, {"step": 2}, ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    assert restore(tmp_path, *trained(steps=0)) == {"step": 2}


def test_a_save_that_fails_leaves_the_last_one(tmp_path, monkeypatch):
    model, optimizer = trained(steps=1)
    save(tmp_path, model, optimizer, {"step": 1}, ALONE)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, model, optimizer, {"step": 2}, ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    assert restore(tmp_path, *trained(steps=0)) == {"step": 1}


def test_only_the_first_rank_writes(tmp_path):
    save(tmp_path, *trained(steps=1), {"step": 1}, SECOND)
    assert not list(tmp_path.iterdir())


def test_the_state_of_another_model_is_refused(tmp_path):
    model, optimizer = trained(steps=1)
    save(tmp_path, model, optimizer, {"step": 1}, ALONE)
    smaller = random_model(GROUPED.with_heads(2), dtype=torch.float32)
    with pytest.raises((RuntimeError, ValueError, KeyError)):
        restore(tmp_path, smaller, torch.optim.AdamW(smaller.parameters()))


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_restoring_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil(), "optimizer": {}, "state": "{}"}, tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError):
        restore(tmp_path, *trained(steps=0))
    assert not (tmp_path / "pwned").exists()


def test_fingerprints_name_all_that_shapes_a_run(monkeypatch):
    declared, inputs, cpu = {"a": 1, "b": [1, 2]}, {"data": "x", "start": "y"}, torch.device("cpu")
    base = fingerprint(declared, inputs, World(0, 2, cpu))
    assert fingerprint({"b": [1, 2], "a": 1}, {"start": "y", "data": "x"}, World(1, 2, cpu)) == base
    others = [fingerprint(other, inputs, World(0, 2, cpu)) for other in ({"a": 2, "b": [1, 2]}, {"a": 1}, {"a": 1, "b": [2, 1]})]
    others.append(fingerprint(declared, inputs | {"data": "z"}, World(0, 2, cpu)))
    others += [fingerprint(declared, inputs, world) for world in (World(0, 4, cpu), World(0, 2, torch.device("cuda")))]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    others.append(fingerprint(declared, inputs, World(0, 2, cpu)))
    assert len({base, *others}) == 8


@pytest.mark.parametrize("edited", ["stages/train.py", "wmtp/train.py", "wmtp/weighting/uniform.py"])
def test_an_edited_program_has_another_fingerprint(tmp_path, monkeypatch, edited):
    for folder in ("stages", "wmtp"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    before = fingerprint({}, {}, ALONE)
    monkeypatch.setattr(scratch, "ROOT", tmp_path)
    assert fingerprint({}, {}, ALONE) == before
    with open(tmp_path / edited, "a") as file:
        file.write("# another program\n")
    assert fingerprint({}, {}, ALONE) != before


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


def test_scratch_is_kept_on_failure_and_removed_on_success(root):
    with pytest.raises(KeyError), held("train@rho1", "abc", ALONE) as folder:
        assert folder == root / ".work" / "train-rho1-abc"
        (folder / "state.pt").write_text("half way")
        raise KeyError
    with held("train@rho1", "abc", ALONE) as folder:
        assert (folder / "state.pt").read_text() == "half way"
    assert not list((root / ".work").iterdir())


def test_another_key_or_stage_is_another_directory(root):
    with held("train", "abc", ALONE) as one, held("train", "abd", ALONE) as two, held("warm_up", "abc", ALONE) as three:
        assert len({one, two, three}) == 3


HOLD = """
import sys, torch
from wmtp.scratch import held
from wmtp.world import World
with held("train", "abc", World(0, 1, torch.device("cpu"))):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_a_directory_held_by_a_live_process_is_refused_and_free_once_that_is_killed(root):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    holder = subprocess.Popen([sys.executable, "-c", HOLD], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ScratchBusy, match="train-abc: another process works here"), held("train", "abc", ALONE):
        pytest.fail("two processes in one scratch directory")
    with held("train", "abd", ALONE):
        pass
    holder.kill()
    holder.communicate()
    with held("train", "abc", ALONE) as folder:
        assert folder.is_dir()


def test_a_directory_in_use_is_refused_but_shared_by_the_ranks_of_one_run(root):
    with held("train", "abc", ALONE) as folder:
        (folder / "state.pt").touch()
        with pytest.raises(ScratchBusy), held("train", "abc", ALONE):
            pytest.fail("two runs in one scratch directory")
        with held("train", "abc", SECOND) as shared:
            assert shared == folder
        assert (folder / "state.pt").exists(), "what a second run or another rank does never removes the first one's state"


def test_a_busy_directory_is_an_error_of_the_kind_that_stages_print_on_one_line():
    assert issubclass(ScratchBusy, (ValueError, OSError, ArithmeticError))


def saved(micro, out, **changes):
    model = load_bundle(micro.bundle, **({"dtype": torch.float32} | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.125)
    save_model(model, micro.bundle, out, ALONE, {"stage": "train", "n_steps": 7})
    return model


def test_a_trained_model_is_a_whole_bundle(micro, tmp_path):
    model = saved(micro, tmp_path / "out")
    verify(tmp_path / "out")
    assert same_bits(load_bundle(tmp_path / "out"), model)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (micro.bundle / "tokenizer.model").read_bytes()
    assert read_metadata(tmp_path / "out")["extra"] == {"start_sha256": bundle_sha256(micro.bundle), "stage": "train", "n_steps": 7}


def test_equal_models_give_equal_bytes(micro, tmp_path):
    for name in "ab":
        saved(micro, tmp_path / name)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab"]
    assert files[0] == files[1]


def test_a_model_trained_without_extra_heads_is_saved_without_them(micro, tmp_path):
    model = saved(micro, tmp_path / "out", n_future=1)
    assert json.loads((tmp_path / "out" / "params.json").read_text())["n_future_tokens"] == 1
    assert same_bits(load_bundle(tmp_path / "out"), model)


@pytest.mark.parametrize("dtype", get_args(Run.model_fields["dtype"].annotation))
def test_every_dtype_that_run_dtype_allows_can_be_saved(micro, tmp_path, dtype):
    model = saved(micro, tmp_path / "out", dtype=getattr(torch, dtype))
    assert same_bits(load_bundle(tmp_path / "out"), model)


def test_other_ranks_write_no_model(micro, tmp_path):
    save_model(load_bundle(micro.bundle), micro.bundle, tmp_path / "out", SECOND, {})
    assert not (tmp_path / "out").exists()
