"""The names that scripts outside this project call: where they are imported from, their parameters in order, and what they give."""

import inspect

import pytest
import torch

from wmtp.align import align_future
from wmtp.critic import gae
from wmtp.weighting import METHODS, project_mean_one


@pytest.mark.parametrize(
    "function, names",
    [
        (align_future, ["q_BT", "n_future", "fill"]),
        (gae, ["values_BT", "reward_B", "response_BT", "gamma", "lam"]),
        (project_mean_one, ["u", "valid", "lo", "hi"]),
    ],
)
def test_parameters_have_their_names_and_order_and_whatever_follows_may_be_left_out(function, names):
    found = list(inspect.signature(function).parameters.values())
    assert [one.name for one in found[: len(names)]] == names
    assert all(one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for one in found[: len(names)])
    assert all(one.default is not inspect.Parameter.empty for one in found[len(names) :])


def test_align_future_gives_each_head_its_own_token_and_the_fill_beyond_the_end():
    q_BT = torch.tensor([[10.0, 11.0, 12.0, 13.0], [20.0, 21.0, 22.0, 23.0]])
    assert align_future(q_BT, 3, -1.0).tolist() == [
        [[11, 12, 13], [12, 13, -1], [13, -1, -1], [-1, -1, -1]],
        [[21, 22, 23], [22, 23, -1], [23, -1, -1], [-1, -1, -1]],
    ]


def test_gae_gives_advantages_by_target_token_and_value_targets_by_state():
    """gamma 0.5, lam 0.5, responses 2..4 and 1..2.

    Row 0, R = 1: delta[4] = 1 - v[3] = 0.6, delta[3] = 0.5 v[3] - v[2] = -0.4, delta[2] = 0.5 v[2] - v[1] = 0.1;
    A[4] = 0.6, A[3] = -0.4 + 0.25 * 0.6 = -0.25, A[2] = 0.1 - 0.25 * 0.25 = 0.0375; G[i-1] = v[i-1] + A[i].
    Row 1, R = 0: delta[2] = -v[1] = -0.8, delta[1] = 0.5 v[1] - v[0] = 0.2; A[2] = -0.8, A[1] = 0.2 - 0.25 * 0.8 = 0.
    """
    values_BT = torch.tensor([[0.9, 0.2, 0.6, 0.4, 0.7], [0.2, 0.8, 0.3, 0.1, 0.5]], dtype=torch.float64)
    response_BT = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]], dtype=torch.bool)
    advantage_BT, target_BT = gae(values_BT, torch.tensor([1.0, 0.0]), response_BT, 0.5, 0.5)
    assert advantage_BT[0].tolist() == pytest.approx([0, 0, 0.0375, -0.25, 0.6], abs=1e-12)
    assert advantage_BT[1].tolist() == pytest.approx([0, 0, -0.8, 0, 0], abs=1e-12)
    assert target_BT[0].tolist() == pytest.approx([0, 0.2375, 0.35, 1, 0], abs=1e-12)
    assert target_BT[1].tolist() == pytest.approx([0.2, 0, 0, 0, 0], abs=1e-12)


def test_project_mean_one_scales_clips_and_leaves_the_rest_at_zero():
    """clip(c * u, 0.5, 2) of 4, 8, 16, 24, 48 sums to 5 where 0.5 + 0.5 + 16c + 24c + 2 = 5: c = 1/20."""
    u, valid = torch.tensor([[4.0, 8.0, 99.0], [16.0, 24.0, 48.0]]), torch.tensor([[True, True, False], [True, True, True]])
    found = project_mean_one(u, valid, 0.5, 2.0)
    assert found.tolist() == [pytest.approx([0.5, 0.5, 0], abs=1e-6), pytest.approx([0.8, 1.2, 2], abs=1e-6)]


def test_methods_is_the_table_of_names_with_one_function_of_arrays_each():
    assert {"ntp", "baseline", "verifiable", "rho1", "shuffled", "constant_critic", "position_only", "random_matched"} <= set(METHODS)
    assert {"random_k", "inverted_k", "oracle", "dft", "focal", "entropy_topk", "crr_binary", "head_decay", "adamtp_mask"} <= set(METHODS)
    for name, method in METHODS.items():
        assert callable(method.function()), name
    response_BT = torch.tensor([[False, True, True]])
    assert METHODS["baseline"].function()(response_BT).tolist() == [[0, 1, 1]]
