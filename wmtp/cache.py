"""Keys and values of tokens that were read; a prompt that many rows go on from is held, and read by a step, once.

Shapes as in wmtp.align; in addition R rows that go on, P prompts, S slots for rows of one prompt, K key-value heads, L cached tokens,
and Q queries that share a key-value head: of N / K heads and T tokens each.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass
class Window:
    """Where the tokens of one forward stand in a cache and what they see of it: the first `length` entries, of them those in `seen`.

    `index_BT` None: from the start on, each seeing itself and what comes before.
    """

    index_BT: Tensor | None
    length: int
    seen_BTL: Tensor | None


def window(index_BT: Tensor) -> Window:
    """Each token sees the entries up to its own index."""
    length = int(index_BT.max()) + 1
    return Window(index_BT, length, torch.arange(length, device=index_BT.device) <= index_BT[..., None])


class BlockCache:
    """Keys and values [B, K, capacity, H] of one block."""

    def __init__(self, rows: int, n_kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype, device: torch.device):
        self.keys = torch.zeros(rows, n_kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)

    def put(self, keys_BTKH: Tensor, values_BTKH: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """Writes where the window says; returns the keys and values [B, K, L, H] that it reaches."""
        if window.index_BT is None:
            self.keys[:, :, : window.length] = keys_BTKH.transpose(1, 2)
            self.values[:, :, : window.length] = values_BTKH.transpose(1, 2)
        else:
            rows = torch.arange(len(window.index_BT), device=window.index_BT.device)[:, None]
            self.keys[rows, :, window.index_BT] = keys_BTKH
            self.values[rows, :, window.index_BT] = values_BTKH
        return self.keys[:, :, : window.length], self.values[:, :, : window.length]

    def attend(self, q_BTNH: Tensor, keys_BTKH: Tensor, values_BTKH: Tensor, window: Window) -> Tensor:
        """What the queries find, [B, T, N, H], once the forward's own keys and values are put."""
        keys_BKLH, values_BKLH = self.put(keys_BTKH, values_BTKH, window)
        return attention(q_BTNH, keys_BKLH, values_BKLH, None if window.seen_BTL is None else window.seen_BTL[:, None])

    def rows(self, first: int, after: int) -> "BlockCache":
        """Rows [first, after) of this one, in the same memory."""
        part = copy.copy(self)
        part.keys, part.values = self.keys[first:after], self.values[first:after]
        return part

    def select(self, rows: Tensor) -> None:
        """Keeps these rows (indices, repeats allowed), in this order."""
        self.keys, self.values = self.keys[rows], self.values[rows]


def attention(q_BTNH: Tensor, keys_BKLH: Tensor, values_BKLH: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention [B, T, N, H] with grouped queries; plain causal without a mask."""
    found_BNTH = functional.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2), keys_BKLH, values_BKLH, attn_mask=mask, is_causal=mask is None,
        enable_gqa=q_BTNH.shape[2] != keys_BKLH.shape[1],
    )  # fmt: skip
    return found_BNTH.transpose(1, 2)


@dataclass
class Cache:
    """One BlockCache for each block of a model, trunk first, then extra heads; the token at position p of a row is its entry p."""

    blocks: list[BlockCache]
    is_empty: bool = True

    @property
    def capacity(self) -> int:
        """Positions that a row may have."""
        return self.blocks[0].keys.shape[2]

    def window(self, position_BT: Tensor | None, n_tokens: int) -> Window:
        """None: the first `n_tokens` positions of every row, which an empty cache alone can take."""
        if position_BT is None and not self.is_empty:
            raise ValueError("position_BT: expected the positions of the tokens, since the cache holds some already; found None")
        self.is_empty = False
        return Window(None, n_tokens, None) if position_BT is None else window(position_BT)

    def rows(self, first: int, after: int) -> "Cache":
        """Rows [first, after) of this one, in the same memory."""
        return Cache([block.rows(first, after) for block in self.blocks], self.is_empty)

    def select(self, rows: Tensor) -> None:
        for block in self.blocks:
            block.select(rows)

    def fork(self, prompt_R: Tensor, length_P: Tensor, capacity: int) -> "Fork":
        """A cache for rows that go on from this one's: row r from the first length_P[prompt_R[r]] tokens of row prompt_R[r].

        It has room for `capacity` tokens more of each row, and reads what is here now without a copy.
        """
        like = self.blocks[0].keys
        own = [BlockCache(len(prompt_R), like.shape[1], like.shape[3], capacity, like.dtype, like.device) for _ in self.blocks]
        return Fork([copy.copy(block) for block in self.blocks], own, prompt_R, length_P)


class Fork:
    """Rows that share prompts: one cache for the prompts, one for what each row has of its own.

    A step reads one copy of a prompt, however many rows go on from it (bifurcated attention, 2403.08845). A row's tokens stand at
    positions from its prompt's length on.
    """

    def __init__(self, prompts: list[BlockCache], own: list[BlockCache], prompt_R: Tensor, length_P: Tensor):
        self.prompts, self.own, self.prompt_R, self.length_P = prompts, own, prompt_R, length_P
        self.blocks = [ForkedBlock(self, prompt, block) for prompt, block in zip(prompts, own)]
        self._arrange()

    @property
    def capacity(self) -> int:
        """Positions that a row may have."""
        return self.prompts[0].keys.shape[2] + self.own[0].keys.shape[2]

    def _arrange(self) -> None:
        """Rows of one prompt side by side: `row_PS` tells the row at each slot (any row, where a slot is empty), `slot_R` the reverse."""
        row_R, order = torch.arange(len(self.prompt_R), device=self.prompt_R.device), self.prompt_R.argsort()
        count_P = torch.bincount(self.prompt_R)
        first_P, S = count_P.cumsum(0) - count_P, int(count_P.max())
        sorted_R = self.prompt_R[order]
        self.slot_R = torch.empty_like(order).index_copy_(0, order, sorted_R * S + row_R - first_P[sorted_R])
        self.row_PS = row_R.new_zeros(len(self.length_P) * S).index_copy_(0, self.slot_R, row_R).view(-1, S)
        self.start_R1 = self.length_P[self.prompt_R][:, None]
        self.padding_RL = torch.arange(int(self.length_P.max()), device=self.prompt_R.device) >= self.start_R1

    def window(self, position_BT: Tensor | None, n_tokens: int) -> Window:
        if position_BT is None:
            raise ValueError("position_BT: expected the positions of the tokens, since every row goes on from a prompt; found None")
        return window(position_BT - self.start_R1)

    def select(self, rows: Tensor) -> None:
        """Keeps these rows, in this order; a prompt that no row goes on from is let go."""
        kept, self.prompt_R = torch.unique(self.prompt_R[rows], return_inverse=True)
        if len(kept) < len(self.length_P):
            self.length_P = self.length_P[kept]
            for block in self.prompts:
                block.select(kept)
        for block in self.own:
            block.select(rows)
        self._arrange()

    def by_prompt(self, q_RKQH: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """`product` of what a prompt's rows bring, put together as [P, K, S Q, H], given back by row."""
        (P, S), (K, Q) = self.row_PS.shape, q_RKQH.shape[1:3]
        found = product(q_RKQH[self.row_PS].transpose(1, 2).flatten(2, 3))
        return found.unflatten(2, (S, Q)).transpose(1, 2).reshape(P * S, K, Q, -1)[self.slot_R]


@dataclass
class ForkedBlock:
    """One block of a Fork."""

    fork: Fork
    prompts: BlockCache
    own: BlockCache

    def attend(self, q_BTNH: Tensor, keys_BTKH: Tensor, values_BTKH: Tensor, window: Window) -> Tensor:
        """As BlockCache.attend: one softmax over the prompt's tokens and the row's own, in float32 at least."""
        K, (T, N, H), length = keys_BTKH.shape[2], q_BTNH.shape[1:], self.fork.padding_RL.shape[1]
        exact = torch.promote_types(q_BTNH.dtype, torch.float32)
        q_RKQH = q_BTNH.to(exact).transpose(1, 2).unflatten(1, (K, N // K)).flatten(2, 3) * H**-0.5
        keys_RKLH, values_RKLH = (part.to(exact) for part in self.own.put(keys_BTKH, values_BTKH, window))
        keys_PKLH, values_PKLH = (part[:, :, :length].to(exact) for part in (self.prompts.keys, self.prompts.values))
        prompt_RKQL = self.fork.by_prompt(q_RKQH, lambda q_PKQH: q_PKQH @ keys_PKLH.transpose(-1, -2))
        own_RKQL, seen_RQL = q_RKQH @ keys_RKLH.transpose(-1, -2), window.seen_BTL.repeat(1, N // K, 1)
        prompt_RKQL = prompt_RKQL.masked_fill(self.fork.padding_RL[:, None, None], -torch.inf)
        p_RKQL = torch.cat([prompt_RKQL, own_RKQL.masked_fill(~seen_RQL[:, None], -torch.inf)], -1).softmax(-1)
        found = self.fork.by_prompt(p_RKQL[..., :length], lambda p_PKQL: p_PKQL @ values_PKLH) + p_RKQL[..., length:] @ values_RKLH
        return found.to(q_BTNH.dtype).unflatten(2, (N // K, T)).flatten(1, 2).transpose(1, 2)
