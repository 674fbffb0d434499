import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor

from wmtp import sources
from wmtp.atomic import AtomicError
from wmtp.bundle import BundleError, read_args, read_tensors, tensor_shapes, verify
from wmtp.convert import convert
from wmtp.model import load_bundle
from wmtp.slicing import build_micro
from wmtp.sources import copy_checkpoints, copy_local, train_tokenizer, write_synthetic

ROOT = Path(__file__).parents[1]
TEXTS = [f"def f{i}(x):\n    total = {i * 37}\n    for y in x:\n        total += y * {i % 9}\n    return total\n" for i in range(200)]
SIZES = {
    "seed": 3,
    "dim": 48,
    "n_layers": 6,
    "n_heads": 6,
    "n_kv_heads": 3,
    "vocab_size": 320,
    "multiple_of": 16,
    "n_future_tokens": 3,
    "reference": {"dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2},
}


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "raw"
    write_synthetic(out, texts=TEXTS, **SIZES)
    return out


# synthetic


def test_the_layouts_are_the_real_ones(raw):
    assert sorted(contents(raw)) == [
        "policy/consolidated.pth",
        "policy/params.json",
        "policy/tokenizer.model",
        "reference/config.json",
        "reference/model-00001-of-00003.safetensors",
        "reference/model-00002-of-00003.safetensors",
        "reference/model-00003-of-00003.safetensors",
        "reference/model.safetensors.index.json",
        "reference/tokenizer.model",
    ]
    assert json.loads((raw / "policy" / "params.json").read_text()) == {
        "dim": 48,
        "n_layers": 6,
        "n_heads": 6,
        "n_kv_heads": 3,
        "n_future_tokens": 3,
        "rope_theta": 10000.0,
        "norm_eps": 1e-5,
        "multiple_of": 16,
        "ffn_dim_multiplier": 1.0,
        "vocab_size": 320,
    }
    state = torch.load(raw / "policy" / "consolidated.pth", weights_only=True)
    frequencies = state.pop("rope.freqs")
    assert frequencies.tolist() == [torch.tensor(10000.0 ** (-2 * i / 8)).half().item() for i in range(4)]
    assert len(state) == 3 + 6 * 9 and "extra_heads.1.ffn_norm.weight" in state and "layers.4.ffn_norm.weight" not in state
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    reference = load_file(raw / "reference" / "model-00001-of-00003.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(reference.flatten()[:99], state["tok_embeddings.weight"].flatten()[:99])
    assert (raw / "policy" / "tokenizer.model").read_bytes() == (raw / "reference" / "tokenizer.model").read_bytes()


def test_deviations(raw):
    """1 / sqrt(inputs), less by the square root of twice the depth (4 and 3 blocks) into the residual stream; embeddings 1, output 0.02."""
    state = torch.load(raw / "policy" / "consolidated.pth", weights_only=True)
    for file in (raw / "reference").glob("*.safetensors"):
        state |= load_file(file)
    for name, tensor in state.items():
        if tensor.ndim == 2:
            residual = name.endswith(("wo.weight", "w2.weight", "o_proj.weight", "down_proj.weight"))
            embedding, output = "embed" in name, name in ("output.weight", "lm_head.weight")
            expected = 1.0 if embedding else 0.02 if output else tensor.shape[1] ** -0.5
            expected /= (8 if "model." not in name else 6) ** 0.5 if residual else 1
            assert abs(tensor.float().std().item() / expected - 1) < 0.1, name
        elif "norm" in name:
            assert (tensor == 1).all()


def test_both_can_be_converted(raw, tmp_path):
    convert(raw / "policy", tmp_path / "policy")
    convert(raw / "reference", tmp_path / "reference")
    verify(tmp_path / "policy")
    verify(tmp_path / "reference")
    reference = read_args(tmp_path / "reference")
    assert (reference.dim, reference.n_layers, reference.n_heads, reference.n_kv_heads, reference.n_future_tokens) == (32, 3, 4, 2, 1)
    assert reference.hidden_dim == 96  # 2/3 of 128 rounded up to 16
    assert [name for name, _ in read_tensors(tmp_path / "policy")] == list(tensor_shapes(read_args(tmp_path / "policy")))


@pytest.mark.slow
def test_transformers_reads_the_reference(raw):
    transformers = pytest.importorskip("transformers")
    model, report = transformers.LlamaForCausalLM.from_pretrained(raw / "reference", output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.float16
    config = model.config
    assert (config.rope_parameters["rope_theta"], config.rms_norm_eps, config.tie_word_embeddings) == (10000.0, 1e-5, False)


def test_equal_seeds_give_equal_bytes(raw, tmp_path):
    write_synthetic(tmp_path / "elsewhere", texts=iter(TEXTS), **SIZES)
    assert contents(tmp_path / "elsewhere") == contents(raw)
    write_synthetic(tmp_path / "elsewhere", texts=TEXTS, **SIZES | {"seed": 4})
    other = contents(tmp_path / "elsewhere")
    assert {name for name, content in contents(raw).items() if other[name] != content} == {
        name for name in other if name.endswith((".pth", ".safetensors"))
    }


AGAIN = """
import json, sys
from wmtp.sources import write_synthetic
arguments = json.loads(sys.stdin.read())
write_synthetic(sys.argv[1], **arguments)
"""


@pytest.mark.slow
def test_another_process_writes_the_same_bytes_in_silence(raw, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", AGAIN, str(tmp_path / "again")],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1"},
        input=json.dumps({"texts": TEXTS} | SIZES),
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert contents(tmp_path / "again") == contents(raw)


def test_a_slice_is_a_trainable_start(raw, tmp_path):
    """Near-uniform predictions, of the slice as of the whole, and a gradient in every weight that a token reaches."""
    convert(raw / "policy", tmp_path / "base")
    build_micro(tmp_path / "base", tmp_path / "micro", dim=32, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=300, multiple_of=16)
    generator = torch.Generator().manual_seed(0)
    for name, vocab_size in (("base", 320), ("micro", 300)):
        model = load_bundle(tmp_path / name, dtype=torch.float32)
        tokens = torch.randint(0, vocab_size, (4, 16), generator=generator)
        targets = torch.randint(0, vocab_size, (4, 16, 3), generator=generator)
        loss = model(tokens, targets).mean()
        assert abs(loss.item() - torch.tensor(vocab_size).log().item()) < 0.1
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_wrong_sizes_leave_nothing(tmp_path):
    for change, said in (
        ({"vocab_size": 9000}, "tokenizer: vocab_size 9000 does not fit the texts: .*too high"),
        ({"dim": 50}, "dim 50"),
        ({"reference": {"width": 3}}, "reference: unknown size width; expected some of dim, n_layers"),
    ):
        with pytest.raises(BundleError, match=said) as caught:
            write_synthetic(tmp_path / "raw", texts=TEXTS, **SIZES | change)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_tokenizer(raw):
    pieces = SentencePieceProcessor(model_file=str(raw / "policy" / "tokenizer.model"))
    assert len(pieces) == 320
    assert (pieces.unk_id(), pieces.bos_id(), pieces.eos_id(), pieces.pad_id()) == (0, 1, 2, -1)
    assert [pieces.id_to_piece(i) for i in (3, 258)] == ["<0x00>", "<0xFF>"]
    odd = ["", " ", "  x", "x  ", "\n\n    y\t\r\n", "\u00e9\u2603\U0001f600 ", "def f(x):\n        return 1234567\n", "ﬁ ½ Å"]
    for text in TEXTS + odd:
        assert pieces.decode(pieces.encode(text)) == text
    assert any(set(pieces.id_to_piece(i)) == {"\u2581"} and len(pieces.id_to_piece(i)) > 1 for i in range(320))


def test_digits_are_split():
    """Numbers are spelled, however often they occur."""
    pieces = SentencePieceProcessor(model_proto=train_tokenizer([*TEXTS, *["2024 2024 2024\n"] * 500], 320))
    assert not any(sum(character.isdigit() for character in pieces.id_to_piece(i)) > 1 for i in range(259, 320))
    assert pieces.encode("2024", out_type=str) == ["2", "0", "2", "4"]


def test_prompt_and_response_join_without_a_blank(raw):
    """No dummy prefix: pieces of the parts decode to the parts, put together."""
    pieces = SentencePieceProcessor(model_file=str(raw / "policy" / "tokenizer.model"))
    assert pieces.decode(pieces.encode("def f(x):\n") + pieces.encode("    return x\n")) == "def f(x):\n    return x\n"


def test_long_texts_are_not_left_out():
    """SentencePiece skips a text above max_sentence_length without a word."""
    short = [f"x{i} = {i}\n" for i in range(50)]
    pieces = SentencePieceProcessor(model_proto=train_tokenizer([*short, "value of the same kind\n" * 4000], 300))
    assert any("value" in pieces.id_to_piece(i) for i in range(len(pieces)))


# local


def test_copies_what_is_expected_and_nothing_else(raw, tmp_path):
    (tmp_path / "from").mkdir()
    for name in ("consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model", "README.md"):
        (tmp_path / "from" / name).write_text(name)
    copy_local(tmp_path / "from", tmp_path / "to", ["consolidated*.pth", "params.json", "tokenizer.model"])
    assert contents(tmp_path / "to") == {
        name: name.encode() for name in ("consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model")
    }


def test_what_is_absent_is_named_and_nothing_is_copied(raw, tmp_path):
    with pytest.raises(BundleError, match=r"policy: expected checksums.txt, found consolidated.pth, params.json, tokenizer.model$"):
        copy_local(raw / "policy", tmp_path / "to", ["*.pth", "checksums.txt"])
    with pytest.raises(BundleError, match=r"nowhere: no such folder; source.checkpoint"):
        copy_local(tmp_path / "nowhere", tmp_path / "to", ["*"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("x")
    with pytest.raises(AtomicError, match="holds other files"):
        copy_local(raw / "policy", tmp_path / "mine", ["*"])
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_copies_both_checkpoints_by_their_layout(raw, tmp_path):
    copy_checkpoints(tmp_path / "raw", raw / "policy", raw / "reference")
    assert contents(tmp_path / "raw") == contents(raw)
    copy_checkpoints(tmp_path / "raw", raw / "reference", raw / "policy")  # replaces, and either layout may stand in either place
    assert sorted(contents(tmp_path / "raw"))[:2] == ["policy/config.json", "policy/model-00001-of-00003.safetensors"]


def test_both_checkpoints_or_none(raw, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=r"empty: expected consolidated\*.pth \(Meta\), model\*.safetensors or .*, found none"):
        copy_checkpoints(tmp_path / "raw", raw / "policy", tmp_path / "empty")
    (tmp_path / "empty" / "pytorch_model.bin").write_text("")
    with pytest.raises(BundleError, match=r"empty: expected config.json, found pytorch_model.bin"):
        copy_checkpoints(tmp_path / "raw", raw / "policy", tmp_path / "empty")
    assert not (tmp_path / "raw").exists()


# the hub, played on this machine


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers like the hub: repository information, redirect-free files with their headers, ranges, errors by X-Error-Code."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.server.requests.append((self.command, self.path))
        self.answer(body=True)

    def answer(self, body):
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path):
            self.information(*found.groups())
        elif found := re.fullmatch(r"/(.+?/.+?)/resolve/(.+?)/(.+)", path):
            self.file(found[1], found[3], body)
        else:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def information(self, name, revision):
        repository = self.server.repositories.get(name)
        if repository is None:
            return self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision not in (None, "main", repository["sha"]):
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        siblings = [
            {"rfilename": file, "size": len(content), "blobId": "0" * 40}
            | ({"lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}} if lfs(file) else {})
            for file, content in repository["files"].items()
        ]
        facts = {"id": name, "modelId": name, "sha": repository["sha"], "siblings": siblings, "private": False, "tags": []}
        return self.send(200, json.dumps(facts).encode(), {"Content-Type": "application/json"})

    def file(self, name, file, body):
        repository = self.server.repositories[name]
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository.get("gated") and token != "granted":
            return self.send(403 if token else 401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted"})
        if file in repository.get("lost", ()) or file not in repository["files"]:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = repository.get("served", {}).get(file, repository["files"][file])
        digest = hashlib.sha256(repository["files"][file]).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": repository["sha"], "Accept-Ranges": "bytes"}
        start = int(re.search(r"\d+", self.headers["Range"])[0]) if body and self.headers.get("Range") else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self.send(206 if start else 200, content[start:], headers)

    def send(self, status, content, headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def lfs(file):
    return file.endswith((".pth", ".safetensors", ".model"))


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.repositories = [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


COMMIT = "5f0b02c75b57c5855da9ae460ce51323ea669d8a"
META_FILES = {
    "7B_1T_4/consolidated.pth": b"weights" * 1000,
    "7B_1T_4/params.json": b"{}",
    "7B_1T_1/consolidated.pth": b"other",
    "7B_1T_1/params.json": b"{}",
    "tokenizer.model": b"pieces",
    "README.md": b"read me",
}
LLAMA_FILES = {
    "config.json": b"{}",
    "model.safetensors.index.json": b"{}",
    "model-00001-of-00001.safetensors": b"tensors",
    "tokenizer.model": b"pieces",
    "tokenizer.json": b"{}",
}
CALL = """
import json, sys
from wmtp import sources
from wmtp.bundle import BundleError
name, arguments = json.loads(sys.argv[1])
try:
    print("result", json.dumps(getattr(sources, name)(*arguments)))
except BundleError as error:
    print("error", error)
"""


def call(hub, tmp_path, name, *arguments, token=None):
    """What a sources function prints in a process of its own: the hub's address is read when its library is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-c", CALL, json.dumps([name, [str(argument) for argument in arguments[:-1]] + [arguments[-1]]])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return done.stdout.strip()


@pytest.mark.slow
def test_download_and_its_errors(hub, tmp_path):
    hub.repositories["meta/mtp"] = {"sha": COMMIT, "files": META_FILES}
    out = tmp_path / "out"
    assert call(hub, tmp_path, "download", "meta/mtp", "main", out, ["7B_1T_4/*", "tokenizer.model"]) == f'result "{COMMIT}"'
    expected = {name: META_FILES[name] for name in ("7B_1T_4/consolidated.pth", "7B_1T_4/params.json", "tokenizer.model")}
    assert contents(out) == expected
    for repo_id, revision, patterns, said in (
        ("meta/mtp", "main", ["7B_1T_8/*"], "error meta/mtp at main: expected 7B_1T_8/*, found 7B_1T_1/consolidated.pth"),
        ("meta/mtp", "v9", ["*"], "error meta/mtp: revision v9: no such branch, tag or commit"),
        ("meta/none", "main", ["*"], "error meta/none: no such repository, or it is private and no token is set: put one in HF_TOKEN"),
        ("not a name", "main", ["*"], "error not a name: cannot be fetched from the hub: HFValidationError"),
    ):
        assert call(hub, tmp_path, "download", repo_id, revision, tmp_path / "other", patterns).startswith(said)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]


@pytest.mark.slow
def test_a_gated_repository(hub, tmp_path):
    hub.repositories["meta/mtp"] = {"sha": COMMIT, "files": META_FILES, "gated": True}
    arguments = ("download", "meta/mtp", "main", tmp_path / "out", ["tokenizer.model"])
    assert call(hub, tmp_path, *arguments) == "error meta/mtp: gated: no token is set: put one in HF_TOKEN or run `hf auth login`"
    assert call(hub, tmp_path, *arguments, token="stranger") == (
        "error meta/mtp: gated: this token's account has not been granted the licence: accept it at https://huggingface.co/meta/mtp"
    )
    assert not (tmp_path / "out").exists()
    assert call(hub, tmp_path, *arguments, token="granted").startswith("result")
    assert contents(tmp_path / "out") == {"tokenizer.model": b"pieces"}


@pytest.mark.slow
def test_files_that_are_lost_or_damaged_on_the_way(hub, tmp_path):
    damaged = META_FILES["7B_1T_4/consolidated.pth"].replace(b"weights", b"wEights", 1)
    hub.repositories["meta/mtp"] = repository = {"sha": COMMIT, "files": META_FILES, "lost": ["7B_1T_4/params.json"]}
    arguments = ("download", "meta/mtp", "main", tmp_path / "out", ["7B_1T_4/*"])
    assert call(hub, tmp_path, *arguments).startswith("error meta/mtp: a listed file cannot be fetched: 404")
    assert [path for _, path in hub.requests if "consolidated" in path]
    repository["lost"] = []
    hub.requests.clear()
    assert call(hub, tmp_path, *arguments).startswith("result")
    assert not [path for _, path in hub.requests if "consolidated" in path]  # kept from the first attempt
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]

    repository["served"] = {"7B_1T_4/consolidated.pth": damaged}
    arguments = ("download", "meta/mtp", COMMIT, tmp_path / "second", ["7B_1T_4/*"])
    assert call(hub, tmp_path, *arguments).startswith("error consolidated.pth: SHA256: expected")
    assert not (tmp_path / "second").exists()
    repository["served"] = {}
    assert call(hub, tmp_path, *arguments).startswith("result")
    assert contents(tmp_path / "second")["7B_1T_4/consolidated.pth"] == META_FILES["7B_1T_4/consolidated.pth"]


@pytest.mark.slow
def test_no_hub_at_all(hub, tmp_path):
    hub.shutdown()
    hub.server_close()
    said = call(hub, tmp_path, "download", "meta/mtp", "main", tmp_path / "out", ["*"])
    assert said.startswith("error meta/mtp: cannot be fetched from the hub: ConnectError")
    assert [file.name for file in tmp_path.iterdir() if file.name != "home"] == []


@pytest.mark.slow
def test_both_checkpoints_from_the_hub(hub, tmp_path):
    hub.repositories["meta/mtp"] = {"sha": COMMIT, "files": META_FILES}
    hub.repositories["lab/llama"] = {"sha": COMMIT[::-1], "files": LLAMA_FILES}
    out = tmp_path / "raw"
    said = call(hub, tmp_path, "download_checkpoints", out, "meta/mtp", "7B_1T_4", "lab/llama", "main")
    assert said == "result " + json.dumps({"policy": COMMIT, "reference": COMMIT[::-1]})
    assert contents(out) == {
        "policy/consolidated.pth": META_FILES["7B_1T_4/consolidated.pth"],
        "policy/params.json": b"{}",
        "policy/tokenizer.model": b"pieces",
        "reference/config.json": b"{}",
        "reference/model-00001-of-00001.safetensors": b"tensors",
        "reference/model.safetensors.index.json": b"{}",
        "reference/tokenizer.model": b"pieces",
    }
    said = call(hub, tmp_path, "download_checkpoints", tmp_path / "new", "meta/mtp", "7B_1T_8", "lab/llama", "main")
    assert said.startswith("error meta/mtp/7B_1T_8: expected consolidated*.pth (Meta)")
    said = call(hub, tmp_path, "download_checkpoints", tmp_path / "new", "lab/llama", "", "lab/llama", "main")
    assert said.startswith("result") and contents(tmp_path / "new" / "policy") == contents(out / "reference")


def test_the_tokenizer_of_a_folder_comes_before_the_repositorys():
    names = {"7B/consolidated.pth", "7B/params.json", "7B/tokenizer.model", "tokenizer.model"}
    assert sources.checkpoint_targets(names, "7B", "repo") == {
        "7B/consolidated.pth": "consolidated.pth",
        "7B/params.json": "params.json",
        "7B/tokenizer.model": "tokenizer.model",
    }
