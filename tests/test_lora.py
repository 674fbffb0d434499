"""Adapters: what trains, what is merged, what is written and read back; with peft itself as the other side."""

import copy
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import methods
from tests.conftest import run_ranks
from tests.test_model import SHAPES, random_model, random_tokens
from tests.test_train import ALONE, OPTIMIZER, Killed, fit, killer, plan_of, policy, same_bits, short_plan, start_model
from wmtp import checkpoint, lora, outcome, train
from wmtp.batches import share
from wmtp.bundle import BundleError, NotFinite, bundle_sha256, read_metadata, write_bundle
from wmtp.checkpoint import full_state, save_model
from wmtp.model import load_bundle
from wmtp.params import Lora
from wmtp.policy import PolicyObjective
from wmtp.records import sha256_file
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
    merged, adapter = lora.split(dict(model.state_dict()), 6 / 4)
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
    """(the start, the adapted model, the bundle that a training would leave), with dropout that evaluation must not see."""
    model = adapted(load_bundle(micro.bundle, dtype=torch.float32), dropout=0.5)
    save_model(model, micro.bundle, tmp_path / "out", ALONE, {"stage": "train"}, lora.merging(settings(dropout=0.5)))
    return micro.bundle, model, tmp_path / "out"


def test_base_and_written_adapter_equal_the_merged_bundle(written):
    start, model, out = written
    tokens_BT, merged = random_tokens(model.args, 2, 9), load_bundle(out)
    expected = torch.rand(3, generator=torch.manual_seed(5))
    torch.manual_seed(5)
    found = lora.load_adapted(start, out)
    assert torch.equal(torch.rand(3), expected), "the caller's stream of random numbers is left alone"
    assert same_bits(found, model) and not any(module.training for module in found.modules())
    torch.testing.assert_close(merged(tokens_BT), found(tokens_BT), rtol=1e-5, atol=1e-5)
    assert read_metadata(out)["extra"]["lora"]["targets"] == LINEAR
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in out.rglob("*") if file.is_file())


def test_the_bundle_is_identified_by_the_merged_weights_alone(written, tmp_path):
    _, model, out = written
    merged, _ = lora.split(dict(model.state_dict()), 6 / 4)
    write_bundle(tmp_path / "plain", model.args, merged, (out / "tokenizer.model").read_bytes(), source="", dropped=[], extra={})
    assert bundle_sha256(tmp_path / "plain") == bundle_sha256(out)


def test_fewer_heads_than_the_start_has_are_found_again(micro, tmp_path):
    model = adapted(load_bundle(micro.bundle, n_future=1, dtype=torch.float32))
    save_model(model, micro.bundle, tmp_path / "out", ALONE, {}, lora.merging(settings()))
    assert same_bits(lora.load_adapted(micro.bundle, tmp_path / "out"), model)


def test_peft_reads_the_written_adapter(written):
    from peft import PeftModel

    start, model, out = written
    base, tokens_BT = load_bundle(start, dtype=torch.float32), random_tokens(model.args, 2, 9)
    base.config = {}
    torch.testing.assert_close(PeftModel.from_pretrained(base, out / "adapter").eval()(tokens_BT), model.eval()(tokens_BT))


def changed(out, change):
    """The adapter's weights after `change`, with a manifest that agrees."""
    file, facts = out / "adapter" / lora.WEIGHTS, out / "metadata.json"
    tensors, before = load_file(file), sha256_file(file)
    change(tensors)
    save_file(tensors, file)
    facts.write_text(facts.read_text().replace(before, sha256_file(file)))


def told(out, change):
    """metadata.json after `change` of what it says of the adapter."""
    metadata = json.loads((out / "metadata.json").read_text())
    change(metadata["extra"]["lora"])
    (out / "metadata.json").write_text(json.dumps(metadata))


NAME = "base_model.model.layers.0.attention.wq.lora_A.weight"
DAMAGE = {
    "missing": (lambda out: changed(out, lambda tensors: tensors.pop(NAME)), f"missing tensor {NAME}; expected 56 tensors, found 55"),
    "unknown": (lambda out: changed(out, lambda tensors: tensors.update(more=torch.zeros(1))), "unknown tensor more"),
    "weights": (lambda out: (out / "adapter" / lora.WEIGHTS).write_bytes(b"cut"), r"adapter_model\.safetensors: SHA256: expected"),
    "settings": (lambda out: (out / "adapter" / lora.CONFIG).write_text("{}"), r"adapter_config\.json: SHA256: expected"),
    "no weights": (lambda out: (out / "adapter" / lora.WEIGHTS).unlink(), r"adapter_model\.safetensors: missing"),
    "no folder": (lambda out: shutil.rmtree(out / "adapter"), r"adapter_config\.json: missing"),
    "no facts": (lambda out: told(out, lambda facts: facts.pop("rank")), r"metadata\.json: extra\.lora: expected rank, alpha, .*, found"),
    "odd fact": (lambda out: told(out, lambda facts: facts.update(sha256="x")), r"metadata\.json: extra\.lora: expected rank"),
    "odd file": (lambda out: told(out, lambda facts: facts["sha256"].pop(lora.CONFIG)), r"metadata\.json: extra\.lora: expected rank"),
    "odd target": (lambda out: told(out, lambda facts: facts["targets"].append(1)), r"metadata\.json: extra\.lora: expected rank"),
    "alpha": (lambda out: told(out, lambda facts: facts.update(alpha=5.0)), r"adapter_config\.json: expected .*5\.0.* as in"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_adapter_that_is_not_what_was_written_is_refused(written, damage):
    change, message = DAMAGE[damage]
    change(written[2])
    with pytest.raises((lora.LoraError, BundleError), match=message):
        lora.load_adapted(written[0], written[2])


def test_another_start_and_a_bundle_without_adapter_are_refused(written, micro):
    with pytest.raises(lora.LoraError, match=r"expected the bundle that .* started from"):
        lora.load_adapted(written[2], written[2])
    with pytest.raises(lora.LoraError, match=r"expected a bundle that was trained with training\.lora"):
        lora.load_adapted(micro.bundle, micro.bundle)


def test_a_start_that_the_bundle_does_not_name_is_refused(written):
    file = written[2] / "metadata.json"
    metadata = json.loads(file.read_text())
    del metadata["extra"]["start_sha256"]
    file.write_text(json.dumps(metadata))
    with pytest.raises(lora.LoraError, match=r"started from, None, found"):
        lora.load_adapted(written[0], written[2])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"targets": ["wq", "q_proj"]}, "targets: q_proj: expected a linear layer of the model, one of wq, wk, wv, wo, w1, w2"),
        ({"rank": 17, "targets": ["w1", "wk"]}, "rank: expected at most 8, the rank that wk can have, found 17"),
    ],
)
def test_adapters_that_the_model_has_no_place_for_are_refused(change, message):
    model = random_model()
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(lora.LoraError, match=message):
        lora.attach(model, settings(**change), 3)
    assert [name for name, _ in model.named_parameters()] == before


@pytest.mark.parametrize("change", [{"rank": 8}, {"targets": LINEAR[:6]}, {"targets": [*LINEAR, "output"]}])
def test_settings_of_another_adapter_are_not_merged(micro, tmp_path, change):
    model = adapted(load_bundle(micro.bundle, dtype=torch.float32))
    with pytest.raises(lora.LoraError, match=r"the model's adapters: expected rank .*, found rank 4 on w1, w2, w3, wk, wo, wq, wv"):
        save_model(model, micro.bundle, tmp_path / "out", ALONE, {}, lora.merging(settings(**change)))
    assert not (tmp_path / "out").exists()


def test_what_has_no_adapters_has_none_to_merge_and_adapters_are_not_saved_unmerged(micro, tmp_path):
    model = load_bundle(micro.bundle, dtype=torch.float32)
    with pytest.raises(lora.LoraError, match="found rank none on none"):
        save_model(model, micro.bundle, tmp_path / "out", ALONE, {}, lora.merging(settings()))
    with pytest.raises(BundleError, match=r"the given tensors: missing tensor extra_heads\.0\.attention\.wk\.weight and 27 more"):
        save_model(adapted(model), micro.bundle, tmp_path / "out", ALONE, {})
    assert not (tmp_path / "out").exists()


def test_half_an_adapter_is_not_merged():
    state = dict(adapted(random_model()).state_dict())
    del state["layers.0.attention.wq" + lora.A]
    with pytest.raises(lora.LoraError, match=r"layers\.0\.attention\.wq: expected both matrices of an adapter, found one"):
        lora.merging(settings())(state)


def test_a_merge_that_is_no_number_is_not_saved(micro, tmp_path):
    model = adapted(load_bundle(micro.bundle, dtype=torch.float32))
    for name, parameter in model.named_parameters():
        if name.endswith((lora.A, lora.B)):
            parameter.data.fill_(1e30)
    with pytest.raises(NotFinite, match="holds numbers that are not finite"):
        save_model(model, micro.bundle, tmp_path / "out", ALONE, {}, lora.merging(settings()))
    assert not (tmp_path / "out").exists()


def test_a_state_of_another_kind_of_training_is_not_restored(micro, tmp_path):
    optimizer = lambda model: torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)  # noqa: E731
    whole = load_bundle(micro.bundle, dtype=torch.float32)
    checkpoint.save(tmp_path, whole, optimizer(whole), {"step": 1}, ALONE)
    model = adapted(load_bundle(micro.bundle, dtype=torch.float32))
    with pytest.raises(RuntimeError, match=r"state\.pt: .*: expected in the saved state and in the model; remove that folder"):
        checkpoint.restore(tmp_path, model, optimizer(model))


def test_a_model_is_adapted_once():
    model = adapted(random_model())
    with pytest.raises(lora.LoraError, match="has adapters already"):
        lora.attach(model, settings(), 3)


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


class Seeds:
    """An objective that notes what each step's random numbers start from."""

    def __init__(self):
        self.inner, self.seen = policy("baseline"), []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def loss(self, model, batch):
        self.seen.append(torch.initial_seed())
        return self.inner.loss(model, batch)


def test_every_step_seed_and_rank_draws_its_own(micro, data, monkeypatch):
    monkeypatch.setattr(train, "share", lambda step, rank, size, budget: share(step, 0, 1, budget))  # rank 1 of one has no rows
    found = []
    for seed, rank in ((3, 0), (4, 0), (3, 1)):
        objective, plan = Seeds(), replace(short_plan(data), seed=seed)
        train.fit(start_model(micro.bundle, torch.float32), objective, plan, OPTIMIZER, replace(ALONE, rank=rank))
        assert len(set(objective.seen)) == plan.n_steps == 4
        found += set(objective.seen)
    assert len(set(found)) == 12


@pytest.mark.parametrize("name, changes", [("rho1", {"scope": "two_pass"}), ("rho1", {"scope": {"kind": "lagged", "ema": 0.5}})])
def test_weights_that_are_made_before_the_losses_see_no_dropout(micro, data, name, changes, monkeypatch):
    modes = []
    weigh_step = PolicyObjective.weigh_step

    def noted(self, model, *arguments):
        modes.append({module.training for module in model.modules()})
        return weigh_step(self, model, *arguments)

    monkeypatch.setattr(PolicyObjective, "weigh_step", noted)
    model = adapted(start_model(micro.bundle, torch.float32), dropout=0.5).train()
    objective = methods.objective(name, n_future=3, **changes)
    train.train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), objective, short_plan(data).step(0), ALONE, 500, 1.0)
    assert modes == [{False}] and model.training


def test_a_shared_critic_trains_its_head_beside_the_adapter(micro):
    model = SharedPolicy(adapted(start_model(micro.bundle, torch.float32), trained=False))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [name for name in trained if "lora_" not in name] == ["value.weight", "value.bias"]


def test_the_account_counts_adapters_apart(micro, data):
    plan, objective = plan_of(data), policy("baseline")
    full = outcome.account(start_model(micro.bundle), objective, plan, {})
    model = adapted(start_model(micro.bundle))
    found = outcome.account(model, objective, plan, {})
    assert found["parameters"] == full["parameters"] == full["trained_parameters"]
    assert found["trained_parameters"] == sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert 0.6 * full["train_flops"] < found["train_flops"] < full["train_flops"]  # to the product in test_flops


@pytest.mark.parametrize("change", [
    {"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"targets": []}, {"targets": ["q_proj"]}, {"bias": "all"}, {"alpha": math.inf},
    {"targets": ["wq", "wq"]},
])  # fmt: skip
def test_settings_out_of_range_are_refused(change):
    whole = {"rank": 64, "alpha": 128, "dropout": 0.05, "targets": LINEAR}
    Lora.model_validate(whole)
    with pytest.raises(ValueError):
        Lora.model_validate(whole | change)


def on_two_ranks(bundle, processed, out):
    torch.set_num_threads(1)
    data, found = TokenData(processed, "policy"), {}
    with joined("cpu") as world:
        for parallel in ("ddp", "fsdp"):
            scratch = Path(out) / parallel
            scratch.mkdir(exist_ok=True)
            for key, dropout, folder, at in (
                ("alone", 0.0, None, 0), ("whole", 0.5, None, 0), ("killed", 0.5, scratch, 4), ("resumed", 0.5, scratch, 0),
            ):  # fmt: skip
                model, plan = adapted(start_model(bundle), trained=False, dropout=dropout), plan_of(data, checkpoint_every=2)
                try:
                    fixed = {"parallel": parallel, "scratch": folder, "on_log": killer(at)}
                    train.fit(model, policy("verifiable"), plan, OPTIMIZER, world, **fixed)
                except Killed:
                    continue
                found[parallel, key] = full_state(model)
    if world.is_first:
        torch.save(found, f"{out}/found.pt")


@pytest.fixture(scope="module")
def ranks(micro, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    ends = run_ranks("tests.test_lora", "on_two_ranks", micro.bundle, micro.processed, out)
    assert [code for code, _ in ends] == [0, 0], "\n".join(error[-3000:] for _, error in ends)
    return torch.load(out / "found.pt"), out


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_the_adapter_of_one(ranks, micro, data, parallel):
    model = adapted(start_model(micro.bundle), trained=False)
    fit(model, policy("verifiable"), plan_of(data))
    torch.testing.assert_close(ranks[0][parallel, "alone"], dict(model.state_dict()), rtol=1e-8, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_resume_an_adapter_with_dropout_bit_for_bit(ranks, parallel):
    found, out = ranks
    whole, resumed = found[parallel, "whole"], found[parallel, "resumed"]
    assert list(whole) == list(resumed) and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], found[parallel, "alone"][name]) for name in whole)
    saved = torch.load(out / parallel / "state.pt")
    assert {name.removeprefix("module.") for name in saved["model"]} == {name for name in whole if "lora_" in name}
