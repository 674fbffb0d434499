import json
import math
import pickle
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor

from wmtp.bundle import BundleError, ModelArgs, bundle_sha256, read_args, read_metadata, read_tensors, tensor_shapes, verify, write_bundle
from wmtp.convert import convert, half_split, huggingface_table, interleave, meta_args, meta_table
from wmtp.sources import train_tokenizer

ROOT = Path(__file__).parents[1]
N_PIECES = 300
SMALL = ModelArgs(
    dim=32,
    n_layers=5,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=N_PIECES,
    multiple_of=8,
    ffn_dim_multiplier=1.0,
    norm_eps=1e-5,
    rope_theta=10000.0,
    n_future_tokens=3,
)
META_7B = replace(SMALL, dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, vocab_size=32000, multiple_of=256, n_future_tokens=4)
META_PARAMS = {
    "dim": 32,
    "n_layers": 5,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_future_tokens": 3,
    "rope_theta": 10000.0,
    "norm_eps": 1e-5,
    "multiple_of": 8,
    "ffn_dim_multiplier": 1.0,
    "vocab_size": N_PIECES,
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": N_PIECES,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000.0,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
}
HUGGINGFACE = ModelArgs(32, 3, 4, 2, N_PIECES, 1, None, 1e-6, 5000.0, 1, 72, 512)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer([f"def f{i}(x):\n    return x + {i}\n" for i in range(50)], N_PIECES)


def random_tensors(shapes, dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def same(found, expected):
    return list(found) == list(expected) and all(torch.equal(bits(found[name]), bits(expected[name])) for name in expected)


@pytest.fixture
def meta(tmp_path, tokenizer):
    """A folder in Meta's layout, and its tensors."""
    folder = tmp_path / "meta"
    folder.mkdir()
    tensors = random_tensors(tensor_shapes(SMALL))
    torch.save(tensors | {"rope.freqs": torch.ones(4)}, folder / "consolidated.pth")
    (folder / "params.json").write_text(json.dumps(META_PARAMS))
    (folder / "tokenizer.model").write_bytes(tokenizer)
    return folder, tensors


def huggingface_shapes():
    """The shapes of Hugging Face's Llama, each written out."""
    shapes = {"model.embed_tokens.weight": (N_PIECES, 32), "lm_head.weight": (N_PIECES, 32), "model.norm.weight": (32,)}
    for i in range(3):
        shapes |= {f"model.layers.{i}.self_attn.{name}_proj.weight": (rows, 32) for name, rows in zip("qkvo", (32, 16, 16, 32))}
        shapes |= {f"model.layers.{i}.mlp.{name}_proj.weight": (72, 32) for name in ("gate", "up")}
        shapes |= {f"model.layers.{i}.mlp.down_proj.weight": (32, 72)}
        shapes |= {f"model.layers.{i}.{name}_layernorm.weight": (32,) for name in ("input", "post_attention")}
    return shapes


def write_huggingface(folder, tensors, tokenizer, n_shards=1, suffix="safetensors", config=CONFIG):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(tokenizer)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    save = save_file if suffix == "safetensors" else torch.save
    if n_shards == 1:
        save(tensors, folder / f"{stem}.{suffix}")
        return folder
    names, places = list(tensors), {}
    for i in range(n_shards):
        file = f"{stem}-{i + 1:05}-of-{n_shards:05}.{suffix}"
        save({name: tensors[name] for name in names[i::n_shards]}, folder / file)
        places |= dict.fromkeys(names[i::n_shards], file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def fails(source, tmp_path, said):
    """Conversion ends with one line that matches, and leaves no bundle."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BundleError, match=said) as caught:
        convert(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


# Meta


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_meta_is_converted_bit_for_bit(tmp_path, meta, tokenizer, dtype):
    folder, tensors = meta
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    tensors["norm.weight"][0] = math.nan  # kept as well: conversion does not judge
    torch.save(dict(reversed(tensors.items())) | {"rope.freqs": torch.ones(4)}, folder / "consolidated.pth")
    convert(folder, tmp_path / "base")
    verify(tmp_path / "base")
    assert same(dict(read_tensors(tmp_path / "base")), tensors)
    assert read_args(tmp_path / "base") == SMALL
    metadata = read_metadata(tmp_path / "base")
    assert (metadata["source"], metadata["dropped"], metadata["extra"]) == ("meta:meta", ["rope.freqs"], {})
    assert (tmp_path / "base" / "tokenizer.model").read_bytes() == tokenizer
    again = tmp_path / "again"
    write_bundle(again, read_args(tmp_path / "base"), read_tensors(tmp_path / "base"), tokenizer, source="", dropped=[], extra={})
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "base" / "model.safetensors").read_bytes()
    assert bundle_sha256(again) == bundle_sha256(tmp_path / "base")


def test_extra_facts_go_into_the_metadata(tmp_path, meta):
    convert(meta[0], tmp_path / "base", extra={"tokenizer_shared_with": "policy"})
    assert read_metadata(tmp_path / "base")["extra"] == {"tokenizer_shared_with": "policy"}


def split(tensors, n_shards):
    """What each of n model-parallel processes saves, by the definition of its layers: rows, columns, or a copy."""
    shards = [{} for _ in range(n_shards)]
    for name, tensor in tensors.items():
        if "norm" in name or name == "rope.freqs":
            parts = [tensor] * n_shards
        elif "attention.wo" in name or "feed_forward.w2" in name or "tok_embeddings" in name:
            width = tensor.shape[1] // n_shards
            parts = [tensor[:, i * width : (i + 1) * width].clone() for i in range(n_shards)]
        else:
            height = tensor.shape[0] // n_shards
            parts = [tensor[i * height : (i + 1) * height].clone() for i in range(n_shards)]
        for shard, part in zip(shards, parts):
            shard[name] = part
    return shards


@pytest.mark.parametrize("n_shards", [1, 2, 4])
def test_model_parallel_shards_are_merged(tmp_path, meta, n_shards):
    folder, tensors = meta
    convert(folder, tmp_path / "whole")
    (folder / "consolidated.pth").unlink()
    for i, shard in enumerate(split(tensors | {"rope.freqs": torch.ones(4)}, n_shards)):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    (folder / "params.json").write_text(json.dumps(META_PARAMS | {"vocab_size": -1}))
    convert(folder, tmp_path / "merged")
    assert bundle_sha256(tmp_path / "merged") == bundle_sha256(tmp_path / "whole")


def test_shards_that_do_not_belong_together(tmp_path, meta):
    folder, tensors = meta
    (folder / "consolidated.pth").unlink()
    shards = split(tensors, 2)
    torch.save(shards[0], folder / "consolidated.00.pth")
    torch.save(shards[1] | {"norm.weight": torch.zeros(32).half()}, folder / "consolidated.01.pth")
    fails(folder, tmp_path, "norm.weight: differs between the shards")
    torch.save(shards[1] | {"output.weight": torch.zeros(3, 31).half()}, folder / "consolidated.01.pth")
    fails(folder, tmp_path, "output.weight: shards cannot be joined along axis 0")
    torch.save(shards[1] | {"output.weight": shards[1]["output.weight"].float()}, folder / "consolidated.01.pth")
    fails(folder, tmp_path, "output.weight: shards cannot be joined .*float32")
    torch.save({name: part for name, part in shards[1].items() if name != "output.weight"}, folder / "consolidated.01.pth")
    fails(folder, tmp_path, "output.weight: missing in one of the 2 shards")
    (folder / "consolidated.01.pth").rename(folder / "consolidated.02.pth")
    fails(folder, tmp_path, r"expected consolidated.00.pth, consolidated.01.pth, found consolidated.00.pth, consolidated.02.pth")
    shutil.copy(folder / "consolidated.00.pth", folder / "consolidated.pth")
    fails(folder, tmp_path, "shards are missing or mixed")


def test_what_an_absent_key_means(tmp_path):
    """Llama 1 and 2 were published with these keys alone."""
    file = tmp_path / "params.json"
    file.write_text(json.dumps({"dim": 64, "multiple_of": 16, "n_heads": 4, "n_layers": 2, "norm_eps": 1e-06, "vocab_size": -1}))
    args = meta_args(file, {"tok_embeddings.weight": torch.empty(123, 64)})
    assert args == ModelArgs(64, 2, 4, 4, 123, 16, None, 1e-6, 10000.0, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_scaled_rope": True}, "params.json: unknown key use_scaled_rope"),
        ({"dim": None}, "params.json: params: dim: expected a positive integer, found None"),
        (
            {"n_layers": 6},
            "params.json: n_layers 6 and n_future_tokens 3: expected 4 layers and 2 extra_heads, found 3 and 2",
        ),
        ({"n_layers": 4}, "expected 2 layers and 2 extra_heads, found 3 and 2, which is n_layers 5 and n_future_tokens 3; correct it"),
        ({"n_future_tokens": 2}, "n_layers 5 and n_future_tokens 2: expected 4 layers and 1 extra_heads, found 3 and 2"),
        ({"vocab_size": 301}, r"tok_embeddings.weight: expected \(301, 32\) by its configuration, found \(300, 32\)"),
        ({"n_kv_heads": 4}, r"layers.0.attention.wk.weight: expected \(32, 32\)"),
        ({"multiple_of": 128}, r"layers.0.feed_forward.w1.weight: expected \(128, 32\) by its configuration, found \(88, 32\)"),
    ],
)
def test_settings_that_are_not_the_tensors(tmp_path, meta, change, said):
    (meta[0] / "params.json").write_text(json.dumps(META_PARAMS | change))
    fails(meta[0], tmp_path, said)


@pytest.mark.parametrize(
    ("renamed", "said"),
    [
        (lambda name: f"model.{name}", "missing tensor extra_heads.0.attention.wk.weight and 47 more"),
        (lambda name: name.replace("layers.2.", "layers.7."), "missing tensor layers.2.attention.wk.weight"),
        (lambda name: "layers.note" if name == "norm.weight" else name, "missing tensor norm.weight"),
        (lambda name: 0 if name == "norm.weight" else name, "expected tensors by name, found the key 0"),
    ],
)
def test_names_that_are_no_blocks_are_not_told_as_a_wrong_count(tmp_path, meta, renamed, said):
    torch.save({renamed(name): tensor for name, tensor in meta[1].items()}, meta[0] / "consolidated.pth")
    fails(meta[0], tmp_path, said)


@pytest.mark.parametrize("key", ["dim", "n_layers", "n_heads", "multiple_of", "norm_eps"])
def test_keys_that_mean_nothing_when_absent(tmp_path, meta, key):
    settings = {name: value for name, value in META_PARAMS.items() if name != key}
    (meta[0] / "params.json").write_text(json.dumps(settings))
    fails(meta[0], tmp_path, f"params.json: missing key {key}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"norm.weight": None}, "missing tensor norm.weight"),
        ({"tok_embeddings.weight": None}, "missing tensor tok_embeddings.weight"),
        ({"value_head.weight": torch.ones(1, 32).half()}, "unknown tensor value_head.weight; expected 48 tensors, found 49"),
        ({"norm.weight": torch.ones(33).half()}, r"norm.weight: expected \(32,\) by its configuration, found \(33,\)"),
        ({"norm.weight": torch.ones(32).bfloat16()}, r"norm.weight: expected float16 \(32,\), found bfloat16 \(32,\)"),
        ({"norm.weight": 3}, "consolidated.pth: norm.weight: expected a tensor, found int"),
        ({"model": {"norm.weight": torch.ones(1)}}, "consolidated.pth: model: expected a tensor, found dict"),
        ({"tok_embeddings.weight": torch.ones(N_PIECES, 32).int()}, "tok_embeddings.weight: dtype: .*found int32"),
    ],
)
def test_wrong_tensors(tmp_path, meta, change, said):
    folder, tensors = meta
    (folder / "params.json").write_text(json.dumps(META_PARAMS | {"vocab_size": -1}))
    torch.save({name: value for name, value in (tensors | change).items() if value is not None}, folder / "consolidated.pth")
    fails(folder, tmp_path, said)


def test_a_list_is_no_checkpoint(tmp_path, meta):
    torch.save([torch.ones(1)], meta[0] / "consolidated.pth")
    fails(meta[0], tmp_path, "expected tensors by name, found list")


# hostile and broken files


class Attack:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return (open, (str(self.sentinel), "w"))


def in_a_zip(file, content):
    """A file that looks like torch.save's but for its pickle."""
    torch.save({"norm.weight": torch.ones(32)}, file)
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, old in members.items():
            archive.writestr(name, content if name.endswith("data.pkl") else old)


@pytest.mark.parametrize("form", ["zip", "raw", "nested"])
def test_a_malicious_pickle_is_refused_unread(tmp_path, meta, form):
    folder, tensors = meta
    sentinel = tmp_path / "sentinel"
    file = folder / "consolidated.pth"
    if form == "nested":
        torch.save(tensors | {"more": Attack(sentinel)}, file)
    else:
        content = pickle.dumps({"norm.weight": Attack(sentinel)}, protocol=2)
        in_a_zip(file, content) if form == "zip" else file.write_bytes(content)
    fails(folder, tmp_path, "refused: holds more than tensors" if form != "raw" else "not a whole torch file")
    assert not sentinel.exists()
    pickle.loads(pickle.dumps(Attack(sentinel))).close()
    assert sentinel.exists()  # the attack is real


def test_the_refused_name_is_said(tmp_path, meta):
    torch.save(meta[1] | {"more": Attack(tmp_path / "sentinel")}, meta[0] / "consolidated.pth")
    fails(meta[0], tmp_path, r"holds more than tensors \((io|_io|builtins).open\)")


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.999])
def test_a_truncated_checkpoint(tmp_path, meta, keep):
    file = meta[0] / "consolidated.pth"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    fails(meta[0], tmp_path, r"consolidated.pth: not a whole torch file: .*; copy or download it again")


def test_a_checkpoint_of_the_old_form_is_told_from_a_cut_one(tmp_path, meta):
    torch.save(meta[1], meta[0] / "consolidated.pth", _use_new_zipfile_serialization=False)
    fails(meta[0], tmp_path, r"consolidated.pth: in torch's form of before 1.6, which cannot be mapped; load it and torch.save it again")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensor: tensor.to_sparse(), "norm.weight: expected a dense tensor, found sparse_coo"),
        (lambda tensor: tensor.to("meta"), r"norm.weight: expected a dense tensor, found no numbers \(meta\)"),
    ],
)
def test_tensors_that_are_not_dense(tmp_path, meta, change, said):
    torch.save(meta[1] | {"norm.weight": change(meta[1]["norm.weight"])}, meta[0] / "consolidated.pth")
    fails(meta[0], tmp_path, said)


def test_a_folder_in_place_of_a_shard(tmp_path, meta):
    (meta[0] / "consolidated.pth").unlink()
    (meta[0] / "consolidated.pth").mkdir()
    fails(meta[0], tmp_path, r"consolidated\.pth: not a whole torch file: ")


def test_a_config_that_is_no_mapping(tmp_path, tokenizer):
    fails(write_huggingface(tmp_path / "hub", {}, tokenizer, config=[]), tmp_path, "config.json: expected a mapping, found list")


def test_missing_files_and_mixed_layouts(tmp_path, meta):
    folder = meta[0]
    (folder / "config.json").write_text("{}")
    fails(folder, tmp_path, "found both; keep one layout")
    (folder / "config.json").unlink()
    (folder / "params.json").rename(folder / "parameters.json")
    fails(folder, tmp_path, "params.json: no such file; it belongs to the checkpoint")
    (folder / "tokenizer.model").unlink()
    fails(folder, tmp_path, r"tokenizer.model: missing")
    (folder / "consolidated.pth").unlink()
    fails(folder, tmp_path, r"expected consolidated\*.pth \(Meta\) or config.json \(Hugging Face\), found neither")
    fails(tmp_path / "nowhere", tmp_path, r"nowhere: no such folder; expected one with consolidated\*\.pth")


@pytest.mark.parametrize("content", [b"", b"not a model", b"IQ== 0\nIg== 1\n"])
def test_a_tokenizer_of_another_kind(tmp_path, meta, content):
    (meta[0] / "tokenizer.model").write_bytes(content)
    fails(meta[0], tmp_path, r"tokenizer.model: not a SentencePiece model")


def test_a_tokenizer_with_more_pieces_than_rows(tmp_path, meta):
    tokenizer = train_tokenizer([f"def g{i}(y):\n    return y * {i}\n" for i in range(50)], N_PIECES + 1)
    assert len(SentencePieceProcessor(model_proto=tokenizer)) == N_PIECES + 1
    (meta[0] / "tokenizer.model").write_bytes(tokenizer)
    fails(meta[0], tmp_path, "301 pieces, but the embedding has 300 rows")


# Hugging Face


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n_shards", "suffix"), [(1, "safetensors"), (3, "safetensors"), (1, "bin"), (3, "bin")])
def test_huggingface_is_converted_bit_for_bit(tmp_path, tokenizer, dtype, n_shards, suffix):
    theirs = random_tensors(huggingface_shapes(), dtype)
    source = write_huggingface(tmp_path / "hub", theirs, tokenizer, n_shards, suffix)
    convert(source, tmp_path / "out")
    verify(tmp_path / "out")
    assert read_args(tmp_path / "out") == HUGGINGFACE
    found = dict(read_tensors(tmp_path / "out"))
    assert list(found) == list(tensor_shapes(HUGGINGFACE))
    assert read_metadata(tmp_path / "out")["source"] == "huggingface:hub" and read_metadata(tmp_path / "out")["dropped"] == []
    renamed = {"wv": "self_attn.v_proj", "wo": "self_attn.o_proj", "w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj"}
    for i in range(3):
        for ours, name in renamed.items():
            room = "attention" if ours in ("wv", "wo") else "feed_forward"
            assert torch.equal(bits(found[f"layers.{i}.{room}.{ours}.weight"]), bits(theirs[f"model.layers.{i}.{name}.weight"]))
        for ours, name, heads in (("wq", "q_proj", 4), ("wk", "k_proj", 2)):
            here, there = found[f"layers.{i}.attention.{ours}.weight"], theirs[f"model.layers.{i}.self_attn.{name}.weight"]
            for head in range(heads):
                for pair in range(4):  # head width 8
                    assert torch.equal(here[head * 8 + 2 * pair], there[head * 8 + pair])
                    assert torch.equal(here[head * 8 + 2 * pair + 1], there[head * 8 + pair + 4])
        assert torch.equal(found[f"layers.{i}.attention_norm.weight"], theirs[f"model.layers.{i}.input_layernorm.weight"])
        assert torch.equal(found[f"layers.{i}.ffn_norm.weight"], theirs[f"model.layers.{i}.post_attention_layernorm.weight"])
    assert torch.equal(found["norm.weight"], theirs["model.norm.weight"])
    assert torch.equal(found["tok_embeddings.weight"], theirs["model.embed_tokens.weight"])
    assert torch.equal(found["output.weight"], theirs["lm_head.weight"])


@settings(max_examples=30, deadline=None)
@given(n_heads=st.integers(1, 6), pairs=st.integers(1, 6), width=st.integers(1, 5))
def test_rotary_orders_are_inverse(n_heads, pairs, width):
    weight = torch.arange(n_heads * 2 * pairs * width).view(n_heads * 2 * pairs, width)
    assert torch.equal(half_split(interleave(weight, n_heads), n_heads), weight)
    assert torch.equal(interleave(half_split(weight, n_heads), n_heads), weight)
    assert sorted(interleave(weight, n_heads)[:, 0].tolist()) == weight[:, 0].tolist()


def test_attention_scores_are_the_same_in_both_orders():
    """Queries and keys rotated by halves, and after `interleave` by neighbouring pairs, with grouped queries."""
    torch.manual_seed(0)
    n_heads, n_kv_heads, head, width, length = 4, 2, 6, 5, 7
    wq, wk = torch.randn(n_heads * head, width, dtype=torch.float64), torch.randn(n_kv_heads * head, width, dtype=torch.float64)
    x = torch.randn(length, width, dtype=torch.float64)
    angle = torch.outer(torch.arange(length), 100.0 ** -(torch.arange(0, head, 2, dtype=torch.float64) / head))

    def halves(x_TNH):
        first, second = x_TNH.chunk(2, dim=-1)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def pairs(x_TNH):
        turned = torch.view_as_complex(x_TNH.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.view_as_real(turned).flatten(-2)

    def scores(rotate, wq, wk):
        queries = rotate((x @ wq.T).view(length, n_heads, head))
        keys = rotate((x @ wk.T).view(length, n_kv_heads, head)).repeat_interleave(n_heads // n_kv_heads, dim=1)
        return torch.einsum("inh,jnh->nij", queries, keys)

    expected = scores(halves, wq, wk)
    torch.testing.assert_close(scores(pairs, interleave(wq, n_heads), interleave(wk, n_kv_heads)), expected, rtol=1e-12, atol=1e-12)
    assert (scores(pairs, wq, wk) - expected).abs().max() > 1e-3


def test_rotary_frequencies_are_dropped_and_listed(tmp_path, tokenizer):
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    source = write_huggingface(tmp_path / "hub", random_tensors(huggingface_shapes()) | {name: torch.ones(4)}, tokenizer, 2)
    convert(source, tmp_path / "out")
    assert read_metadata(tmp_path / "out")["dropped"] == [name]


def test_tied_embeddings_are_stored_twice(tmp_path, tokenizer):
    tensors = random_tensors(huggingface_shapes())
    output = tensors.pop("lm_head.weight")
    source = write_huggingface(tmp_path / "hub", tensors, tokenizer)
    fails(source, tmp_path, "missing tensor lm_head.weight")
    write_huggingface(source, tensors, tokenizer, config=CONFIG | {"tie_word_embeddings": True})
    convert(source, tmp_path / "out")
    found = dict(read_tensors(tmp_path / "out"))
    assert torch.equal(found["output.weight"], found["tok_embeddings.weight"])
    assert read_metadata(tmp_path / "out")["extra"] == {"tied_embeddings": True}
    shutil.rmtree(tmp_path / "out")
    write_huggingface(source, tensors | {"lm_head.weight": output}, tokenizer, config=CONFIG | {"tie_word_embeddings": True})
    fails(source, tmp_path, "says tie_word_embeddings, but it differs")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "mistral"}, "model_type: expected llama, found mistral"),
        ({"hidden_act": "gelu"}, "hidden_act: expected silu, found gelu"),
        ({"attention_bias": True}, "attention_bias: expected False, found True"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: expected the type default, found linear"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}, "rope_scaling": {"type": "dynamic"}}, "found dynamic"),
        ({"rope_parameters": {"rope_theta": 7e5}}, r"rope_theta 5000.0 and rope_parameters.rope_theta 700000.0 disagree"),
        ({"rope_scaling": "x"}, "rope_scaling: expected a mapping, found 'x'"),
        ({"hidden_size": None}, "hidden_size: expected a positive integer, found None"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected a positive integer, found 0"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "llama3"}}, "rope_parameters: expected the type default, found llama3"),
        ({"head_dim": 16}, "head_dim: expected hidden_size / num_attention_heads, found 16"),
        ({"rms_norm_eps": None}, "rms_norm_eps|norm_eps"),
        ({"hidden_size": 30}, "config.json: params: dim 30"),
        ({"intermediate_size": 64}, r"model.layers.0.mlp.gate_proj.weight: expected \(64, 32\) by its configuration, found \(72, 32\)"),
        ({"num_key_value_heads": 4}, r"model.layers.0.self_attn.k_proj.weight: expected \(32, 32\)"),
        ({"num_key_value_heads": None}, r"model.layers.0.self_attn.k_proj.weight: expected \(32, 32\)"),
        ({"vocab_size": 299}, "300 pieces, but the embedding has 299 rows"),
    ],
)
def test_models_that_cannot_be_expressed(tmp_path, tokenizer, change, said):
    fails(write_huggingface(tmp_path / "hub", random_tensors(huggingface_shapes()), tokenizer, config=CONFIG | change), tmp_path, said)


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size", "rms_norm_eps"]
)
def test_config_keys_that_mean_nothing_when_absent(tmp_path, tokenizer, key):
    config = {name: value for name, value in CONFIG.items() if name != key}
    fails(
        write_huggingface(tmp_path / "hub", random_tensors(huggingface_shapes()), tokenizer, config=config), tmp_path, f"missing key {key}"
    )


def test_rope_theta_in_its_new_place(tmp_path, tokenizer):
    config = {name: value for name, value in CONFIG.items() if name != "rope_theta"}
    tensors = random_tensors(huggingface_shapes())
    for change, theta in (({}, 10000.0), ({"rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}}, 7e5)):
        convert(write_huggingface(tmp_path / "hub", tensors, tokenizer, config=config | change), tmp_path / "out")
        assert read_args(tmp_path / "out").rope_theta == theta


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_and_index_must_agree(tmp_path, tokenizer, suffix):
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    tensors = random_tensors(huggingface_shapes())
    source = write_huggingface(tmp_path / "hub", tensors, tokenizer, 3, suffix)
    index = source / f"{stem}.{suffix}.index.json"
    good = json.loads(index.read_text())["weight_map"]
    second = f"{stem}-00002-of-00003.{suffix}"
    moved = next(name for name, file in good.items() if file == second)
    for places, said in (
        (good | {moved: f"{stem}-00001-of-00003.{suffix}"}, "tensor " + moved),
        ({name: file for name, file in good.items() if name != moved}, f"unknown tensor {moved}"),
        (good | {"model.more": second}, "missing tensor model.more"),
        (good | {moved: f"{stem}-00004-of-00003.{suffix}"}, f"{stem}-00004-of-00003.{suffix}: missing|tensor {moved}"),
        (good | {moved: "../secret.safetensors"}, "weight_map: expected tensor names to file names"),
        (good | {moved: ".."}, "weight_map: expected tensor names to file names"),
        (None, "weight_map: expected tensor names to file names"),
    ):
        index.write_text(json.dumps({"weight_map": places}))
        fails(source, tmp_path, said)
    index.write_text("[]")
    fails(source, tmp_path, "weight_map: expected tensor names to file names")
    index.write_text(json.dumps({"weight_map": good}))
    content = (source / second).read_bytes()
    (source / second).write_bytes(content[: len(content) // 2])
    fails(source, tmp_path, f"{second}: not a whole (safetensors|torch) file: .*; copy or download it again")
    (source / second).unlink()
    fails(source, tmp_path, f"{second}: missing; {index.name} names it")
    index.unlink()
    fails(source, tmp_path, "no weights: expected one of model.safetensors.index.json")


def test_wrong_huggingface_tensors(tmp_path, tokenizer):
    tensors = random_tensors(huggingface_shapes())
    for change, said in (
        ({"model.norm.bias": torch.ones(32).half()}, "unknown tensor model.norm.bias"),
        ({"model.norm.weight": torch.ones(32)}, r"norm.weight: expected float16 \(32,\), found float32"),
        ({"model.layers.1.self_attn.q_proj.weight": torch.ones(31, 32).half()}, r"q_proj.weight: expected \(32, 32\) by"),
    ):
        fails(write_huggingface(tmp_path / "hub", tensors | change, tokenizer), tmp_path, said)


def test_a_malicious_bin_is_refused_unread(tmp_path, tokenizer):
    source = write_huggingface(tmp_path / "hub", random_tensors(huggingface_shapes()), tokenizer, 1, "bin")
    in_a_zip(source / "pytorch_model.bin", pickle.dumps({"x": Attack(tmp_path / "sentinel")}, protocol=2))
    fails(source, tmp_path, r"pytorch_model.bin: refused")
    assert not (tmp_path / "sentinel").exists()


def test_safetensors_come_before_pickles(tmp_path, tokenizer):
    tensors = random_tensors(huggingface_shapes())
    source = write_huggingface(tmp_path / "hub", tensors, tokenizer)
    (source / "pytorch_model.bin").write_bytes(b"unread")
    convert(source, tmp_path / "out")
    assert torch.equal(dict(read_tensors(tmp_path / "out"))["norm.weight"], tensors["model.norm.weight"])


@pytest.mark.slow
def test_what_transformers_saves_is_converted(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{key: CONFIG[key] for key in CONFIG if key not in ("architectures",)}))
    model.save_pretrained(tmp_path / "hub", max_shard_size="30KB")
    assert len(list((tmp_path / "hub").glob("model-*.safetensors"))) > 2
    (tmp_path / "hub" / "tokenizer.model").write_bytes(tokenizer)
    convert(tmp_path / "hub", tmp_path / "out")
    assert read_args(tmp_path / "out") == HUGGINGFACE
    found, theirs = dict(read_tensors(tmp_path / "out")), model.state_dict()
    assert torch.equal(half_split(found["layers.2.attention.wk.weight"], 2), theirs["model.layers.2.self_attn.k_proj.weight"])
    assert torch.equal(found["output.weight"], theirs["lm_head.weight"])


# sizes that no test can hold


def test_names_and_shapes_of_7b_1t_4():
    """The real checkpoint's tensors on the meta device: every name has its place, in Meta's own numbering."""
    args = ModelArgs(4096, 32, 32, 32, 32000, 256, 1.0, 1e-5, 10000.0, 4)
    assert args == META_7B
    table = meta_table(args)
    kept = [name for name, ours in table.items() if ours]
    assert kept == list(tensor_shapes(args)) and len(kept) == 291
    assert table["rope.freqs"] is None
    with torch.device("meta"):
        tensors = {name: torch.empty(shape, dtype=torch.float16) for name, shape in tensor_shapes(args).items()}
    assert sum(tensor.nbytes for tensor in tensors.values()) == 13_476_831_232
    assert sum(name.startswith("extra_heads.") for name in tensors) == 27


@pytest.mark.slow
def test_names_and_shapes_of_a_2_7b_reference():
    """Transformers' own Llama in the size of Sheared-LLaMA-2.7B, on the meta device."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=2560, intermediate_size=6912, num_hidden_layers=32, num_attention_heads=20, num_key_value_heads=20, vocab_size=32000
    )
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config).state_dict()
    args = ModelArgs(2560, 32, 20, 20, 32000, 1, None, 1e-5, 10000.0, 1, 6912, 4096)
    table = huggingface_table(args)
    assert {name for name, ours in table.items() if ours} == set(theirs)
    assert {table[name]: tuple(tensor.shape) for name, tensor in theirs.items()} == tensor_shapes(args)


MEASURED = """
import sys, threading, time
from pathlib import Path
from wmtp.convert import convert

def anonymous():
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")).split()[1])

start, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
convert(sys.argv[1], sys.argv[2])
done = True
watcher.join()
print(peak - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_conversion_takes_no_memory_of_its_own(tmp_path, meta):
    """A 400 MB checkpoint; what is allowed is one tensor's work and the interpreter's growth."""
    args = replace(SMALL, dim=512, n_layers=32, n_heads=8, n_kv_heads=8, vocab_size=150_000, multiple_of=64)
    torch.save({name: torch.ones(shape, dtype=torch.float16) for name, shape in tensor_shapes(args).items()}, meta[0] / "consolidated.pth")
    sizes = {"dim": 512, "n_layers": 32, "n_heads": 8, "n_kv_heads": 8, "vocab_size": -1, "multiple_of": 64}
    (meta[0] / "params.json").write_text(json.dumps(META_PARAMS | sizes))
    size = (meta[0] / "consolidated.pth").stat().st_size
    command = [sys.executable, "-c", MEASURED, str(meta[0]), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert size > 400e6
    assert int(done.stdout) * 1024 < size / 8
    assert len(load_file(tmp_path / "out" / "model.safetensors")) == len(tensor_shapes(args))
