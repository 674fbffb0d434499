"""Meta's multi-token prediction Llama in plain PyTorch (Gloeckle et al. 2024, 2404.19737); shapes as in wmtp.align.

The trunk's last block is head 0; `extra_heads` are blocks for heads 1..F-1 that read what head 0 reads; all share `norm` and
`output`. Rotary pairs are interleaved, as in Meta's checkpoints. The model knows neither ranks, methods nor files.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from wmtp.align import IGNORE
from wmtp.bundle import BundleError, ModelArgs, read_args, read_tensors, verify
from wmtp.cache import BlockCache, Cache, Fork, ForkedBlock, Window, attention

AnyBlockCache = BlockCache | ForkedBlock
AnyCache = Cache | Fork


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        x32 = x_BTD if x_BTD.dtype == torch.float64 else x_BTD.float()
        return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x_BTD.dtype) * self.weight


def rotary_table(length: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """cos and sin of each position's angles [length, 2, H], each angle twice, sin with the sign that `rotate` gives its partner.

    Computed in float64, as angles at far positions lose digits in float32, and on the CPU: MPS knows no float64.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), frequency)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, cos], -1), torch.stack([-sin, sin], -1)], 1).flatten(-2).to(device, dtype)


def rotate(x_BTNH: Tensor, turn: Tensor) -> Tensor:
    """Rotates interleaved pairs; `turn` is [T, 2, H], or [B, T, 2, H] when rows stand at different positions.

    In real numbers, which compilers fuse; they leave complex ones alone.
    """
    x = x_BTNH.to(turn.dtype)
    cos, sin = turn.unsqueeze(-3).unbind(-2)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.addcmul(x * cos, torch.stack((odd, even), -1).flatten(-2), sin).to(x_BTNH.dtype)


@dataclass
class Context:
    """What every block of one forward shares: rotary turns, and the window on its cache."""

    turn: Tensor
    window: Window | None


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = args.n_heads, args.n_kv_heads, args.head_dim
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(self, x_BTD: Tensor, context: Context, cache: AnyBlockCache | None, first: int) -> Tensor:
        """Attended [B, T - first, D]: every position is a key, those from `first` on are queries."""
        q = rotate(self.wq(x_BTD[:, first:]).unflatten(-1, (self.n_heads, self.head_dim)), context.turn[..., first:, :, :])
        k = rotate(self.wk(x_BTD).unflatten(-1, (self.n_kv_heads, self.head_dim)), context.turn)
        v = self.wv(x_BTD).unflatten(-1, (self.n_kv_heads, self.head_dim))
        if cache is not None:
            return self.wo(cache.attend(q, k, v, context.window).flatten(-2))
        mask = None
        if first:
            mask = torch.ones(x_BTD.shape[1], x_BTD.shape[1], dtype=torch.bool, device=x_BTD.device).tril()[first:]
        return self.wo(attention(q, k.transpose(1, 2), v.transpose(1, 2), mask).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x_BTD)) * self.w3(x_BTD))


class Block(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x_BTD: Tensor, context: Context, cache: AnyBlockCache | None = None, first: int = 0) -> Tensor:
        """The block's output at positions `first`.. [B, T - first, D]; earlier ones are only read."""
        x_out = x_BTD[:, first:] + self.attention(self.attention_norm(x_BTD), context, cache, first)
        return x_out + self.feed_forward(self.ffn_norm(x_out))


class Transformer(nn.Module):
    """Trunk and heads; `args.n_future_tokens` heads are built, parameter names are Meta's."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        # Given, not initialised by nn.Embedding: on the meta device a normal draw imports torch._dynamo, a second in every process.
        embeddings = torch.empty(args.vocab_size, args.dim)
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim, _weight=embeddings if embeddings.is_meta else embeddings.normal_())
        self.layers = nn.ModuleList(Block(args) for _ in range(args.n_trunk))
        self.extra_heads = nn.ModuleList(Block(args) for _ in range(args.n_future_tokens - 1))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self._rotary: Tensor | None = None

    @property
    def n_future(self) -> int:
        return 1 + len(self.extra_heads)

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BTF: Tensor | None = None,
        cache: AnyCache | None = None,
        position_BT: Tensor | None = None,
        n_future: int | None = None,
        first: int = 0,
        with_entropy: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Without targets: logits [B, T - first, F, V]. With targets: cross-entropy [B, T, F] in nats, at least float32, 0 where IGNORE.

        `with_entropy` adds the entropy of each of those predictions, of the same form and detached.

        ValueError where more heads are asked for than are built.

        With a cache, `position_BT` says where each token of each row stands (None: from the start of an empty one); earlier
        positions are read from the cache. All are below its capacity; nothing checks that, since the answer would have to be waited for.
        `first` is the caller's word that no target stands before that position: the head blocks then compute nothing there.
        """
        if targets_BTF is None and with_entropy:
            raise ValueError("with_entropy: expected with targets; without them the logits hold all of the predictions")
        hidden = self.hidden(tokens_BT, cache, position_BT, n_future, first)
        if targets_BTF is None:
            return torch.stack([self.output(x_BTD) for x_BTD in hidden], dim=2)
        if targets_BTF.shape != (*tokens_BT.shape, len(hidden)):
            raise ValueError(f"targets: expected shape {(*tokens_BT.shape, len(hidden))}, found {tuple(targets_BTF.shape)}")
        found = [self.cross_entropy(x_BTD, targets_BTF[:, first:, h], with_entropy) for h, x_BTD in enumerate(hidden)]
        if not with_entropy:
            return functional.pad(torch.stack(found, dim=2), (0, 0, first, 0))
        ce, entropy = (functional.pad(torch.stack(part, dim=2), (0, 0, first, 0)) for part in zip(*found))
        return ce, entropy

    def hidden(
        self,
        tokens_BT: Tensor,
        cache: AnyCache | None = None,
        position_BT: Tensor | None = None,
        n_future: int | None = None,
        first: int = 0,
    ) -> list[Tensor]:
        """The normed output [B, T - first, D] of each of the first `n_future` heads (default: all that are built)."""
        if cache is not None and first:
            raise ValueError(f"first: expected 0 with a cache, whose positions are told by position_BT, found {first}")
        if not 0 <= first <= tokens_BT.shape[1]:
            raise ValueError(f"first: expected 0..{tokens_BT.shape[1]}, a position of the rows, found {first}")
        n_future = self.n_future if n_future is None else n_future
        if not 1 <= n_future <= self.n_future:
            raise ValueError(f"n_future: expected 1..{self.n_future}, the heads that are built, found {n_future}")
        if cache is not None and len(cache.blocks) < len(self.layers) + n_future - 1:
            raise ValueError(f"cache: expected room for {n_future} heads, found {len(cache.blocks) - len(self.layers) + 1}; see new_cache")
        context = self._context(tokens_BT, cache, position_BT)
        caches = cache.blocks if cache else [None] * (len(self.layers) + n_future - 1)
        x_BTD = self.tok_embeddings(tokens_BT)
        *trunk, head_0 = self.layers
        for block, block_cache in zip(trunk, caches):
            x_BTD = block(x_BTD, context, block_cache)
        heads = [head_0, *self.extra_heads][:n_future]
        return [self.norm(head(x_BTD, context, block_cache, first)) for head, block_cache in zip(heads, caches[len(trunk) :])]

    def _context(self, tokens_BT: Tensor, cache: AnyCache | None, position_BT: Tensor | None) -> Context:
        T = tokens_BT.shape[1]
        window = None if cache is None else cache.window(position_BT, T)
        if position_BT is None:
            return Context(self._turns(T)[:T], window)
        # As many turns as there can be positions: the greatest in use would have to be waited for.
        return Context(self._turns(cache.capacity)[position_BT], window)

    def new_cache(self, rows: int, capacity: int, n_future: int = 1) -> Cache:
        """An empty one for the trunk and `n_future` heads, with room for `capacity` tokens a row."""
        weight, n_blocks = self.tok_embeddings.weight, len(self.layers) + n_future - 1
        sizes = (rows, self.args.n_kv_heads, self.args.head_dim, capacity)
        return Cache([BlockCache(*sizes, weight.dtype, weight.device) for _ in range(n_blocks)])

    def _turns(self, length: int) -> Tensor:
        weight = self.norm.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        table = self._rotary
        if table is None or len(table) < length or table.device != weight.device or table.dtype != dtype:
            with torch.inference_mode(False):
                self._rotary = table = rotary_table(max(length, 256), self.args.head_dim, self.args.rope_theta, dtype, weight.device)
        return table

    def cross_entropy(self, x_BTD: Tensor, target_BT: Tensor, with_entropy: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Loss [B, T] in nats of one head from its normed output; the vocabulary is computed only where there is a target.

        `with_entropy` gives (loss, entropy of the prediction), the latter detached.
        """
        valid_BT = target_BT != IGNORE
        logits = self.output(x_BTD[valid_BT])
        logits = logits if logits.dtype == torch.float64 else logits.float()
        ce = functional.cross_entropy(logits, target_BT[valid_BT], reduction="none")
        placed = ce.new_zeros(target_BT.shape).masked_scatter(valid_BT, ce)
        if not with_entropy:
            return placed
        log_p = logits.detach().log_softmax(-1)
        return placed, torch.zeros_like(placed.detach()).masked_scatter(valid_BT, -(log_p.exp() * log_p).sum(-1))


def load_bundle(
    path: str | Path, n_future: int | None = None, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Transformer:
    """The bundle's model in evaluation mode; `n_future` < n_future_tokens leaves the further heads out, unread.

    The model is built on the meta device and filled tensor by tensor, so that no second copy is held. Names, shapes and hashes are
    checked against the bundle's manifest; any difference is an error that names it.
    """
    verify(path)
    args = read_args(path)
    if n_future is not None and not 1 <= n_future <= args.n_future_tokens:
        raise BundleError(f"{path}: n_future: expected 1..{args.n_future_tokens} (params.json n_future_tokens), found {n_future}")
    if n_future is not None:
        args = args.with_heads(n_future)
    with torch.device("meta"):
        model = Transformer(args)
    state = {name: tensor.to(device=device, dtype=dtype or tensor.dtype) for name, tensor in read_tensors(path, n_future)}
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(True).eval()
