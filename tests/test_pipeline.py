"""What runs again after which change, and what is shown; DVC for real, on the tiny preset, in a clone of this repository."""

import json
from pathlib import Path

import pytest
import yaml

from tests.pipeline import METHODS, after, restored, run, stages_run

pytestmark = pytest.mark.slow


def test_every_stage_ends_and_a_second_run_has_nothing_to_do(finished):
    assert "up to date" in run(finished, "dvc", "repro").stdout
    for method in ("start", *METHODS):
        figures = json.loads((finished / f"metrics/{method}/eval.json").read_text())
        assert {name: found["n_problems"] for name, found in figures.items()} == {"humaneval": 8, "mbpp": 8, "codecontests": 8}
        assert all(0 <= found[key] <= 1 for found in figures.values() for key in ("tests_passed", "greedy_tests_passed"))
        assert all(found["tests_passed"] >= found["pass@1"] and found["inside"] == 0 for found in figures.values())
        assert [name for name, found in figures.items() if "greedy_exact_match" in found] == ["mbpp"]
    assert json.loads((finished / "metrics/data.json").read_text())["humaneval"]["references_passed"] == 8
    assert "verifiable" in (finished / "metrics/report/table.md").read_text()
    assert not list((finished / ".work").glob("*"))


def test_methods_are_rows_of_dvc_metrics_show(finished):
    shown = run(finished, "dvc", "metrics", "show", "--md", *(f"metrics/{method}/eval.json" for method in METHODS)).stdout
    assert all(f"metrics/{method}/eval.json" in shown for method in METHODS) and "humaneval.pass@1" in shown


def test_beta_is_read_by_verifiable_alone(finished):
    done = run(finished, "dvc", "exp", "run", "-S", "training.beta=0.5")
    assert {"train@verifiable", "sample@verifiable"} <= stages_run(done) <= after("verifiable")
    assert yaml.safe_load((finished / "params.yaml").read_text())["training"]["beta"] == 0.5
    restored(finished)


def test_the_learning_rate_is_read_by_the_four_trainings(finished):
    done = run(finished, "dvc", "exp", "run", "-S", "training.learning_rate=0.002", *(f"train@{method}" for method in METHODS))
    assert stages_run(done) == {f"train@{method}" for method in METHODS}
    left = stages_run(run(finished, "dvc", "repro", "--dry"))
    assert {f"sample@{method}" for method in METHODS} <= left <= after(*METHODS) - stages_run(done)
    restored(finished)


def with_value(folder: Path, section: str, key: str, value: object) -> None:
    values = yaml.safe_load((folder / "params.yaml").read_text())
    assert values[section][key] != value
    values[section][key] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(values))


@pytest.mark.parametrize(
    ("section", "upstream", "method"),
    [("critic", {"critic-pretrain", "score-critic"}, "verifiable"), ("reference", {"tune-reference", "score-reference"}, "rho1")],
)
def test_another_critic_or_reference_scores_again_and_trains_only_the_method_that_reads_it(finished, section, upstream, method):
    with_value(finished, section, "learning_rate", 0.002)
    done = run(finished, "dvc", "repro", "score-critic", "score-reference", *(f"train@{name}" for name in METHODS if name != method))
    planned = stages_run(run(finished, "dvc", "repro", "--dry"))
    restored(finished)
    assert stages_run(done) == upstream
    assert f"train@{method}" in planned


def test_other_data_for_the_policies_is_scored_again(finished):
    with_value(finished, "data", "max_problems", 8)
    run(finished, "dvc", "repro", "prepare-and-validate-datasets")
    state = json.loads(run(finished, "dvc", "status", "--json", "score-critic", "score-reference").stdout)
    restored(finished)
    for stage in ("score-critic", "score-reference"):
        changed = {name for one in state[stage] for name in one.get("changed deps", {})}
        assert changed == {"data/processed/manifest.json", "data/processed/policy"}, stage


def test_nothing_before_the_trainings_reads_their_seed(finished):
    with_value(finished, "training", "seed", 7)
    planned = stages_run(run(finished, "dvc", "repro", "--dry"))
    restored(finished)
    assert {f"train@{method}" for method in METHODS} <= planned <= after("start", *METHODS)


def test_editing_one_method_runs_that_method_again(finished):
    text = (finished / "params.yaml").read_text()
    (finished / "params.yaml").write_text(text.replace("keep_fraction: 0.6", "keep_fraction: 0.5"))
    done = run(finished, "dvc", "repro")
    assert {"train@rho1"} <= stages_run(done) <= after("rho1")
    restored(finished)


def test_metrics_diff_between_two_methods(finished):
    shown = run(finished, "launch/diff-methods", "baseline", "ntp").stdout
    assert "metrics/selected.json" in shown and "training.parameters" in shown
    for name in ("npt", "start"):
        failed = run(finished, "launch/diff-methods", "baseline", name, check=False)
        assert failed.returncode == 1
        assert failed.stderr == f"diff-methods: {name}: no metrics/{name}/train.json; expected a method that was trained\n"


def test_plots_are_defined_on_columns_that_exist(finished):
    plots = {name: plot for one in yaml.safe_load((finished / "dvc.yaml").read_text())["plots"] for name, plot in one.items()}
    run(finished, "dvc", "plots", "show", "-o", "plots")
    page = (finished / "plots/index.html").read_text()
    for name, plot in plots.items():
        assert name in page
        x = plot["x"] if isinstance(plot["x"], dict) else dict.fromkeys(plot["y"], plot["x"])
        for file, wanted in [*x.items(), *plot["y"].items()]:
            columns = (finished / file).read_text().splitlines()[0].split(",")
            assert {wanted} <= set(columns) if isinstance(wanted, str) else set(wanted) <= set(columns), (name, file, wanted)
