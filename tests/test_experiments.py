"""Which revisions make seeds of one experiment, and what is refused."""

import hashlib
import json
import re
import subprocess

import pytest
import yaml

from tests.pipeline import run
from wmtp import experiments
from wmtp.dependencies import ROOT
from wmtp.experiments import ExperimentError, by_seed, check_alike, check_trained_with, trained


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Commits of params.yaml by name, each with the changes asked for."""
    run(tmp_path, "git", "init", "-q", "-b", "main")
    text = (ROOT / "params.yaml").read_text()

    def commit(name, *changes, files=()):
        edited = text
        for old, new in changes:
            assert edited.count(old) >= 1
            edited = edited.replace(old, new, 1)
        (tmp_path / "params.yaml").write_text(edited)
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text("{}")
        run(tmp_path, "git", "add", "-A")
        run(tmp_path, "git", "commit", "-qm", name, "--allow-empty")
        run(tmp_path, "git", "tag", name)

    monkeypatch.chdir(tmp_path)
    return commit


SEED = "seed: 1 "


def test_revisions_that_differ_in_their_seed_alone_are_seeds_of_one_experiment(repository):
    repository("one")
    repository("five", (SEED, "seed: 5 "))
    assert by_seed(["one", "five"]) == {1: "one", 5: "five"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ([(SEED, "seed: 5 "), ("beta: 0.9 ", "beta: 0.5 ")], "other: training.beta is another than in one; only training.seed may differ"),
        ([(SEED, "seed: 5 "), ("keep_fraction: 0.6", "keep_fraction: 0.5")], "other: methods.rho1.keep_fraction is another than in one"),
        ([], r"other: training.seed 1 again, as in one"),
    ],
)
def test_other_revisions_are_refused(repository, changes, message):
    repository("one")
    repository("other", *changes)
    with pytest.raises(ExperimentError, match=message):
        by_seed(["one", "other"])


def test_one_seed_is_none_to_speak_of(repository):
    repository("one")
    with pytest.raises(ExperimentError, match="one training seed, expected two at least; make more with `dvc exp run --queue"):
        by_seed(["one"])


def test_a_revision_that_is_not_there_is_one_line(repository, monkeypatch, capsys):
    repository("one")
    monkeypatch.setattr("sys.argv", ["experiments", "one", "nowhere"])
    with pytest.raises(SystemExit) as stopped:
        experiments.main()
    assert "nowhere" in str(stopped.value.code) and "\n" not in str(stopped.value.code)


def test_methods_are_those_with_results(repository):
    repository("one", files=["metrics/baseline/train.json", "metrics/rho1/train.json", "metrics/start/eval.json"])
    assert trained("one") == ["baseline", "rho1"]


def test_nothing_is_read_from_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExperimentError, match="git show"):
        by_seed(["HEAD", "main"])
    assert subprocess.run(["git", "status"], cwd=tmp_path, capture_output=True).returncode != 0


def test_seeds_of_other_code_data_or_parameters_are_not_pooled(repository, tmp_path):
    train, evaluation = b'{"steps": 1}', b"{}"

    def commit(name, dep="d", temperature=0.8, report=train):
        own = {"path": "models/rho1", "md5": name}
        lock = {
            "train@rho1": {
                "deps": [{"path": "models/warm", "md5": dep}], "params": {"params.yaml": {"training.seed": len(name)}},
                "outs": [own, {"path": "metrics/rho1/train.json", "md5": hashlib.md5(train).hexdigest()}],
            },
            "sample@rho1": {"deps": [own], "params": {"params.yaml": {"evaluation.temperature": temperature}}, "outs": []},
            "evaluate-humaneval-mbpp@rho1": {"outs": [{"path": "metrics/rho1/eval.json", "md5": hashlib.md5(evaluation).hexdigest()}]},
        }  # fmt: skip
        (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": lock}))
        (tmp_path / "metrics/rho1").mkdir(parents=True, exist_ok=True)
        (tmp_path / "metrics/rho1/train.json").write_bytes(report)
        (tmp_path / "metrics/rho1/eval.json").write_bytes(evaluation)
        repository(name)

    commit("a")
    commit("bb")
    check_alike({1: "a", 2: "bb"}, ["rho1"])
    commit("ccc", dep="e")
    with pytest.raises(ExperimentError, match="ccc: rho1 was made from another train models/warm than in a; run both again with one code"):
        check_alike({1: "a", 3: "ccc"}, ["rho1"])
    commit("dddd", temperature=0.1)
    with pytest.raises(ExperimentError, match=r"dddd: rho1 was made from another sample evaluation\.temperature than in a"):
        check_alike({1: "a", 4: "dddd"}, ["rho1"])
    commit("eeeee", report=b'{"steps": 2}')
    with pytest.raises(ExperimentError, match=r"eeeee: metrics/rho1/train\.json is not the file that dvc\.lock knows"):
        check_alike({1: "a", 5: "eeeee"}, ["rho1"])


def test_experiments_have_names_and_those_of_another_kind_are_left_out(repository, tmp_path, capsys):
    """Where DVC keeps them: refs/exps, by the commit that they were made from."""
    repository("base")
    base = run(tmp_path, "git", "rev-parse", "HEAD").stdout.strip()
    for name, changes in {
        "same-seed": [], "five": [(SEED, "seed: 5 ")], "five-again": [(SEED, "seed: 5 ")],
        "other": [(SEED, "seed: 6 "), ("beta: 0.9 ", "beta: 0.5 ")],
        "reported": [(SEED, "seed: 7 "), ("method: verifiable", "method: rho1")],
    }.items():  # fmt: skip
        repository(f"tag-{name}", *changes)
        run(tmp_path, "git", "update-ref", f"refs/exps/{base[:2]}/{base[2:]}/{name}", "HEAD")
    run(tmp_path, "git", "checkout", "-q", base)
    commits = {name: run(tmp_path, "git", "rev-parse", f"tag-{name}").stdout.strip() for name in ("five", "reported", "other")}
    assert experiments.made_from_head() == ["HEAD", commits["five"], commits["reported"]]
    told = capsys.readouterr()
    said = told.out + told.err
    for words in ("other: left out, its training.beta is another", "same-seed: left out, its seed is", "five-again: left out, its seed is"):
        assert words in said
    assert experiments.resolved(["HEAD", "five", "base", "nowhere"]) == ["HEAD", commits["five"], "base", "nowhere"]
    assert by_seed(["HEAD", commits["reported"]]) == {1: "HEAD", 7: commits["reported"]}


def test_an_experiment_that_trained_a_part_alone_is_refused(repository, tmp_path):
    def locked(name):
        model, text = {"path": f"models/{name}", "md5": "m"}, {"path": f"data/completions/{name}.jsonl", "md5": "t"}
        return {
            f"train@{name}": {"params": {"params.yaml": {"training.seed": 5}}, "outs": [model]},
            f"sample@{name}": {"params": {"params.yaml": {"training.seed": 5}}, "deps": [model], "outs": [text]},
            f"evaluate-humaneval-mbpp@{name}": {"deps": [text]},
        }

    cases = {
        "baseline": "train@baseline was last run with training.seed 1, expected 5",
        "ntp": "sample@ntp was last run with training.seed 1, expected 5",
        "verifiable": "sample@verifiable did not read the models/verifiable that train@verifiable wrote last",
        "shuffled": "evaluate-humaneval-mbpp@shuffled did not read the data/completions/shuffled.jsonl that sample@shuffled wrote last",
        "oracle": "train@oracle was last run with training.seed None, expected 5",
    }
    lock = json.loads(json.dumps({stage: entry for name in (*cases, "rho1") if name != "oracle" for stage, entry in locked(name).items()}))
    for stage in ("train@baseline", "sample@ntp"):
        lock[stage]["params"]["params.yaml"]["training.seed"] = 1
    for stage in ("sample@verifiable", "evaluate-humaneval-mbpp@shuffled"):
        lock[stage]["deps"][0]["md5"] = "older"
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": lock}))
    repository("five", (SEED, "seed: 5 "))
    check_trained_with(5, "five", ["rho1"])
    for method, message in cases.items():
        with pytest.raises(ExperimentError, match=re.escape(f"five: {message}")):
            check_trained_with(5, "five", ["rho1", method])
