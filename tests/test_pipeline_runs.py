"""Experiments, adapters, exports, runs side by side, stopped runs: DVC for real, as typed, on the tiny preset in a clone."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
import yaml

from tests.pipeline import EACH, cloned, environment, processes_in, restored, run, typed
from wmtp.lora import load_adapted
from wmtp.model import load_bundle

pytestmark = pytest.mark.slow


def test_the_temperature_is_searched_on_validation_problems_alone(finished, tmp_path):
    line = f"launch/search-temperature models/baseline --temperatures 0.2,0.9 --max-problems 5 --out {tmp_path / 'found.json'}"
    shown = typed(finished, line).stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["temperatures"]) == ["0.2", "0.9"] and set(found["best"]) == {"pass@1", "pass@2"}
    assert all(row in shown for row in ("| temperature |", "| 0.2 ", "| 0.9 ", "| best "))
    failed = typed(finished, "launch/search-temperature models/nowhere", check=False)
    assert failed.returncode == 1 and failed.stderr.strip().splitlines()[-1].startswith("search-temperature: models/nowhere")


def test_a_trained_model_is_exported(finished):
    shown = typed(finished, "python -m wmtp.export models/verifiable llama --metrics metrics/verifiable").stdout
    card = (finished / "llama/README.md").read_text()
    shutil.rmtree(finished / "llama")
    assert "a LlamaForCausalLM" in shown and "by wmtp's method `verifiable`" in card and "| codecontests pass@1 | " in card


def test_adapters_train_beside_frozen_weights_and_leave_a_merged_bundle(finished):
    small = "-S training.lora.rank=8 -S training.lora.alpha=16"
    typed(finished, f"dvc exp run $(python -m wmtp.overlay presets/lora.yaml) {small} train@verifiable")
    start, trained = finished / "models/warm", finished / "models/verifiable"
    tokens_BT = torch.arange(300, 320)[None]
    expected = load_bundle(trained)(tokens_BT)
    torch.testing.assert_close(load_adapted(start, trained)(tokens_BT), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(load_bundle(start, dtype=torch.float32)(tokens_BT), expected, atol=1e-3)
    figures = json.loads((finished / "metrics/verifiable/train.json").read_text())
    assert 0 < figures["trained_parameters"] < figures["parameters"]
    assert yaml.safe_load((finished / "params.yaml").read_text())["training"]["lora"]["rank"] == 8
    restored(finished)


def test_a_stage_under_torchrun_is_a_child_run_in_mlflow(finished, tmp_path):
    """Two processes, one record: parameters, metrics and the weights' statistics step by step."""
    from mlflow import MlflowClient

    folder = cloned(finished, tmp_path / "tracked")
    run(
        folder, "dvc", "exp", "run", "--name", "tracked", "-S", "tracking.enabled=true", "-S", "run.n_processes=2", "-s", "train@verifiable"
    )
    client = MlflowClient(f"sqlite:///{folder}/.mlflow/mlflow.db")
    deadline = time.monotonic() + 60
    while list((folder / ".mlflow/outbox").glob("*")):
        assert time.monotonic() < deadline, "the writer did not end"
        time.sleep(0.5)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    (parent,), (child,) = ([one for one in runs if ("mlflow.parentRunId" in one.data.tags) == inner] for inner in (False, True))
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id and parent.data.tags["wmtp.key"] == "tracked"
    assert (child.data.tags["stage"], child.info.status) == ("train@verifiable", "FINISHED")
    assert child.data.params["training.beta"] == "0.9" and child.data.metrics["total_flops"] > 0
    logged = (folder / "metrics/verifiable/train.csv").read_text().splitlines()[1:]
    for name in ("weight_ess", "weight_mean", "ce_head3"):
        assert [one.step for one in client.get_metric_history(child.info.run_id, name)] == [int(line.split(",")[0]) for line in logged]


def test_side_by_side_ends_where_one_after_the_other_does(finished, tmp_path):
    folder = tmp_path / "parallel"
    cloned(finished, folder)
    edited = (folder / "params.yaml").read_text().replace("seed: 1 ", "seed: 5 ")
    assert yaml.safe_load(edited)["training"]["seed"] == 5
    for place in (folder, finished):
        (place / "params.yaml").write_text(edited)
    run(folder, "launch/train-in-parallel", "baseline", "rho1")
    # Forced: both repositories have one cache of runs, from which DVC would take what the other has just made.
    for method in ("baseline", "rho1"):
        run(finished, "dvc", "repro", "--force", "--single-item", f"train@{method}")
    run(finished, "dvc", "repro")
    assert yaml.safe_load((folder / "dvc.lock").read_text()) == yaml.safe_load((finished / "dvc.lock").read_text())
    restored(finished)


def test_killed_in_the_middle_of_training_it_goes_on(finished):
    """kill -9 of dvc takes torchrun and its workers along; the next `dvc repro` ends as if nothing had happened."""
    before = (finished / "dvc.lock").read_text()
    (finished / "models/baseline/params.json").unlink()
    started = subprocess.Popen(
        ["dvc", "repro", "--force", "--single-item", "train@baseline"], cwd=finished, env=environment(), stderr=subprocess.PIPE, text=True
    )
    for line in started.stderr:
        if line.startswith("train-baseline: "):
            break
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    started.stderr.close()
    deadline = time.monotonic() + 30
    while marked := [pid for pid in processes_in(finished) if pid != os.getpid()]:
        assert time.monotonic() < deadline, f"still alive: {marked}"
        time.sleep(0.2)
    run(finished, "dvc", "repro")
    assert yaml.safe_load((finished / "dvc.lock").read_text()) == yaml.safe_load(before)


@pytest.mark.stress
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
@pytest.mark.parametrize("stage", EACH)
def test_any_stage_may_be_stopped_and_the_next_repro_goes_on(finished, stage, how):
    """Early, in its imports, and later, about where it writes; dvc and the stage die together, as by a power cut or in a terminal.

    The stage must be running: killed while it writes its own lock file, DVC wants that file removed by hand (.dvc/tmp/rwlock).
    """
    before = yaml.safe_load((finished / "dvc.lock").read_text())
    for seconds in (0.1, 1.5, 2.5):
        command = ["dvc", "repro", "--force", "--single-item", stage]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started = subprocess.Popen(command, cwd=finished, env=environment(), start_new_session=True, **quiet)
        while started.poll() is None and not processes_in(finished, b"stages."):
            time.sleep(0.02)
        time.sleep(seconds)
        if processes_in(finished, b"stages."):
            os.killpg(started.pid, how)
        started.wait()
        deadline = time.monotonic() + 30
        while marked := processes_in(finished, b"stages."):
            assert time.monotonic() < deadline, f"still alive: {marked}"
            time.sleep(0.2)
    run(finished, "dvc", "repro")
    assert yaml.safe_load((finished / "dvc.lock").read_text()) == before
    assert not list((finished / ".work").glob("*"))
