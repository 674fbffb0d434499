"""tokenizer.json gives the ids and texts of SentencePiece, in both of its forms, and refuses what it cannot say."""

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as schema

from wmtp.bundle import BundleError
from wmtp.slicing import cut_tokenizer
from wmtp.sources import train_tokenizer
from wmtp.synthetic import corpus
from wmtp.tokenizer_json import SPACE, fast_tokenizer

tokenizers = pytest.importorskip("tokenizers")
ALPHABET = st.sampled_from([*"defxs(): \n\t0123=+-_[]#", "  ", "    ", "return ", "é", "你", "▁", "\x00", "😀", "for x in xs"])


def changed(content, prefix=None, **normalizer):
    model = schema.ModelProto.FromString(content)
    if prefix is not None:
        model.normalizer_spec.add_dummy_prefix = prefix
    for name, value in normalizer.items():
        setattr(model.normalizer_spec, name, value)
    return model.SerializeToString()


@pytest.fixture(scope="module")
def models():
    whole = train_tokenizer(corpus(3, 300), 400)
    cut = cut_tokenizer(whole, 340)[0]
    named = {"whole": whole, "cut": cut, "whole, dummy prefix": changed(whole, prefix=True), "cut, dummy prefix": changed(cut, prefix=True)}
    return {name: (content, fast_tokenizer(content, name)) for name, content in named.items()}


@pytest.mark.parametrize("name", ["whole", "cut", "whole, dummy prefix", "cut, dummy prefix"])
def test_ids_and_texts_are_those_of_sentencepiece(models, name):
    content, made = models[name]
    theirs, ours = sentencepiece.SentencePieceProcessor(model_proto=content), tokenizers.Tokenizer.from_str(made.text)
    assert not made.unreachable and ours.get_vocab_size() == len(theirs) and ('"ByteLevel"' in made.text) == name.startswith("cut")
    assert (made.bos, made.eos, made.unk) == ("<s>", "</s>", "<unk>")

    @settings(max_examples=200, deadline=None)
    @given(parts=st.lists(ALPHABET, max_size=12))
    def agree(parts):
        text = "".join(parts)
        ids = theirs.encode(text)
        assert ours.encode(text).ids == [theirs.bos_id(), *ids]
        assert ours.decode(ids) == theirs.decode(ids)

    agree()


def test_every_program_of_the_task_has_the_same_ids(models):
    for content, made in models.values():
        theirs, ours = sentencepiece.SentencePieceProcessor(model_proto=content), tokenizers.Tokenizer.from_str(made.text)
        for text in corpus(9, 50):
            assert ours.encode(text).ids[1:] == theirs.encode(text)


def test_pieces_whose_characters_were_cut_off_are_counted():
    """é alone is two bytes, a merge; 這 is three, which would need a token of two; ▁ñ holds a character that is no piece."""
    model = schema.ModelProto.FromString(cut_tokenizer(train_tokenizer(corpus(3, 300), 400), 340)[0])
    for place, piece in ((-4, "é"), (-3, "é" + SPACE), (-2, "這"), (-1, SPACE + "ñ")):
        model.pieces[place].piece = piece
    content = model.SerializeToString()
    made = fast_tokenizer(content, "tokenizer.model")
    theirs, ours = sentencepiece.SentencePieceProcessor(model_proto=content), tokenizers.Tokenizer.from_str(made.text)
    assert made.unreachable == sorted(["這", SPACE + "ñ"]) and ours.get_vocab_size() == len(theirs) == 340
    for text in ("é", "aé é", "éa", "ü", "é é é", "a\u00e9\u00e9 "):
        assert ours.encode(text).ids[1:] == theirs.encode(text), text
    for text in ("a這", "這é ñ", "x ñ"):
        assert ours.decode(theirs.encode(text)) == text, "a model may write them, and then they read as they should"
        assert ours.decode(ours.encode(text).ids[1:]) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces: expected false, found True"),
        ({"escape_whitespaces": False}, "escape_whitespaces: expected true, found False"),
        ({"precompiled_charsmap": b"x"}, "precompiled_charsmap: expected none"),
    ],
)
def test_what_tokenizer_json_cannot_say_is_refused(models, changes, message):
    with pytest.raises(BundleError, match=f"m/tokenizer.model: {message}"):
        fast_tokenizer(changed(models["whole"][0], **changes), "m/tokenizer.model")


@pytest.mark.parametrize("kind", ["bos", "eos", "unk"])
def test_a_model_without_a_piece_that_frames_texts_is_refused(models, kind):
    model = schema.ModelProto.FromString(models["whole"][0])
    setattr(model.trainer_spec, f"{kind}_id", -1)
    with pytest.raises(BundleError, match=f"m/tokenizer.model: expected a {kind} piece, found none"):
        fast_tokenizer(model.SerializeToString(), "m/tokenizer.model")


def test_pieces_of_the_users_own_are_refused(models):
    model = schema.ModelProto.FromString(models["whole"][0])
    model.pieces[300].type = 4
    with pytest.raises(BundleError, match="user-defined pieces: expected none, found 1"):
        fast_tokenizer(model.SerializeToString(), "tokenizer.model")
