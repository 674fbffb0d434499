"""The house's own rules: floors and wings, stage length, dependencies and parameters as declared, one table of methods."""

import ast
import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.house import PIPELINES, code_dependencies, filled, method_files, weighting_dependencies
from wmtp.dependencies import EXEMPT, ROOT, imports
from wmtp.method_schema import SHARED_ARMS
from wmtp.params import OPERATIONAL, ParameterError, Params, validate
from wmtp.schema import Section
from wmtp.view import View, declared_keys, split_arguments
from wmtp.weighting import METHODS, method_of

# Rooms by wing, a list a floor, lowest first. An import goes to a strictly lower floor, and never from one wing into the other.
BOTH = [
    "records blocks faults schema progress gate dependencies",
    "arms method_schema",
    "params protocols overlay launch runstore splits",
    "view benchmarks tracking",
]
TRAINING = [
    "align advantage atomic cache world optim noise pickled flops",
    "weighting bundle scratch",
    "model convert slicing sources provenance tokenizer_json cells",
    "tokens generate export growth checkpoint",
    "batches scores sampling lora",
    "policy critic preference measure drift plan",
    "scoring anchor shared outcome",
    "pretrain train",
    "examples",
]
JUDGING = [
    "grammar codec confine checkers disagreements",
    "layouts cases passk agreement namespaces seccomp landlock runtime pages",
    "problems synthetic zygote compare report",
    "raw_data sandbox study critic_report page",
    "session hub_data study_report",
    "referee experiments",
    "judge",
    "verdicts references",
]
PLACE = {room: (wing, floor) for wing, floors in (("both", BOTH), ("training", TRAINING), ("judging", JUDGING))
         for floor, rooms in enumerate(floors) for room in rooms.split()}  # fmt: skip
STAGES = sorted((ROOT / "stages").glob("[a-z]*.py"))
PIPELINE, STUDY = (yaml.safe_load((ROOT / name).read_text()) for name in PIPELINES)
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
PARAMS["study"]["arms"] += SHARED_ARMS  # as a user adds them


def room(path: Path) -> str:
    return path.relative_to(ROOT / "wmtp").parts[0].removesuffix(".py")


def instances() -> dict[str, tuple[str, dict]]:
    """Every stage instance by its DVC name, of a study's seeds the first: (module of its command, its body)."""
    found = {}
    for prefix, pipeline in (("", PIPELINE), ("study/dvc.yaml:", STUDY)):
        for name, entry in pipeline["stages"].items():
            body = entry.get("do", entry)
            module = re.search(r"(?:-m|--) stages\.(\w+)", body["cmd"])[1]
            arms = [f"{arm}-{PARAMS['study']['seeds'][0]}" for arm in PARAMS["study"]["arms"]]
            for key in arms if "matrix" in entry else entry.get("foreach", {"": None}):
                found[f"{prefix}{name}@{key}" if key else f"{prefix}{name}"] = (module, body)
    return found


def keys_of(name: str) -> list[str]:
    """What the stage declares, and what its command sets."""
    prefix, _, stage = name.rpartition(":")
    _, settings = split_arguments(instances()[name][1]["cmd"].split())
    return [*declared_keys(stage, STUDY if prefix else PIPELINE, PARAMS), *settings]


def test_every_room_has_a_place_and_a_sentence():
    rooms = {room(path) for path in (ROOT / "wmtp").rglob("*.py")} - {"__init__"}
    assert rooms == set(PLACE)
    page = (ROOT / "docs/architecture.md").read_text()
    assert not [name for name in rooms if f"`{name}`" not in page and f"`{name}/`" not in page]


@pytest.mark.parametrize("path", sorted((ROOT / "wmtp").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_and_stay_in_their_wing(path):
    if path == ROOT / "wmtp/__init__.py":
        return
    wing, floor = PLACE[room(path)]
    for target in imports(path):
        if room(target) == room(path):
            continue
        other_wing, other_floor = PLACE[room(target)]
        assert other_wing in (wing, "both"), f"{room(path)} ({wing}) imports {room(target)} ({other_wing})"
        assert other_floor < floor or (other_wing == "both" and wing != "both"), (
            f"{room(path)} imports {room(target)} on its own floor or above"
        )


def test_the_judging_wing_works_where_torch_is_absent():
    rooms = [name for name, (wing, _) in PLACE.items() if wing in ("judging", "both")]
    code = "import sys; sys.modules['torch'] = None\n" + "\n".join(f"import wmtp.{name}" for name in rooms)
    stage = "\nimport stages.evaluate_humaneval_mbpp, stages.compare, stages.fetch_data"
    subprocess.run([sys.executable, "-c", code + stage], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_a_stage_reads_calls_and_writes_on_one_screen(path):
    assert len(path.read_text().splitlines()) < 60
    assert path.stem in {module for module, _ in instances().values()}


@pytest.mark.parametrize("name", instances())
def test_code_dependencies_are_what_the_stage_imports(name):
    module, body = instances()[name]
    if f"study/code/{module}.json" in body["deps"]:
        assert module in STUDY["stages"]["code"]["cmd"].split() and {"stages", "wmtp"} < set(STUDY["stages"]["code"]["deps"])
        return
    declared = [dependency for dependency in body["deps"] if dependency.endswith(".py") and "${" not in dependency]
    assert sorted(set(declared) - method_files()) == code_dependencies(module)
    assert not any(room(ROOT / dependency) in EXEMPT for dependency in declared if dependency.startswith("wmtp/"))


def test_a_method_depends_on_its_own_weighting_alone():
    train = PIPELINE["stages"]["train"]
    for name, item in train["foreach"].items():
        assert item["weighting"] == METHODS[name].weighting == PARAMS["methods"][name]["weighting"]
        scores = {
            "critic": "data/scores/critic.safetensors",
            "reference": "data/scores/reference.safetensors",
            None: "data/processed/policy",
        }
        assert item["signal"] == scores[METHODS[name].signal]
        declared, behind = filled(train["do"]["deps"], item), set(weighting_dependencies(item["weighting"]))
        assert behind <= declared, f"train@{name} lacks {behind - declared} in its `code`"
        assert declared & method_files() <= behind, f"train@{name} lists another method's {declared & method_files() - behind}"
    for stage in ("warm-up", "tune-reference"):
        assert set(weighting_dependencies(METHODS["baseline"].weighting)) <= set(PIPELINE["stages"][stage]["deps"])


def test_the_files_behind_a_weighting_are_found_through_what_it_imports():
    for method in METHODS.values():
        assert set(method.source_files()) == set(weighting_dependencies(method.weighting))
        assert all(path == ROOT / name for name, path in method.source_files().items())
    assert "wmtp" in STUDY["stages"]["arms"]["deps"], "any changed file must describe the arms anew"
    assert weighting_dependencies("uniform") == ["wmtp/weighting/uniform.py"]
    assert weighting_dependencies("shuffled")[0] == "wmtp/weighting/shuffled.py"
    assert {"wmtp/weighting/advantage.py", "wmtp/advantage.py", "wmtp/noise.py"} < set(weighting_dependencies("shuffled"))
    assert filled(["${item.a}", "${item.b[1]}", "c"], {"a": "x", "b": ["y", "z"]}) == {"x", "z", "c"}


# Rows that no experiment as committed trains.
WITHOUT_BLOCK = {
    "inverted_k", "dft", "focal", "entropy_topk", "loss_topk", "crr_binary", "head_decay", "adamtp_mask",
}  # fmt: skip


def test_one_table_of_methods():
    trained = PIPELINE["stages"]["train"]["foreach"]
    assert {*trained, *PARAMS["study"]["arms"]} == set(PARAMS["methods"])
    for name, block in validate(copy.deepcopy(PARAMS)).methods.items():
        assert method_of(name, block).weighting == block.weighting
    assert set(METHODS) - set(PARAMS["methods"]) == WITHOUT_BLOCK
    evaluated = ["start", *trained]
    assert list(PIPELINE["stages"]["sample"]["foreach"]) == list(PIPELINE["stages"]["measure-heads"]["foreach"]) == evaluated
    assert PIPELINE["stages"]["evaluate-humaneval-mbpp"]["foreach"] == evaluated
    compared = set(PIPELINE["stages"]["compare"]["deps"])
    assert {f"metrics/{name}/eval.json" for name in evaluated} | {f"metrics/{name}/train.json" for name in trained} <= compared


def keys_read(module: str) -> set[str]:
    """Dotted parameter keys that a stage's source reads from `params`, names bound to a section of it included."""
    tree = ast.parse((ROOT / "stages" / f"{module}.py").read_text())
    aliases = {"params": ""}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else [node.targets[0]]
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            for target, value in zip(targets, values):
                if isinstance(target, ast.Name) and (key := dotted(value, aliases)):
                    aliases[target.id] = key
    return {key for node in ast.walk(tree) if isinstance(node, ast.Attribute) and (key := dotted(node, aliases))}


def dotted(node: ast.AST, aliases: dict[str, str]) -> str:
    parts = []
    while isinstance(node, ast.Attribute | ast.Subscript):
        if isinstance(node, ast.Attribute):
            parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in aliases:
        return ""
    return ".".join(part for part in [aliases[node.id], *reversed(parts)] if part)


@pytest.mark.parametrize("name", instances())
def test_declared_parameters_exist_and_belong(name):
    for key in keys_of(name):
        value = PARAMS
        for part in key.split("."):
            assert part in value, f"{name} declares {key}, which params.yaml does not have"
            value = value[part]


@pytest.mark.parametrize("name", instances())
def test_what_a_stage_reads_it_declares(name):
    module, _ = instances()[name]
    whole = validate(copy.deepcopy(PARAMS))
    view = View(whole, keys_of(name) + OPERATIONAL, name)
    lazily = ("critic.gate.train_anyway", "training.beta")  # asked for only by the methods that have them
    for key in keys_read(module):
        if module in ("train", "show_weights") and any(f"{lazy}.".startswith(f"{key}.") for lazy in lazily):
            continue
        if key.startswith("methods"):
            continue  # which block is an argument of the stage; test_reading_an_undeclared_key_is_an_error covers it
        value = view
        for part in key.split("."):
            value = getattr(value, part)
            if not isinstance(value, View):
                break  # declared, with all that lies in it


def test_reading_an_undeclared_key_is_an_error():
    view = View(validate(copy.deepcopy(PARAMS)), declared_keys("train@ntp", PIPELINE), "train@ntp")
    assert view.methods["ntp"].n_future == 1
    with pytest.raises(ParameterError, match=r"train@ntp reads training\.beta, which dvc\.yaml does not declare"):
        _ = view.training.beta
    with pytest.raises(ParameterError, match=r"methods\.rho1"):
        _ = view.methods["rho1"]


def leaves(section: dict, path: str = "") -> list[str]:
    found = []
    for key, value in section.items():
        found += leaves(value, f"{path}{key}.") if isinstance(value, dict) and value else [f"{path}{key}"]
    return found


def test_no_dead_parameter():
    """Every leaf of params.yaml is declared by a stage, used in a command or path of dvc.yaml, or operational."""
    text = "".join((ROOT / name).read_text() for name in PIPELINES)
    used = {key for name in instances() for key in keys_of(name)} | set(re.findall(r"\$\{([\w.]+)\}", text))
    for leaf in leaves(PARAMS):
        prefixes = [leaf.rsplit(".", n)[0] for n in range(leaf.count(".") + 1)]
        assert any(prefix in used or prefix in OPERATIONAL for prefix in prefixes), f"{leaf} changes nothing"


def names_used(path: Path) -> set[str]:
    """Attributes read, parameters of functions, which take a section spread over them, and words in quotes, which index one."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    words = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return words | {node.attr for node in nodes if isinstance(node, ast.Attribute)} | {one.arg for one in nodes if isinstance(one, ast.arg)}


def test_every_key_of_the_schema_is_read_somewhere():
    """A section may be declared whole; so each of its keys must be named by code outside the schema, or by a pipeline."""
    code = [
        path
        for folder in ("wmtp", "stages")
        for path in (ROOT / folder).rglob("*.py")
        if path.stem not in ("params", "schema", "method_schema")
    ]
    used = set().union(*map(names_used, code)) | set(re.findall(r"\w+", "".join((ROOT / name).read_text() for name in PIPELINES)))
    fields, waiting = set(), [Section]
    while waiting:
        waiting += (section := waiting.pop()).__subclasses__()
        fields |= {(section.__name__, name) for name in section.model_fields}
    assert not {(section, name) for section, name in fields if name not in used}


def test_every_field_of_the_schema_is_in_the_file():
    assert set(Params.model_fields) == set(PARAMS)


def test_no_machine_path_in_the_tree():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    pattern = re.compile(r"(?<![\w.])/(?:root|work|home/\w+)/")
    assert not [name for name in files if (ROOT / name).is_file() and pattern.search((ROOT / name).read_text(errors="replace"))]
