"""Adapters: what trains, what is merged, what is written and read back; with peft itself as the other side."""

import copy
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import run_ranks
from tests.test_model import SHAPES, random_model, random_tokens
from tests.test_train import ALONE, OPTIMIZER, Killed, fit, killer, plan_of, policy, same_bits, short_plan, start_model
from wmtp import flops, lora, train
from wmtp.bundle import BundleError, bundle_sha256
from wmtp.checkpoint import full_state, save_model
from wmtp.model import load_bundle
from wmtp.params import Lora
from wmtp.shared import SharedPolicy
from wmtp.tokens import TokenData
from wmtp.world import joined

LINEAR = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"]


def settings(**changes):
    return SimpleNamespace(**{"rank": 4, "alpha": 6.0, "dropout": 0.0, "targets": LINEAR} | changes)


def adapted(model, seed=3, trained=True, **changes):
    """With B away from 0, as after a training."""
    lora.attach(model, settings(**changes), seed)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if trained and name.endswith(lora.B):
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def plain(args, state):
    model = random_model(args, dtype=next(iter(state.values())).dtype)
    model.load_state_dict(state, strict=True)
    return model


def test_an_adapter_starts_as_nothing_and_trains_alone_in_every_block():
    model, tokens_BT = random_model(), random_tokens(SHAPES["grouped"], 2, 9)
    before, state = model(tokens_BT), copy.deepcopy(model.state_dict())
    lora.attach(model, settings(), 3)
    assert torch.equal(model(tokens_BT), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    blocks = [*(f"layers.{i}" for i in range(3)), "extra_heads.0", "extra_heads.1"]
    places = [
        f"{block}.{part}"
        for block in blocks
        for part in (*(f"attention.{w}" for w in LINEAR[:4]), *(f"feed_forward.{w}" for w in LINEAR[4:]))
    ]
    assert trained == {place + end for place in places for end in (lora.A, lora.B)}
    kept = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items() if "lora_" not in name}
    assert set(kept) == set(state) and all(torch.equal(kept[name], state[name]) for name in state)


def test_equal_seeds_give_equal_bits_and_the_callers_stream_is_left_alone():
    models = [random_model() for _ in range(3)]
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one, same, other = (adapted(model, seed, trained=False) for model, seed in zip(models, (3, 3, 4)))
    assert torch.equal(torch.rand(1), expected)
    assert same_bits(one, same) and not same_bits(one, other)


@pytest.mark.parametrize("targets", [LINEAR, ["wq", "w2"], ["output"]])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_merged_model_is_what_peft_merges_and_computes_what_base_and_adapter_do(targets, dtype, tolerance):
    model, tokens_BT = adapted(random_model(dtype=dtype, scale=0.1), targets=targets), random_tokens(SHAPES["grouped"], 2, 9)
    merged, adapter = lora.split(model.state_dict(), settings())
    found = plain(model.args, merged)(tokens_BT)
    torch.testing.assert_close(found, model(tokens_BT), rtol=tolerance, atol=tolerance)
    base = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items() if "lora_" not in name}
    assert not torch.allclose(found, plain(model.args, base)(tokens_BT), atol=1e-2) and len(adapter) == 2 * len(targets) * (
        5 if targets != ["output"] else 1
    )
    for part in model.modules():
        if hasattr(part, "lora_A"):
            part.merge()
    assert all(torch.equal(merged[name], value) for name, value in model.state_dict().items() if name in merged)
    assert all(
        torch.equal(merged[name.replace(".base_layer", "")], value) for name, value in model.state_dict().items() if "base_layer" in name
    )


@pytest.fixture
def written(micro, tmp_path):
    """(the start, the adapted model, the bundle that a training would leave)."""
    model = adapted(load_bundle(micro.bundle, dtype=torch.float32))
    save_model(model, micro.bundle, tmp_path / "out", ALONE, {"stage": "train"}, settings())
    return load_bundle(micro.bundle, dtype=torch.float32), model, tmp_path / "out"


def test_base_and_written_adapter_equal_the_merged_bundle(written):
    base, model, out = written
    tokens_BT = random_tokens(base.args, 2, 9)
    lora.load_adapter(base, out / "adapter")
    assert same_bits(base, model)
    torch.testing.assert_close(load_bundle(out)(tokens_BT), base(tokens_BT), rtol=1e-5, atol=1e-5)
    assert bundle_sha256(out) and all(file.stat().st_mode & 0o044 == 0o044 for file in out.rglob("*") if file.is_file())


def test_peft_reads_the_written_adapter(written):
    from peft import PeftModel

    base, model, out = written
    tokens_BT = random_tokens(base.args, 2, 9)
    base.config = {}
    torch.testing.assert_close(PeftModel.from_pretrained(base, out / "adapter")(tokens_BT), model(tokens_BT))


def damaged(out, change):
    from safetensors.torch import load_file, save_file

    file = out / "adapter" / lora.WEIGHTS
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


NAME = "base_model.model.layers.0.attention.wq.lora_A.weight"
DAMAGE = {
    "missing": (lambda tensors: tensors.pop(NAME), BundleError, f"missing tensor {NAME}; expected 56 tensors, found 55"),
    "unknown": (lambda tensors: tensors.update(more=torch.zeros(1)), BundleError, "unknown tensor more"),
    "shape": (lambda tensors: tensors.update({NAME: torch.zeros(4, 31)}), lora.LoraError, r"expected \(4, 32\), found \(4, 31\)"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_adapter_that_does_not_fit_is_refused(written, damage):
    change, error, message = DAMAGE[damage]
    damaged(written[2], change)
    with pytest.raises(error, match=message):
        lora.load_adapter(written[0], written[2] / "adapter")


@pytest.mark.parametrize("content", ["{}", "no json"])
def test_a_configuration_that_is_none_is_refused(written, content):
    (written[2] / "adapter" / lora.CONFIG).write_text(content)
    with pytest.raises((lora.LoraError, BundleError), match=r"adapter_config\.json: (r: missing|not readable JSON)"):
        lora.load_adapter(written[0], written[2] / "adapter")


def test_without_peft_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(lora.LoraError, match=r"training\.lora needs peft: .*; pip install -c constraints\.txt -e '\.\[lora\]'"):
        lora.attach(random_model(), settings(), 3)


def test_training_changes_the_adapter_alone_and_learns(micro, data):
    model = adapted(start_model(micro.bundle, torch.float32), trained=False, rank=8, alpha=16.0)
    before = copy.deepcopy(model.state_dict())
    records = fit(model, policy("verifiable"), plan_of(data, n_epochs=3.0))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.endswith((lora.A, lora.B))}
    assert records[-1]["loss"] < 0.97 * records[0]["loss"]


def test_dropout_draws_anew_each_step_and_resumes_bit_for_bit(micro, data, tmp_path):
    def start(**changes):
        return adapted(start_model(micro.bundle, torch.float32), trained=False, **changes)

    whole, other, resumed = start(dropout=0.5), start(), start(dropout=0.5)
    records = fit(whole, policy("baseline"), short_plan(data))
    assert not same_bits(whole, other) and fit(other, policy("baseline"), short_plan(data)) != records
    with pytest.raises(Killed):
        fit(start(dropout=0.5), policy("baseline"), short_plan(data, checkpoint_every=1), scratch=tmp_path, on_log=killer(2))
    torch.rand(11)  # whatever was drawn elsewhere
    assert json.dumps(fit(resumed, policy("baseline"), short_plan(data, checkpoint_every=1), scratch=tmp_path)) == json.dumps(records)
    assert same_bits(whole, resumed)


def test_dropout_draws_differ_between_steps_and_ranks():
    seeds = {train._dropout_seed(*one) for one in ((1, 0, 0), (1, 1, 0), (1, 0, 1), (2, 0, 0))}
    assert len(seeds) == 4


def test_a_shared_critic_trains_its_head_beside_the_adapter(micro):
    model = SharedPolicy(adapted(start_model(micro.bundle, torch.float32), trained=False))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [name for name in trained if "lora_" not in name] == ["value.weight", "value.bias"]


def test_the_account_counts_adapters_apart(micro, data):
    plan, objective = plan_of(data), policy("baseline")
    full = train.account(start_model(micro.bundle), objective, plan, {})
    model = adapted(start_model(micro.bundle))
    found = train.account(model, objective, plan, {})
    assert found["parameters"] == full["parameters"] == full["trained_parameters"]
    assert found["trained_parameters"] == sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    # Frozen products cost 4 of 6, and the adapter's own come on top.
    assert 4 / 6 * full["train_flops"] < found["train_flops"] < full["train_flops"]
    bare = start_model(micro.bundle)
    for parameter in bare.parameters():
        parameter.requires_grad_(False)
    rows = plan.rows_read()
    length_R, start_R = data.lengths[rows], data.response_start[rows]
    assert flops.training(bare, length_R, start_R) == flops.training_forward(bare, length_R, start_R)


@pytest.mark.parametrize("change", [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"targets": []}, {"targets": ["q_proj"]}, {"bias": "all"}])
def test_settings_out_of_range_are_refused(change):
    whole = {"rank": 64, "alpha": 128, "dropout": 0.05, "targets": LINEAR}
    Lora.model_validate(whole)
    with pytest.raises(ValueError):
        Lora.model_validate(whole | change)


def on_two_ranks(bundle, processed, out):
    torch.set_num_threads(1)
    found = {}
    with joined("cpu") as world:
        for parallel in ("ddp", "fsdp"):
            model = adapted(start_model(bundle), trained=False)
            train.fit(model, policy("verifiable"), plan_of(TokenData(processed, "policy")), OPTIMIZER, world, parallel=parallel)
            found[parallel] = lora.split(full_state(model), settings()) if world.is_first else full_state(model) and None
    if world.is_first:
        torch.save(found, f"{out}/found.pt")


@pytest.mark.slow
def test_two_ranks_train_the_adapter_of_one(micro, data, tmp_path):
    ends = run_ranks("tests.test_lora", "on_two_ranks", micro.bundle, micro.processed, tmp_path)
    assert [code for code, _ in ends] == [0, 0], "\n".join(error[-3000:] for _, error in ends)
    model = adapted(start_model(micro.bundle), trained=False)
    fit(model, policy("verifiable"), plan_of(data))
    merged, adapter = lora.split(full_state(model), settings())
    for parallel, found in torch.load(tmp_path / "found.pt").items():
        for expected, one in zip((merged, adapter), found, strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-8, atol=1e-10, msg=lambda text, parallel=parallel: f"{parallel}: {text}")
