"""The schema: every fault is one line that says what, where, expected and found; a stage sees what it declares."""

import copy
import re
import shutil
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from tests import methods
from wmtp.arms import controls
from wmtp.dependencies import ROOT
from wmtp.method_schema import AnyMethod
from wmtp.overlay import merged
from wmtp.params import ParameterError, Params, loader, parse_yaml, read_yaml, validate
from wmtp.policy import policy_objective
from wmtp.schema import Section
from wmtp.view import declared_keys, load, split_arguments
from wmtp.weighting import METHODS, method_of

COMMITTED = yaml.safe_load((ROOT / "params.yaml").read_text())


def changed(key: str, value: Any) -> dict[str, Any]:
    values = copy.deepcopy(COMMITTED)
    section = values
    *path, last = key.split(".")
    for part in path:
        section = section[part]
    section[last] = value
    return values


def test_the_committed_file_is_valid():
    assert validate(COMMITTED).training.beta == 0.9


def test_a_benchmark_that_local_data_lack_is_told_before_anything_runs():
    values = changed("evaluation.benchmarks", ["mbpp", "codecontests"])
    folders = {"codecontests": "a", "functions": None, "humaneval": "b", "mbpp": "c"}
    values["source"]["data"] = {"kind": "local", "path": "data", "folders": folders}
    with pytest.raises(ParameterError, match=r"evaluation\.benchmarks: codecontests, but .*codecontests_test is null"):
        validate(values)
    folders["codecontests_test"] = "d"
    assert validate(values).evaluation.benchmarks == ["mbpp", "codecontests"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.beta", "1e-1", r"training\.beta: YAML reads 1e-1 as text, expected a number; write 1\.0e-1"),
        ("training.beta", 0.0, r"training\.beta: Input should be greater than 0, found 0\.0"),
        ("training.beta", "high", r"training\.beta: .*valid number, found 'high'"),
        ("training.epochs", 3, r"training\.epochs: unknown key"),
        ("training.seed", True, r"training\.seed: .*valid integer, found True"),
        ("run.device", "tpu", r"run\.device: .*'auto', 'cpu', 'cuda' or 'mps', found 'tpu'"),
        ("data.splits.policy", 0.9, r"data\.splits: .*shares sum to 1\.\d+, expected 1"),
        ("critic.batch_rows", 15, r"critic: .*batch_rows 15 is odd"),
        ("report.method", "dpo", r"report\.method 'dpo' is none of methods: ntp, baseline, verifiable, rho1"),
        ("methods.rho1.keep_fraction", 1.5, r"methods\.rho1.*keep_fraction: Input should be less than or equal to 1, found 1\.5"),
        ("methods.rho1.beta", 1.5, r"methods\.rho1.*beta: unknown key"),
        ("methods.rho1.temperature", 1.0, r"methods\.rho1.*temperature: unknown key"),
        (
            "methods.rho1.head_mode",
            "any",
            r"methods\.rho1.*head_mode: .*'shared_target', 'per_head', 'per_head_zscore' or 'pooled', found 'any'",
        ),
        ("methods.rho1.selection", "magic", r"methods\.rho1\.selection: Input should be one of 'topk', .*, found 'magic'"),
        ("methods.ntp.head_weights", [1.0, 0.5], r"methods\.ntp.*expected n_future = 1 numbers"),
        ("methods.baseline.head_weights", [0.0] * 4, r"methods\.baseline.*not all 0"),
        ("methods.baseline.head_weights", [1.0, 1.0, 1.0, -1.0], r"methods\.baseline.*greater than or equal to 0, found -1"),
        ("methods.rho1.weighting", "magic", r"methods\.rho1\.weighting: Input should be one of 'uniform', .*, found 'magic'"),
        ("source.data.kind", "ftp", r"source\.data\.kind: Input should be one of 'synthetic', 'local', 'huggingface', found 'ftp'"),
        ("evaluation.top_p", 0, r"evaluation\.top_p: Input should be greater than 0, found 0"),
        ("methods", "ntp", r"methods: Input should be a valid dictionary, found 'ntp'"),
    ],
)
def test_a_bad_value_is_one_line(key, value, message):
    with pytest.raises(ParameterError, match=message) as caught:
        validate(changed(key, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["seed", "training.beta", "source.checkpoint.kind", "methods.verifiable.lam"])
def test_a_missing_key_is_named(key):
    values = copy.deepcopy(COMMITTED)
    section = values
    *path, last = key.split(".")
    for part in path:
        section = section[part]
    del section[last]
    with pytest.raises(ParameterError, match=rf"{key}: this key is missing"):
        validate(values)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_form_in_which_no_key_is_free(name):
    """Its own keys are enough, each is needed, and another's is refused."""
    adapter = TypeAdapter(AnyMethod)
    adapter.validate_python(methods.block(name))
    for key in methods.block(name):
        if key not in ("weighting", "selection", "policy_on_incorrect", "critic"):
            with pytest.raises(ValidationError, match="missing"):
                adapter.validate_python({k: v for k, v in methods.block(name).items() if k != key})
    with pytest.raises(ValidationError, match="extra_forbidden"):
        adapter.validate_python({**methods.block(name), "no_such_key": 1.0})


@pytest.mark.parametrize("selection", [*methods.EXCESS_FORMS, "softmax_over_heads"])
def test_a_selection_has_its_own_keys_alone(selection):
    adapter = TypeAdapter(AnyMethod)
    adapter.validate_python(methods.excess_block(selection, "pooled"))
    foreign = {key for form in methods.EXCESS_FORMS.values() for key in form} | {"head_mode", "scope"}
    for key in foreign - set(methods.excess_block(selection, "pooled")):
        with pytest.raises(ValidationError, match="extra_forbidden"):
            adapter.validate_python({**methods.excess_block(selection, "pooled"), key: 0.5})


@pytest.mark.parametrize("preset", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_fits_the_schema(preset):
    assert validate(merged(COMMITTED, yaml.safe_load(preset.read_text())), str(preset))


def test_every_arm_of_the_preset_of_pairs_is_compared_with_the_uniform_arm_of_its_kind():
    whole = validate(merged(COMMITTED, yaml.safe_load((ROOT / "presets/pairs.yaml").read_text())))
    assert controls({arm: whole.methods[arm] for arm in whole.study.arms}) == {
        "baseline": None, "verifiable": "baseline", "constant_weighted": None, "verifiable_weighted": "constant_weighted",
        "shuffled_weighted": "constant_weighted", "random_matched_weighted": "constant_weighted",
        "verifiable_binary": "constant_weighted", "oracle_weighted": "constant_weighted",
        "uniform_shared": None, "verifiable_shared": "uniform_shared",
    }  # fmt: skip


def test_every_arm_of_the_sweep_is_a_method_with_weights_of_its_own():
    whole = validate(merged(COMMITTED, yaml.safe_load((ROOT / "presets/sweep.yaml").read_text())))
    arms = {arm: whole.methods[arm] for arm in whole.study.arms}
    made = {arm: policy_objective(arm, block, lambda: whole.training.beta, lambda: 1, lambda: ()) for arm, block in arms.items()}
    swept = {arm: (one.settings["beta"], one.mix, one.settings["terminal_credit"]) for arm, one in made.items() if arm != "baseline"}
    assert len(set(swept.values())) == len(swept) == len(arms) - 1
    assert {beta for beta, mix, credit in swept.values() if (mix, credit) == (1.0, False)} == {0.3, 0.9, 3.0}
    assert {mix for beta, mix, credit in swept.values() if (beta, credit) == (0.9, False)} == {0.25, 0.5, 1.0}
    assert [arm for arm, (*_, credit) in swept.items() if credit] == ["verifiable_terminal_credit"]
    assert {arm: method_of(arm, block) for arm, block in arms.items()} == {
        arm: METHODS["baseline" if arm == "baseline" else "verifiable"] for arm in arms
    }


def with_arms(*arms, **blocks):
    values = copy.deepcopy(COMMITTED)
    values["methods"] |= blocks
    values["study"]["arms"] = list(arms)
    return values


def test_arms_of_a_study_have_a_control_that_reads_the_same_rows():
    """Whatever their names are; arms of pairs with a critic of its own and with a shared one each have theirs."""
    pairs, flat = {"policy_on_incorrect": "weighted"}, {"gamma": 1.0, "terminal_credit": False}
    blocks = {
        "on_pairs": methods.block("verifiable", **pairs), "even": methods.block("constant_critic", **pairs, **flat),
        "discounted": methods.block("constant_critic", **pairs, **flat | {"gamma": 0.99}),
        "paid": methods.block("constant_critic", **pairs, **flat | {"terminal_credit": True}),
        "one_net": methods.block("verifiable_shared", beta=0.3), "one_net_of_all": methods.block("verifiable_shared", **pairs),
        "one_net_by_value": methods.block("verifiable_shared", value_coef=0.1), "short": methods.block("verifiable", n_future=2),
        "short_uniform": methods.block("baseline", n_future=2),
    }  # fmt: skip
    whole = validate(with_arms("baseline", "rho1", "on_pairs", "even", "one_net", "uniform_shared", **blocks))
    found = controls({arm: whole.methods[arm] for arm in whole.study.arms})
    assert found == {
        "baseline": None, "rho1": "baseline", "on_pairs": "even", "even": None, "one_net": "uniform_shared", "uniform_shared": None
    }  # fmt: skip
    heads = validate(with_arms("baseline", "ntp", "short", "short_uniform", "verifiable", **blocks))
    assert controls({arm: heads.methods[arm] for arm in heads.study.arms}) == {
        "baseline": None, "ntp": "baseline", "short": "short_uniform", "short_uniform": "baseline", "verifiable": "baseline"
    }  # fmt: skip
    for arms, told in (
        (("baseline", "on_pairs"), r"on_pairs reads pairs \(n_future 4\), .* expected a block with weighting constant_critic"),
        (("baseline", "on_pairs", "discounted"), r"on_pairs reads pairs .* gamma 1\.0 and no terminal_credit"),
        (("baseline", "on_pairs", "paid"), r"on_pairs reads pairs .* gamma 1\.0 and no terminal_credit"),
        (
            ("baseline", "verifiable_shared", "even"),
            "verifiable_shared reads pairs with a shared critic .* as uniform_shared, equal in these; add it",
        ),
        (("baseline", "short"), r"short reads correct programs \(n_future 2\), and no arm beside it does so with uniform weights"),
        (("baseline", "one_net_of_all", "uniform_shared"), "one_net_of_all reads .* policy_on_incorrect weighted"),
        (("baseline", "one_net_by_value", "uniform_shared"), r"one_net_by_value reads .* value_coef 0\.1"),
        (("baseline", "even"), "study.arms: baseline, even: each is"),
    ):
        found = validate(with_arms(*arms, **blocks))
        with pytest.raises(ValueError, match=told):
            controls({arm: found.methods[arm] for arm in found.study.arms})


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ParameterError, match="no such file; run from the root"):
        load(tmp_path)
    (tmp_path / "params.yaml").write_text("a: [1, 2\nb: 3")
    with pytest.raises(ParameterError, match="not valid YAML") as caught:
        read_yaml(tmp_path / "params.yaml")
    assert "\n" not in str(caught.value)
    (tmp_path / "params.yaml").write_text("- 1\n")
    with pytest.raises(ParameterError, match="expected a mapping of sections, found list"):
        read_yaml(tmp_path / "params.yaml")


def test_numbers_as_dvc_writes_them_and_as_yaml_reads_them_not(tmp_path):
    text = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("beta: 0.9 ", "beta: 1e-05 "))
    assert load(tmp_path).training.beta == 1e-5
    for written, better in (("1e-5", "1.0e-5"), ("1e4", "1.0e+4"), ("2E+03", "2.0e+3")):
        (tmp_path / "params.yaml").write_text(text.replace("beta: 0.9 ", f"beta: {written} "))
        said = rf"training\.beta: YAML reads {re.escape(written)} as text, expected a number; write {re.escape(better)}$"
        with pytest.raises(ParameterError, match=said):
            load(tmp_path)
        assert parse_yaml(better) == float(written), "the advice must be read as a number"


def test_declared_keys_fill_in_the_cell_of_a_matrix():
    stage = {"matrix": {"arm": ["a", "b_c"], "seed": [1, 2]}, "params": ["m.${item.arm}", "s.${item.seed}"]}
    assert declared_keys("train@b_c-2", {"stages": {"train": stage}}) == ["m.b_c", "s.2"]
    stage["matrix"]["arm"] = "${study.arms}"
    assert declared_keys("train@b_c-2", {"stages": {"train": stage}}, {"study": {"arms": ["b_c"]}}) == ["m.b_c", "s.2"]


def test_a_cell_that_the_matrix_lacks_is_an_error():
    stage = {"matrix": {"arm": ["a"], "seed": [1]}, "params": []}
    with pytest.raises(ParameterError, match="no cell 'a-2'"):
        declared_keys("train@a-2", {"stages": {"train": stage}})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seeds", [1, 1, 2]),
        ("seeds", [1]),
        ("arms", ["rho1", "ntp"]),
        ("arms", ["baseline", "baseline"]),
        ("arms", ["baseline", "dpo"]),
    ],
)
def test_a_study_that_could_not_be_compared_is_refused(key, value):
    values = copy.deepcopy(COMMITTED)
    values["study"][key] = value
    with pytest.raises(ParameterError, match=r"expected 2 at least|expected baseline|none of methods"):
        validate(values)


@pytest.fixture
def pipeline_folder(tmp_path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "dvc.yaml").write_text("stages:\n  fit: {cmd: x, params: [training.beta]}\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "more/dvc.yaml").write_text("stages:\n  fit: {cmd: x, params: [training.log_every]}\n")
    return tmp_path


def test_a_setting_in_the_command_replaces_and_declares_its_key(pipeline_folder, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "fit")
    rest, settings = split_arguments(["a=b", "models/x", "training.seed=7", "training.learning_rate=1.0e-3", "data.max_problems=null"])
    assert rest == ["a=b", "models/x"]
    view = load(pipeline_folder, settings)
    assert (view.training.seed, view.training.learning_rate, view.data.max_problems) == (7, 0.001, None)
    assert view.declared()["training.seed"] == 7
    with pytest.raises(ParameterError, match="does not declare"):
        _ = view.training.n_epochs


@pytest.mark.parametrize("key", ["training.sed", "trainin.seed", "seed.seed"])
def test_a_setting_of_an_unknown_key_is_an_error(pipeline_folder, key):
    with pytest.raises(ParameterError, match=f"{key}=1: no such key"):
        load(pipeline_folder, {key: 1})


def test_a_bad_value_of_a_setting_is_one_line(pipeline_folder):
    with pytest.raises(ParameterError, match=r"training\.seed: Input should be greater than or equal to 0, found -1"):
        load(pipeline_folder, {"training.seed": -1})


def test_a_stage_of_another_pipeline_file_declares_there(pipeline_folder, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "more/dvc.yaml:fit")
    assert load(pipeline_folder).training.log_every > 0
    with pytest.raises(ParameterError, match="does not declare"):
        _ = load(pipeline_folder).training.beta


def test_declared_keys_fill_in_the_instance():
    pipeline = {"stages": {"train": {"foreach": {"a": {"beta": "t.beta"}}, "do": {"params": ["m.${key}", "${item.beta}", "seed"]}}}}
    assert declared_keys("train@a", pipeline) == ["m.a", "t.beta", "seed"]
    with pytest.raises(ParameterError, match="no stage tune"):
        declared_keys("tune", pipeline)


def test_the_view_follows_the_running_stage(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DVC_STAGE", "compare")
    view = load()
    assert view.report.method == COMMITTED["report"]["method"] and view.log_level == COMMITTED["log_level"]
    with pytest.raises(ParameterError, match="stage compare reads seed"):
        _ = view.seed


def fields(section: type[Section]) -> list[tuple[str, Any]]:
    return list(section.model_fields.items())


def test_every_field_has_a_description_but_words_that_choose_and_sections():
    plain = {"kind", "weighting", "selection", "loss", "gate", "start"}
    sections, waiting = [], [section for section in Section.__subclasses__() if section is not Params]
    while waiting:
        sections.append(waiting.pop())
        waiting += sections[-1].__subclasses__()
    bare = [f"{section.__name__}.{name}" for section in sections for name, field in fields(section) if not field.description]
    assert not [name for name in bare if name.split(".")[1] not in plain]


@pytest.mark.parametrize("text", [(ROOT / "params.yaml").read_text(), (ROOT / "dvc.yaml").read_text(), "a: 1e-05\nb: 1e-5\nc: -2.0e-3"])
def test_yaml_is_read_alike_with_and_without_libyaml(text):
    """Its parser in C is not everywhere."""
    assert parse_yaml(text) == yaml.load(text, loader(yaml.SafeLoader))
