"""Batched generation with a key-value cache.

A token is arg max of logits / temperature + Gumbel noise, and the noise is a counter's: keyed by (seed, task, sample, position). So a
completion does not depend on which others are generated beside it, in which order, or on how many ranks.
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


@dataclass
class Request:
    """One completion to make; `temperature` 0 is greedy. `output` grows to at most max_tokens ids, the end of text not among them."""

    task_id: str
    sample: int
    prompt: Sequence[int]
    temperature: float
    output: list[int] = field(default_factory=list)
    ended: bool = False

    def noise_key(self, seed: int) -> int:
        digest = hashlib.sha256(f"{seed}:{self.task_id}:{self.sample}".encode()).digest()
        return int.from_bytes(digest[:8], "little", signed=True)


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


@torch.inference_mode()
def generate(
    model: Transformer,
    requests: list[Request],
    *,
    max_tokens: int,
    eos: int,
    top_p: float,
    seed: int,
    batch_rows: int,
    n_tokens: int | None = None,
    stopped: Callable[[Request], bool] | None = None,
    stop_every: int = 8,
) -> Iterator[list[Request]]:
    """Fills the requests' outputs, `batch_rows` at a time and similar prompt lengths together; yields each batch as it ends.

    Tokens from `n_tokens` on, the padding of a vocabulary, are never chosen.
    `stopped` is asked every `stop_every` tokens whether a row's text already holds a stop; the caller cuts exactly afterwards.
    """
    ordered = sorted(requests, key=lambda request: (-len(request.prompt), request.task_id, request.temperature, request.sample))
    for first in range(0, len(ordered), batch_rows):
        batch = ordered[first : first + batch_rows]
        _generate_batch(model, batch, max_tokens, eos, top_p, seed, n_tokens, stopped, stop_every)
        yield batch


def _generate_batch(
    model: Transformer,
    batch: list[Request],
    max_tokens: int,
    eos: int,
    top_p: float,
    seed: int,
    n_tokens: int | None,
    stopped: Callable[[Request], bool] | None,
    stop_every: int,
) -> None:
    device = model.tok_embeddings.weight.device
    logits_BV, cache, position_B = _prefill(model, batch, max_tokens, device)
    key_B = torch.tensor([request.noise_key(seed) for request in batch], device=device)
    temperature_B = torch.tensor([request.temperature for request in batch], device=device)
    active = list(batch)
    for n in range(max_tokens):
        token_B = choose(logits_BV[:, :n_tokens], temperature_B, key_B, position_B, top_p)
        # Not a number is the maximum wherever it stands.
        known_B = logits_BV.gather(1, token_B[:, None])[:, 0].isfinite()
        for request, token in zip(active, torch.where(known_B, token_B, -1).tolist()):
            if token < 0:
                raise NotFinite(f"{request.task_id}: the model's logits for token {n + 1} of a completion are not finite; train it anew")
            if token == eos:
                request.ended = True
            elif not request.ended:
                request.output.append(token)
        if stopped and n % stop_every == stop_every - 1:
            for request in active:
                request.ended = request.ended or stopped(request)
        alive = [i for i, request in enumerate(active) if not request.ended]
        if not alive or n == max_tokens - 1:
            return
        if len(alive) <= 0.8 * len(active):
            keep = torch.tensor(alive, device=device)
            active = [active[i] for i in alive]
            cache.select(keep)
            token_B, key_B, temperature_B, position_B = token_B[keep], key_B[keep], temperature_B[keep], position_B[keep]
        logits_BV = model(token_B[:, None], cache=cache, position_BT=position_B[:, None], n_future=1)[:, 0, 0]
        position_B = position_B + 1


def _prefill(model: Transformer, batch: list[Request], max_tokens: int, device: torch.device) -> tuple[Tensor, Fork, Tensor]:
    """Runs each distinct prompt once; returns every request's next-token logits, the cache that it goes on with and its next position."""
    place: dict[tuple[int, ...], int] = {}
    prompt_R = torch.tensor([place.setdefault(tuple(request.prompt), len(place)) for request in batch], device=device)
    prompts = list(place)
    cache, logits = model.new_cache(len(prompts), max(map(len, prompts))), []
    for first, after in _together(list(map(len, prompts)), PREFILL_TOKENS):
        lengths = [len(prompt) for prompt in prompts[first:after]]
        # Padding comes after a prompt's own tokens, and no query of theirs sees it.
        tokens = torch.tensor([[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts[first:after]], device=device)
        hidden_PTD = model.hidden(tokens, cache.rows(first, after), n_future=1)[0]
        logits.append(model.output(hidden_PTD[torch.arange(after - first, device=device), torch.tensor(lengths, device=device) - 1]))
    length_P = torch.tensor(list(map(len, prompts)), device=device)
    return torch.cat(logits)[prompt_R], cache.fork(prompt_R, length_P, max_tokens), length_P[prompt_R]


def _together(lengths: list[int], budget: int) -> Iterator[tuple[int, int]]:
    """Consecutive [first, after) of as many as fit `budget` when padded to their longest, one at least."""
    first, longest = 0, 0
    for place, length in enumerate(lengths):
        longest = max(longest, length)
        if place > first and (place + 1 - first) * longest > budget:
            yield first, place
            first, longest = place, length
    yield first, len(lengths)
