"""Where checkpoints come from: made on the spot, copied from a folder, or fetched from the Hugging Face hub.

The synthetic source writes the very file layouts of the real ones, so that everything after it runs the same code.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from wmtp.atomic import atomic_directory, one_line, require_space
from wmtp.bundle import BundleError, ModelArgs, plan_shards, save_tensors, tensor_shapes

META_SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "n_future_tokens")
META_KEYS = (*META_SIZES, "rope_theta", "norm_eps", "multiple_of", "ffn_dim_multiplier", "vocab_size")
EMBEDDINGS, OUTPUTS = ("tok_embeddings", "embed_tokens"), ("output", "lm_head")
RESIDUAL = ("attention.wo.weight", "feed_forward.w2.weight", "self_attn.o_proj.weight", "mlp.down_proj.weight")


def write_synthetic(
    out: str | Path,
    *,
    texts: Iterable[str],
    seed: int,
    dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    vocab_size: int,
    multiple_of: int,
    n_future_tokens: int,
    reference: dict,
) -> None:
    """Writes out/policy in Meta's layout and out/reference in Hugging Face's, random weights in float16, one tokenizer.

    `texts` train the tokenizer; `reference` has the sizes in which the reference differs. Equal arguments give equal bytes.
    """
    common = {"vocab_size": vocab_size, "ffn_dim_multiplier": 1.0, "norm_eps": 1e-5, "rope_theta": 10000.0}
    sizes = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "multiple_of": multiple_of}
    if unknown := sorted(set(reference) - set(sizes)):
        raise BundleError(f"reference: unknown size {unknown[0]}; expected some of {', '.join(sizes)}")
    policy = ModelArgs(**common, **sizes, n_future_tokens=n_future_tokens)
    other = ModelArgs(**common, **(sizes | reference), n_future_tokens=1)
    tokenizer = train_tokenizer(texts, vocab_size)
    with atomic_directory(out, marker="policy/params.json") as folder:
        for name in ("policy", "reference"):
            (folder / name).mkdir()
            (folder / name / "tokenizer.model").write_bytes(tokenizer)
        write_meta(folder / "policy", policy, random_tensors(tensor_shapes(policy), policy.n_trunk, seed))
        write_huggingface(folder / "reference", other, random_tensors(huggingface_shapes(other), other.n_trunk, seed + 1))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """A byte-fallback BPE model without dummy prefix, under which decode(encode(text)) == text for every text."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=1 << 20,  # bytes; SentencePiece leaves longer texts out silently
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise BundleError(f"tokenizer: vocab_size {vocab_size} does not fit the texts: {one_line(error)}") from None
    return model.getvalue()


def random_tensors(shapes: dict[str, tuple[int, ...]], n_blocks: int, seed: int) -> dict:
    """Normal weights of deviation 1 / sqrt(inputs), smaller where a block writes into the residual stream; embeddings 1, output 0.02.

    Embeddings as large as what the blocks add keep tokens apart from the first step on: with deviation 0.02 throughout, a micro model
    learns to copy a number from its prompt only after three times as many tokens.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=torch.float16)
            continue
        layer = name.split(".")[-2]
        deviation = 1.0 if layer in EMBEDDINGS else 0.02 if layer in OUTPUTS else shape[1] ** -0.5
        deviation /= (2 * n_blocks) ** 0.5 if name.endswith(RESIDUAL) else 1
        tensors[name] = (torch.randn(shape, generator=generator) * deviation).half()
    return tensors


def write_meta(folder: Path, args: ModelArgs, tensors: dict) -> None:
    """consolidated.pth and params.json as Meta publishes them: its names, its keys, the rotary frequencies beside the weights."""
    import torch

    from wmtp import pickled

    frequencies = args.rope_theta ** -(torch.arange(0, args.head_dim, 2, dtype=torch.float32) / args.head_dim)
    pickled.save(tensors | {"rope.freqs": frequencies.half()}, folder / "consolidated.pth")
    (folder / "params.json").write_text(json.dumps({key: getattr(args, key) for key in META_KEYS}) + "\n")


def huggingface_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a LlamaForCausalLM, in its own order."""
    width, hidden, keys = args.dim, args.hidden_dim, args.n_kv_heads * args.head_dim
    block = {
        "self_attn.q_proj.weight": (width, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.o_proj.weight": (width, width),
        "mlp.gate_proj.weight": (hidden, width),
        "mlp.up_proj.weight": (hidden, width),
        "mlp.down_proj.weight": (width, hidden),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (args.vocab_size, width)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(args.n_layers) for name, shape in block.items()}
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (args.vocab_size, width)}


def write_huggingface(folder: Path, args: ModelArgs, tensors: dict) -> None:
    """A sharded Llama as `save_pretrained` leaves it."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards = plan_shards(huggingface_shapes(args), "float16", total // 2)  # at least two, as large checkpoints have
    for file, names in shards.items():
        save_tensors({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
    places = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": args.max_seq_len,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def select(names: Iterable[str], patterns: list[str], where: str) -> list[str]:
    """The names that match a pattern (shell wildcards, over the whole path); a pattern that matches nothing is an error."""
    names = sorted(names)
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            near = ", ".join(name for name in names[:8]) or "nothing"
            raise BundleError(f"{where}: expected {pattern}, found {near}{', ...' if len(names) > 8 else ''}")
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def layout_patterns(names: set[str], where: str) -> list[str]:
    """The files of a checkpoint, by the layout that is there; Meta's comes first, and safetensors before pickles."""
    if any(fnmatch(name, "consolidated*.pth") for name in names):
        return ["consolidated*.pth", "params.json", "tokenizer.model"]
    for weights, index in (("model*.safetensors", "model.safetensors.index.json"), ("pytorch_model*.bin", "pytorch_model.bin.index.json")):
        if any(fnmatch(name, weights) for name in names):
            return ["config.json", weights, "tokenizer.model"] + [index] * (index in names)
    raise BundleError(f"{where}: expected consolidated*.pth (Meta), model*.safetensors or pytorch_model*.bin (Hugging Face), found none")


def copy_local(path: str | Path, out: str | Path, expected: list[str]) -> None:
    """Copies the files of folder `path` that match `expected` (wildcards allowed, each must match); all of them or none."""
    with atomic_directory(out) as folder:
        copy_files(Path(path), folder, expected)


def copy_checkpoints(out: str | Path, policy: str | Path, reference: str | Path) -> None:
    """Copies two checkpoints, each in Meta's or Hugging Face's layout, to out/policy and out/reference; both or none."""
    with atomic_directory(out, marker="policy") as folder:
        for name, path in (("policy", Path(policy)), ("reference", Path(reference))):
            copy_files(path, folder / name, None)


def copy_files(path: Path, folder: Path, expected: list[str] | None) -> None:
    if not path.is_dir():
        raise BundleError(f"{path}: no such folder; source.checkpoint names where the checkpoint lies")
    present = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    names = select(present, layout_patterns(present, str(path)) if expected is None else expected, str(path))
    require_space(folder.parent, sum((path / name).stat().st_size for name in names))
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path / name, folder / name)


def download(repo_id: str, revision: str, out: str | Path, allow_patterns: list[str]) -> str:
    """Fetches the matching files of a hub repository, each pattern matching at least one, and returns the commit's hash.

    Size, and SHA256 where the hub knows it, are checked. What was fetched before an interruption is kept in a hidden sibling of
    `out` and used by the next call. HF_TOKEN and HF_ENDPOINT are respected.
    """
    where = f"{repo_id} at {revision}"
    kept, targets, commit = fetch(repo_id, revision, Path(out), lambda names: {name: name for name in select(names, allow_patterns, where)})
    with atomic_directory(out) as place:
        move(kept, targets, place)
    return commit


def download_checkpoints(
    out: str | Path, policy: str, policy_folder: str, reference: str, revision: str, reference_revision: str = "main"
) -> dict[str, str]:
    """Fetches two checkpoints from the hub to out/policy and out/reference, both or none; returns the commits.

    `policy_folder` is a folder inside the policy's repository; a tokenizer.model above it serves where it has none of its own.
    """
    sources = {"policy": (policy, revision, policy_folder), "reference": (reference, reference_revision, "")}
    found = {}
    for name, (repo_id, commit, folder) in sources.items():
        beside = Path(out).with_name(f"{Path(out).name}-{name}")
        found[name] = fetch(repo_id, commit, beside, lambda names, at=folder, where=repo_id: checkpoint_targets(names, at, where))
    with atomic_directory(out, marker="policy") as place:
        for name, (kept, targets, _) in found.items():
            move(kept, targets, place / name)
    return {name: commit for name, (_, _, commit) in found.items()}


def checkpoint_targets(names: set[str], folder: str, where: str) -> dict[str, str]:
    """Path in the repository to path in the checkpoint, for the files that belong to the checkpoint."""
    inside = {str(PurePosixPath(name).relative_to(folder)): name for name in names if PurePosixPath(name).is_relative_to(folder)}
    if "tokenizer.model" in names:
        inside.setdefault("tokenizer.model", "tokenizer.model")
    where = f"{where}/{folder}".rstrip("/")
    return {inside[target]: target for target in select(inside, layout_patterns(set(inside), where), where)}


def fetch(repo_id: str, revision: str, out: Path, choose: Callable[[set[str]], dict[str, str]]) -> tuple[Path, dict[str, str], str]:
    """(folder beside `out` with the chosen files, path there to path wanted, commit hash)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    api = HfApi()
    try:
        info = api.repo_info(repo_id, revision=revision, files_metadata=True)
        files = {file.rfilename: file for file in info.siblings}
        targets = choose(set(files))
        kept = out.absolute().with_name(f".{out.name}.{repo_id.replace('/', '.')}.{info.sha[:12]}.download")
        kept.mkdir(parents=True, exist_ok=True)
        require_space(kept, sum(files[name].size for name in targets if not (kept / name).is_file()))
        for name in targets:
            api.hf_hub_download(repo_id, name, revision=info.sha, local_dir=kept)
            check_download(kept / name, files[name])
    except (HTTPError, HFValidationError, OSError) as error:
        raise BundleError(explain(error, repo_id, revision)) from None
    return kept, targets, info.sha


def move(kept: Path, targets: dict[str, str], place: Path) -> None:
    for name, target in targets.items():
        (place / target).parent.mkdir(parents=True, exist_ok=True)
        (kept / name).rename(place / target)
    shutil.rmtree(kept)


def check_download(file: Path, expected) -> None:
    if file.stat().st_size != expected.size:
        file.unlink()
        raise BundleError(f"{file.name}: expected {expected.size} bytes, found another size; removed, run again")
    if expected.lfs is None:
        return
    with open(file, "rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != expected.lfs.sha256:
        file.unlink()
        raise BundleError(f"{file.name}: SHA256: expected {expected.lfs.sha256}, found {found}; removed, run again")


def explain(error: Exception, repo_id: str, revision: str) -> str:
    """One line for what the hub answered, and what to do about it."""
    from huggingface_hub import errors, get_token

    token = get_token() is not None
    page = f"https://huggingface.co/{repo_id}"
    login = "no token is set: put one in HF_TOKEN or run `hf auth login`"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo_id}: gated: " + (f"this token's account has not been granted the licence: accept it at {page}" if token else login)
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id}: revision {revision}: no such branch, tag or commit; see {page}/commits"
    if isinstance(error, errors.EntryNotFoundError):
        return f"{repo_id}: a listed file cannot be fetched: {one_line(error)[:200]}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{repo_id}: no such repository, or it is private and " + ("this token may not read it" if token else login)
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
        return f"{repo_id}: the token is invalid or expired: renew HF_TOKEN"
    return f"{repo_id}: cannot be fetched from the hub: {type(error).__name__}: {one_line(error)[:200]}"
