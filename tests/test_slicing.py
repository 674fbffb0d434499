import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from wmtp.bundle import BundleError, ModelArgs, bundle_sha256, read_args, read_metadata, read_tensors, tensor_shapes, verify, write_bundle
from wmtp.growth import load_grown
from wmtp.model import load_bundle
from wmtp.provenance import learned_from, training_flops
from wmtp.slicing import SPACE, build_micro, cut_tokenizer, grow_heads, sliced, spread
from wmtp.sources import train_tokenizer

N_PIECES = 400
LARGE = ModelArgs(
    dim=48,
    n_layers=7,
    n_heads=6,
    n_kv_heads=3,
    vocab_size=N_PIECES,
    multiple_of=8,
    ffn_dim_multiplier=1.0,
    norm_eps=1e-5,
    rope_theta=10000.0,
    n_future_tokens=3,
)
SIZES = {"dim": 16, "n_layers": 5, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 300, "multiple_of": 4}
WORDS = ["keep", "the", "even", "numbers", "odd", "add", "sum", "list", "return", "x", "total"]
TEXTS = [
    f"def f{i}(x):\n    total = {i * 7 % 1000}\n    for y in x:\n        total += y * {i}\n    return total\n\n# {a} {b}  {c}\n"
    for i, (a, b, c) in enumerate(itertools.islice(itertools.product(WORDS, repeat=3), 0, 1331, 7))
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, N_PIECES)


@pytest.fixture(scope="module")
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).half() for name, shape in tensor_shapes(LARGE).items()}


@pytest.fixture(scope="module")
def large(tmp_path_factory, tensors, tokenizer):
    out = tmp_path_factory.mktemp("models") / "base"
    write_bundle(out, LARGE, tensors, tokenizer, source="test", dropped=["rope.freqs"], extra={"a": 1})
    return out


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# weights


def expected_element(large, name, index, args, small, blocks):
    """The element of the large model that belongs at `index` of a slice, by the definition of a slice."""
    kind, place, *rest = name.split(".")
    if kind == "layers":
        name = ".".join([kind, str(blocks[int(place)]), *rest])
    index = list(index)
    axis = {"wq": 0, "wk": 0, "wv": 0, "wo": 1}.get(rest[1] if len(rest) > 1 else "")
    if axis is not None:
        head, channel = divmod(index[axis], small.head_dim)
        index[axis] = head * args.head_dim + channel
    return large[name][tuple(index)]


@pytest.mark.parametrize(
    "change", [{}, {"n_heads": 2, "dim": 12, "n_kv_heads": 1}, {"n_layers": 3}, {"dim": 48, "n_heads": 6, "n_kv_heads": 3}]
)
def test_every_element_comes_from_its_place(large, tensors, tmp_path, change):
    build_micro(large, tmp_path / "micro", **SIZES | change)
    verify(tmp_path / "micro")
    small = read_args(tmp_path / "micro")
    blocks = spread(LARGE.n_trunk, small.n_trunk)
    found = dict(read_tensors(tmp_path / "micro"))
    for name, tensor in found.items():
        picked = torch.Generator().manual_seed(1)
        for _ in range(40):
            index = tuple(int(torch.randint(size, (1,), generator=picked)) for size in tensor.shape)
            if name in ("tok_embeddings.weight", "output.weight") and index[0] == small.vocab_size - 1:
                continue  # the blank's row, tested below
            assert tensor[index] == expected_element(tensors, name, index, LARGE, small, blocks), (name, index)


def test_settings_of_a_slice(large, tmp_path):
    build_micro(large, tmp_path / "micro", **SIZES)
    small = read_args(tmp_path / "micro")
    assert small == replace(LARGE, **SIZES)
    assert (small.n_trunk, small.n_future_tokens, small.hidden_dim) == (3, 3, 44)
    metadata = read_metadata(tmp_path / "micro")
    assert metadata["dtype"] == "float16" and metadata["source"] == "slice of test"
    assert metadata["extra"] == {"a": 1, "sliced_from": bundle_sha256(large), "layers": [0, 2, 4]}


def test_a_slice_of_a_trained_model_says_what_that_learned_from(large, tensors, tokenizer, tmp_path):
    """Else its scores of those very problems would pass for out of fold; what the training cost is no longer the slice's own."""
    learned = {"task_ids": ["3_a"], "groups": ["3"]}
    extra = {"learned_from": learned, "flops": 7, "sliced_from": "x", "layers": [9]}
    write_bundle(tmp_path / "trained", LARGE, tensors, tokenizer, source="test", dropped=[], extra=extra)
    build_micro(tmp_path / "trained", tmp_path / "micro", **SIZES)
    assert learned_from(tmp_path / "micro") == learned and training_flops(tmp_path / "micro") == 0
    assert read_metadata(tmp_path / "micro")["extra"]["sliced_from"] == bundle_sha256(tmp_path / "trained")


def test_head_zero_and_the_extra_heads_stay(large, tensors, tmp_path):
    build_micro(large, tmp_path / "micro", **SIZES)
    found = dict(read_tensors(tmp_path / "micro"))
    for here, there in (
        ("layers.2", "layers.4"),
        ("layers.0", "layers.0"),
        ("extra_heads.0", "extra_heads.0"),
        ("extra_heads.1", "extra_heads.1"),
    ):
        assert torch.equal(found[f"{here}.ffn_norm.weight"], tensors[f"{there}.ffn_norm.weight"][:16])


def test_named_layers(large, tensors, tmp_path):
    build_micro(large, tmp_path / "micro", **SIZES, layers=[1, 2, 3])
    found = dict(read_tensors(tmp_path / "micro"))
    for i in range(3):
        assert torch.equal(found[f"layers.{i}.feed_forward.w2.weight"], tensors[f"layers.{i + 1}.feed_forward.w2.weight"][:16, :44])
    assert read_metadata(tmp_path / "micro")["extra"]["layers"] == [1, 2, 3]


@settings(max_examples=200)
@given(st.integers(1, 80).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_spread_is_even_and_ends_with_the_last(sizes):
    n_blocks, n_kept = sizes
    blocks = spread(n_blocks, n_kept)
    assert len(blocks) == n_kept and blocks[-1] == n_blocks - 1
    assert sorted(set(blocks)) == blocks and blocks[0] >= 0
    if n_kept > 1:
        steps = [b - a for a, b in itertools.pairwise(blocks)]
        assert blocks[0] == 0 and max(steps) - min(steps) <= 1


def test_equal_slices_have_equal_bytes(large, tmp_path):
    for name in ("a", "b"):
        build_micro(large, tmp_path / name, **SIZES)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dim": 64}, "dim: a slice has at most 48, asked for 64"),
        ({"n_layers": 8}, "n_layers: a slice has at most 7"),
        ({"n_heads": 8, "n_kv_heads": 1}, "n_heads: a slice has at most 6"),
        ({"n_heads": 4, "n_kv_heads": 4}, "n_kv_heads: a slice has at most 3"),
        ({"n_heads": 1, "n_kv_heads": 1}, "head_dim: a slice has at most 8, asked for 16"),
        ({"vocab_size": 401}, "vocab_size: a slice has at most 400"),
        ({"multiple_of": 256}, "hidden_dim: a slice has at most 128, asked for 256"),
        ({"n_layers": 2}, "n_layers 2: expected n_future_tokens 3 or more"),
        ({"dim": 18}, "dim 18"),
        ({"layers": [0.0, 1.0, 2.0]}, "layers: expected 3 ascending blocks"),
        ({"vocab_size": 259}, r"vocab_size: expected 260 \(bytes and control pieces\) to 400, asked for 259"),
        ({"layers": [0, 1]}, r"layers: expected 3 ascending blocks of 0..4, found \[0, 1\]"),
        ({"layers": [0, 2, 1]}, "layers: expected 3 ascending"),
        ({"layers": [0, 1, 1]}, "layers: expected 3 ascending"),
        ({"layers": [2, 3, 5]}, "layers: expected 3 ascending"),
        ({"layers": [-1, 3, 4]}, "layers: expected 3 ascending"),
        ({"max_megabytes": 0.04}, r"0.\d MB, more than the 0.04 MB allowed"),
    ],
)
def test_impossible_slices_are_one_line_and_leave_nothing(large, tmp_path, change, said):
    with pytest.raises(BundleError, match=said) as caught:
        build_micro(large, tmp_path / "micro", **SIZES | change)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(tensors, tokenizer, tmp_path, value):
    bad = tensors["layers.4.feed_forward.w1.weight"].clone()
    bad[3, 3] = value
    write_bundle(tmp_path / "base", LARGE, tensors | {"layers.4.feed_forward.w1.weight": bad}, tokenizer, source="", dropped=[], extra={})
    with pytest.raises(BundleError, match=r"layers.2.feed_forward.w1.weight: expected finite weights"):
        build_micro(tmp_path / "base", tmp_path / "micro", **SIZES)
    assert [file.name for file in tmp_path.iterdir()] == ["base"]


def test_a_damaged_base_is_refused(large, tensors, tokenizer, tmp_path):
    write_bundle(tmp_path / "base", LARGE, tensors, tokenizer, source="", dropped=[], extra={})
    content = bytearray((tmp_path / "base" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "base" / "model.safetensors").write_bytes(content)
    for work in (
        lambda: build_micro(tmp_path / "base", tmp_path / "out", **SIZES),
        lambda: grow_heads(tmp_path / "base", tmp_path / "out", 4),
    ):
        with pytest.raises(BundleError, match=r"model.safetensors: SHA256"):
            work()


def test_the_micro_model_of_7b_1t_4_stays_below_50_megabytes():
    """dim 512, 4 layers, 8000 pieces, cut on the meta device: the next-token block is the real model's last, and three heads."""
    args = replace(LARGE, dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, vocab_size=32000, multiple_of=256, n_future_tokens=4)
    small = replace(args, dim=512, n_layers=4, n_heads=4, n_kv_heads=4, vocab_size=8000)
    with torch.device("meta"):
        tensors = {name: torch.empty(shape, dtype=torch.float16) for name, shape in tensor_shapes(args).items()}
    cut = dict(sliced(tensors, args, small, spread(args.n_trunk, small.n_trunk), list(range(8000))))
    assert spread(args.n_trunk, small.n_trunk) == [28]
    assert {name: tuple(tensor.shape) for name, tensor in cut.items()} == tensor_shapes(small)
    assert cut["layers.0.feed_forward.w1.weight"].shape == (1536, 512) and cut["extra_heads.2.attention.wo.weight"].shape == (512, 512)
    n_bytes = sum(tensor.nbytes for tensor in cut.values())
    assert all(tensor.dtype == torch.float16 for tensor in cut.values())
    assert 40e6 < n_bytes < 49e6  # beside it a tokenizer of at most 0.5 MB


# vocabulary


@pytest.mark.parametrize("n_pieces", [260, 280, 330, 399, 400])
def test_pieces_keep_their_ids(tokenizer, n_pieces):
    cut, rows = cut_tokenizer(tokenizer, n_pieces)
    whole, small = SentencePieceProcessor(model_proto=tokenizer), SentencePieceProcessor(model_proto=cut)
    assert len(small) == len(rows) == n_pieces
    assert [small.id_to_piece(i) for i in range(n_pieces)] == [whole.id_to_piece(row) for row in rows]
    assert rows[:-1] == list(range(n_pieces - 1))
    assert whole.id_to_piece(rows[-1]) == SPACE or rows[-1] == n_pieces - 1
    assert (small.unk_id(), small.bos_id(), small.eos_id(), small.pad_id()) == (0, 1, 2, -1)
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(cut)
    assert model.trainer_spec.vocab_size == n_pieces


def test_the_whole_tokenizer_is_left_alone(tokenizer):
    cut, rows = cut_tokenizer(tokenizer, N_PIECES)
    assert rows == list(range(N_PIECES))
    whole, same = SentencePieceProcessor(model_proto=tokenizer), SentencePieceProcessor(model_proto=cut)
    assert all(whole.encode(text) == same.encode(text) for text in TEXTS)


@pytest.mark.parametrize("n_pieces", [260, 300, 350])
def test_text_survives_a_cut_tokenizer(tokenizer, n_pieces):
    small = SentencePieceProcessor(model_proto=cut_tokenizer(tokenizer, n_pieces)[0])
    for text in [
        *TEXTS,
        " lone  blanks   everywhere ",
        "\ttabs\r\n",
        "\u00fcml\u00e4ut \u2603 \U0001f600",
        "",
        " ",
        "\n\n",
        "a\u2581b".replace("\u2581", " "),
    ]:
        assert small.decode(small.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="defrtunx0123456789 \n():=+_*é☃", max_size=60))
def test_any_text_survives(tokenizer, text):
    small = SentencePieceProcessor(model_proto=cut_tokenizer(tokenizer, 300)[0])
    assert small.decode(small.encode(text)) == text
    assert max(small.encode(text), default=0) < 300


def test_without_its_row_the_blank_would_be_lost(tokenizer):
    """Why the blank is kept: a plain cut spells it in bytes, which decode to SentencePiece's mark."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(tokenizer)
    del model.pieces[300:]
    plain = SentencePieceProcessor(model_proto=model.SerializeToString())
    assert plain.decode(plain.encode(" blank")) == SPACE + "blank"


def test_ids_agree_where_the_pieces_are_kept(tokenizer):
    n_pieces = 330
    whole, small = SentencePieceProcessor(model_proto=tokenizer), SentencePieceProcessor(model_proto=cut_tokenizer(tokenizer, n_pieces)[0])
    kept = shared = 0
    for text in TEXTS:
        for word in text.replace("\n", " ").split(" "):
            ids = whole.encode(word)
            if max(ids, default=0) < n_pieces - 1:
                assert small.encode(word) == ids
                kept += 1
            shared += 1
    assert 0.1 * shared < kept < shared


def test_the_blanks_row_moves_with_it(large, tensors, tokenizer, tmp_path):
    build_micro(large, tmp_path / "micro", **SIZES)
    small = SentencePieceProcessor(model_file=str(tmp_path / "micro" / "tokenizer.model"))
    blank = SentencePieceProcessor(model_proto=tokenizer).piece_to_id(SPACE)
    assert blank >= 300 and small.piece_to_id(SPACE) == 299
    for name in ("tok_embeddings.weight", "output.weight"):
        assert torch.equal(dict(read_tensors(tmp_path / "micro"))[name][299], tensors[name][blank, :16])


def test_a_broken_tokenizer_is_one_line():
    with pytest.raises(BundleError, match="not a SentencePiece model"):
        cut_tokenizer(b"\xff\xff\xff", 300)
    with pytest.raises(BundleError, match="expected pieces with byte fallback"):
        cut_tokenizer(b"", 300)


# heads


def test_new_heads_are_copies_of_the_last_block(large, tensors, tokenizer, tmp_path):
    write_bundle(
        tmp_path / "one",
        LARGE.with_heads(1),
        {name: tensors[name] for name in tensor_shapes(LARGE.with_heads(1))},
        tokenizer,
        source="one",
        dropped=["rope.freqs"],
        extra={"a": 1},
    )
    for start, n_had in ((tmp_path / "one", 1), (large, 3)):
        grow_heads(start, tmp_path / "grown", 4)
        verify(tmp_path / "grown")
        args = read_args(tmp_path / "grown")
        assert args == LARGE.with_heads(4) and args.n_trunk == LARGE.n_trunk == 5
        found, had = dict(read_tensors(tmp_path / "grown")), dict(read_tensors(start))
        assert all(torch.equal(found[name], had[name]) for name in had)
        for i in range(n_had - 1, 3):
            assert all(
                torch.equal(found[f"extra_heads.{i}.{name.removeprefix('layers.4.')}"], tensor)
                for name, tensor in had.items()
                if name.startswith("layers.4.")
            )
        metadata = read_metadata(tmp_path / "grown")
        assert metadata["extra"] == {"a": 1, "heads_grown_from": n_had} and metadata["dropped"] == ["rope.freqs"]
        assert (tmp_path / "grown" / "tokenizer.model").read_bytes() == tokenizer


def test_a_model_grown_as_it_is_loaded_is_the_grown_bundles(large, tmp_path):
    grow_heads(large, tmp_path / "grown", 6)
    model, n_grown = load_grown(large, 6, "cpu")
    expected = load_bundle(tmp_path / "grown", dtype=torch.float32)
    assert n_grown == 3 and model.args == expected.args and not model.training
    for (name, mine), (other, theirs) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        assert name == other and torch.equal(mine, theirs)
    parameters = list(model.parameters())
    assert len({one.data_ptr() for one in parameters}) == len(parameters) and all(one.requires_grad for one in parameters)
    same, none = load_grown(large, 2, "cpu")
    assert none == 0 and same.n_future == 2


def test_growing_and_reading_back_fewer_heads_is_the_identity(large, tmp_path):
    grow_heads(large, tmp_path / "grown", 6)
    fewer, had = dict(read_tensors(tmp_path / "grown", n_future=3)), dict(read_tensors(large))
    assert list(fewer) == list(had) and all(torch.equal(fewer[name], had[name]) for name in had)


@pytest.mark.parametrize("n_future", [3, 2, 0])
def test_heads_do_not_shrink(large, tmp_path, n_future):
    with pytest.raises(BundleError, match=f"expected more than the 3 heads it has, asked for {n_future}"):
        grow_heads(large, tmp_path / "grown", n_future)
    assert not list(tmp_path.iterdir())
