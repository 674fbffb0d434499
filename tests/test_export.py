"""Transformers loads what is exported, without code of ours, and computes what the bundle computes."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from wmtp.atomic import AtomicError
from wmtp.bundle import BundleError, ModelArgs, read_args, read_tensors, write_bundle
from wmtp.convert import convert
from wmtp.dependencies import ROOT
from wmtp.export import export
from wmtp.generate import Decoding, Request, generate
from wmtp.model import load_bundle
from wmtp.sources import write_synthetic
from wmtp.synthetic import corpus
from wmtp.tokens import Tokenizer

NEAR = 1e-4  # of logits: closer ones may change places with the order of a sum


@pytest.fixture(scope="module")
def exported(micro, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "llama"
    assert not export(micro.bundle, out, "float32").unreachable
    return out


def loaded(path, **options):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval(), transformers.AutoTokenizer.from_pretrained(path)


def test_files_are_those_of_a_llama(micro, exported):
    names = {path.name for path in exported.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
        "README.md", ".wmtp-export",
    }  # fmt: skip
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in exported.iterdir()), "others may read it"
    config, args = json.loads((exported / "config.json").read_text()), read_args(micro.bundle)
    assert config["model_type"] == "llama" and config["num_hidden_layers"] == args.n_trunk < args.n_layers, "extra heads are left out"
    assert (exported / "tokenizer.model").read_bytes() == (micro.bundle / "tokenizer.model").read_bytes()


@pytest.mark.slow
def test_transformers_computes_the_same_logits_and_texts(micro, exported, corpus_problems=64):
    theirs, tokenizer = loaded(exported)
    ours, own = load_bundle(micro.bundle, n_future=1, dtype=torch.float32), Tokenizer(micro.bundle)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    near = 0
    for number, text in zip(range(corpus_problems), corpus(21, corpus_problems)):
        prompt = text[: text.index("### Response:\n") + len("### Response:\n")]
        ids = own.encode_prompt(prompt)
        assert tokenizer(prompt).input_ids == ids and tokenizer.decode(ids[1:]) == prompt
        tokens_BT = torch.tensor([ids])
        with torch.no_grad():
            expected, found = ours(tokens_BT)[:, :, 0], theirs(tokens_BT).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(1.0, float(expected.abs().max())))
        made = theirs.generate(tokens_BT, attention_mask=torch.ones_like(tokens_BT), max_new_tokens=24, pad_token_id=own.eos)
        request = Request(str(number), 0, ids, 0.0)
        generate(ours, [request], Decoding(24, own.eos))
        written = made[0, len(ids) :].tolist()
        if written[: len(request.output)] != list(request.output):
            place = next(i for i, (a, b) in enumerate(zip(written, request.output)) if a != b)
            with torch.no_grad():
                best = ours(torch.tensor([[*ids, *request.output[:place]]]))[0, -1, 0].topk(2).values
            assert float(best[0] - best[1]) < NEAR
            near += 1
    assert near <= corpus_problems // 20


@pytest.mark.slow
def test_export_and_conversion_are_inverse_bit_for_bit(micro, tmp_path):
    for name, bundle in (("policy", micro.bundle), ("reference", micro.reference)):
        export(bundle, tmp_path / name)
        convert(tmp_path / name, tmp_path / f"{name}-back")
        back, kept = dict(read_tensors(tmp_path / f"{name}-back")), dict(read_tensors(bundle, n_future=1))
        assert set(back) == set(kept) and all(torch.equal(back[key], kept[key]) for key in kept)
        assert {tensor.dtype for tensor in back.values()} == {torch.float16}
        args = read_args(bundle).with_heads(1)
        assert read_args(tmp_path / f"{name}-back").hidden_dim == args.hidden_dim
        assert isinstance(args, ModelArgs) and read_args(tmp_path / f"{name}-back").n_kv_heads == args.n_kv_heads


@pytest.mark.slow
def test_shards_have_an_index_that_transformers_follows(micro, tmp_path, monkeypatch):
    monkeypatch.setattr("wmtp.export.SHARD_BYTES", 30_000)
    export(micro.bundle, tmp_path / "shards", "float32")
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2 and not (tmp_path / "shards/model.safetensors").exists()
    theirs, _ = loaded(tmp_path / "shards")
    tokens_BT = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(tokens_BT).logits, load_bundle(micro.bundle, n_future=1, dtype=torch.float32)(tokens_BT)[:, :, 0], rtol=1e-5, atol=1e-4
        )


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "wmtp.export", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)


def test_the_card_says_what_the_model_is_and_what_it_scored(micro, tmp_path):
    metrics = tmp_path / "rho1"
    metrics.mkdir()
    (metrics / "eval.json").write_text(json.dumps({"mbpp": {"pass@1": 0.5, "protocol": "alpaca"}}))
    (metrics / "train.json").write_text(json.dumps({"steps": 151, "train_flops": 12}))
    shutil.copytree(micro.bundle, tmp_path / "bundle")
    metadata = json.loads((tmp_path / "bundle/metadata.json").read_text())
    metadata["extra"] |= {"method": "rho1", "n_steps": 150, "flops": 12}
    (tmp_path / "bundle/metadata.json").write_text(json.dumps(metadata))
    done = command(tmp_path / "bundle", tmp_path / "out", "--metrics", metrics)
    assert done.returncode == 1 and "train.json: steps: expected 150 as the model says of itself, found 151" in done.stderr
    metadata["extra"]["n_steps"] = 151
    (tmp_path / "bundle/metadata.json").write_text(json.dumps(metadata))
    done = command(tmp_path / "bundle", tmp_path / "out", "--metrics", metrics)
    assert done.returncode == 0 and "a LlamaForCausalLM with its tokenizer" in done.stdout, done.stderr
    shutil.copytree(metrics, tmp_path / "odd/rho1")
    (tmp_path / "odd/rho1/train.json").write_text("[]")
    odd = command(tmp_path / "bundle", tmp_path / "other", "--metrics", tmp_path / "odd/rho1")
    assert odd.returncode == 1 and "rho1/train.json: expected a mapping, found list" in odd.stderr and "Traceback" not in odd.stderr
    shutil.copytree(metrics, tmp_path / "verifiable")
    other = command(tmp_path / "bundle", tmp_path / "other", "--metrics", tmp_path / "verifiable")
    assert other.returncode == 1 and "--metrics: expected a folder named rho1, as the model's method, found verifiable" in other.stderr
    card = (tmp_path / "out/README.md").read_text()
    for line in (
        "# bundle",
        "| training | by wmtp's method `rho1`, 151 optimizer steps |",
        "| mbpp pass@1 | 0.5 |",
        "| mbpp protocol | alpaca |",
        "| steps | 151 |",
    ):
        assert line in card


def test_the_card_names_adapters_and_figures_need_a_training(micro, tmp_path):
    metadata = json.loads((micro.bundle / "metadata.json").read_text())
    with pytest.raises(BundleError, match="says of no training by wmtp, so these figures cannot be its own; leave --metrics out"):
        export(micro.bundle, tmp_path / "out", metrics=tmp_path)
    shutil.copytree(micro.bundle, tmp_path / "bundle")
    metadata["extra"] |= {"stage": "warm_up", "n_steps": 3}
    (tmp_path / "bundle/metadata.json").write_text(json.dumps(metadata))
    export(tmp_path / "bundle", tmp_path / "out")
    assert "| training | by wmtp's stage `warm_up`, 3 optimizer steps |" in (tmp_path / "out/README.md").read_text()
    metadata["extra"] |= {"method": "rho1", "lora": {"rank": 8, "alpha": 16, "targets": ["wq", "w2"]}}
    (tmp_path / "bundle/metadata.json").write_text(json.dumps(metadata))
    export(tmp_path / "bundle", tmp_path / "out")
    assert "3 optimizer steps, of adapters (rank 8, alpha 16, on wq, w2) that are merged |" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("extra", [None, 3, []])
def test_a_damaged_account_of_the_model_is_one_line(micro, tmp_path, extra):
    shutil.copytree(micro.bundle, tmp_path / "bundle")
    metadata = json.loads((tmp_path / "bundle/metadata.json").read_text()) | {"extra": extra}
    (tmp_path / "bundle/metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(BundleError, match=r"metadata\.json: extra: expected a mapping, found .*; make the bundle again"):
        export(tmp_path / "bundle", tmp_path / "out")


def test_numbers_that_the_other_type_has_not_are_refused(micro, tmp_path):
    args, tensors = read_args(micro.bundle), {name: tensor.float() for name, tensor in read_tensors(micro.bundle)}
    tensors["layers.1.feed_forward.w1.weight"][3, 2] = 7e4  # float16 ends at 65504
    write_bundle(tmp_path / "large", args, tensors, (micro.bundle / "tokenizer.model").read_bytes(), source="", dropped=[], extra={})
    with pytest.raises(BundleError, match=r"layers\.1\.feed_forward\.w1\.weight: .* not finite in float16; take another --dtype"):
        export(tmp_path / "large", tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()
    export(tmp_path / "large", tmp_path / "out", "bfloat16")
    tensors["norm.weight"][0] = torch.nan
    write_bundle(tmp_path / "broken", args, tensors, (micro.bundle / "tokenizer.model").read_bytes(), source="", dropped=[], extra={})
    with pytest.raises(BundleError, match=r"norm\.weight: holds numbers that are not finite; such a model is not exported"):
        export(tmp_path / "broken", tmp_path / "again")


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(micro, tmp_path):
    with pytest.raises(BundleError, match="dtype: expected one of float16, bfloat16, float32, found int8"):
        export(micro.bundle, tmp_path / "out", "int8")
    shutil.copytree(micro.bundle, tmp_path / "damaged")
    with open(tmp_path / "damaged/model.safetensors", "r+b") as file:
        file.seek(-3, 2)
        file.write(b"x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    for bundle, out, message in (
        (tmp_path / "nowhere", tmp_path / "out", "nowhere: no such folder, expected a bundle; correct the path"),
        (micro.bundle, tmp_path / "mine/thesis.txt/out", "Not a directory"),
        (tmp_path / "damaged", tmp_path / "out", "model.safetensors: SHA256"),
        (micro.bundle, tmp_path / "mine", "holds other files"),
    ):
        done = command(bundle, out)
        assert done.returncode == 1 and done.stderr.startswith("export: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() and [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(AtomicError):
        export(micro.bundle, tmp_path / "mine")


def test_grouped_queries_keep_their_order(tmp_path):
    sizes = {"dim": 48, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "vocab_size": 400, "multiple_of": 16, "n_future_tokens": 2}
    write_synthetic(tmp_path / "checkpoint", texts=corpus(3, 150), seed=4, reference={"n_layers": 2}, **sizes)
    convert(tmp_path / "checkpoint/policy", tmp_path / "bundle")
    export(tmp_path / "bundle", tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "back")
    for (name, mine), (_, theirs) in zip(read_tensors(tmp_path / "bundle", n_future=1), read_tensors(tmp_path / "back"), strict=True):
        assert torch.equal(mine, theirs), name
