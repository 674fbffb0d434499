"""Other inputs through the whole pipeline, by running DVC for real: bad values, real files, the 7B preset."""

import json
import os
import shutil

import pytest
import yaml

from tests.pipeline import METHODS, cloned, restored, run, stages_run, typed
from wmtp.dependencies import ROOT
from wmtp.raw_data import FOLDERS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("training.learning_rate", "-1.0", "training.learning_rate: Input should be greater than 0, found -1.0"),
        ("report.method", "dpo", "report.method 'dpo' is none of methods"),
        ("source.data.min_operations", "9", "min_operations 9 is above max_operations 4"),
        ("evaluation.humaneval_protocol", "nonesuch", "unknown protocol 'nonesuch', expected one of"),
        ("evaluation.codecontests_protocol", "mbpp/bigcode", "'mbpp/bigcode' is a protocol of mbpp, not of codecontests"),
        ("evaluation.benchmarks", "[mbpp,mbpp]", "benchmarks ['mbpp', 'mbpp']: expected one at least, each once"),
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
    row = json.loads(lines[10])
    lines[10] = json.dumps(row | {"code": "def f(xs):\n    return None"}) + "\n"
    weights.unlink()
    problems.write_text("".join([*lines[:2], '{"task_id": 7\n', *lines[3:]]))
    values = yaml.safe_load((folder / "params.yaml").read_text())
    values["source"]["checkpoint"] = {"kind": "local", "policy": str(mine / "policy"), "reference": str(mine / "reference")}
    values["source"]["data"] = {"kind": "local", "path": str(mine / "data")}
    values["source"]["data"]["folders"] = {name: name for name in FOLDERS}
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    for target, told, mend in (
        ("build-micro-model", f"{mine}/policy: expected consolidated*.pth (Meta)", lambda: weights.write_bytes(kept)),
        ("prepare-and-validate-datasets", f"{problems}:3: line: Invalid JSON", lambda: problems.write_text("".join(lines))),
    ):
        done = run(folder, "dvc", "repro", target, check=False)
        assert done.returncode != 0 and told in done.stdout + done.stderr and "Traceback" not in done.stdout + done.stderr
        mend()
        done = run(folder, "dvc", "repro", target)
    assert "mbpp: left out, their references fail: mbpp/11" in done.stdout + done.stderr
    found = json.loads((folder / "metrics/data.json").read_text())["mbpp"]
    assert found == {"problems": 7, "references_passed": 7, "without_reference": 0, "references_failed": ["mbpp/11"]}
    kept = (folder / "data/processed/benchmarks/mbpp.jsonl").read_text().splitlines()
    assert len(kept) == 7 and not any('"mbpp/11"' in line for line in kept)


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
    typed(folder, f"{command} -S evaluation.max_tokens=8 -S evaluation.max_problems=60 -S run.n_processes=2 {short}")
    data = json.loads((folder / "metrics/data.json").read_text())
    assert data["humaneval"]["problems"] == data["humaneval"]["references_passed"] == 164
    assert data["mbpp"]["problems"] == data["mbpp"]["references_passed"] == 500
    for method in ("start", *METHODS):
        figures = json.loads((folder / f"metrics/{method}/eval.json").read_text())
        assert (figures["humaneval"]["n_problems"], figures["mbpp"]["n_problems"]) == (60, 60)
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
