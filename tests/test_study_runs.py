"""launch/study on the tiny preset, three arms with two seeds: whole, with a further arm, interrupted, with a cell that fails."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.pipeline import cloned, environment, processes_in, run, stages_run

pytestmark = pytest.mark.slow

ARMS = ("baseline", "ntp_full", "shuffled")
CELLS = {f"{arm}-{seed}" for arm in ARMS for seed in (1, 2)}


@pytest.fixture(scope="module")
def studied(finished, tmp_path_factory) -> Path:
    """A clone of the tiny run with a whole study, uninterrupted and committed; tests may change the files, not the commit."""
    folder = cloned(finished, tmp_path_factory.mktemp("study") / "whole")
    file = folder / "params.yaml"
    whole = yaml.safe_load(file.read_text())["study"]["arms"]
    assert "focal" not in whole
    text = file.read_text().replace("seeds: [1, 2, 3, 4, 5, 6]", "seeds: [1, 2]").replace("n_samples: 4", "n_samples: 2")
    file.write_text(text.replace(f"arms: [{', '.join(whole)}]", f"arms: [{', '.join(ARMS)}]"))
    assert yaml.safe_load(file.read_text())["study"] == {"arms": list(ARMS), "seeds": [1, 2], "n_samples": 2}
    run(folder, "launch/study", "2")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "study")
    return folder


def test_a_study_trains_every_arm_with_every_seed_and_a_further_arm_alone_when_it_is_added(studied):
    assert {path.stem for path in (studied / "study/verdicts").glob("*.jsonl")} == CELLS
    assert "shuffled - baseline" in (studied / "study/report/table.md").read_text()
    trained = {arm: json.loads((studied / f"study/metrics/{arm}-1/train.json").read_text()) for arm in ARMS}
    assert trained["ntp_full"]["parameters"] == trained["baseline"]["parameters"]
    before = {name: (studied / f"study/models/{name}/metadata.json").stat().st_mtime_ns for name in CELLS}
    block = "  focal: {weighting: focal, n_future: 4, mix: 1.0, head_weights: null, scope: sequence, focusing: 2.0}"
    file = studied / "params.yaml"
    added = file.read_text().replace("\nevaluation:", f"{block}\n\nevaluation:", 1)
    file.write_text(added.replace(f"arms: [{', '.join(ARMS)}]", f"arms: [{', '.join(ARMS)}, focal]"))
    run(studied, "launch/study", "2")
    assert "focal - baseline" in (studied / "study/report/table.md").read_text()
    assert before == {name: (studied / f"study/models/{name}/metadata.json").stat().st_mtime_ns for name in before}
    assert stages_run(run(studied, "dvc", "repro", "study/dvc.yaml")) == set()


def without(cells: set[str], studied: Path, folder: Path) -> Path:
    """A clone of the study that knows nothing of these cells, neither in the lock nor in DVC's cache of runs, and has no report."""
    cloned(studied, folder)
    files = Path(run(folder, "dvc", "cache", "dir").stdout.strip()) / "files"
    shutil.copytree(files, folder.parent / "cache/files", copy_function=os.link)
    run(folder, "dvc", "cache", "dir", str(folder.parent / "cache"))
    file = folder / "study/dvc.lock"
    lock = yaml.safe_load(file.read_text())
    lock["stages"] = {name: stage for name, stage in lock["stages"].items() if name.split("@")[-1] not in {*cells, "compare"}}
    file.write_text(yaml.safe_dump(lock))
    run(folder, "dvc", "checkout", "-q", *(f"study/dvc.yaml:{name}" for name in lock["stages"]))
    shutil.rmtree(folder / "study/report")
    return folder


def stages_done(folder: Path) -> dict[str, dict]:
    return {name: stage for name, stage in yaml.safe_load((folder / "study/dvc.lock").read_text())["stages"].items() if "@" in name}


def cells_running(folder: Path) -> set[str]:
    """Those in whose train, sample or evaluate a stage computes, so that DVC waits and writes nothing."""
    lines = processes_in(folder, b"-m\0stages.").values()
    return {found[1].decode() for line in lines if (found := re.search(rb"study/(?:models|completions)/(\w+-\d)", line))}


def until_some_compute_and_one_is_done(folder: Path, started: subprocess.Popen, cells: set[str], jobs: int) -> None:
    deadline = time.monotonic() + 600
    while True:
        assert started.poll() is None, f"launch/study ended with {started.returncode}"
        assert time.monotonic() < deadline, "one done, others computing: not seen"
        done = cells & set(re.findall(r"^  evaluate@([\w-]+):$", (folder / "study/dvc.lock").read_text(), re.MULTILINE))
        if done and list(folder.glob(".work/train-*/state.pt")) and len(cells_running(folder) - done) == jobs:
            return
        time.sleep(0.02)


def outputs(folder: Path, stages: dict[str, dict]) -> dict[Path, int]:
    """When each file that these stages have written was written."""
    listed = [folder / out["path"] for stage in stages.values() for out in stage["outs"]]
    return {file: file.stat().st_mtime_ns for path in listed for file in (path.iterdir() if path.is_dir() else [path])}


@pytest.mark.parametrize(
    ("how", "whole_group", "jobs", "seeds"),
    [
        pytest.param(signal.SIGINT, True, 1, "1", id="Ctrl-C"),
        pytest.param(signal.SIGINT, True, 2, "12", id="Ctrl-C, two side by side", marks=pytest.mark.stress),
        pytest.param(signal.SIGINT, False, 2, "12", id="SIGINT to it alone", marks=pytest.mark.stress),
        pytest.param(signal.SIGTERM, False, 2, "12", id="SIGTERM to it alone", marks=pytest.mark.stress),
        pytest.param(signal.SIGKILL, True, 2, "12", id="kill -9", marks=pytest.mark.stress),
    ],
)
def test_an_interrupted_study_goes_on_without_training_again_and_ends_as_a_whole_one(studied, tmp_path, how, whole_group, jobs, seeds):
    """As many cells as run side by side compute when the signal comes, at least one of them in a training that has saved its state."""
    cells = {cell for cell in CELLS if cell[-1] in seeds}
    folder = without(cells, studied, tmp_path / "interrupted")
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace("checkpoint_every: 50 ", "checkpoint_every: 1 "))
    with open(tmp_path / "stderr", "w") as stderr:
        started = subprocess.Popen(["launch/study", str(jobs)], cwd=folder, env=environment(), stderr=stderr, start_new_session=True)
    try:
        until_some_compute_and_one_is_done(folder, started, cells, jobs)
    finally:
        (os.killpg if whole_group else os.kill)(started.pid, how)
    assert started.wait(timeout=120) == (-how if how == signal.SIGKILL else 130)
    assert "Traceback" not in (tmp_path / "stderr").read_text()
    deadline = time.monotonic() + 30
    while alive := processes_in(folder, b"stages."):
        assert time.monotonic() < deadline, f"still alive: {alive}"
        time.sleep(0.1)
    done, kept = stages_done(folder), outputs(folder, stages_done(folder))
    assert len(done) < 3 * len(CELLS)

    run(folder, "launch/study", "2")
    logs = {path.stem: path.read_text() for path in (folder / "study/logs").glob("*.log")}
    times = {name: logs[name.split("@")[1]].count(f"Running stage 'study/dvc.yaml:{name}'") for name in done}
    assert times == {name: int(name.split("@")[1] in cells) for name in done}
    assert outputs(folder, done) == kept
    assert {name: stage for name, stage in stages_done(folder).items() if name in done} == done
    assert not whole_group or any("(resumed)" in log for log in logs.values())
    assert "shuffled - baseline" in (folder / "study/report/table.md").read_text()
    for path in (studied / "study/metrics").glob("*/*"):
        if path.parent.name in CELLS:
            assert (folder / path.relative_to(studied)).read_bytes() == path.read_bytes(), path
    committed = run(folder, "git", "show", "HEAD:study/dvc.lock").stdout
    assert yaml.safe_load((folder / "study/dvc.lock").read_text()) == yaml.safe_load(committed)
    assert not list((folder / ".work").glob("*"))


def test_a_cell_that_fails_is_one_line_that_names_it_and_its_log(studied, tmp_path):
    """The tiny critic fails its gate, and only the arm that reads it is refused."""
    folder = cloned(studied, tmp_path / "failing")
    run(folder, "dvc", "checkout", "-q", "study/dvc.yaml")
    text = (folder / "params.yaml").read_text()
    assert not json.loads((folder / "metrics/critic.json").read_text())["passed"] and "train_anyway: true" in text
    (folder / "params.yaml").write_text(text.replace("train_anyway: true", "train_anyway: false"))
    done = run(folder, "launch/study", "2", check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    *before, last = done.stderr.splitlines()
    found = re.fullmatch(r"study: (shuffled-[12]) failed; its output is in (study/logs/\1\.log)", last)
    assert found and not any(" failed" in line for line in before), done.stderr
    assert "its critic failed the quality gate" in (folder / found[2]).read_text()
    assert "Running stage" not in "".join(path.read_text() for path in (folder / "study/logs").glob("[!s]*.log"))
