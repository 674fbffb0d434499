"""Other inputs through the whole pipeline, by running DVC for real: bad values, real files, the 7B preset, a study."""

import json
import os
import sys

import pytest
import yaml

from tests.pipeline import METHODS, cloned, restored, run, stages_run
from wmtp.dependencies import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("training.learning_rate", "-1.0", "training.learning_rate: Input should be greater than 0, found -1.0"),
        ("report.method", "dpo", "report.method 'dpo' is none of methods"),
        ("source.data.min_operations", "9", "min_operations 9 is above max_operations 4"),
        ("evaluation.humaneval_protocol", "nonesuch", "unknown protocol 'nonesuch', expected one of"),
    ],
)
def test_a_bad_value_is_one_line(finished, key, value, expected):
    done = run(finished, "dvc", "exp", "run", "-S", f"{key}={value}", check=False)
    restored(finished)
    assert done.returncode != 0
    assert expected in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


REAL = ROOT.parent / "shared" / "datasets"


@pytest.mark.skipif(
    not REAL.is_dir() and os.environ.get("WMTP_REAL_DATA") != "require", reason="the folder of real files is not beside this repository"
)
def test_real_files_go_through_every_stage(finished, tmp_path):
    assert REAL.is_dir(), f"{REAL} is absent; WMTP_REAL_DATA=require needs it"
    folder = tmp_path / "real"
    cloned(finished, folder)
    run(folder, sys.executable, "-m", "wmtp.overlay", "presets/real-data.yaml", "--write", "params.yaml")
    values = yaml.safe_load((folder / "params.yaml").read_text())
    values["source"]["data"]["path"] = str(REAL)
    values["evaluation"]["max_tokens"] = 8
    values["run"]["n_processes"] = 2
    for section in ("warm_up", "reference", "critic", "training"):  # rows of a thousand tokens: a few steps of each
        values[section]["n_epochs"] = 0.1
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    run(folder, "dvc", "repro")
    data = json.loads((folder / "metrics/data.json").read_text())
    assert data["humaneval"]["problems"] == data["humaneval"]["references_passed"] == 164
    assert data["mbpp"]["problems"] == data["mbpp"]["references_passed"] == 500
    for method in ("start", *METHODS):
        figures = json.loads((folder / f"metrics/{method}/eval.json").read_text())
        assert (figures["humaneval"]["n_problems"], figures["mbpp"]["n_problems"]) == (164, 500)


def test_the_7b_preset_is_a_pipeline_that_dvc_can_plan(finished):
    run(finished, sys.executable, "-m", "wmtp.overlay", "presets/7b.yaml", "--write", "params.yaml")
    planned = stages_run(run(finished, "dvc", "repro", "--dry", "compare"))
    restored(finished)
    assert {f"train@{method}" for method in METHODS} <= planned
    assert not {"warm-up", "build-micro-model"} & planned, "the 7B policies start from the base itself"


def study_cells(folder) -> set[str]:
    return {path.stem for path in (folder / "study/verdicts").glob("*.jsonl")}


def test_a_study_trains_every_arm_with_every_seed_and_a_further_arm_alone_when_it_is_added(finished, tmp_path):
    folder = cloned(finished, tmp_path / "study")
    file = folder / "params.yaml"
    whole = yaml.safe_load(file.read_text())["study"]["arms"]
    assert "focal" not in whole
    listed = f"arms: [{', '.join(whole)}]"
    text = file.read_text().replace("seeds: [1, 2, 3, 4, 5, 6]", "seeds: [1, 2]").replace("n_samples: 4", "n_samples: 2")
    file.write_text(text.replace(listed, "arms: [baseline, ntp_full, shuffled]"))
    run(folder, "launch/study", "2")
    arms = {"baseline", "ntp_full", "shuffled"}
    assert study_cells(folder) == {f"{arm}-{seed}" for arm in arms for seed in (1, 2)}
    assert "shuffled - baseline" in (folder / "study/report/table.md").read_text()
    trained = {arm: json.loads((folder / f"study/metrics/{arm}-1/train.json").read_text()) for arm in arms}
    assert trained["ntp_full"]["parameters"] == trained["baseline"]["parameters"]
    before = {name: (folder / f"study/models/{name}/metadata.json").stat().st_mtime_ns for name in study_cells(folder)}
    block = "  focal: {weighting: focal, n_future: 4, mix: 1.0, head_weights: null, scope: sequence, focusing: 2.0}"
    added = file.read_text().replace("\nevaluation:", f"{block}\n\nevaluation:", 1)
    file.write_text(added.replace("arms: [baseline, ntp_full, shuffled]", "arms: [baseline, ntp_full, shuffled, focal]"))
    run(folder, "launch/study", "2")
    assert "focal - baseline" in (folder / "study/report/table.md").read_text()
    assert before == {name: (folder / f"study/models/{name}/metadata.json").stat().st_mtime_ns for name in before}
    assert stages_run(run(folder, "dvc", "repro", "study/dvc.yaml")) == set()
