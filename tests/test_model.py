import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from wmtp.align import IGNORE, future_targets
from wmtp.bundle import BundleError, ModelArgs, read_tensors
from wmtp.model import Transformer, load_bundle

GROUPED = ModelArgs(
    dim=24, n_layers=5, n_heads=6, n_kv_heads=2, vocab_size=40, multiple_of=8, ffn_dim_multiplier=None, norm_eps=1e-3, rope_theta=500.0,
    n_future_tokens=3,
)  # fmt: skip
SHAPES = {
    "grouped": GROUPED,
    "plain": replace(GROUPED, n_kv_heads=6),
    "one key head": replace(GROUPED, n_kv_heads=1),
    "one head": replace(GROUPED, n_layers=2, n_future_tokens=1),
    "heads alone": replace(GROUPED, n_layers=3),
}


def random_model(args=GROUPED, seed=0, dtype=torch.float64, scale=0.4):
    """Weights so large, by default, that a wrong angle, mask or norm shows in the first digit."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(args).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            wide = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * wide if parameter.ndim == 1 else scale * wide)
    return model


def random_tokens(args, *shape, seed=1):
    return torch.randint(args.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotate(x_TH, theta):
    """Neighbouring pairs as complex numbers, turned by position / theta^(2j/H)."""
    pairs = torch.view_as_complex(x_TH.reshape(len(x_TH), -1, 2).contiguous())
    H = x_TH.shape[1]
    speed = torch.tensor([theta ** (-2 * j / H) for j in range(H // 2)], dtype=torch.float64)
    turn = torch.exp(1j * torch.arange(len(x_TH), dtype=torch.float64)[:, None] * speed)
    return torch.view_as_real(pairs * turn).reshape(x_TH.shape)


def block(x_TD, weights, args, place):
    """One block of one row, head by head, from the layout of Meta's checkpoints alone."""

    def w(name):
        return weights[f"{place}.{name}.weight"]

    H, T = args.dim // args.n_heads, len(x_TD)
    normed = norm(x_TD, w("attention_norm"), args.norm_eps)
    heads = []
    for n in range(args.n_heads):
        group = n // (args.n_heads // args.n_kv_heads)
        q = rotate(normed @ w("attention.wq")[n * H : (n + 1) * H].T, args.rope_theta)
        k = rotate(normed @ w("attention.wk")[group * H : (group + 1) * H].T, args.rope_theta)
        v = normed @ w("attention.wv")[group * H : (group + 1) * H].T
        future = torch.ones(T, T).triu(1).bool()
        heads.append(((q @ k.T) / math.sqrt(H)).masked_fill(future, -torch.inf).softmax(-1) @ v)
    x_TD = x_TD + torch.cat(heads, -1) @ w("attention.wo").T
    normed = norm(x_TD, w("ffn_norm"), args.norm_eps)
    gate = normed @ w("feed_forward.w1").T
    return x_TD + (gate * torch.sigmoid(gate) * (normed @ w("feed_forward.w3").T)) @ w("feed_forward.w2").T


def reference_logits(model, tokens_T):
    """[T, F, V]: the trunk but its last block, then that block and each extra head on the same input, one norm, one output."""
    weights, args = {name: value.detach() for name, value in model.state_dict().items()}, model.args
    x_TD = weights["tok_embeddings.weight"][tokens_T]
    for i in range(args.n_trunk - 1):
        x_TD = block(x_TD, weights, args, f"layers.{i}")
    places = [f"layers.{args.n_trunk - 1}", *(f"extra_heads.{i}" for i in range(args.n_future_tokens - 1))]
    heads = [norm(block(x_TD, weights, args, place), weights["norm.weight"], args.norm_eps) for place in places]
    return torch.stack([x @ weights["output.weight"].T for x in heads], 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_metas_forward(shape):
    args = SHAPES[shape]
    model, tokens_BT = random_model(args), random_tokens(args, 2, 11)
    logits = model(tokens_BT)
    assert logits.shape == (2, 11, args.n_future_tokens, args.vocab_size)
    for row, tokens_T in enumerate(tokens_BT):
        torch.testing.assert_close(logits[row], reference_logits(model, tokens_T), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_stays_near_metas_forward_in_float64(shape, cached):
    args = SHAPES[shape]
    model, tokens_BT = random_model(args, dtype=torch.float32, scale=0.15), random_tokens(args, 2, 11)
    wide = random_model(args, dtype=torch.float32, scale=0.15).double()
    if cached:
        cache = model.new_cache(2, 11, args.n_future_tokens)
        ends = [(0, 6), *((at, at + 1) for at in range(6, 11))]
        parts = [model(tokens_BT[:, a:b], cache=cache, position_BT=torch.arange(a, b).expand(2, -1)) for a, b in ends]
    found = torch.cat(parts, 1) if cached else model(tokens_BT)
    for row, tokens_T in enumerate(tokens_BT):
        expected = reference_logits(wide, tokens_T)
        assert float(expected.abs().max()) > 0.5
        torch.testing.assert_close(found[row].double(), expected, rtol=0, atol=1e-5)


def test_rows_longer_than_the_first_rotary_table():
    model = random_model(replace(GROUPED, n_layers=3))
    tokens_BT = random_tokens(model.args, 1, 300)
    model(tokens_BT[:, :5])
    torch.testing.assert_close(model(tokens_BT)[0], reference_logits(model, tokens_BT[0]), rtol=1e-10, atol=1e-10)


def test_parameter_names_are_metas():
    from wmtp.bundle import tensor_shapes

    model = random_model()
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == tensor_shapes(model.args)


@pytest.mark.parametrize("shape", SHAPES)
def test_cache_equals_no_cache_for_rows_of_unequal_length(shape):
    """Prefill of padded prompts, then single steps at each row's own position, in all heads."""
    args = SHAPES[shape]
    model, F = random_model(args), args.n_future_tokens
    tokens_BT, length_B = random_tokens(args, 3, 14), torch.tensor([8, 3, 5])
    expected = model(tokens_BT)
    cache = model.new_cache(3, 14, F)
    padded = torch.where(torch.arange(8) < length_B[:, None], tokens_BT[:, :8], 7)
    found = model(padded, cache=cache, position_BT=torch.arange(8).expand(3, 8))
    for row, length in enumerate(length_B):
        torch.testing.assert_close(found[row, :length], expected[row, :length], rtol=1e-10, atol=1e-10)
    for step in range(6):
        at = (length_B + step)[:, None]
        found = model(tokens_BT.gather(1, at), cache=cache, position_BT=at)
        torch.testing.assert_close(found[:, 0], expected[torch.arange(3), at[:, 0]], rtol=1e-10, atol=1e-10)


def test_cache_takes_several_tokens_a_step():
    model, tokens_BT = random_model(), random_tokens(GROUPED, 2, 9)
    cache = model.new_cache(2, 9, 3)
    parts = [model(tokens_BT[:, a:b], cache=cache, position_BT=torch.arange(a, b).expand(2, -1)) for a, b in ((0, 4), (4, 5), (5, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens_BT), rtol=1e-10, atol=1e-10)


def test_cache_rows_can_be_dropped_repeated_and_reordered():
    model, tokens_BT = random_model(), random_tokens(GROUPED, 3, 6)
    cache = model.new_cache(3, 8)
    model(tokens_BT, cache=cache, position_BT=torch.arange(6).expand(3, -1), n_future=1)
    cache.select(torch.tensor([2, 0, 2]))
    added = torch.tensor([[4], [5], [6]])
    found = model(added, cache=cache, position_BT=torch.full((3, 1), 6), n_future=1)
    whole = torch.cat([tokens_BT[[2, 0, 2]], added], 1)
    torch.testing.assert_close(found, model(whole, n_future=1)[:, 6:], rtol=1e-10, atol=1e-10)


def random_targets(args, *shape):
    targets = random_tokens(args, *shape, args.n_future_tokens, seed=3)
    return targets.masked_fill(random_tokens(args, *shape, args.n_future_tokens, seed=4) % 3 == 0, IGNORE)


def test_losses_are_the_cross_entropy_of_the_logits():
    model, tokens_BT, targets = random_model(), random_tokens(GROUPED, 3, 7), random_targets(GROUPED, 3, 7)
    ce, logits = model(tokens_BT, targets).detach(), model(tokens_BT).detach()
    assert ce.shape == targets.shape and ce.dtype == torch.float64
    for place in torch.cartesian_prod(*map(torch.arange, targets.shape)).tolist():
        target = int(targets[tuple(place)])
        expected = 0.0 if target == IGNORE else float(-logits[tuple(place)].log_softmax(-1)[target])
        assert float(ce[tuple(place)]) == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_gradient_of_losses_is_that_through_the_logits():
    model, tokens_BT, targets = random_model(), random_tokens(GROUPED, 2, 6), random_targets(GROUPED, 2, 6)
    weight = torch.randn(targets.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    direct = torch.autograd.grad((weight * model(tokens_BT, targets)).sum(), list(model.parameters()))
    dense = functional.cross_entropy(model(tokens_BT).flatten(0, 2), targets.flatten(), reduction="none", ignore_index=IGNORE)
    through = torch.autograd.grad((weight.flatten() * dense).sum(), list(model.parameters()))
    torch.testing.assert_close(direct, through, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_at_least_float32(dtype):
    model, tokens_BT, targets = random_model(dtype=dtype), random_tokens(GROUPED, 2, 6), random_targets(GROUPED, 2, 6)
    ce = model(tokens_BT, targets)
    expected = functional.cross_entropy(model(tokens_BT).float().flatten(0, 2), targets.flatten(), reduction="none", ignore_index=IGNORE)
    assert ce.dtype == torch.float32
    torch.testing.assert_close(ce.flatten(), expected, rtol=1e-6, atol=1e-6)


def test_targets_of_another_shape_are_refused():
    model, tokens_BT = random_model(), random_tokens(GROUPED, 2, 6)
    with pytest.raises(ValueError, match=r"targets: expected shape \(2, 6, 3\), found \(2, 6, 2\)"):
        model(tokens_BT, torch.zeros(2, 6, 2, dtype=torch.int64))


def test_fewer_heads_neither_run_nor_matter():
    model, tokens_BT = random_model(), random_tokens(GROUPED, 2, 6)
    expected = model(tokens_BT)
    with torch.no_grad():
        for parameter in model.extra_heads[1].parameters():
            parameter.fill_(torch.nan)
    torch.testing.assert_close(model(tokens_BT, n_future=2), expected[:, :, :2], rtol=0, atol=0)
    assert [hidden.shape for hidden in model.hidden(tokens_BT, n_future=1)] == [(2, 6, 24)]


@pytest.mark.parametrize("n_future", [0, 4, 9])
def test_heads_that_are_not_built_are_not_left_out_in_silence(n_future):
    with pytest.raises(ValueError, match=rf"n_future: expected 1\.\.3, the heads that are built, found {n_future}"):
        random_model()(random_tokens(GROUPED, 2, 6), n_future=n_future)


def test_a_cache_without_room_for_a_head_is_refused():
    model, tokens_BT = random_model(), random_tokens(GROUPED, 2, 6)
    with pytest.raises(ValueError, match="cache: expected room for 3 heads, found 1; see new_cache"):
        model(tokens_BT, cache=model.new_cache(2, 9))
    assert (
        model(tokens_BT, cache=model.new_cache(2, 9, 3)).shape[2] == 3
        and model(tokens_BT, cache=model.new_cache(2, 9), n_future=1).shape[2] == 1
    )


def test_entropy_is_of_predictions_that_have_targets():
    with pytest.raises(ValueError, match="with_entropy: expected with targets"):
        random_model()(random_tokens(GROUPED, 2, 6), with_entropy=True)


@pytest.mark.parametrize("first", [-1, 7])
def test_the_first_position_is_one_of_the_rows(first):
    with pytest.raises(ValueError, match=rf"first: expected 0\.\.6, a position of the rows, found {first}"):
        random_model()(random_tokens(GROUPED, 2, 6), first=first)


@pytest.mark.parametrize("first", [1, 4, 6])
def test_positions_before_the_first_target_are_read_but_not_computed(first):
    model, tokens_BT, targets = random_model(), random_tokens(GROUPED, 2, 7), random_targets(GROUPED, 2, 7)
    torch.testing.assert_close(model(tokens_BT, first=first), model(tokens_BT)[:, first:], rtol=1e-10, atol=1e-10)
    assert [hidden.shape for hidden in model.hidden(tokens_BT, first=first)] == [(2, 7 - first, 24)] * 3
    targets[:, :first] = IGNORE
    cut, whole = model(tokens_BT, targets, first=first), model(tokens_BT, targets)
    torch.testing.assert_close(cut, whole, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(loss.sum(), list(model.parameters())) for loss in (cut, whole)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


def test_a_model_that_was_used_in_inference_mode_can_be_trained():
    """The rotary table is kept between calls, and an inference tensor cannot be saved for backward."""
    model, tokens_BT, targets = random_model(), random_tokens(GROUPED, 2, 6), random_targets(GROUPED, 2, 6)
    with torch.inference_mode():
        model(tokens_BT)
    model(tokens_BT, targets).sum().backward()
    assert model.layers[0].attention.wq.weight.grad.abs().sum() > 0


def test_loaded_bundle_holds_the_files_tensors(micro):
    model = load_bundle(micro.bundle, dtype=torch.float64)
    expected = dict(read_tensors(micro.bundle))
    assert set(model.state_dict()) == set(expected) and not model.training
    assert all(torch.equal(value, expected[name].double()) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())


def test_loaded_bundle_keeps_its_dtype_unless_told(micro):
    assert load_bundle(micro.bundle).norm.weight.dtype == torch.float16


def test_ntp_leaves_the_extra_heads_unread(micro):
    whole, ntp = load_bundle(micro.bundle, dtype=torch.float64), load_bundle(micro.bundle, n_future=1, dtype=torch.float64)
    tokens_BT = random_tokens(whole.args, 2, 9)
    assert len(ntp.extra_heads) == 0 and ntp.args == whole.args.with_heads(1)
    assert not any(name.startswith("extra_heads") for name in ntp.state_dict())
    torch.testing.assert_close(ntp(tokens_BT)[:, :, 0], whole(tokens_BT)[:, :, 0], rtol=0, atol=0)


@pytest.mark.parametrize("n_future", [0, 4, -1])
def test_a_number_of_heads_that_the_bundle_lacks_is_refused(micro, n_future):
    with pytest.raises(ValueError, match=rf"n_future: expected 1\.\.3 .*found {n_future}"):
        load_bundle(micro.bundle, n_future=n_future)


def test_a_changed_byte_is_refused_on_loading(micro, tmp_path):
    import shutil

    copy = shutil.copytree(micro.bundle, tmp_path / "bundle")
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.safetensors: SHA256"):
        load_bundle(copy)


@pytest.mark.slow
@pytest.mark.parametrize("width, n_heads, n_kv_heads", [(48, 6, 6), (48, 6, 2), (64, 4, 1), (120, 10, 5)])
def test_parity_with_transformers_llama(micro, tmp_path, width, n_heads, n_kv_heads):
    transformers = pytest.importorskip("transformers")
    from wmtp.convert import convert

    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=80, num_hidden_layers=3, num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads, vocab_size=400,
        rms_norm_eps=1e-4, initializer_range=0.25, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer.model").write_bytes((micro.bundle / "tokenizer.model").read_bytes())
    convert(tmp_path / "llama", tmp_path / "bundle")
    assert json.loads((tmp_path / "bundle" / "params.json").read_text())["n_kv_heads"] == n_kv_heads
    ours, tokens_BT = load_bundle(tmp_path / "bundle"), random_tokens(GROUPED, 2, 40)
    with torch.no_grad():
        expected = theirs(tokens_BT).logits
        torch.testing.assert_close(ours(tokens_BT)[:, :, 0], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("first", [0, 4])
def test_entropy_comes_with_the_loss_where_it_is_asked_for(first):
    model = random_model().double()
    tokens, response = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(0)), torch.arange(12).expand(2, 12) >= 7
    targets = future_targets(tokens, response, model.n_future)
    ce, entropy = model(tokens, targets, first=first, with_entropy=True)
    assert torch.equal(ce, model(tokens, targets, first=first)) and ce.requires_grad and not entropy.requires_grad
    p = model(tokens).softmax(-1)
    expected = -(p * p.log()).sum(-1) * (targets != IGNORE)
    torch.testing.assert_close(entropy, expected.detach(), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["logits", "loss and entropy"])
def test_the_model_compiles_whole_and_in_real_numbers(wanted):
    """One graph, none of its values complex, and the gradients of the model that is not compiled."""
    model, tokens_BT = random_model(SHAPES["heads alone"]), random_tokens(GROUPED, 2, 11)
    targets_BTF = None if wanted == "logits" else future_targets(tokens_BT, (torch.arange(11) > 3).expand(2, -1), 3)
    given = {"first": 3, "with_entropy": True} if wanted == "loss and entropy" else {}
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    found, expected = compiled(tokens_BT, targets_BTF, **given), model(tokens_BT, targets_BTF, **given)
    torch.testing.assert_close(found, expected)
    first = [(out[0] if isinstance(out, tuple) else out).sum() for out in (found, expected)]
    for one, other in zip(*(torch.autograd.grad(total, list(model.parameters())) for total in first)):
        torch.testing.assert_close(one, other)
    values = [node.meta.get("example_value") for graph in graphs for node in graph.graph.nodes]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    assert len(graphs) == 1 and len(tensors) > 100 and not any(value.is_complex() for value in tensors)
