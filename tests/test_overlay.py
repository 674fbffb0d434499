import copy
import os
import string
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from wmtp import overlay
from wmtp.overlay import Change, OverlayError

ROOT = Path(__file__).parents[1]

PARAMS = """\
# every number once
seed: 17                 # drives everything

source:
  kind: synthetic        # synthetic | local
  dim: 192               # width
  shared: 1
  limit: null
  folders: {a: x, b: y}
methods:
  rho1:
    weighting: excess
    keep: 0.6
    mix: 1.0
optimizer:
  betas: [0.9, 0.95]     # AdamW
  eps: 1.0e-8
  layers: null
  lora: null
  block: {rank: 1}
  device: auto
tags: {}
"""

PRESET = r"""
seed: 3
source:
  kind: local
  path: /data/it's "here"\
  shared: 2
  folders: {a: z, c: null}
  more: {deep: [1, {x: "true", y: [a, 1.5]}], none: null}
methods: {rho1: {weighting: uniform, mix: 0.5}, rho2: {weighting: excess, keep: 0.3, none: null}}
optimizer:
  betas: [0.9, 0.999]
  eps: 1e-5
  layers: [0, 2, 5]
  lora: {rank: 64, dropout: 0.05, targets: [wq, wk], empty: {}, nothing: []}
  block: null
  device: "no"
tags: {team: "a=b,c:[d]{e}*?$x;|&<>#~`!", text: "1.0", "null-like": "null", empty: ""}
"""
UNFIT_FOR_FLAGS = ' "here"'


@pytest.fixture
def place(tmp_path):
    """A folder with params.yaml and the preset; the second is free of the white space that flags cannot carry."""
    (tmp_path / "params.yaml").write_text(PARAMS)
    (tmp_path / "preset.yaml").write_text(PRESET.replace(UNFIT_FOR_FLAGS, '"here"'))
    return tmp_path


def call(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "wmtp.overlay", *arguments], cwd=place, env=environment, capture_output=True, text=True)


def expected() -> dict:
    """The merged parameters written out by hand."""
    values = yaml.safe_load(PRESET.replace(UNFIT_FOR_FLAGS, '"here"'))
    optimizer = values["optimizer"] | {"eps": 0.00001}
    return {
        "seed": 3,
        "source": values["source"],  # another kind: replaced whole
        "methods": {"rho1": {"weighting": "uniform", "mix": 0.5}, "rho2": {"weighting": "excess", "keep": 0.3, "none": None}},
        "optimizer": optimizer,
        "tags": values["tags"],
    }


def test_merging_changes_what_the_preset_names_and_nothing_else(place):
    params, preset = overlay.read(place / "params.yaml"), overlay.read(place / "preset.yaml")
    before = copy.deepcopy((params, preset))
    merged = overlay.merged(params, preset)
    assert merged == expected()
    merged["source"]["folders"]["a"] = "changed"
    merged["optimizer"]["betas"].append(1)
    assert (params, preset) == before
    assert overlay.merged(params, {"optimizer": {"eps": 1.0}}) == params | {"optimizer": params["optimizer"] | {"eps": 1.0}}
    assert overlay.merged(params, {}) == params


@pytest.mark.parametrize(
    "preset, key",
    [
        ({"sed": 1}, "sed"),
        ({"optimizer": {"beta": 1}}, "optimizer.beta"),
        ({"methods": {"rho2": {"mix": 0.5}}}, "methods.rho2"),
        ({"methods": {"rho1": {"block": {"weighting": "uniform"}}}}, "methods.rho1.block"),
        ({"source": {"rho2": {"weighting": "uniform"}}}, "source.rho2"),
        ({"source": {"path": "x"}}, "source.path"),
        ({"source": {"kind": "synthetic", "path": "x"}}, "source.path"),
        ({"optimizer": {"block": {"size": 1}}}, "optimizer.block.size"),
    ],
)
def test_a_key_that_params_lacks_is_named(preset, key):
    params = yaml.safe_load(PARAMS)
    with pytest.raises(OverlayError, match=rf"^{key}: no such key in params.yaml"):
        overlay.merged(params, preset)


def test_methods_take_a_further_block_that_tells_its_weighting():
    params, block = yaml.safe_load(PARAMS), {"weighting": "excess", "keep": 0.3, "folders": None}
    merged = overlay.merged(params, {"methods": {"rho2": block}})
    assert merged == {**params, "methods": {**params["methods"], "rho2": block}}
    (change,) = overlay.changes(params, {"methods": {"rho2": block}})
    assert overlay.flags([change]) == "-S +methods.rho2={weighting:'excess',keep:0.3,folders:null}"


def test_a_block_of_the_same_kind_is_merged_and_one_of_another_is_replaced():
    old = {"block": {"kind": "a", "x": 1, "y": None}}
    assert overlay.merged(old, {"block": {"kind": "a", "x": 2}}) == {"block": {"kind": "a", "x": 2, "y": None}}
    assert overlay.merged(old, {"block": {"kind": "b", "z": 3}}) == {"block": {"kind": "b", "z": 3}}
    assert list(overlay.changes(old, {"block": {"kind": "b", "x": 5, "z": 3}})) == [
        Change("", ("block", "y"), 0),
        Change("~", ("block", "y")),
        Change("", ("block", "kind"), "b"),
        Change("", ("block", "x"), 5),
        Change("+", ("block", "z"), 3),
    ]


# Values that a preset may hold and a flag can carry.
plain_text = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Z"))).filter(lambda text: "${" not in text)
awkward_text = st.text("'\"\\,:=[]{}()$~*?+-@/.e10a").filter(lambda text: "${" not in text)
words = st.sampled_from(["true", "False", "null", "NULL", "inf", "nan", "1", "-1.5", "1e5", "1_0", "yes", "a b"]).filter(
    lambda t: " " not in t
)
keys = st.text(string.ascii_letters + "_", min_size=1, max_size=6).filter(lambda key: key.lower() not in overlay.RESERVED)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | plain_text | awkward_text | words
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=6)


def same(one, other) -> bool:
    """Equal in value and type; 1, 1.0 and true are three things."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@given(values)
def test_dvcs_parser_reads_back_what_was_written(value):
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import QuotedString

    def bare(read):
        if isinstance(read, QuotedString):
            return read.text
        if isinstance(read, dict):
            return {key: bare(item) for key, item in read.items()}
        return [bare(item) for item in read] if isinstance(read, list) else read

    written = overlay.text(value, "x")
    assert not any(character.isspace() for character in written)
    (override,) = OverridesParser.create().parse_overrides([f"x={written}"])
    assert not override.is_sweep_override()
    assert same(bare(override._value), value), written


@pytest.mark.parametrize(
    "value, reason",
    [
        ("two words", "white space"),
        ("line\nbreak", "white space"),
        ("${seed}", "reference"),
        ({"a b": 1}, "cannot be a key"),
        ({1: 1}, "cannot be a key"),
        ({"null": 1}, "cannot be a key"),
        (b"x", "bytes cannot be a flag"),
    ],
)
def test_what_flags_cannot_carry_is_refused_by_name(value, reason):
    with pytest.raises(OverlayError, match=rf"^a\.b: .*{reason}"):
        overlay.flags([Change("", ("a", "b"), value)])


def test_one_line_that_the_shell_splits_at_the_right_places(place):
    done = call(place, "preset.yaml")
    assert done.returncode == 0 and done.stdout.count("\n") == 1
    split = subprocess.run(
        ["bash", "-c", f'printf "%s\\n" $({sys.executable} -m wmtp.overlay preset.yaml)'],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    pieces = split.stdout.splitlines()
    assert pieces[::2] == ["-S"] * (len(pieces) // 2)
    listed = overlay.changes(overlay.read(place / "params.yaml"), overlay.read(place / "preset.yaml"))
    assert [piece.partition("=")[0] for piece in pieces[1::2]] == [change.sign + ".".join(change.path) for change in listed]


@pytest.mark.slow
@pytest.mark.parametrize("where", [[], ["--temp"]])
def test_dvc_makes_of_the_flags_what_merging_makes(place, where):
    (place / "dvc.yaml").write_text(
        "stages: {keep: {cmd: cp params.yaml kept.yaml,"
        " params: [seed, source, methods, optimizer, tags], outs: [kept.yaml: {cache: false}]}}"
    )
    script = f"""
        git init -q . && git config user.email a@b.c && git config user.name n && dvc init -q && dvc config core.analytics false
        git add -A && git commit -qm start
        dvc exp run -q -n tried {" ".join(where)} $({sys.executable} -m wmtp.overlay preset.yaml) && dvc exp apply -q tried
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DVC")}
    environment |= {"PYTHONPATH": str(ROOT), "PATH": path, "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(["bash", "-ec", script], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert same(overlay.read(place / "kept.yaml"), expected())


def test_writing_keeps_comments_and_order_and_what_is_written_is_read_alike_by_every_reader(place):
    assert call(place, "preset.yaml", "--write", "params.yaml").returncode == 0
    written = (place / "params.yaml").read_text()
    assert same(yaml.safe_load(written), expected()) and same(overlay.read(place / "params.yaml"), expected())
    for comment in ("# every number once", "# drives everything", "# synthetic | local", "# AdamW"):
        assert comment in written
    assert "betas: [0.9, 0.999]" in written and "layers: [0, 2, 5]" in written
    kept = [line for line in PARAMS.splitlines() if line.split(":")[0] in ("seed", "source", "methods", "optimizer", "tags")]
    order = [line.split(":")[0] for line in written.splitlines() if line and not line.startswith((" ", "#"))]
    assert order == [line.split(":")[0] for line in kept]


def test_writing_nothing_new_leaves_the_file_as_it_was(place):
    (place / "preset.yaml").write_text("seed: 17\n")
    assert call(place, "preset.yaml", "--write", "params.yaml").returncode == 0
    assert (place / "params.yaml").read_text() == PARAMS


def test_white_space_can_be_written_though_it_cannot_be_a_flag(place):
    (place / "preset.yaml").write_text("optimizer: {device: two words}\n")
    assert call(place, "preset.yaml").returncode == 1
    assert call(place, "preset.yaml", "--write", "params.yaml").returncode == 0
    assert overlay.read(place / "params.yaml")["optimizer"]["device"] == "two words"


@pytest.mark.parametrize(
    "preset, message",
    [
        ("seed: 3\nsource: {dimm: 3}\n", "preset.yaml: source.dimm: no such key in params.yaml; correct it, or add it there first"),
        ("- 1\n", "preset.yaml: expected a mapping of sections, found list"),
        ("", "preset.yaml: expected a mapping of sections, found NoneType"),
        (None, "preset.yaml: no such file; run from the root of the repository"),
    ],
)
@pytest.mark.parametrize("option", [[], ["--write", "params.yaml"]])
def test_a_wrong_preset_is_one_line_and_nothing_is_written(place, preset, message, option):
    if preset is None:
        (place / "preset.yaml").unlink()
    else:
        (place / "preset.yaml").write_text(preset)
    done = call(place, "preset.yaml", *option)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message + "\n")
    assert (place / "params.yaml").read_text() == PARAMS
    assert sorted(path.name for path in place.iterdir()) == ["params.yaml"] + ["preset.yaml"] * (preset is not None)


def test_broken_yaml_is_one_line(place):
    (place / "preset.yaml").write_text("a: [1\n")
    done = call(place, "preset.yaml")
    assert done.returncode == 1 and done.stderr.startswith("preset.yaml: not valid YAML: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("preset", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_presets_of_the_repository_fit_its_parameters(preset):
    params = overlay.read(ROOT / "params.yaml")
    assert overlay.flags(list(overlay.changes(params, overlay.read(preset))))
