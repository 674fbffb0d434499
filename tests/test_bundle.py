import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp import bundle
from wmtp.atomic import AtomicError
from wmtp.bundle import BundleError, ModelArgs, bundle_sha256, read_args, read_metadata, read_tensors, tensor_shapes, verify, write_bundle

ROOT = Path(__file__).parents[1]
SMALL = ModelArgs(
    dim=32,
    n_layers=5,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=50,
    multiple_of=8,
    ffn_dim_multiplier=None,
    norm_eps=1e-5,
    rope_theta=10000.0,
    n_future_tokens=3,
)
META_7B = replace(
    SMALL, dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, vocab_size=32000, multiple_of=256, ffn_dim_multiplier=1.0, n_future_tokens=4
)


def random_tensors(args=SMALL, dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in tensor_shapes(args).items()}


def write(out, tensors=None, args=SMALL, **changes):
    settings = {"source": "test", "dropped": ["rope.freqs"], "extra": {}} | changes
    write_bundle(out, args, random_tensors(args) if tensors is None else tensors, b"pieces", **settings)
    return out


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def rehash(folder):
    """Makes the manifest agree with changed files, so that a later check has to find the fault."""
    metadata = read_metadata(folder)
    metadata["sha256"] = bundle.hash_files(folder, list(metadata["sha256"]))
    (folder / "metadata.json").write_text(json.dumps(metadata))


# ModelArgs


@pytest.mark.parametrize(
    ("dim", "multiplier", "multiple_of", "expected"),
    [
        (4096, None, 256, 11008),
        (4096, 1.0, 256, 11008),
        (5120, None, 256, 13824),
        (6656, None, 256, 17920),
        (8192, None, 256, 22016),
        (8192, 1.3, 4096, 28672),
        (512, 1.0, 256, 1536),
        (128, 1.0, 32, 352),
    ],
)
def test_hidden_dim_is_llamas(dim, multiplier, multiple_of, expected):
    args = replace(META_7B, dim=dim, ffn_dim_multiplier=multiplier, multiple_of=multiple_of)
    assert args.hidden_dim == expected
    assert replace(args, ffn_hidden_dim=77).hidden_dim == 77


def test_7b_1t_4_has_the_published_size():
    shapes = tensor_shapes(META_7B)
    assert META_7B.n_trunk == 29
    assert sum(map(math.prod, shapes.values())) == 6_738_415_616  # Llama 7B
    assert sum(map(math.prod, tensor_shapes(META_7B.with_heads(1)).values())) == 6_738_415_616 - 3 * 202_383_360
    assert len(shapes) == 3 + 32 * 9
    assert shapes["layers.28.attention.wo.weight"] == (4096, 4096) and "layers.29.attention.wo.weight" not in shapes
    assert shapes["extra_heads.2.feed_forward.w2.weight"] == (4096, 11008) and "extra_heads.3.ffn_norm.weight" not in shapes
    assert next(iter(shapes)) == "tok_embeddings.weight" and list(shapes)[-2:] == ["norm.weight", "output.weight"]


def test_grouped_queries_narrow_keys_and_values():
    shapes = tensor_shapes(SMALL)
    assert shapes["layers.0.attention.wk.weight"] == shapes["layers.0.attention.wv.weight"] == (16, 32)
    assert shapes["layers.0.attention.wq.weight"] == shapes["layers.0.attention.wo.weight"] == (32, 32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dim": 30}, "dim 30"),
        ({"dim": 12}, "even head width"),
        ({"n_kv_heads": 3}, "multiple of n_kv_heads 3"),
        ({"n_layers": 2}, "n_layers 2: expected n_future_tokens 3"),
        ({"vocab_size": 0}, "vocab_size: expected a positive integer, found 0"),
        ({"n_future_tokens": -1}, "n_future_tokens"),
        ({"dim": 32.0}, "dim: expected a positive integer, found 32.0"),
        ({"n_heads": True}, "n_heads: expected a positive integer, found True"),
        ({"norm_eps": None}, "norm_eps: expected a positive number, found None"),
        ({"rope_theta": math.inf}, "rope_theta"),
        ({"rope_theta": math.nan}, "rope_theta"),
        ({"norm_eps": "1e-5"}, "norm_eps"),
    ],
)
def test_impossible_settings_are_one_line(change, said):
    with pytest.raises(BundleError, match=said) as caught:
        replace(SMALL, **change)
    assert "\n" not in str(caught.value)


def test_heads_are_layers():
    for n_future in (1, 2, 3, 4):
        assert SMALL.with_heads(n_future).n_trunk == SMALL.n_trunk == 3
        assert SMALL.with_heads(n_future).n_layers == 2 + n_future
    assert SMALL.with_heads(3) == SMALL
    with pytest.raises(BundleError, match="at least 1"):
        SMALL.with_heads(0)


@settings(max_examples=50, deadline=None)
@given(
    heads=st.integers(1, 8),
    pairs=st.integers(1, 8),
    multiplier=st.none() | st.floats(0.1, 4),
    eps=st.floats(1e-12, 1),
    theta=st.floats(1, 1e7) | st.integers(1, 10**7),
    hidden=st.none() | st.integers(1, 999),
)
def test_params_json_is_exact(tmp_path_factory, heads, pairs, multiplier, eps, theta, hidden):
    args = ModelArgs(heads * pairs * 2, 3, heads, heads, 9, 4, multiplier, eps, theta, 2, hidden)
    file = tmp_path_factory.mktemp("params") / "params.json"
    file.write_text(args.to_json())
    assert ModelArgs.from_json(file) == args
    assert ModelArgs.from_json(file).to_json() == args.to_json()


@pytest.mark.parametrize("key", list(asdict(SMALL)))
def test_params_json_needs_every_key(tmp_path, key):
    file = tmp_path / "params.json"
    settings = json.loads(SMALL.to_json())
    del settings[key]
    file.write_text(json.dumps(settings))
    with pytest.raises(BundleError, match=f"params.json: missing key {key}"):
        ModelArgs.from_json(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1,', "not readable JSON"),
        ("[]", "expected a mapping, found list"),
        (json.dumps(asdict(SMALL) | {"use_scaled_rope": True}), "unknown key use_scaled_rope"),
        (json.dumps(asdict(SMALL) | {"dim": 30}), "params.json: params: dim 30"),
    ],
)
def test_bad_params_json(tmp_path, text, said):
    (tmp_path / "params.json").write_text(text)
    with pytest.raises(BundleError, match=said):
        read_args(tmp_path)


# writing and reading


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000, 1])
def test_round_trip_is_bit_for_bit(tmp_path, dtype, shard_bytes):
    tensors = random_tensors(dtype=dtype)
    tensors["norm.weight"][:3] = torch.tensor([math.nan, -0.0, math.inf])
    out = write(tmp_path / "model", tensors, shard_bytes=shard_bytes)
    verify(out)
    found = dict(read_tensors(out))
    assert list(found) == list(tensor_shapes(SMALL))
    assert all(found[name].dtype == dtype and torch.equal(bits(found[name]), bits(tensors[name])) for name in tensors)
    assert read_args(out) == SMALL
    assert (out / "tokenizer.model").read_bytes() == b"pieces"
    assert read_metadata(out)["dtype"] == str(dtype).removeprefix("torch.")
    assert yaml.safe_load((out / "meta_adapter.yaml").read_text()) == {
        "intermediate_size": SMALL.hidden_dim,
        "rope_theta": 10000.0,
        "dtype": read_metadata(out)["dtype"],
        "n_future_tokens": 3,
    }
    copy = tmp_path / "copy"
    write_bundle(
        copy, read_args(out), read_tensors(out), b"pieces", source="test", dropped=["rope.freqs"], extra={}, shard_bytes=shard_bytes
    )
    assert contents(copy) == contents(out)


def test_equal_inputs_give_equal_bytes(tmp_path):
    tensors = random_tensors()
    backwards = dict(reversed(tensors.items()))
    assert contents(write(tmp_path / "a", tensors)) == contents(write(tmp_path / "elsewhere" / "b", backwards))


def test_shards_stay_below_their_size_and_the_index_names_them(tmp_path):
    limit = 20_000
    out = write(tmp_path / "model", shard_bytes=limit)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 3
    assert [shard.name for shard in shards] == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    assert max(shard.stat().st_size for shard in shards) <= limit
    index = json.loads((out / bundle.INDEX).read_text())
    assert set(index["weight_map"]) == set(tensor_shapes(SMALL)) and set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in random_tensors().values())
    assert sorted(read_metadata(out)["sha256"]) == sorted(file.name for file in out.iterdir() if file.name != "metadata.json")


def test_headers_count_in_the_size_of_a_shard(tmp_path):
    for limit in range(8_000, 20_000, 1_000):
        out = write(tmp_path / "model", shard_bytes=limit)
        places = json.loads((out / bundle.INDEX).read_text())["weight_map"]
        for shard in out.glob("*.safetensors"):
            assert shard.stat().st_size <= limit or list(places.values()).count(shard.name) == 1


def test_the_7b_plan_covers_every_tensor_in_order_with_shards_of_a_gibibyte():
    shapes = tensor_shapes(META_7B)
    plan = bundle.plan_shards(shapes, "float16", 1 << 30)
    assert [name for group in plan.values() for name in group] == list(shapes)
    sizes = [sum(math.prod(shapes[name]) * 2 for name in group) for group in plan.values()]
    assert max(sizes) <= 1 << 30 and min(sizes[:-1]) > 1 << 29 and len(plan) == 14


def test_one_shard_is_held_at_a_time(tmp_path):
    alive, most = set(), 0

    def stream():
        nonlocal most
        for name, shape in tensor_shapes(SMALL).items():
            tensor = torch.zeros(shape, dtype=torch.float16)
            alive.add(name)
            weakref.finalize(tensor.untyped_storage(), alive.discard, name)
            most = max(most, len(alive))
            yield name, tensor

    write(tmp_path / "model", stream(), shard_bytes=20_000)
    largest = max(len(group) for group in bundle.plan_shards(tensor_shapes(SMALL), "float16", 20_000).values())
    assert most <= largest + 2 < len(tensor_shapes(SMALL)) // 2


def test_odd_layouts_are_written_right(tmp_path):
    """Tied, transposed and broadcast tensors get bytes of their own."""
    tensors = random_tensors()
    tensors["output.weight"] = tensors["tok_embeddings.weight"]
    tensors["layers.0.attention.wq.weight"] = tensors["layers.0.attention.wq.weight"].T
    tensors["norm.weight"] = torch.ones(1, dtype=torch.float16).expand(32)
    tensors["layers.1.attention.wq.weight"].requires_grad_(True)
    found = dict(read_tensors(write(tmp_path / "model", tensors)))
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_heads_are_left_out_by_name(tmp_path):
    out = write(tmp_path / "model", shard_bytes=20_000)
    for n_future in (1, 2, 3):
        assert [name for name, _ in read_tensors(out, n_future=n_future)] == list(tensor_shapes(SMALL.with_heads(n_future)))
    assert not any(name.startswith("extra_heads") for name, _ in read_tensors(out, n_future=1))
    with pytest.raises(BundleError, match="n_future_tokens: expected at least 4, found 3"):
        read_tensors(out, n_future=4)


def test_writing_into_a_read_tensor_leaves_the_file(tmp_path):
    out = write(tmp_path / "model")
    before = contents(out)
    for _, tensor in read_tensors(out):
        tensor.zero_()
    assert contents(out) == before
    assert dict(read_tensors(out))["output.weight"].any()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_reading_maps_the_file(tmp_path):
    """100 MB of weights are opened without taking memory of their own."""
    args = replace(SMALL, dim=256, vocab_size=100_000)

    def anonymous():
        return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")).split()[1])

    out = write(tmp_path / "model", ((name, torch.zeros(shape).half()) for name, shape in tensor_shapes(args).items()), args)
    before = anonymous()
    tensors = dict(read_tensors(out))
    assert sum(int(tensor.count_nonzero()) for tensor in tensors.values()) == 0
    assert sum(tensor.nbytes for tensor in tensors.values()) > 100e6
    assert anonymous() - before < 20_000  # kB


# strictness of writing


def without(name):
    return {key: tensor for key, tensor in random_tensors().items() if key != name}


def moved(name):
    pairs = list(random_tensors().items())
    return [pair for pair in pairs if pair[0] != name] + [pair for pair in pairs if pair[0] == name]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (without("layers.1.ffn_norm.weight"), "missing tensor layers.1.ffn_norm.weight"),
        (random_tensors() | {"rope.freqs": torch.ones(2)}, "unknown tensor rope.freqs"),
        (random_tensors() | {"norm.weight": torch.ones(31).half()}, r"norm.weight: expected float16 \(32,\), found float16 \(31,\)"),
        (random_tensors() | {"norm.weight": torch.ones(32)}, r"norm.weight: expected float16 \(32,\), found float32 \(32,\)"),
        (random_tensors(dtype=torch.float64), "tok_embeddings.weight: dtype: expected one of float16, bfloat16, float32, found float64"),
        (list(without("layers.0.ffn_norm.weight").items()), "expected layers.0.ffn_norm.weight, found layers.1.attention.wq.weight"),
        (moved("layers.0.ffn_norm.weight"), "expected layers.0.ffn_norm.weight, found layers.1.attention.wq.weight"),
        (list(without("output.weight").items()), "expected output.weight, found the end"),
        ([*random_tensors().items(), ("more", torch.ones(1))], "more: unknown or repeated tensor"),
        ([], "expected 48 tensors, found none"),
    ],
    ids=["missing", "unknown", "shape", "dtype", "all-double", "gap", "order", "short", "long", "empty"],
)
@pytest.mark.parametrize("shard_bytes", [1 << 30, 8_000])
def test_wrong_tensors_leave_nothing_and_the_old_bundle_stays(tmp_path, tensors, said, shard_bytes):
    old = write(tmp_path / "old")
    before = contents(old)
    with pytest.raises(BundleError, match=said) as caught:
        write(tmp_path / "new", tensors, shard_bytes=shard_bytes)
    assert "\n" not in str(caught.value)
    with pytest.raises(BundleError, match=said):
        write(old, tensors, shard_bytes=shard_bytes)
    assert contents(old) == before
    assert [file.name for file in tmp_path.iterdir()] == ["old"]


def test_an_error_in_the_stream_leaves_nothing(tmp_path):
    def stream():
        yield from list(random_tensors().items())[:20]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "model", stream(), shard_bytes=8_000)
    assert not list(tmp_path.iterdir())


def test_replacing_removes_every_file_of_the_old_bundle(tmp_path):
    out = write(tmp_path / "model", shard_bytes=8_000)
    fresh = write(tmp_path / "fresh", random_tensors(seed=1))
    write(out, random_tensors(seed=1))
    assert contents(out) == contents(fresh)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["fresh", "model"]


def test_other_peoples_data_is_not_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(AtomicError, match="home: holds other files"):
        write(tmp_path / "home")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "file").write_text("x")
    with pytest.raises(AtomicError, match="expected a directory, found a file"):
        write(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    verify(write(tmp_path / "empty"))


def test_too_little_disk_is_said_before_writing(tmp_path):
    args = replace(SMALL, vocab_size=10**14)
    with pytest.raises(AtomicError, match=r"needs 1280000\d\.\d+ GB of disk, .* GB are free"):
        write(tmp_path / "model", iter([("tok_embeddings.weight", torch.zeros(1).half())]), args)
    assert not list(tmp_path.iterdir())


# strictness of reading


@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000])
def test_one_changed_byte_in_any_file_is_found(tmp_path, shard_bytes):
    out = write(tmp_path / "model", shard_bytes=shard_bytes)
    for file in sorted(out.iterdir()):
        content = file.read_bytes()
        if file.name == "metadata.json":
            continue
        file.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        with pytest.raises(BundleError, match=f"{file.name}: SHA256: expected [0-9a-f]{{64}}, found [0-9a-f]{{64}}; make"):
            verify(out)
        file.write_bytes(content)
        verify(out)


def test_a_missing_file_is_named(tmp_path):
    out = write(tmp_path / "model", shard_bytes=20_000)
    for file in sorted(out.iterdir()):
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(BundleError, match=file.name):
            verify(out, hashes=False)
        file.write_bytes(content)
    with pytest.raises(BundleError, match=r"params.json: no such file; correct the path, or run the stage"):
        read_tensors(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_truncated_file_is_found_without_its_hash(tmp_path, keep):
    out = write(tmp_path / "model")
    content = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(content[:keep])
    with pytest.raises(BundleError, match=r"model.safetensors: not a whole safetensors file: .*; make the bundle again") as caught:
        read_tensors(out)
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_found(tmp_path):
    out = write(tmp_path / "model")
    (out / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(BundleError, match=r"model-00001-of-00002.safetensors: not in metadata.json"):
        verify(out)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_layers": 6}, r"missing tensor layers.3.attention.wk.weight and 8 more; expected 57 tensors, found 48"),
        ({"n_layers": 4}, r"unknown tensor layers.2"),
        ({"vocab_size": 51}, r"(tok_embeddings|output).weight: expected float16 \(51, 32\), found float16 \(50, 32\)"),
        ({"n_future_tokens": 2}, "n_future_tokens: expected 2 as in params.json"),
        ({"rope_theta": 1e6}, "meta_adapter.yaml: rope_theta: expected 1000000.0"),
        ({"multiple_of": 64}, "intermediate_size: expected 128"),
    ],
)
def test_settings_that_are_not_the_tensors(tmp_path, change, said):
    out = write(tmp_path / "model")
    (out / "params.json").write_text(replace(SMALL, **change).to_json())
    if "n_future" not in said and "adapter" not in said and "intermediate" not in said:
        (out / "meta_adapter.yaml").write_text(yaml.safe_dump(bundle.adapter(replace(SMALL, **change), "float16")))
    rehash(out)
    with pytest.raises(BundleError, match=said):
        verify(out)


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: [", "not readable"), ("[1]", "expected a mapping"), ("dtype: float16\n", "missing key intermediate_size")],
)
def test_bad_adapter(tmp_path, text, said):
    out = write(tmp_path / "model")
    (out / "meta_adapter.yaml").write_text(text)
    rehash(out)
    with pytest.raises(BundleError, match=f"meta_adapter.yaml: {said}"):
        verify(out)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 2}, "format_version: expected 1, found 2"),
        ({"date": "today"}, "unknown key date"),
        ({"sha256": []}, r"sha256: expected a mapping, found \[\]"),
        ({"sha256": {}}, "sha256: expected hashes of params.json, tokenizer.model, meta_adapter.yaml and the weights, found"),
        ({"extra": None}, "extra: expected a mapping, found None; make the bundle again"),
        ({"dropped": "x"}, "dropped: expected a list, found 'x'"),
        ({"sha256": {"params.json": "0", "tokenizer.model": "0"}}, "sha256: expected hashes of params.json"),
        ({"dtype": "bfloat16"}, "dtype: expected bfloat16 as in params.json and metadata.json, found float16"),
    ],
)
def test_bad_metadata(tmp_path, change, said):
    out = write(tmp_path / "model")
    (out / "metadata.json").write_text(json.dumps(read_metadata(out) | change))
    with pytest.raises(BundleError, match=said):
        verify(out)


def test_a_dtype_other_than_the_manifests_is_found(tmp_path):
    out = write(tmp_path / "model")
    (out / "metadata.json").write_text(json.dumps(read_metadata(out) | {"dtype": "bfloat16"}))
    (out / "meta_adapter.yaml").write_text(yaml.safe_dump(bundle.adapter(SMALL, "bfloat16")))
    rehash(out)
    with pytest.raises(BundleError, match=r"expected bfloat16 .*, found float16"):
        verify(out)


def test_json_that_no_parser_can_hold_is_an_error_in_one_line(tmp_path):
    out = write(tmp_path / "model")
    (out / "params.json").write_text("[" * 100_000)
    with pytest.raises(BundleError, match=r"params.json: not readable JSON: .*recursion"):
        read_args(out)


@pytest.mark.parametrize("index", [[], {}])
def test_an_index_of_another_form_disagrees(tmp_path, index):
    out = write(tmp_path / "model", shard_bytes=20_000)
    (out / bundle.INDEX).write_text(json.dumps(index))
    rehash(out)
    with pytest.raises(BundleError, match="weight_map disagrees"):
        read_tensors(out)


def test_index_and_shards_must_agree(tmp_path):
    out = write(tmp_path / "model", shard_bytes=20_000)
    index = json.loads((out / bundle.INDEX).read_text())
    index["weight_map"]["norm.weight"] = "model-00001-of-00009.safetensors"
    (out / bundle.INDEX).write_text(json.dumps(index))
    rehash(out)
    with pytest.raises(BundleError, match="weight_map disagrees"):
        read_tensors(out)
    metadata = read_metadata(out)
    del metadata["sha256"][bundle.INDEX]
    (out / "metadata.json").write_text(json.dumps(metadata))
    (out / bundle.INDEX).unlink()
    with pytest.raises(BundleError, match="missing beside several shards"):
        read_tensors(out)


def test_a_tensor_in_two_shards_is_found(tmp_path):
    from safetensors.torch import load_file, save_file

    out = write(tmp_path / "model", shard_bytes=20_000)
    shards = sorted(out.glob("*.safetensors"))
    save_file(load_file(shards[-1]) | {"tok_embeddings.weight": load_file(shards[0])["tok_embeddings.weight"]}, shards[-1])
    rehash(out)
    with pytest.raises(BundleError, match=r"tok_embeddings.weight: is in model-00001"):
        verify(out)


def test_identity_is_the_content(tmp_path):
    first = bundle_sha256(write(tmp_path / "a"))
    assert bundle_sha256(write(tmp_path / "b", source="elsewhere", extra={"date": "2024-06-18"}, dropped=[])) == first
    assert bundle_sha256(write(tmp_path / "c", random_tensors(seed=1))) != first
    assert bundle_sha256(write(tmp_path / "d", args=replace(SMALL, rope_theta=1e6))) != first
    assert read_metadata(tmp_path / "b")["extra"] == {"date": "2024-06-18"}


# interruption

KILLED = """
import sys, time, torch
from wmtp.bundle import ModelArgs, tensor_shapes, write_bundle
args = ModelArgs(256, 4, 4, 4, 5000, 32, None, 1e-5, 10000.0, 2)
stop = int(sys.argv[2])
def stream():
    for i, (name, shape) in enumerate(tensor_shapes(args).items()):
        if i == stop:
            print("now", flush=True)
            time.sleep(60)
        yield name, torch.full(shape, 2.0).half()
if stop < 0:
    print("now", flush=True)
write_bundle(sys.argv[1], args, stream(), b"new", source="killed", dropped=[], extra={}, shard_bytes=1 << 20)
"""


def start_writer(out, stop):
    command = [sys.executable, "-c", KILLED, str(out), str(stop)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "now\n"
    return child


def kill(child):
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True])
def test_killed_while_writing(tmp_path, old):
    out = tmp_path / "model"
    before = contents(write(out)) if old else None
    kill(start_writer(out, 25))
    assert (tmp_path / ".model.partial").is_dir()  # the kill came in the middle of the work
    assert (contents(out) if out.exists() else None) == before
    write(out, random_tensors(seed=1))
    verify(out)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.mark.stress
def test_killed_anywhere(tmp_path):
    out = tmp_path / "model"
    for attempt in range(30):
        child = start_writer(out, -1)
        time.sleep(attempt * 0.008)
        kill(child)
        if out.exists():
            verify(out)
    verify(write(out, random_tensors(seed=1)))
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


LIMITED = """
import resource, signal, sys, torch
from wmtp.atomic import AtomicError
from wmtp.bundle import ModelArgs, tensor_shapes, write_bundle
args = ModelArgs(256, 4, 4, 4, 5000, 32, None, 1e-5, 10000.0, 2)
tensors = {name: torch.ones(shape).half() for name, shape in tensor_shapes(args).items()}
if sys.argv[2] != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    write_bundle(sys.argv[1], args, tensors, b"x" * 9000, source="limited", dropped=[], extra={})
except AtomicError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1 << 20, 4096, 100])
def test_a_write_that_fails_is_one_line_and_leaves_nothing(tmp_path, limit):
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path / "model"), str(limit)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nothing written: " in done.stdout and "File too large" in done.stdout and done.stdout.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tiny_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_nothing(tiny_disk):
    (tiny_disk / "other").write_bytes(b"x" * (4 << 20))
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tiny_disk / "model"), "0"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "GB of disk" in done.stdout and done.stdout.count("\n") == 1
    assert [file.name for file in tiny_disk.iterdir()] == ["other"]


@pytest.mark.slow
def test_a_disk_that_fills_up_meanwhile(tiny_disk):
    args = replace(SMALL, dim=128, vocab_size=8000)

    def stream():
        for i, (name, shape) in enumerate(tensor_shapes(args).items()):
            if i == 5:
                (tiny_disk / "other").write_bytes(b"x" * (9 << 20))
            yield name, torch.ones(shape).half()

    with pytest.raises(AtomicError, match=r"nothing written: .*No space left"):
        write(tiny_disk / "model", stream(), args, shard_bytes=1 << 20)
    assert [file.name for file in tiny_disk.iterdir()] == ["other"]


@pytest.mark.slow
def test_settings_are_read_without_torch():
    code = "import sys, wmtp.bundle; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY  # the limit above stayed in its child
