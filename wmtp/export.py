"""python -m wmtp.export MODEL OUT: the next-token path of a bundle as a Hugging Face Llama, for Transformers without code of ours.

Extra heads are left out: a LlamaForCausalLM has no place for them. Names and rotary order are the inverse of wmtp.convert.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from wmtp.atomic import AtomicError, atomic_directory, require_space
from wmtp.bundle import (
    INDEX,
    ITEM_BYTES,
    BundleError,
    ModelArgs,
    bundle_sha256,
    plan_shards,
    read_args,
    read_json,
    read_metadata,
    read_tensors,
    save_tensors,
    tensor_shapes,
    verify,
)
from wmtp.convert import HUGGINGFACE_FIXED, half_split, huggingface_table
from wmtp.tokenizer_json import FastTokenizer, fast_tokenizer

SHARD_BYTES = 1 << 30  # held in memory, one at a time
MARKER = ".wmtp-export"  # a folder that holds it is an earlier export, and replaced
FILES = {"eval.json": "of the evaluation", "train.json": "of the training"}


def export(bundle: str | Path, out: str | Path, dtype: str | None = None, metrics: str | Path | None = None) -> FastTokenizer:
    """Writes OUT whole or not at all: config, weights in `dtype` (default: the bundle's), tokenizer, and a model card with the figures of
    the folder `metrics`, if one is given. Returns the tokenizer, which knows the pieces that it cannot reach.
    """
    verify(bundle)
    args, metadata = read_args(bundle).with_heads(1), read_metadata(bundle)
    dtype = dtype or metadata["dtype"]
    if dtype not in ITEM_BYTES:
        raise BundleError(f"dtype: expected one of {', '.join(ITEM_BYTES)}, found {dtype}")
    figures = figures_of(metrics, metadata["extra"]) if metrics else {}
    content = (Path(bundle) / "tokenizer.model").read_bytes()
    tokenizer = fast_tokenizer(content, f"{bundle}/tokenizer.model")
    ids = special_ids(content)
    with atomic_directory(out, marker=MARKER) as folder:
        (folder / MARKER).touch()
        write_weights(folder, bundle, args, dtype)
        write_json(folder / "config.json", config(args, dtype, ids))
        write_json(folder / "generation_config.json", {"bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "do_sample": False})
        write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, args))
        (folder / "tokenizer.json").write_text(tokenizer.text, encoding="utf-8")
        (folder / "tokenizer.model").write_bytes(content)
        (folder / "README.md").write_text(card(Path(bundle), args, metadata, dtype, figures, tokenizer), encoding="utf-8")
    return tokenizer


def figures_of(metrics: str | Path, extra: dict[str, Any]) -> dict[str, dict]:
    """eval.json and train.json of the folder metrics/METHOD; BundleError where they are of another training than the bundle's, as far as
    its name, steps and FLOPs tell.
    """
    if "n_steps" not in extra:
        raise BundleError(f"{metrics}: the model says of no training by wmtp, so these figures cannot be its own; leave --metrics out")
    name, method = Path(os.path.abspath(metrics)).name, extra.get("method")
    if method is not None and name != method and not name.startswith(f"{method}-"):
        raise BundleError(f"{metrics}: --metrics: expected a folder named {method}, as the model's method, found {name}")
    figures = {name: read_json(Path(metrics) / name) for name in FILES}
    if other := [name for name, found in figures.items() if not isinstance(found, dict)]:
        raise BundleError(f"{metrics}/{other[0]}: expected a mapping, found {type(figures[other[0]]).__name__}; evaluate the model again")
    for key, known in (("steps", extra["n_steps"]), ("train_flops", extra.get("flops"))):
        if (found := figures["train.json"].get(key)) != known:
            raise BundleError(f"{metrics}/train.json: {key}: expected {known} as the model says of itself, found {found}")
    return figures


def special_ids(content: bytes) -> dict[str, int]:
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_proto=content)
    return {"bos": pieces.bos_id(), "eos": pieces.eos_id()}


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def config(args: ModelArgs, dtype: str, ids: dict[str, int]) -> dict[str, Any]:
    fixed = {key: value for key, value in HUGGINGFACE_FIXED.items() if value is not None}
    return {
        "architectures": ["LlamaForCausalLM"],
        **fixed,
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": args.max_seq_len,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "tie_word_embeddings": False,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "torch_dtype": dtype,
    }


def tokenizer_config(tokenizer: FastTokenizer, args: ModelArgs) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.bos,
        "eos_token": tokenizer.eos,
        "unk_token": tokenizer.unk,
        "model_max_length": args.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }


def their_tensors(bundle: str | Path, args: ModelArgs, dtype: str) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's names and rotary order, in the order of our names."""
    theirs = {ours: name for name, ours in huggingface_table(args).items() if ours}
    for name, tensor in read_tensors(bundle, n_future=1):
        if name.endswith("attention.wq.weight"):
            tensor = half_split(tensor, args.n_heads)
        elif name.endswith("attention.wk.weight"):
            tensor = half_split(tensor, args.n_kv_heads)
        yield theirs[name], _as(name, tensor, getattr(torch, dtype)).contiguous()


def _as(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not bool(tensor.isfinite().all()):
        raise BundleError(f"{name}: holds numbers that are not finite; such a model is not exported")
    found = tensor.to(dtype)
    if not bool(found.isfinite().all()):
        raise BundleError(f"{name}: holds numbers that are not finite in {str(dtype).removeprefix('torch.')}; take another --dtype")
    return found


def write_weights(folder: Path, bundle: str | Path, args: ModelArgs, dtype: str) -> None:
    """One shard is held at a time."""
    theirs = {ours: name for name, ours in huggingface_table(args).items() if ours}
    shapes = {theirs[name]: shape for name, shape in tensor_shapes(args).items()}
    n_bytes = sum(torch.Size(shape).numel() for shape in shapes.values()) * ITEM_BYTES[dtype]
    require_space(folder, n_bytes + (1 << 20))
    plan, stream = plan_shards(shapes, dtype, SHARD_BYTES), their_tensors(bundle, args, dtype)
    for file, names in plan.items():
        shard = {name: tensor for _, (name, tensor) in zip(names, stream)}
        save_tensors(shard, folder / file, {"format": "pt"})
    if len(plan) > 1:
        places = {name: file for file, names in plan.items() for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": n_bytes}, "weight_map": places})


def card(path: Path, args: ModelArgs, metadata: dict, dtype: str, figures: dict[str, dict], tokenizer: FastTokenizer) -> str:
    extra = metadata["extra"]
    trained = "no training by wmtp"
    if "n_steps" in extra:
        what = f"method `{extra['method']}`" if "method" in extra else f"stage `{extra.get('stage', 'unknown')}`"
        trained = f"by wmtp's {what}, {extra['n_steps']} optimizer steps"
    if lora := extra.get("lora"):
        trained += f", of adapters (rank {lora['rank']}, alpha {lora['alpha']:g}, on {', '.join(lora['targets'])}) that are merged"
    lines = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [code, wmtp]\n---\n",
        f"# {path.name}\n",
        "The next-token path of a model that wmtp, weighted multi-token prediction, wrote; its extra heads are left out.\n",
        "| | |\n|---|---|",
        f"| source | {metadata['source']} |",
        f"| training | {trained} |",
        f"| blocks, width, vocabulary | {args.n_layers}, {args.dim}, {args.vocab_size} |",
        f"| dtype | {dtype}{'' if dtype == metadata['dtype'] else ', trained in ' + metadata['dtype']} |",
        f"| SHA256 of the bundle | {bundle_sha256(path)} |",
    ]
    if "start_sha256" in extra:
        lines.append(f"| SHA256 of the model it started from | {extra['start_sha256']} |")
    for name, words in FILES.items():
        if name in figures:
            lines += [f"\n## Figures {words}\n\n| | |\n|---|---|", *(f"| {key} | {value} |" for key, value in flat(figures[name]))]
    if "eval.json" in figures:
        lines.append(
            "\nA benchmark's name says its form: with `problems_sha256` other than the published file's, problems of that form were made by"
            " wmtp's own generator."
        )
    if tokenizer.unreachable:
        lines.append(
            f"\n{len(tokenizer.unreachable)} pieces of tokenizer.model cannot be given by tokenizer.json (wmtp/tokenizer_json.py): text"
            " with them has other ids there than under SentencePiece."
        )
    return "\n".join(lines) + "\n"


def flat(figures: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", f"{value:.6g}" if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m wmtp.export", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a bundle: models/verifiable and the like")
    parser.add_argument("out", metavar="OUT", help="a folder that from_pretrained loads; an earlier export there is replaced")
    parser.add_argument("--dtype", choices=tuple(ITEM_BYTES), help="of the weights (default: as they are)")
    parser.add_argument("--metrics", metavar="DIR", help="metrics/verifiable and the like: figures for the model card")
    given = parser.parse_args()
    try:
        tokenizer = export(given.model, given.out, given.dtype, given.metrics)
    except OSError as error:
        sys.exit(f"export: {error.filename or given.out}: {error.strerror or error}")
    except (BundleError, AtomicError, SafetensorError) as error:
        sys.exit(f"export: {error}")
    print(f"{given.out}: a LlamaForCausalLM with its tokenizer")
    if tokenizer.unreachable:
        print(f"{len(tokenizer.unreachable)} pieces of the tokenizer cannot be reached by tokenizer.json; the model card says why")


if __name__ == "__main__":
    main()
