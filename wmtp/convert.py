"""Checkpoints in: Meta's layout or Hugging Face's Llama layout becomes a bundle, by an explicit table of names.

A table maps a name in the source to ours, or to None where it is knowingly dropped; every other name, and every missing one, is an
error. Weights keep their dtype and their bits. Files are memory-mapped, so that memory holds about one shard of the output.
"""

import contextlib
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten

import torch
from torch import Tensor

from wmtp.atomic import one_line
from wmtp.bundle import BundleError, ModelArgs, check_keys, check_names, open_shard, read_json, tensor_shapes, write_bundle
from wmtp.progress import track

Named = dict[str, Tensor]

META_REQUIRED = ("dim", "n_layers", "n_heads", "multiple_of", "norm_eps")
META_ABSENT = {
    "vocab_size": -1,  # Llama 1 and 2 leave it to the tokenizer; here the embedding's rows decide
    "n_kv_heads": None,  # as many as n_heads: no grouped queries
    "ffn_dim_multiplier": None,  # no multiplier
    "rope_theta": 10000.0,  # Llama 1 and 2
    "n_future_tokens": 1,  # next-token prediction, no extra heads
}
OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6 begins with this number, pickled
COLUMN_SPLIT = ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1", "feed_forward.w3", "output")  # rows of the weight
ROW_SPLIT = ("attention.wo", "feed_forward.w2", "tok_embeddings")  # columns of the weight

HUGGINGFACE_BLOCK = {
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}
HUGGINGFACE_FIXED = {  # key of config.json: the one value that this architecture has; absent means that value
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
}
HUGGINGFACE_WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")


def convert(source: str | Path, out: str | Path, extra: dict | None = None) -> None:
    """Writes the bundle `out` from the folder `source`; `extra` goes into its metadata.json. BundleError names what is wrong."""
    source = Path(source)
    if not source.is_dir():
        raise BundleError(f"{source}: no such folder; expected one with consolidated*.pth (Meta) or config.json (Hugging Face)")
    meta, hugging = any(source.glob("consolidated*.pth")), (source / "config.json").is_file()
    if meta == hugging:
        found = "both" if meta else "neither"
        raise BundleError(
            f"{source}: expected consolidated*.pth (Meta) or config.json (Hugging Face), found {found}; keep one layout there"
        )
    if not (source / "tokenizer.model").is_file():
        raise BundleError(f"{source / 'tokenizer.model'}: missing; it belongs to the checkpoint")
    if meta:
        shards = [load_pickle(file) for file in meta_files(source)]
        args = meta_args(source / "params.json", shards[0])
        check_blocks(source, args, set().union(*shards))
        dropped = apply_table(source, set().union(*shards), meta_table(args))
        stream = merged(source, args, shards)
        facts = {}
    else:
        args, tied = huggingface_args(source / "config.json")
        tensors = huggingface_tensors(source)
        if tied:
            tie_output(source, tensors)
        table = huggingface_table(args)
        dropped = apply_table(source, set(tensors), table)
        stream = renamed(source, args, tensors, {ours: theirs for theirs, ours in table.items() if ours})
        facts = {"tied_embeddings": True} if tied else {}
    tokenizer = (source / "tokenizer.model").read_bytes()
    check_tokenizer(source / "tokenizer.model", tokenizer, args.vocab_size)
    label = f"{'meta' if meta else 'huggingface'}:{source.name}"
    stream = track(stream, f"convert {source.name}", len(tensor_shapes(args)), "tensors")
    write_bundle(out, args, stream, tokenizer, source=label, dropped=dropped, extra=facts | (extra or {}))


def apply_table(source: Path, found: set[str], table: dict[str, str | None]) -> list[str]:
    """Checks the names both ways and returns those that are dropped."""
    dropped = {name for name in found if name in table and table[name] is None}
    check_names(str(source), found - dropped, {name for name, ours in table.items() if ours})
    return sorted(dropped)


def check_blocks(source: Path, args: ModelArgs, names: set[str]) -> None:
    """Meta counts extra heads as layers; a wrong count would otherwise be told as missing tensors, or as unknown ones."""
    found = [re.fullmatch(r"(layers|extra_heads)\.(\d+)\..+", name) for name in names]
    trunk, extra = ({int(one[2]) for one in found if one and one[1] == part} for part in ("layers", "extra_heads"))
    n_trunk, n_extra = len(trunk), len(extra)
    whole = trunk == set(range(n_trunk)) != set() and extra == set(range(n_extra))  # else the names themselves are the fault
    if whole and (n_trunk, n_extra) != (args.n_trunk, args.n_future_tokens - 1):
        raise BundleError(
            f"{source / 'params.json'}: n_layers {args.n_layers} and n_future_tokens {args.n_future_tokens}: expected {args.n_trunk} layers"
            f" and {args.n_future_tokens - 1} extra_heads, found {n_trunk} and {n_extra}, which is n_layers {n_trunk + n_extra} and"
            f" n_future_tokens {n_extra + 1}; correct it, or copy the whole checkpoint"
        )


def expect(source: Path, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise BundleError(f"{source}: {name}: expected {shape} by its configuration, found {tuple(tensor.shape)}")
    return tensor


def check_tokenizer(file: Path, content: bytes, vocab_size: int) -> None:
    """Every id that the tokenizer gives must have a row; further rows are padding."""
    from sentencepiece import SentencePieceProcessor

    try:
        n_pieces = len(SentencePieceProcessor(model_proto=content)) if content else 0
    except RuntimeError:
        n_pieces = 0
    if n_pieces == 0:
        raise BundleError(f"{file}: not a SentencePiece model; other tokenizers (tiktoken) are not supported")
    if n_pieces > vocab_size:
        raise BundleError(f"{file}: {n_pieces} pieces, but the embedding has {vocab_size} rows; take the checkpoint's own tokenizer")


def load_pickle(file: Path) -> Named:
    """Tensors by name, memory-mapped; a pickle that would run code is refused unread."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        names = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({names.group(1)})" if names else ""
        raise BundleError(f"{file}: refused: holds more than tensors{what} and could run code when loaded; save plain tensors") from None
    except PermissionError as error:
        raise BundleError(f"{file}: cannot be read: {error.strerror}") from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        with contextlib.suppress(OSError), open(file, "rb") as start:
            if start.read(len(OLD_MAGIC)) == OLD_MAGIC:
                raise BundleError(
                    f"{file}: in torch's form of before 1.6, which cannot be mapped; load it and torch.save it again"
                ) from None
        raise BundleError(
            f"{file}: not a whole torch file: {shorten(one_line(error), 200, placeholder=' ...')}; copy or download it again"
        ) from None
    if not isinstance(state, dict):
        raise BundleError(f"{file}: expected tensors by name, found {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(name, str):
            raise BundleError(f"{file}: expected tensors by name, found the key {name!r}")
        if not isinstance(value, Tensor):
            raise BundleError(f"{file}: {name}: expected a tensor, found {type(value).__name__}")
        if value.layout != torch.strided or value.is_meta:
            kind = "no numbers (meta)" if value.is_meta else str(value.layout).removeprefix("torch.")
            raise BundleError(f"{file}: {name}: expected a dense tensor, found {kind}")
    return state


def meta_files(source: Path) -> list[Path]:
    found = sorted(file.name for file in source.glob("consolidated*.pth"))
    expected = ["consolidated.pth"] if "consolidated.pth" in found else [f"consolidated.{i:02}.pth" for i in range(len(found))]
    if found != expected:
        raise BundleError(f"{source}: expected {', '.join(expected)}, found {', '.join(found)}; shards are missing or mixed")
    return [source / name for name in found]


def meta_args(file: Path, shard: Named) -> ModelArgs:
    raw = read_json(file, "it belongs to the checkpoint")
    if not isinstance(raw, dict):
        raise BundleError(f"{file}: expected a mapping, found {type(raw).__name__}")
    settings = META_ABSENT | raw
    check_keys(file, settings, [*META_REQUIRED, *META_ABSENT])
    if settings["n_kv_heads"] is None:
        settings["n_kv_heads"] = settings["n_heads"]
    if settings["vocab_size"] == -1:
        if "tok_embeddings.weight" not in shard:
            raise BundleError(f"{file.parent}: missing tensor tok_embeddings.weight")
        settings["vocab_size"] = shard["tok_embeddings.weight"].shape[0]
    try:
        return ModelArgs(**settings)
    except BundleError as error:
        raise BundleError(f"{file}: {error}") from None


def meta_table(args: ModelArgs) -> dict[str, str | None]:
    """Meta's names are ours; rotary frequencies follow from rope_theta and the head width."""
    buffers = ["rope.freqs"] + [f"layers.{i}.attention.inner_attention.rope.freqs" for i in range(args.n_trunk)]
    return {name: name for name in tensor_shapes(args)} | dict.fromkeys(buffers)


def merged(source: Path, args: ModelArgs, shards: list[Named]) -> Iterator[tuple[str, Tensor]]:
    """Model-parallel shards put together as fairscale split them: by rows, by columns, or (norms) equal everywhere."""
    for name, shape in tensor_shapes(args).items():
        if any(name not in shard for shard in shards):
            raise BundleError(f"{source}: {name}: missing in one of the {len(shards)} shards")
        parts = [shard[name] for shard in shards]
        stem = name.removesuffix(".weight")
        if len(parts) == 1:
            tensor = parts[0]
        elif stem.endswith(COLUMN_SPLIT) or stem.endswith(ROW_SPLIT):
            tensor = concatenate(source, name, parts, 0 if stem.endswith(COLUMN_SPLIT) else 1)
        else:
            tensor = parts[0]
            if not all(torch.equal(tensor, part) for part in parts[1:]):
                raise BundleError(f"{source}: {name}: differs between the shards, which all hold a copy; a shard of another model?")
        yield name, expect(source, name, tensor, shape)


def concatenate(source: Path, name: str, parts: list[Tensor], axis: int) -> Tensor:
    if len({(part.dtype, part.ndim, part.shape[1 - axis] if part.ndim == 2 else 0) for part in parts}) > 1 or parts[0].ndim != 2:
        found = ", ".join(f"{part.dtype} {tuple(part.shape)}" for part in parts)
        raise BundleError(f"{source}: {name}: shards cannot be joined along axis {axis}: {found}")
    return torch.cat(parts, axis)


def huggingface_args(file: Path) -> tuple[ModelArgs, bool]:
    """(settings, are embedding and output tied) from config.json; what this architecture cannot express is an error."""
    config = read_json(file)
    if not isinstance(config, dict):
        raise BundleError(f"{file}: expected a mapping, found {type(config).__name__}")
    for key, value in HUGGINGFACE_FIXED.items():
        if config.get(key, value) != value:
            raise BundleError(f"{file}: {key}: expected {value}, found {config[key]}; only plain Llama models can be converted")
    required = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size", "rms_norm_eps"]
    if missing := [key for key in required if key not in config]:
        raise BundleError(f"{file}: missing key {missing[0]}")
    for key in ("hidden_size", "num_attention_heads"):
        if type(config[key]) is not int or config[key] < 1:
            raise BundleError(f"{file}: {key}: expected a positive integer, found {config[key]!r}")
    if config.get("head_dim") not in (None, config["hidden_size"] // config["num_attention_heads"]):
        raise BundleError(f"{file}: head_dim: expected hidden_size / num_attention_heads, found {config['head_dim']}")
    try:
        args = ModelArgs(
            dim=config["hidden_size"],
            n_layers=config["num_hidden_layers"],
            n_heads=config["num_attention_heads"],
            n_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            vocab_size=config["vocab_size"],
            multiple_of=1,
            ffn_dim_multiplier=None,
            norm_eps=config["rms_norm_eps"],
            rope_theta=rotary_theta(file, config),
            n_future_tokens=1,
            ffn_hidden_dim=config["intermediate_size"],
            max_seq_len=config.get("max_position_embeddings", 2048),
        )
    except BundleError as error:
        raise BundleError(f"{file}: {error}") from None
    return args, config.get("tie_word_embeddings", False)


def rotary_theta(file: Path, config: dict) -> float:
    """From the key itself or one of the two mappings that versions of Transformers have kept it in; where they differ, versions do too."""
    thetas = {key: config[key] for key in ("rope_theta",) if key in config}
    for key in ("rope_parameters", "rope_scaling"):
        found = config.get(key) or {}
        if not isinstance(found, dict):
            raise BundleError(f"{file}: {key}: expected a mapping, found {found!r}")
        if scaled := [found[name] for name in ("rope_type", "type") if found.get(name, "default") != "default"]:
            raise BundleError(f"{file}: {key}: expected the type default, found {scaled[0]}; scaled rotary embeddings are not supported")
        if "rope_theta" in found:
            thetas[f"{key}.rope_theta"] = found["rope_theta"]
    if any(theta != next(iter(thetas.values())) for theta in thetas.values()):
        told = " and ".join(f"{key} {value}" for key, value in thetas.items())
        raise BundleError(f"{file}: {told} disagree; keep the one that the model was trained with")
    return next(iter(thetas.values()), 10000.0)


def huggingface_table(args: ModelArgs) -> dict[str, str | None]:
    table: dict[str, str | None] = {"model.embed_tokens.weight": "tok_embeddings.weight"}
    table |= {
        f"model.layers.{i}.{theirs}": f"layers.{i}.{ours}" for i in range(args.n_layers) for theirs, ours in HUGGINGFACE_BLOCK.items()
    }
    table |= {"model.norm.weight": "norm.weight", "lm_head.weight": "output.weight"}
    buffers = ["model.rotary_emb.inv_freq"] + [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(args.n_layers)]
    return table | dict.fromkeys(buffers)


def tie_output(source: Path, tensors: Named) -> None:
    """Tied weights are stored once: the bundle gets them twice, and metadata.json says so."""
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is not None and not torch.equal(tensors.setdefault("lm_head.weight", embedding), embedding):
        raise BundleError(f"{source}: lm_head.weight: config.json says tie_word_embeddings, but it differs from model.embed_tokens.weight")


def huggingface_tensors(source: Path) -> Named:
    """Every tensor, memory-mapped; safetensors come before pickles where a folder has both. The index is checked both ways."""
    chosen = next((source / name for name in HUGGINGFACE_WEIGHTS if (source / name).is_file()), None)
    if chosen is None:
        raise BundleError(f"{source}: no weights: expected one of {', '.join(HUGGINGFACE_WEIGHTS)}")
    if chosen.suffix != ".json":
        return load_weights(chosen)
    index = read_json(chosen)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) and Path(name).name == name != ".." for name in places.values()):
        raise BundleError(f"{chosen}: weight_map: expected tensor names to file names in this folder")
    tensors: Named = {}
    for name in sorted(set(places.values())):
        if not (source / name).is_file():
            raise BundleError(f"{source / name}: missing; {chosen.name} names it; copy or download it again")
        part = load_weights(source / name)
        check_names(str(source / name), set(part), {tensor for tensor, file in places.items() if file == name})
        tensors |= part
    return tensors


def load_weights(file: Path) -> Named:
    if file.suffix == ".bin":
        return load_pickle(file)
    with open_shard(file, "pt", "copy or download it again") as shard:
        return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118  (a handle, not a mapping)


def renamed(source: Path, args: ModelArgs, tensors: Named, theirs: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    for name, shape in tensor_shapes(args).items():
        tensor = expect(source, theirs[name], tensors[theirs[name]], shape)
        if name.endswith("attention.wq.weight"):
            tensor = interleave(tensor, args.n_heads)
        elif name.endswith("attention.wk.weight"):
            tensor = interleave(tensor, args.n_kv_heads)
        yield name, tensor


def interleave(weight: Tensor, n_heads: int) -> Tensor:
    """[N*H, D] from Hugging Face's rotary order to Meta's: within each head, row j and row j + H/2 become rows 2j and 2j + 1.

    Meta rotates neighbouring pairs, Hugging Face the two halves of a head; keys have n_kv_heads heads.
    """
    rows, width = weight.shape
    return weight.view(n_heads, 2, rows // n_heads // 2, width).transpose(1, 2).reshape(rows, width)


def half_split(weight: Tensor, n_heads: int) -> Tensor:
    """[N*H, D] from Meta's rotary order to Hugging Face's; the inverse of `interleave`."""
    rows, width = weight.shape
    return weight.view(n_heads, rows // n_heads // 2, 2, width).transpose(1, 2).reshape(rows, width)
