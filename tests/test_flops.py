"""Counts against numbers worked out by hand for a model of width 8."""

import pytest
import torch

from wmtp import flops
from wmtp.anchor import AnchoredCritic
from wmtp.bundle import ModelArgs
from wmtp.critic import Critic
from wmtp.model import Transformer

# One block: attention 4 x 8 x 8, feed-forward 3 x 8 x 16, two norms of 8.
BLOCK = 256 + 384 + 16
NORM, OUTPUT, VALUE = 8, 10 * 8, 9 + 1


def model(n_trunk, n_future):
    return Transformer(
        ModelArgs(
            dim=8, n_layers=n_trunk + n_future - 1, n_heads=2, n_kv_heads=2, vocab_size=10, multiple_of=16, ffn_dim_multiplier=None,
            norm_eps=1e-5, rope_theta=10000.0, n_future_tokens=n_future, ffn_hidden_dim=16,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("network", "forward", "training"),
    [
        (lambda: model(2, 1), 2 * (2 * BLOCK + NORM + OUTPUT), 6 * (2 * BLOCK + NORM + OUTPUT)),
        (lambda: model(2, 3), 2 * (4 * BLOCK + NORM + 3 * OUTPUT), 6 * (4 * BLOCK + NORM + 3 * OUTPUT)),
        (lambda: Critic(model(2, 1)), 2 * (2 * BLOCK + NORM + OUTPUT + VALUE), 6 * (2 * BLOCK + NORM + OUTPUT + VALUE)),
        (lambda: AnchoredCritic(model(1, 1)), 4 * (BLOCK + NORM + OUTPUT + VALUE), 8 * (BLOCK + NORM + OUTPUT + VALUE)),
    ],
    ids=["one head", "three heads", "critic", "critic with a frozen copy"],
)
def test_two_a_weight_and_token_forward_and_six_in_training(network, forward, training):
    network = network()
    assert (flops.forward(network, 1), flops.training(network, 1)) == (forward, training)
    assert (flops.forward(network, 7), flops.training(network, 7)) == (7 * forward, 7 * training)


def test_a_frozen_model_trains_for_the_price_of_its_forward():
    frozen = model(2, 3).requires_grad_(False)
    assert flops.training(frozen, 5) == flops.forward(frozen, 5) == 10 * (4 * BLOCK + NORM + 3 * OUTPUT)


def test_the_count_is_that_of_the_products_made():
    """By PyTorch's own counter, which sees matrix products alone: attention between positions apart, norms and biases are missing."""
    from torch.utils.flop_counter import FlopCounterMode

    network, tokens = model(2, 3), torch.randint(10, (1, 6))
    with FlopCounterMode(display=False) as counter:
        network(tokens)
    counts = counter.get_flop_counts()["Global"]
    attention = sum(n for operation, n in counts.items() if operation not in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert counter.get_total_flops() - attention == flops.forward(network, 6) - 2 * 6 * (NORM + 4 * 16)
