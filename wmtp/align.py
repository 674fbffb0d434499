"""The one place where "future" is defined, and the legend of shapes.

B rows, T positions, F future offsets (heads), V vocabulary, D width, N heads of attention, H head width. A suffix names an array's
axes: ce_BTF. Every per-token quantity (label, advantage, reference loss, weight) is indexed by its TARGET token; `align_future`
alone turns it into what each head sees.
"""

from torch import Tensor
from torch.nn import functional

IGNORE = -100
"""Label of a token that no head is asked to predict."""


def align_future(q_BT: Tensor, n_future: int, fill: float) -> Tensor:
    """Target-indexed [B, T] to head-indexed [B, T, F]: out[b, t, h] = q[b, t+h+1], or `fill` where t+h+1 > T-1.

    >>> align_future(torch.tensor([[10, 11, 12]]), 2, fill=-1).tolist()
    [[[11, 12], [12, -1], [-1, -1]]]
    """
    if q_BT.ndim != 2 or n_future < 1:
        raise ValueError(f"align_future: expected a [B, T] array and n_future >= 1, found shape {tuple(q_BT.shape)} and {n_future}")
    padded = functional.pad(q_BT[:, 1:], (0, n_future), value=fill)
    return padded.unfold(1, n_future, 1)


def future_targets(tokens_BT: Tensor, response_BT: Tensor, n_future: int) -> Tensor:
    """Targets [B, T, F] (int64): the token that head h at position t predicts, IGNORE where that token is not in `response_BT` (bool).

    The mask belongs to the target, not to the position: the last h+1 prompt positions do train head h.
    """
    return align_future(tokens_BT.masked_fill(~response_BT, IGNORE), n_future, IGNORE)


def last_BT(response_BT: Tensor) -> Tensor:
    """The last token of each response, bool [B, T]: its end of text."""
    return response_BT & ~functional.pad(response_BT[:, 1:], (0, 1), value=False)
