"""Random numbers from a key: what they depend on, and that they are uniform."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from wmtp import noise

M = 2**64


def splitmix(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % M
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % M
    return z ^ (z >> 31)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(z=st.integers(-(2**63), 2**63 - 1))
def test_mix_is_splitmix64s_finaliser(z):
    assert int(noise.mix(torch.tensor([z]))[0]) % M == splitmix(z % M)


def test_a_number_depends_on_seed_row_and_place_alone():
    rows = torch.tensor([5, 0, 7, 5])
    found = noise.uniform(3, rows, 20)
    assert found.dtype == torch.float64 and torch.equal(found[0], found[3]) and not torch.equal(found[0], found[1])
    assert torch.equal(noise.uniform(3, rows, 50)[:, :20], found), "padding"
    assert torch.equal(noise.uniform(3, torch.tensor([7]), 20)[0], found[2]), "company"
    assert not (noise.uniform(4, rows, 20) == found).any()


def test_streams_of_one_seed_and_row_are_independent():
    found = np.stack([noise.uniform(1, torch.arange(40), 100, stream).numpy().ravel() for stream in ("", "shuffled", "random_k")])
    assert abs(np.corrcoef(found) - np.eye(3)).max() < 0.06
    assert not torch.equal(noise.uniform(1, torch.arange(2), 9, "a"), noise.uniform(2, torch.arange(2), 9, "a"))


@pytest.mark.parametrize("axis", ["places", "rows", "seeds"])
def test_numbers_are_uniform_and_uncorrelated(axis):
    n = 4000
    if axis == "places":
        found = noise.uniform(1, torch.arange(2), n).numpy()
    elif axis == "rows":
        found = noise.uniform(1, torch.arange(n), 2).numpy().T
    else:
        found = np.stack([noise.uniform(seed, torch.tensor([0]), 2)[0].numpy() for seed in range(n)]).T
    assert (found >= 0).all() and (found < 1).all() and len(np.unique(found)) == found.size
    for values in found:
        assert stats.kstest(values, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.06
    assert abs(np.corrcoef(found)[0, 1]) < 0.06
