"""Small models out of large ones: the micro bundle cut from a base bundle, and extra heads grown from the last block."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from wmtp.bundle import (
    ITEM_BYTES,
    BundleError,
    ModelArgs,
    bundle_sha256,
    read_args,
    read_metadata,
    read_tensors,
    tensor_shapes,
    verify,
    write_bundle,
)

SPACE = "\u2581"  # SentencePiece's mark for a blank


def build_micro(
    bundle: str | Path,
    out: str | Path,
    *,
    dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    vocab_size: int,
    multiple_of: int,
    layers: list[int] | None = None,
    max_megabytes: float = 50.0,
) -> None:
    """Cuts a bundle down: the first `dim` channels, attention heads, feed-forward units and pieces, and some of the blocks.

    `n_layers` counts the extra heads, all of which stay. `layers` names the trunk blocks that are kept, in order; without it they are
    spread evenly and the last is head 0. Megabytes are 10^6 bytes of weights and tokenizer. The dtype stays. What comes out is noise
    with plausible scales, to be trained.
    """
    verify(bundle)
    args, metadata = read_args(bundle), read_metadata(bundle)
    sizes = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "vocab_size": vocab_size}
    small = replace(args, **sizes, multiple_of=multiple_of, ffn_hidden_dim=None)
    for key in (*sizes, "hidden_dim", "head_dim"):
        if getattr(small, key) > getattr(args, key):
            raise BundleError(f"{bundle}: {key}: a slice has at most {getattr(args, key)}, asked for {getattr(small, key)}")
    blocks = spread(args.n_trunk, small.n_trunk) if layers is None else layers
    whole = all(type(block) is int for block in blocks)
    if not whole or len(blocks) != small.n_trunk or sorted(set(blocks)) != blocks or not 0 <= blocks[0] <= blocks[-1] < args.n_trunk:
        raise BundleError(f"layers: expected {small.n_trunk} ascending blocks of 0..{args.n_trunk - 1}, found {blocks}")
    tokenizer, rows = cut_tokenizer((Path(bundle) / "tokenizer.model").read_bytes(), vocab_size)
    n_bytes = sum(map(math.prod, tensor_shapes(small).values())) * ITEM_BYTES[metadata["dtype"]] + len(tokenizer)
    if n_bytes > max_megabytes * 1e6:
        raise BundleError(f"{out}: {n_bytes / 1e6:.1f} MB, more than the {max_megabytes} MB allowed; make it smaller or raise the limit")
    stream = finite(bundle, sliced(dict(read_tensors(bundle)), args, small, blocks, rows))
    source = f"slice of {metadata['source']}"
    # What the bundle learned from stays known of its slice; the cost of that training is not the slice's.
    inherited = {key: value for key, value in metadata["extra"].items() if key != "flops"}
    extra = inherited | {"sliced_from": bundle_sha256(bundle), "layers": blocks}
    write_bundle(out, small, stream, tokenizer, source=source, dropped=metadata["dropped"], extra=extra)


def spread(n_blocks: int, n_kept: int) -> list[int]:
    """`n_kept` of `n_blocks` at even distances, first and last among them; of one, the last."""
    if n_kept == 1:
        return [n_blocks - 1]
    return [i * (n_blocks - 1) // (n_kept - 1) for i in range(n_kept)]


def sliced(
    tensors: Mapping[str, Tensor], args: ModelArgs, small: ModelArgs, blocks: list[int], rows: list[int]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `small` as copies out of those of `args`: trunk block i from blocks[i], vocabulary row i from rows[i]."""
    origin = {f"layers.{new}": f"layers.{old}" for new, old in enumerate(blocks)}
    for name, shape in tensor_shapes(small).items():
        place = ".".join(name.split(".")[:2])
        tensor = tensors[name.replace(place, origin.get(place, place), 1)]
        if name.endswith(("attention.wq.weight", "attention.wk.weight", "attention.wv.weight")):
            tensor = cut_heads(tensor, args.head_dim, small.head_dim)
        elif name.endswith("attention.wo.weight"):
            tensor = cut_heads(tensor.T, args.head_dim, small.head_dim).T
        elif name in ("tok_embeddings.weight", "output.weight"):
            tensor = tensor[rows]
        yield name, tensor[tuple(slice(0, size) for size in shape)].clone(memory_format=torch.contiguous_format)


def finite(where: str | Path, stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in stream:
        if not tensor.isfinite().all():
            raise BundleError(f"{where}: {name}: expected finite weights, found NaN or infinity; convert the checkpoint again")
        yield name, tensor


def cut_heads(weight: Tensor, head_dim: int, kept: int) -> Tensor:
    """[N*head_dim, D] to [N*kept, D]: the first `kept` rows of every head, whole rotary pairs since Meta's pairs are neighbours."""
    return weight.reshape(-1, head_dim, weight.shape[1])[:, :kept].reshape(-1, weight.shape[1])


def cut_tokenizer(content: bytes, n_pieces: int) -> tuple[bytes, list[int]]:
    """(the SentencePiece model with its first `n_pieces` pieces, the old id of each); ids stay what they were.

    The one exception: a blank alone has a late id in Llama's vocabulary, and without it blanks would not survive decoding; where the
    cut loses it, it takes the last id. Every other lost character falls back to its bytes.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import SentencePieceProcessor
    from sentencepiece import sentencepiece_model_pb2 as schema

    model = schema.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError:
        raise BundleError("tokenizer.model: not a SentencePiece model") from None
    pieces = list(model.pieces)
    if not pieces or not model.trainer_spec.byte_fallback:
        raise BundleError("tokenizer.model: expected pieces with byte fallback, so that any text survives a cut; found none")
    plain = (schema.ModelProto.SentencePiece.NORMAL, schema.ModelProto.SentencePiece.USER_DEFINED)
    needed = 2 + max(i for i, piece in enumerate(pieces) if piece.type not in plain)  # bytes, control pieces and the blank
    if not needed <= n_pieces <= len(pieces):
        raise BundleError(
            f"tokenizer.model: vocab_size: expected {needed} (bytes and control pieces) to {len(pieces)}, asked for {n_pieces}"
        )
    rows = list(range(n_pieces))
    blank = next((i for i, piece in enumerate(pieces) if piece.piece == SPACE), None)
    if blank is not None and blank >= n_pieces:
        rows[-1] = blank
    del model.pieces[:]
    model.pieces.extend(pieces[i] for i in rows)
    model.trainer_spec.vocab_size = n_pieces
    cut = model.SerializeToString(deterministic=True)
    SentencePieceProcessor(model_proto=cut)  # a model that SentencePiece cannot load must not leave this room
    return cut, rows


def grow_heads(bundle: str | Path, out: str | Path, n_future: int) -> None:
    """The bundle with `n_future` heads: those it has stay, each further one starts as a copy of the last block (head 0)."""
    verify(bundle)
    args, metadata = read_args(bundle), read_metadata(bundle)
    if n_future <= args.n_future_tokens:
        raise BundleError(f"{bundle}: n_future: expected more than the {args.n_future_tokens} heads it has, asked for {n_future}")
    tensors = dict(read_tensors(bundle))
    stream = ((name, tensors[source]) for name, source in grown_from(args, n_future).items())
    tokenizer = (Path(bundle) / "tokenizer.model").read_bytes()
    extra = metadata["extra"] | {"heads_grown_from": args.n_future_tokens}
    write_bundle(out, args.with_heads(n_future), stream, tokenizer, source=metadata["source"], dropped=metadata["dropped"], extra=extra)


def grown_from(args: ModelArgs, n_future: int) -> dict[str, str]:
    """For every tensor of the model with `n_future` heads, in a bundle's order, the tensor of `args` that it starts as."""
    held, last = tensor_shapes(args), f"layers.{args.n_trunk - 1}."
    return {name: name if name in held else last + name.split(".", 2)[2] for name in tensor_shapes(args.with_heads(n_future))}
