"""Stages as a user runs them without DVC, on the data of one finished tiny run."""

import json
import shutil
import sys

import pytest

from tests.pipeline import run

pytestmark = pytest.mark.slow


def stage(folder, n_processes, *arguments, check=True):
    launched = [sys.executable, "-m", "wmtp.launch", "--nproc", str(n_processes), "--"] if n_processes else [sys.executable, "-m"]
    return run(folder, *launched, *arguments, check=check)


def trained(folder, name, method, n_processes, *settings, signal="nowhere", check=True):
    """The stage's end and the report of stages.train for `method`, its outputs under by-hand/`name`."""
    outputs = [f"by-hand/{name}/{file}" for file in ("model", "train.csv", "train.json")]
    done = stage(folder, n_processes, "stages.train", method, "models/warm", "data/processed", signal, *outputs, *settings, check=check)
    return done, json.loads((folder / outputs[-1]).read_text()) if done.returncode == 0 else None


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_shared_critic_trains_on_two_processes_as_on_one(finished, parallel):
    _, alone = trained(finished, "alone", "verifiable_shared", 1)
    _, found = trained(finished, parallel, "verifiable_shared", 2, f"run.parallel={parallel}")
    assert found == pytest.approx(alone, rel=1e-3) and found["signal_flops"] == 0
    assert {key: found[key] for key in ("steps", "tokens", "parameters", "total_flops")} == {
        key: alone[key] for key in ("steps", "tokens", "parameters", "total_flops")
    }
    for name in ("alone", parallel):
        columns = (finished / f"by-hand/{name}/train.csv").read_text().splitlines()[0].split(",")
        assert {"value_loss", "value_brier"} <= set(columns)
    shapes = [json.loads((finished / f"by-hand/{name}/model/params.json").read_text()) for name in ("alone", parallel)]
    assert shapes[0] == shapes[1] == json.loads((finished / "models/warm/params.json").read_text())


def test_a_start_with_one_head_grows_the_others(finished):
    outputs = [f"by-hand/grown/{file}" for file in ("model", "train.csv", "train.json")]
    done = stage(finished, 2, "stages.train", "baseline", "models/ntp", "data/processed", "nowhere", *outputs)
    assert "models/ntp: 1 of 4 heads; the others start as copies of its last block" in done.stdout + done.stderr
    metadata = json.loads((finished / outputs[0] / "metadata.json").read_text())
    assert metadata["extra"]["grown_heads"] == json.loads((finished / outputs[2]).read_text())["grown_heads"] == 3
    assert json.loads((finished / outputs[0] / "params.json").read_text())["n_future_tokens"] == 4
    assert "validation_ce_head3" in json.loads((finished / outputs[2]).read_text())


def test_scores_of_an_older_critic_are_refused_in_one_line(finished):
    """Trained again by hand, and not scored again."""
    scores, arguments = "data/scores/critic.safetensors", ("models/warm", "data/processed", "models/critic")
    _, before = trained(finished, "before", "verifiable", 0, signal=scores)
    spent = json.loads((finished / "models/critic/trunk/metadata.json").read_text())["extra"]["flops"]
    assert before["total_flops"] - before["train_flops"] == before["signal_flops"] > spent > 0
    stage(finished, 0, "stages.critic_pretrain", *arguments, "by-hand/log", "by-hand/gate", "by-hand/pictures", "critic.n_epochs=0.5")
    done, _ = trained(finished, "refused", "verifiable", 0, signal=scores, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{scores}: made by model " in last and ", but models/critic now holds " in last and last.endswith("stale scores; run dvc repro")
    shutil.rmtree(finished / "models/critic")
    assert trained(finished, "alone", "verifiable", 0, signal=scores)[1] == before
