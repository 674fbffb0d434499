"""Counts against PyTorch's own counter on the calls that a training and a scoring make."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch.utils.flop_counter import FlopCounterMode

from tests import methods
from wmtp import flops, lora, scoring, shared
from wmtp.anchor import AnchoredCritic, AnchoredObjective
from wmtp.batches import Batch
from wmtp.bundle import ModelArgs
from wmtp.critic import Critic, ValueObjective
from wmtp.method_schema import AnyMethod
from wmtp.model import Transformer
from wmtp.preference import PairwiseObjective
from wmtp.shared import SharedPolicy

LENGTH, START = 17, 9
LINEAR = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


def model(n_future, n_trunk=2):
    """Grouped queries, so that keys and values are not as large as queries."""
    return Transformer(
        ModelArgs(
            dim=8, n_layers=n_trunk + n_future - 1, n_heads=4, n_kv_heads=2, vocab_size=10, multiple_of=16, ffn_dim_multiplier=None,
            norm_eps=1e-5, rope_theta=10000.0, n_future_tokens=n_future, ffn_hidden_dim=24,
        )
    )  # fmt: skip


def rows(n=2, length=LENGTH, start=START):
    """Correct and incorrect in turn, without padding: what a row computes for others' sake is not counted."""
    response = (torch.arange(length) >= start).repeat(n, 1)
    tokens = torch.randint(10, (n, length), generator=torch.Generator().manual_seed(0))
    return Batch(torch.arange(n), tokens, response, is_correct_B=torch.arange(n) % 2 == 0, shortest_prompt=start)


def extents(n=2, length=LENGTH, start=START):
    return np.full(n, length), np.full(n, start)


@pytest.fixture(autouse=True)
def no_attention(monkeypatch):
    """In its place something without a product of matrices, through which queries, keys and values get their gradients."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **_: q * (k.mean() + v.mean()))


def counted(call):
    """By PyTorch's own counter, which sees products of matrices alone."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def shared_work(n_future, on_incorrect):
    values = methods.block("uniform_shared", n_future, policy_on_incorrect=on_incorrect)
    return shared.objective(TypeAdapter(AnyMethod).validate_python(values), methods.objective("uniform_shared", values=values))


def adapted(network, *targets, dropout=0.0):
    lora.attach(network, SimpleNamespace(rank=3, alpha=6, dropout=dropout, targets=targets), 1)
    return network


TRAININGS = {
    "adapters everywhere": (lambda: adapted(model(3), *LINEAR), lambda: methods.objective("baseline", n_future=3)),
    "adapters of queries": (lambda: adapted(model(3), "wq"), lambda: methods.objective("baseline", n_future=3)),
    "adapters of the last matrix of a block": (lambda: adapted(model(2), "w2"), lambda: methods.objective("baseline", n_future=2)),
    "an adapter of the output": (lambda: adapted(model(3), "output"), lambda: methods.objective("baseline", n_future=3)),
    "adapters and a shared critic": (lambda: SharedPolicy(adapted(model(3), *LINEAR)), lambda: shared_work(3, "weighted")),
    "one head": (lambda: model(1), lambda: methods.objective("baseline", n_future=1)),
    "three heads": (lambda: model(3), lambda: methods.objective("baseline", n_future=3)),
    "more heads than trunk": (lambda: model(4, 1), lambda: methods.objective("baseline", n_future=4)),
    "shared critic": (lambda: SharedPolicy(model(3)), lambda: shared_work(3, "weighted")),
    "critic": (lambda: Critic(model(1)), lambda: ValueObjective("bce", lm_coef=0.5)),
    "critic of pairs": (lambda: Critic(model(1), "logit"), lambda: PairwiseObjective(0.5)),
    "critic with a frozen copy": (lambda: AnchoredCritic(model(1)), lambda: AnchoredObjective("bce", lm_coef=0.5)),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_costs_the_products_that_its_forward_and_backward_make(name):
    network, work = (make() for make in TRAININGS[name])
    step = work.prepare(rows())
    assert flops.training(network, *extents()) == counted(lambda: work.loss(network, step)[0].backward()) > 0
    with torch.no_grad():
        assert flops.training_forward(network, *extents()) == counted(lambda: work.loss(network, step)) > 0


def test_incorrect_rows_of_a_shared_critic_meet_the_output_matrix_for_head_zero_alone():
    network, work = SharedPolicy(model(3)), shared_work(3, "value_only")
    step = work.prepare(rows())
    found = flops.training(network, *extents(), np.array([True, False]))
    assert found == counted(lambda: work.loss(network, step)[0].backward())
    assert flops.training(network, *extents()) - found == 6 * 2 * (LENGTH - START) * network.trunk.output.weight.numel()


def test_a_frozen_model_trains_for_the_price_of_its_forward():
    frozen = model(3).requires_grad_(False)
    assert flops.training(frozen, *extents()) == flops.training_forward(frozen, *extents())


@pytest.mark.parametrize("network, score", [(model(1), scoring.reference_loss), (Critic(model(1)), scoring.critic_value)])
def test_scoring_costs_the_products_of_its_forward_prompts_included(network, score):
    with torch.no_grad():
        assert flops.forward(network, *extents()) == counted(lambda: score(network)(rows())) > 0


@pytest.mark.parametrize("count", [flops.forward, flops.training_forward, flops.training])
def test_rows_add_up_whatever_their_lengths(count):
    """Each at its own length and prompt; a prompt as short as the heads is computed whole."""
    network, each = model(3), ((17, 9), (5, 3), (12, 11), (40, 20))
    alone = [count(network, *extents(1, length, start)) for length, start in each]
    assert count(network, *(np.array(column, dtype=np.int32) for column in zip(*each))) == sum(alone)
    assert count(network, *extents(0)) == 0


def test_a_count_beyond_32_bits_does_not_overflow():
    """The columns of token data are int32."""
    network, n = model(1), 3000
    length_R, start_R = np.full(n, 10**6, dtype=np.int32), np.full(n, 10, dtype=np.int32)
    assert flops.training(network, length_R, start_R) == n * flops.training(network, length_R[:1], start_R[:1]) > 2**40


def test_without_a_prompt_to_skip_it_is_six_a_matrix_and_token():
    """Kaplan's count, the output matrix once a head."""
    network, n = model(3), 10**6
    matrices = sum(math.prod(one.shape) for name, one in network.named_parameters() if one.ndim == 2 and "embeddings" not in name)
    expected = 6 * n * (matrices + 2 * network.output.weight.numel())
    assert flops.training(network, *extents(1, n, 3)) == pytest.approx(expected, rel=1e-4)


def test_a_training_computes_less_than_all_positions():
    """Were the prompt computed by every head, PyTorch's count would be another one."""
    network, work = model(3), methods.objective("baseline", n_future=3)

    def trained(step):
        return counted(lambda: work.loss(network, work.prepare(step))[0].backward())

    assert trained(rows()) < trained(replace(rows(), shortest_prompt=0))
