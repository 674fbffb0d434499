"""Benchmarks as sampling and judging both see them: which protocol one runs under, by the parameters, and what its completions cost."""

from collections.abc import Sequence
from typing import Any

from wmtp.protocols import PROTOCOLS, Protocol, with_sampling
from wmtp.records import Completion

NAMES = ("humaneval", "mbpp")


class BenchmarkError(ValueError):
    """A protocol that does not exist, or results that do not belong together."""


def protocol_of(name: str, settings: Any, limits: bool = True) -> Protocol:
    """The protocol of benchmark `name` with the sampling, and for judging the limits, of the evaluation section.

    Sampling leaves the limits alone: a change in the judge must not cost a generation. The judge's hash goes into every result.
    """
    chosen = getattr(settings, f"{name}_protocol")
    if chosen not in PROTOCOLS:
        raise BenchmarkError(f"evaluation.{name}_protocol: unknown protocol {chosen!r}, expected one of {', '.join(PROTOCOLS)}")
    changes = {name: getattr(settings, name) for name in ("n_samples", "temperature", "top_p", "max_tokens")}
    if limits:
        changes |= {"cpu_seconds": settings.cpu_seconds, "wall_seconds": settings.wall_seconds}
    protocol = with_sampling(PROTOCOLS[chosen], **changes)
    if protocol.benchmark not in ("any", name):
        raise BenchmarkError(f"evaluation.{name}_protocol: {chosen!r} is a protocol of {protocol.benchmark}, not of {name}")
    return protocol


def tokens_per_forward(completions: Sequence[Completion]) -> dict[str, float]:
    """Of the greedy completions and of the sampled ones, ends of text and the forwards over prompts included; 1 without drafts."""
    kinds = {"greedy": [one for one in completions if one.temperature == 0], "sampled": [one for one in completions if one.temperature > 0]}
    return {
        f"tokens_per_forward_{kind}": sum(one.n_tokens + one.ended for one in some) / sum(one.n_forwards for one in some)
        for kind, some in kinds.items()
        if some
    }
