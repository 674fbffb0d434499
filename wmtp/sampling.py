"""Problems to completions: requests by protocol, this rank's share, texts cut and collected (greedy and sampled, one file)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wmtp.generate import Decoding, Request, batches, generate
from wmtp.model import Transformer
from wmtp.progress import Bar
from wmtp.protocols import Protocol
from wmtp.records import Completion, Problem, read_jsonl, write_jsonl
from wmtp.tokens import Tokenizer
from wmtp.world import World


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's problems under one protocol, their prompts made by `template` where the protocol has none of its own."""

    name: str
    protocol: Protocol
    problems: Sequence[Problem]
    template: str
    greedy: bool = True

    def prompts(self, tokenizer: Tokenizer, problems: Sequence[Problem]) -> dict[str, list[int]]:
        """Token ids by problem."""
        return {one.task_id: tokenizer.encode_prompt(self.protocol.prompt(one, self.template)) for one in problems}

    def requests(self, prompts: dict[str, list[int]]) -> list[Request]:
        """One greedy completion, unless that is not wanted, and `protocol.n_samples` sampled ones of each prompt."""
        kinds = [*[(0, 0.0)] * self.greedy, *((sample, self.protocol.temperature) for sample in range(self.protocol.n_samples))]
        return [Request(task_id, sample, prompt, temperature) for task_id, prompt in prompts.items() for sample, temperature in kinds]


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    benchmark: Benchmark,
    world: World,
    *,
    seed: int,
    batch_rows: int,
    draft_rows: int = 0,
    kept: Path | None = None,
) -> list[Completion] | None:
    """All completions of a benchmark in (problem, temperature, sample) order on rank 0; None elsewhere.

    Batches of at most `draft_rows` rows are drafted by all heads of the model: the same texts in fewer forwards (wmtp.generate). In the
    folder `kept` every batch that is finished is a file, and one that is found there is not made again.
    """
    protocol, prompts = benchmark.protocol, benchmark.prompts(tokenizer, benchmark.problems[world.rank :: world.size])

    def text_of(request: Request) -> str:
        return tokenizer.decode_response(prompts[request.task_id], request.output)

    plain = Decoding(
        protocol.max_tokens, tokenizer.eos, protocol.top_p, seed, len(tokenizer),
        (lambda request: protocol.cut(text_of(request))[1]) if protocol.stops else None,
    )  # fmt: skip
    requests, done = benchmark.requests(prompts), []
    with Bar(f"sample {benchmark.name}", len(requests) * world.size, unit="completions") as bar:
        for number, batch in enumerate(batches(requests, batch_rows)):
            file = kept / f"{benchmark.name}-{world.rank}-{number}.jsonl" if kept else None
            made = _found(file, batch)
            if made is None:
                generate(model, batch, replace(plain, n_heads=model.n_future if len(batch) <= draft_rows else 1))
                made = [_completion(benchmark, request, text_of(request)) for request in batch]
                if file:
                    write_jsonl(file, made)
            done += made
            bar.advance(len(batch) * world.size)
    parts = world.gather(done)
    place = {problem.task_id: i for i, problem in enumerate(benchmark.problems)}
    return parts and sorted((one for part in parts for one in part), key=lambda one: (place[one.task_id], one.temperature, one.sample))


def _found(file: Path | None, batch: Sequence[Request]) -> list[Completion] | None:
    """The batch as an interrupted run left it; None where it did not come so far."""
    if file is None or not file.exists():
        return None
    made = list(read_jsonl(file, Completion))
    if [(one.task_id, one.temperature, one.sample) for one in made] != [(one.task_id, one.temperature, one.sample) for one in batch]:
        raise ValueError(f"{file}: completions of other requests than this batch's; remove {file.parent} and run again")
    return made


def _completion(benchmark: Benchmark, request: Request, text: str) -> Completion:
    cut, stopped = benchmark.protocol.cut(text)
    return Completion(
        task_id=request.task_id, benchmark=benchmark.name, temperature=request.temperature, sample=request.sample, raw=text, completion=cut,
        truncated=not (request.ended or stopped), ended=request.ended, n_tokens=len(request.output), n_forwards=request.n_forwards,
    )  # fmt: skip
