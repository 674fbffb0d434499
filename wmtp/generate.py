"""Batched generation with a key-value cache, and self-speculative decoding with the extra heads (2404.19737, section 3.2).

A token is arg max of logits / temperature + Gumbel noise, and the noise is a counter's: keyed by (seed, task, sample, position). So a
completion does not depend on which others are generated beside it, in which order, or on how many ranks. Drafts take the noise of their
own position, and one is kept where the next forward's head 0 chooses the same token: the text is that of one token at a time, whatever
the drafts were, greedy or sampled (Stern et al. 2018, 1811.03115; there greedy alone). In float32 that holds but for choices that rounding
decides, in bfloat16 in distribution: a forward of several tokens rounds otherwise than one of a single token.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wmtp.bundle import NotFinite
from wmtp.cache import Fork
from wmtp.model import Transformer
from wmtp.noise import bits

PREFILL_TOKENS = 8192  # tokens of one forward over prompts, padding included: one long prompt must not pad all others to its length
STOP_EVERY = 8  # tokens between two looks at a text for its stop strings


@dataclass
class Request:
    """One completion to make; `temperature` 0 is greedy. `output` grows to at most max_tokens ids, the end of text not among them.

    `ended` says that the model ended the text itself, `stopped` that it holds a stop. `n_forwards` counts the forwards that chose its
    tokens, the prompt's own among them.
    """

    task_id: str
    sample: int
    prompt: Sequence[int]
    temperature: float
    output: list[int] = field(default_factory=list)
    ended: bool = False
    stopped: bool = False
    n_forwards: int = 0

    def noise_key(self, seed: int) -> int:
        digest = hashlib.sha256(f"{seed}:{self.task_id}:{self.sample}".encode()).digest()
        return int.from_bytes(digest[:8], "little", signed=True)


@dataclass(frozen=True)
class Decoding:
    """How completions are made. Tokens from `n_tokens` on, the padding of a vocabulary, are never chosen.

    `stopped` is asked every STOP_EVERY tokens whether a text already holds a stop; the caller cuts exactly afterwards. `n_heads` of the
    model's heads draft; with one there is no speculation.
    """

    max_tokens: int
    eos: int
    top_p: float = 1.0
    seed: int = 0
    n_tokens: int | None = None
    stopped: Callable[[Request], bool] | None = None
    n_heads: int = 1

    def take(self, request: Request, tokens: Sequence[int]) -> bool:
        """Adds the tokens that a forward chose, up to the end of the text; whether the request goes on."""
        request.n_forwards += 1
        for token in tokens:
            if token < 0:
                place = len(request.output) + 1
                raise NotFinite(f"{request.task_id}: the model's logits for token {place} of a completion are not finite; train it anew")
            if token == self.eos:
                request.ended = True
                return False
            request.output.append(token)
            if self.stopped and len(request.output) % STOP_EVERY == 0 and self.stopped(request):
                request.stopped = True
                return False
            if len(request.output) == self.max_tokens:
                return False
        return True


def gumbel(key_B: Tensor, position_B: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise [B, V] float32 as a pure function of (key, position, token): splitmix64 of a counter."""
    uniform = ((bits(key_B, position_B, vocab_size) >> 41) & 0x7FFFFF).float().add(0.5).mul(2.0**-23)
    return -torch.log(-torch.log(uniform))


def choose(logits_BV: Tensor, temperature_B: Tensor, key_B: Tensor, position_B: Tensor, top_p: float) -> Tensor:
    """The next token [B] of each row: greedy where the temperature is 0, else a sample of softmax(logits / temperature) within top_p."""
    logits_BV, sampled_B = logits_BV.float(), temperature_B > 0
    if not bool(sampled_B.any()):
        return logits_BV.argmax(-1)
    scaled_BV = logits_BV / torch.where(sampled_B, temperature_B, 1.0)[:, None]
    if top_p < 1:
        scaled_BV = _nucleus(scaled_BV, top_p)
    noisy_BV = scaled_BV + gumbel(key_B, position_B, logits_BV.shape[-1])
    return torch.where(sampled_B[:, None], noisy_BV, logits_BV).argmax(-1)


def _nucleus(scaled_BV: Tensor, top_p: float) -> Tensor:
    """-inf outside the smallest set of likeliest tokens whose probability reaches `top_p`; the first token always stays."""
    ordered_BV, order_BV = scaled_BV.softmax(-1).sort(stable=True, dim=-1, descending=True)
    outside_BV = ordered_BV.cumsum(-1) - ordered_BV >= top_p
    return scaled_BV.masked_fill(torch.zeros_like(outside_BV).scatter(1, order_BV, outside_BV), -torch.inf)


def batches(requests: Sequence[Request], batch_rows: int) -> list[list[Request]]:
    """The requests, `batch_rows` at a time, similar prompt lengths together and those of one prompt side by side."""
    ordered = sorted(requests, key=lambda request: (-len(request.prompt), request.task_id, request.temperature, request.sample))
    return [ordered[first : first + batch_rows] for first in range(0, len(ordered), batch_rows)]


@torch.inference_mode()
def generate(model: Transformer, batch: Sequence[Request], decoding: Decoding) -> None:
    """Fills the outputs of these requests, side by side."""
    if not 1 <= decoding.n_heads <= model.n_future:
        raise ValueError(f"n_heads: expected 1..{model.n_future}, the heads that the model has, found {decoding.n_heads}")
    device = model.tok_embeddings.weight.device
    hidden, cache, position_B = _prefill(model, batch, decoding)
    rows = _Rows(model, decoding, list(batch), device)
    first_B1 = rows.chosen(hidden[:1], position_B)
    going = [decoding.take(request, tokens) for request, tokens in zip(rows.requests, first_B1.tolist())]
    fed_BF = torch.cat([first_B1, rows.chosen(hidden[1:], position_B + 1)], 1).clamp(min=0)
    steps_F = torch.arange(decoding.n_heads, device=device)
    while any(going):
        alive = [place for place, goes in enumerate(going) if goes]
        if len(alive) <= 0.8 * len(going):
            keep = torch.tensor(alive, device=device)
            rows.select(keep)
            cache.select(keep)
            fed_BF, position_B = fed_BF[keep], position_B[keep]
            going = [True] * len(alive)
        place_BF = position_B[:, None] + steps_F
        hidden = model.hidden(fed_BF, cache, place_BF, n_future=decoding.n_heads)
        right_BF = rows.chosen(hidden[0].unbind(1), position_B + 1)
        # Drafts that head 0 confirms, up to the first that it does not.
        n_kept_B = (right_BF[:, :-1] == fed_BF[:, 1:]).cumprod(1).sum(1)
        found = zip(rows.requests, right_BF.tolist(), n_kept_B.tolist(), going)
        going = [goes and decoding.take(request, tokens[: n_kept + 1]) for request, tokens, n_kept, goes in found]
        # A row that has ended stays where it is, within its cache.
        position_B = position_B + torch.where(torch.tensor(going, device=device), n_kept_B + 1, 0)
        place_B = torch.arange(len(going), device=device)
        drafts = rows.chosen([x_BTD[place_B, n_kept_B] for x_BTD in hidden[1:]], position_B + 1)
        fed_BF = torch.cat([right_BF.gather(1, n_kept_B[:, None]), drafts], 1).clamp(min=0)


@dataclass
class _Rows:
    """Requests that are generated side by side, and what their tokens are chosen by."""

    model: Transformer
    decoding: Decoding
    requests: list[Request]
    device: torch.device

    def __post_init__(self) -> None:
        self.key_B = torch.tensor([request.noise_key(self.decoding.seed) for request in self.requests], device=self.device)
        self.temperature_B = torch.tensor([request.temperature for request in self.requests], device=self.device)

    def select(self, keep: Tensor) -> None:
        self.requests = [self.requests[place] for place in keep.tolist()]
        self.key_B, self.temperature_B = self.key_B[keep], self.temperature_B[keep]

    def chosen(self, hidden: Sequence[Tensor], position_B: Tensor) -> Tensor:
        """The tokens [B, N] at `position_B` and after it, each by one of N normed outputs [B, D]; -1 where logits are no numbers."""
        N = len(hidden)
        if not N:
            return position_B.new_empty(len(position_B), 0)
        logits_XV = self.model.output(torch.stack(list(hidden), 1)).flatten(0, 1)[:, : self.decoding.n_tokens]
        position_BN = position_B[:, None] + torch.arange(N, device=position_B.device)
        by_row = (self.temperature_B.repeat_interleave(N), self.key_B.repeat_interleave(N), position_BN.flatten())
        token_X = choose(logits_XV, *by_row, self.decoding.top_p)
        # Not a number is the maximum wherever it stands.
        known_X = logits_XV.gather(1, token_X[:, None])[:, 0].isfinite()
        return torch.where(known_X, token_X, -1).unflatten(0, (-1, N))


def _prefill(model: Transformer, batch: Sequence[Request], decoding: Decoding) -> tuple[list[Tensor], Fork, Tensor]:
    """Runs each distinct prompt once; returns what every head has after a request's prompt [B, D], the cache that it goes on with and its
    next position.
    """
    device, n_heads = model.tok_embeddings.weight.device, decoding.n_heads
    place: dict[tuple[int, ...], int] = {}
    prompt_R = torch.tensor([place.setdefault(tuple(request.prompt), len(place)) for request in batch], device=device)
    prompts = list(place)
    cache, last = model.new_cache(len(prompts), max(map(len, prompts)), n_heads), []
    for first, after in _together(list(map(len, prompts)), PREFILL_TOKENS):
        lengths = [len(prompt) for prompt in prompts[first:after]]
        # Padding comes after a prompt's own tokens, and no query of theirs sees it.
        tokens = torch.tensor([[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts[first:after]], device=device)
        found, end_P = model.hidden(tokens, cache.rows(first, after), n_future=n_heads), torch.tensor(lengths, device=device) - 1
        last.append(torch.stack([x_PTD[torch.arange(after - first, device=device), end_P] for x_PTD in found]))
    length_P = torch.tensor(list(map(len, prompts)), device=device)
    # Drafts may reach beyond the last token that is asked for.
    own = decoding.max_tokens + n_heads
    return list(torch.cat(last, 1)[:, prompt_R]), cache.fork(prompt_R, length_P, own), length_P[prompt_R]


def _together(lengths: list[int], budget: int) -> Iterator[tuple[int, int]]:
    """Consecutive [first, after) of as many as fit `budget` when padded to their longest, one at least."""
    first, longest = 0, 0
    for place, length in enumerate(lengths):
        longest = max(longest, length)
        if place > first and (place + 1 - first) * longest > budget:
            yield first, place
            first, longest = place, length
    yield first, len(lengths)
