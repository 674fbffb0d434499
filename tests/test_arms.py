"""What a cell of the study depends on: its arm's description holds what the arm reads, and nothing else."""

import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from sentencepiece import sentencepiece_model_pb2

from stages import describe_arms, describe_code
from stages import train as stage
from tests import methods
from tests.test_train import signal_of
from wmtp import dependencies, outcome, params, policy
from wmtp.dependencies import ROOT
from wmtp.model import load_bundle
from wmtp.scores import write_scores
from wmtp.tokens import TokenData
from wmtp.view import View, declared_keys
from wmtp.weighting import METHODS
from wmtp.world import World

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


def test_a_description_changes_with_what_its_arm_depends_on_and_with_nothing_else(micro, scores, tmp_path, monkeypatch):
    _, before = described(micro, scores, "one")
    reading = {arm for arm in BLOCKS if json.loads(before[arm])["scores"]}
    critics = {arm for arm in reading if json.loads(before[arm])["signal"] == "critic"}
    assert critics and reading - critics
    file = scores / "critic.safetensors"
    file.write_bytes(file.read_bytes() + b" ")
    assert {arm for arm, text in described(micro, scores, "two")[1].items() if text != before[arm]} == critics
    file.write_bytes(file.read_bytes()[:-1])
    other = shutil.copytree(micro.reference, tmp_path / "other")
    describe_arms.work(view("arms"), QUIET, str(scores), str(tmp_path / "own"), str(micro.bundle), f"ntp_full={other}")
    changed = {arm for arm in BLOCKS if (tmp_path / f"own/{arm}.json").read_text() != before[arm]}
    own = json.loads((tmp_path / "own/ntp_full.json").read_text())
    assert changed == {"ntp_full"} and own["start"] == str(other) and own["start_sha256"] != json.loads(before["baseline"])["start_sha256"]
    assert (
        all(json.loads(before[arm])["files"] for arm in BLOCKS) and "wmtp/weighting/shuffled.py" in json.loads(before["shuffled"])["files"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["scores", "start_sha256", "files"])
def test_a_cell_whose_inputs_are_not_those_it_was_described_with_is_refused(micro, scores, data, changed, monkeypatch):
    """DVC knows the cell by its description; what is read beside it must not have changed since."""
    monkeypatch.setenv("DVC_ROOT", str(scores.parent))
    folder, found = described(micro, scores, "then", train_anyway=True)
    arm = folder / "verifiable.json"
    if changed == "scores":
        rows = [signal_of(data)(row) * 0.5 for row in range(len(data))]
        write_scores(scores / "critic.safetensors", rows, data, "d" * 64, unit="probability", gate_passed=False)
    else:
        older = {"start_sha256": "0" * 64, "files": {"wmtp/weighting/advantage.py": "0" * 64}}[changed]
        arm.write_text(json.dumps(json.loads(found["verifiable"]) | {changed: older}))
    paths = [str(scores.parent / name) for name in ("model", "log.csv", "report.json")]
    with pytest.raises(ValueError, match=f"arm verifiable: its {changed} changed after it was described; run launch/study again"):
        stage.work(view("train@verifiable-1", train_anyway=True), QUIET, "verifiable", str(arm), str(micro.processed), str(scores), *paths)
    assert not (scores.parent / "model").exists()


@pytest.mark.slow
def test_the_training_stage_takes_its_seed_its_validation_and_its_tokenizer_from_where_it_should(micro, scores, tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(scores.parent))

    def run(name, start, seed=1, arm="random_k"):
        paths = [str(tmp_path / f"{name}-{file}") for file in ("model", "log.csv", "report.json")]
        seen = view(f"train@{arm}-1", seed=seed)
        stage.work(seen, QUIET, arm, str(start), str(micro.processed), str(scores), *paths)
        return (tmp_path / f"{name}-log.csv").read_text(), json.loads((tmp_path / f"{name}-report.json").read_text())

    log, report = run("one", micro.bundle)
    assert run("again", micro.bundle) == (log, report) and run("two", micro.bundle, seed=2)[0] != log
    model, alone = load_bundle(tmp_path / "one-model", dtype=torch.float32), World(0, 1, torch.device("cpu"))
    for split, same in (("validation", True), ("policy", False)):
        ce = outcome.validation(model, TokenData(micro.processed, split), alone, 4096)["validation_ce_head0"]
        assert (ce == pytest.approx(report["validation_ce_head0"], rel=1e-6)) == same
    other = shutil.copytree(micro.bundle, tmp_path / "other")
    model = sentencepiece_model_pb2.ModelProto.FromString((micro.bundle / "tokenizer.model").read_bytes())
    model.trainer_spec.input_format = "other"
    (other / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"policy\.start"):
        run("refused", other)


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
