"""A SentencePiece BPE model as Hugging Face's tokenizer.json: the same ids, no code of ours.

SentencePiece merges characters, of which a piece of one's own is not needed: `cut_tokenizer` leaves vocabularies that lack most of them
and spell them as bytes where no merge takes them in. Hugging Face's BPE needs a token for whatever it merges. So there are two forms:

- characters: every character that a longer piece has is a piece itself, as in Llama's own vocabulary;
- bytes: text is merged from its bytes, which have tokens in any case. A character of two bytes that is a piece is a merge of them; a
  piece with one of more bytes, or with one that is no piece, cannot be reached. Such pieces are counted: they are decoded like any other,
  but text that SentencePiece gives them for is spelled by other ids. And where a byte's letter is a piece, the token of that byte, which
  SentencePiece then never gives, has its name for its text.
"""

import json
from dataclasses import dataclass
from typing import Any

from wmtp.bundle import BundleError

SPACE = "\u2581"  # SentencePiece's own sign for a blank
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class FastTokenizer:
    """`text` is tokenizer.json; `unreachable` are the pieces that it never gives and SentencePiece may."""

    text: str
    bos: str
    eos: str
    unk: str
    unreachable: list[str]


def fast_tokenizer(content: bytes, where: str) -> FastTokenizer:
    """Of the bytes of a tokenizer.model; BundleError where the model has what tokenizer.json cannot say."""
    from sentencepiece import sentencepiece_model_pb2 as schema

    model = schema.ModelProto.FromString(content)
    check(model, where)
    pieces = {piece.piece: index for index, piece in enumerate(model.pieces) if piece.type == NORMAL}
    longer = [piece for piece in pieces if len(piece) > 1]
    has_characters = all(character in pieces for piece in longer for character in piece)
    prefix = model.normalizer_spec.add_dummy_prefix
    form, unreachable = (character_form(model, pieces, prefix), []) if has_characters else byte_form(model, pieces, prefix)
    if without := [kind for kind in ("bos", "eos", "unk") if getattr(model.trainer_spec, f"{kind}_id") < 0]:
        raise BundleError(f"{where}: expected a {without[0]} piece, found none; tokenizer.json cannot be written without it")
    named = {kind: model.pieces[getattr(model.trainer_spec, f"{kind}_id")].piece for kind in ("bos", "eos", "unk")}
    special = [
        {"id": index, "content": piece.piece, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for index, piece in enumerate(model.pieces)
        if piece.type in (CONTROL, UNKNOWN)
    ]
    bos = {"SpecialToken": {"id": named["bos"], "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {named["bos"]: {"id": named["bos"], "ids": [model.trainer_spec.bos_id], "tokens": [named["bos"]]}},
    }
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special, **form, "post_processor": template}
    return FastTokenizer(json.dumps(whole, ensure_ascii=False, indent=1) + "\n", **named, unreachable=unreachable)


def check(model: Any, where: str) -> None:
    """What Llama's tokenizers are, and the two forms can say."""
    facts = {
        "model_type": (model.trainer_spec.model_type, 2, "BPE"),
        "byte_fallback": (model.trainer_spec.byte_fallback, True, "true"),
        "remove_extra_whitespaces": (model.normalizer_spec.remove_extra_whitespaces, False, "false"),
        "escape_whitespaces": (model.normalizer_spec.escape_whitespaces, True, "true"),
        "precompiled_charsmap": (bool(model.normalizer_spec.precompiled_charsmap), False, "none (normalization identity)"),
        "user-defined pieces": (sum(piece.type == USER_DEFINED for piece in model.pieces), 0, "none"),
    }
    for name, (found, expected, words) in facts.items():
        if found != expected:
            raise BundleError(f"{where}: {name}: expected {words}, found {found}; tokenizer.json cannot say that")


def merges_of(model: Any, pieces: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of characters or pieces that make a piece, the best score first, as SentencePiece merges them."""
    ranked = sorted((-model.pieces[index].score, index, piece) for piece, index in pieces.items() if len(piece) > 1)
    splits = [(piece[:at], piece[at:]) for _, _, piece in ranked for at in range(1, len(piece))]
    return [(left, right) for left, right in splits if all(len(part) == 1 or part in pieces for part in (left, right))]


def bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], unknown: str, byte_fallback: bool) -> dict[str, Any]:
    return {
        "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": True, "byte_fallback": byte_fallback, "ignore_merges": False, "vocab": vocabulary, "merges": list(map(list, merges)),
    }  # fmt: skip


def character_form(model: Any, pieces: dict[str, int], prefix: bool) -> dict[str, Any]:
    vocabulary = {piece.piece: index for index, piece in enumerate(model.pieces)}
    normalizers = [{"type": "Prepend", "prepend": SPACE}] * prefix + [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    decoders = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders + [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix},
        "model": bpe(vocabulary, merges_of(model, pieces), model.pieces[model.trainer_spec.unk_id].piece, True),
    }


def byte_form(model: Any, pieces: dict[str, int], prefix: bool) -> tuple[dict[str, Any], list[str]]:
    """The form and the pieces that it cannot reach."""
    letters = byte_letters()

    def spelled(piece: str) -> str:
        return "".join(letters[byte] for byte in piece.replace(SPACE, " ").encode())

    double = {character for character in pieces if len(character) == 1 and len(character.encode()) == 2}
    within_reach = {piece: index for piece, index in pieces.items() if all(ord(c) < 128 or c == SPACE or c in double for c in piece)}
    vocabulary = {spelled(piece): index for piece, index in pieces.items()}
    for index, piece in enumerate(model.pieces):
        if piece.type == BYTE:
            letter = letters[int(piece.piece, 16) if piece.piece.startswith("0x") else int(piece.piece[1:-1], 16)]
            vocabulary[piece.piece if letter in vocabulary else letter] = index
        elif piece.type != NORMAL:
            vocabulary[piece.piece] = index
    if len(vocabulary) != len(model.pieces):
        raise BundleError(f"{len(model.pieces)} pieces have {len(vocabulary)} names in bytes; tokenizer.json cannot tell them apart")
    whole = [tuple(spelled(character)) for character in sorted(double, key=pieces.get)]  # a character comes before any merge of two
    merges = whole + [(spelled(left), spelled(right)) for left, right in merges_of(model, within_reach)]
    normalizers = [{"type": "Prepend", "prepend": " "}] * prefix + [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    form = {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": levels,
        "decoder": {"type": "Sequence", "decoders": [levels] + [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix},
        "model": bpe(vocabulary, merges, model.pieces[model.trainer_spec.unk_id].piece, False),
    }
    return form, sorted(set(pieces) - set(within_reach))


def byte_letters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary: itself where it has one, else one from 256 on."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), ord("\u00ff") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]
