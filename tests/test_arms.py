"""What a cell of the study depends on: its arm's description holds what the arm reads, and nothing else."""

import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from stages import describe_arms, describe_code
from stages import train as stage
from tests import methods
from tests.test_train import signal_of
from wmtp import dependencies, params, policy
from wmtp.dependencies import ROOT
from wmtp.scores import write_scores
from wmtp.view import View, declared_keys
from wmtp.weighting import METHODS

STUDY = yaml.safe_load((ROOT / "study/dvc.yaml").read_text())
BLOCKS = {**{name: methods.block(name, 3) for name in METHODS}, "verifiable_beta_03": {**methods.block("verifiable", 3), "beta": 0.3}}
QUIET = SimpleNamespace(log=lambda *_: None)


def view(stage_name, **training):
    """The parameters as `stage_name` of the study may see them, with an arm for every block."""
    values = params.read_yaml(ROOT / "params.yaml")
    values["methods"] = BLOCKS
    values["study"] |= {"arms": list(BLOCKS), "seeds": [1, 2]}
    anyway = training.pop("train_anyway", False)
    values["critic"]["gate"]["train_anyway"] = anyway
    values["training"] |= {"batch_rows": 8, "log_every": 1, "n_epochs": 0.2, "learning_rate": 0.01, **training}
    declared = declared_keys(stage_name, STUDY, values)
    return View(params.validate(values), [*declared, "training.seed", *params.OPERATIONAL], stage_name)


@pytest.fixture
def scores(data, tmp_path):
    rows = [signal_of(data)(row) for row in range(len(data))]
    (tmp_path / "scores").mkdir()
    write_scores(tmp_path / "scores/critic.safetensors", rows, data, "c" * 64, unit="probability", gate_passed=False)
    write_scores(tmp_path / "scores/reference.safetensors", rows, data, "c" * 64, unit="nats")
    return tmp_path / "scores"


def described(micro, scores, name, **training):
    out = scores.parent / name
    describe_arms.work(view("arms", **training), QUIET, str(scores), str(out), str(micro.bundle))
    return out, {arm: (out / f"{arm}.json").read_text() for arm in BLOCKS}


@pytest.mark.parametrize("decides", [stage.reads_pairs, policy.reads_beta])
def test_what_decides_the_rows_and_the_beta_of_a_training_is_part_of_its_code(tmp_path, monkeypatch, decides):
    """An edit of its room is another code of the study's cells, and a changed dependency of train in dvc.yaml."""
    room = Path(inspect.getsourcefile(decides)).relative_to(ROOT)
    assert str(room) in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["train"]["do"]["deps"]
    for folder in ("stages", "wmtp"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for module in (dependencies, describe_code):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    describe_code.work(None, QUIET, str(tmp_path / "before"), "train")
    (tmp_path / room).write_text((tmp_path / room).read_text() + "# edited\n")
    describe_code.work(None, QUIET, str(tmp_path / "after"), "train")
    before, after = (json.loads((tmp_path / name / "train.json").read_text()) for name in ("before", "after"))
    assert {name for name in after if before[name] != after[name]} == {str(room)}


def test_only_the_arms_that_read_a_key_change_with_it(micro, scores):
    _, before = described(micro, scores, "one", beta=0.9)
    _, beta = described(micro, scores, "two", beta=0.5)
    _, gate = described(micro, scores, "three", beta=0.9, train_anyway=True)
    assert {arm for arm in BLOCKS if beta[arm] != before[arm]} == {arm for arm, block in BLOCKS.items() if block.get("beta", 0) is None}
    assert {arm for arm in BLOCKS if gate[arm] != before[arm]} == {arm for arm, row in METHODS.items() if row.signal == "critic"} | {
        "verifiable_beta_03"
    }
    assert json.loads(before["verifiable"])["beta"] == 0.9 and "beta" not in json.loads(before["verifiable_beta_03"])


def test_arms_without_their_control_are_refused_before_anything_trains(micro, scores):
    seen = view("arms")
    seen.study.arms.remove("uniform_shared")
    with pytest.raises(ValueError, match=r"verifiable_shared reads pairs with a shared critic .* as uniform_shared, equal in these"):
        describe_arms.work(seen, QUIET, str(scores), str(scores.parent / "none"), str(micro.bundle))
    assert not (scores.parent / "none").exists()


def trained(micro, scores, arm, out, **training):
    """The log of one cell, whose stage sees what study/dvc.yaml declares for it."""
    folder, _ = described(micro, scores, out, **training)
    paths = [str(scores.parent / f"{out}-{arm}-{name}") for name in ("model", "log.csv", "report.json")]
    stage.work(view(f"train@{arm}-1", **training), QUIET, arm, str(folder / f"{arm}.json"), str(micro.processed), str(scores), *paths)
    log = (scores.parent / f"{out}-{arm}-log.csv").read_text().splitlines()
    return dict(zip(log[0].split(","), map(json.loads, log[1].split(","))))


@pytest.mark.slow
def test_a_cell_reads_from_its_description_what_it_does_not_declare(micro, scores, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(scores.parent))
    with pytest.raises(ValueError, match="failed the quality gate"):
        trained(micro, scores, "verifiable", "refused", beta=0.7)
    for arm, beta in (("verifiable", 0.7), ("verifiable_beta_03", 0.3)):
        assert trained(micro, scores, arm, f"of-{arm}", beta=0.7, train_anyway=True)["weight_beta"] == pytest.approx(beta)
    assert trained(micro, scores, "baseline", "uniform")["weight_std"] == 0


@pytest.mark.slow
def test_a_killed_cell_does_not_go_on_with_another_beta(micro, scores, monkeypatch):
    """The description is one of the inputs that name the state in .work."""
    monkeypatch.setenv("DVC_ROOT", str(scores.parent))
    seen = []
    monkeypatch.setattr(stage.train, "fingerprint", lambda declared, inputs, world: seen.append(inputs) or f"key{len(seen)}")
    for beta in (0.7, 0.5):
        trained(micro, scores, "verifiable", f"at-{beta}", beta=beta, train_anyway=True)
    assert seen[0]["arm"] != seen[1]["arm"] and {**seen[0], "arm": 0} == {**seen[1], "arm": 0}
