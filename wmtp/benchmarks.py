"""Which protocol a benchmark runs under, by the parameters; the same for sampling and judging."""

from pathlib import Path
from typing import Any

from wmtp.protocols import PROTOCOLS, Protocol, with_sampling

KINDS = {"humaneval": "humaneval", "mbpp": "mbpp", "codecontests": "contest"}  # of protocols, by benchmark


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
    if protocol.benchmark not in ("any", KINDS[name]):
        raise BenchmarkError(f"evaluation.{name}_protocol: {chosen!r} is a protocol of {protocol.benchmark}, not of {name}")
    return protocol


def files_of(settings: Any, folder: str) -> dict[str, Path]:
    """The problems of each benchmark that `evaluation.benchmarks` names."""
    files = {name: Path(folder) / f"{name}.jsonl" for name in settings.benchmarks}
    if absent := [name for name, file in files.items() if not file.exists()]:
        raise BenchmarkError(
            f"evaluation.benchmarks: {absent[0]}, but the data has none ({files[absent[0]]}); take it out, or give the data its folder"
        )
    return files
