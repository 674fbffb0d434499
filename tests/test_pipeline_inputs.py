"""Other inputs through the whole pipeline, by running DVC for real: bad values, real files, the 7B preset, a study."""

import json
import os
import shutil

import pytest
import yaml

from tests.pipeline import METHODS, cloned, restored, run, stages_run, typed
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


def test_what_is_absent_is_one_line_and_the_next_repro_goes_on(finished, tmp_path):
    """A checkpoint's file, then a line of a data file, both in folders of the user's own."""
    folder = cloned(finished, tmp_path / "local")
    mine = tmp_path / "mine"
    for name in ("policy", "reference"):
        shutil.copytree(folder / "models/raw" / name, mine / name)
    shutil.copytree(folder / "data/raw", mine / "data")
    weights, problems = mine / "policy/consolidated.pth", mine / "data/mbpp/mbpp.jsonl"
    kept, lines = weights.read_bytes(), problems.read_text().splitlines(keepends=True)
    weights.unlink()
    problems.write_text("".join([*lines[:2], '{"task_id": 7\n', *lines[3:]]))
    values = yaml.safe_load((folder / "params.yaml").read_text())
    values["source"]["checkpoint"] = {"kind": "local", "policy": str(mine / "policy"), "reference": str(mine / "reference")}
    values["source"]["data"] = {"kind": "local", "path": str(mine / "data")}
    values["source"]["data"]["folders"] = {name: name for name in ("codecontests", "functions", "humaneval", "mbpp")}
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    for target, told, mend in (
        ("build-micro-model", f"{mine}/policy: expected consolidated*.pth (Meta)", lambda: weights.write_bytes(kept)),
        ("prepare-and-validate-datasets", f"{problems}:3: line: Invalid JSON", lambda: problems.write_text("".join(lines))),
    ):
        done = run(folder, "dvc", "repro", target, check=False)
        assert done.returncode != 0 and told in done.stdout + done.stderr and "Traceback" not in done.stdout + done.stderr
        mend()
        run(folder, "dvc", "repro", target)


REAL = ROOT.parent / "shared" / "datasets"


@pytest.mark.skipif(
    not REAL.is_dir() and os.environ.get("WMTP_REAL_DATA") != "require", reason="the folder of real files is not beside this repository"
)
def test_real_files_go_through_every_stage(finished, tmp_path):
    assert REAL.is_dir(), f"{REAL} is absent; WMTP_REAL_DATA=require needs it"
    folder = tmp_path / "real"
    cloned(finished, folder)
    # Rows of a thousand tokens: a few steps of each training.
    short = " ".join(f"-S {section}.n_epochs=0.1" for section in ("warm_up", "reference", "critic", "training"))
    command = f"dvc exp run $(python -m wmtp.overlay presets/real-data.yaml) -S source.data.path={REAL}"
    typed(folder, f"{command} -S evaluation.max_tokens=8 -S run.n_processes=2 {short}")
    data = json.loads((folder / "metrics/data.json").read_text())
    assert data["humaneval"]["problems"] == data["humaneval"]["references_passed"] == 164
    assert data["mbpp"]["problems"] == data["mbpp"]["references_passed"] == 500
    for method in ("start", *METHODS):
        figures = json.loads((folder / f"metrics/{method}/eval.json").read_text())
        assert (figures["humaneval"]["n_problems"], figures["mbpp"]["n_problems"]) == (164, 500)
    assert "No program of any method passed" in (folder / "metrics/report/table.md").read_text()


def test_the_7b_preset_is_a_pipeline_that_dvc_can_plan(finished):
    # Queued, the flags are read and nothing runs; a dry run of an experiment stops where the first output is not there.
    queued = typed(finished, "dvc exp run --queue $(python -m wmtp.overlay presets/7b.yaml) write-page")
    assert "Queued experiment" in queued.stdout
    typed(finished, "dvc queue remove --queued")
    typed(finished, "python -m wmtp.overlay presets/7b.yaml --write params.yaml")
    planned = stages_run(run(finished, "dvc", "repro", "--dry", "write-page"))
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
    assert yaml.safe_load(file.read_text())["study"] == {"arms": ["baseline", "ntp_full", "shuffled"], "seeds": [1, 2], "n_samples": 2}
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
