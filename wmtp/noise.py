"""Random numbers as a pure function of their key: splitmix64 of a counter. No state, no order, the same on every rank."""

import zlib

import torch
from torch import Tensor


def mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 [...]: every bit of the counter reaches every bit of the result."""
    # int64 products wrap, as splitmix64 wants; >> is arithmetic, so the copied sign bits are masked off.
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def bits(key_B: Tensor, place_B: Tensor, n: int) -> Tensor:
    """64 random bits, int64 [B, n]: entry [b, i] depends on (key_B[b], place_B[b], i) alone."""
    counter = key_B[:, None] + place_B[:, None] * -7046029254386353131 + torch.arange(n, device=key_B.device) * 0x2545F4914F6CDD1D
    return mix(mix(counter))


def uniform(seed: int, row_B: Tensor, length: int, stream: str = "") -> Tensor:
    """Numbers in [0, 1), float64 [B, length]: entry [b, i] depends on (seed, stream, row_B[b], i) alone, padding and batching change none.

    Two users of one seed and one row name streams of their own, else one's draws tell the other's.
    """
    seed_key = mix(torch.tensor(seed ^ (zlib.crc32(stream.encode()) << 31), dtype=torch.int64, device=row_B.device))
    return ((bits(seed_key.expand_as(row_B), row_B, length) >> 11) & 0x1FFFFFFFFFFFFF).double() * 2.0**-53
