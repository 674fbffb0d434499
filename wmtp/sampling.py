"""Problems to completions: requests by protocol, this rank's share, texts cut and collected (greedy and sampled, one file)."""

from collections.abc import Sequence
from dataclasses import dataclass

from wmtp.generate import Request, generate
from wmtp.model import Transformer
from wmtp.progress import Bar
from wmtp.protocols import Protocol
from wmtp.records import Completion, Problem
from wmtp.tokens import Tokenizer
from wmtp.world import World


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's problems under one protocol."""

    name: str
    protocol: Protocol
    problems: Sequence[Problem]


def complete(
    model: Transformer, tokenizer: Tokenizer, benchmark: Benchmark, template: str, world: World, *, seed: int, batch_rows: int
) -> list[Completion] | None:
    """One greedy and `protocol.n_samples` sampled completions a problem, in (problem, temperature, sample) order on rank 0; else None."""
    protocol = benchmark.protocol
    requests, prompts = [], {}
    for problem in benchmark.problems[world.rank :: world.size]:
        prompts[problem.task_id] = prompt = tokenizer.encode_prompt(protocol.prompt(problem, template))
        requests.append(Request(problem.task_id, 0, prompt, 0.0))
        requests += [Request(problem.task_id, sample, prompt, protocol.temperature) for sample in range(protocol.n_samples)]

    def text_of(request: Request) -> str:
        return tokenizer.decode_response(prompts[request.task_id], request.output)

    done = []
    with Bar(f"sample {benchmark.name}", len(requests) * world.size, unit="completions") as bar:
        for batch in generate(
            model, requests, max_tokens=protocol.max_tokens, eos=tokenizer.eos, top_p=protocol.top_p, seed=seed, batch_rows=batch_rows,
            n_tokens=len(tokenizer),
            stopped=(lambda request: protocol.cut(text_of(request))[1]) if protocol.stops else None,
        ):  # fmt: skip
            done += [_completion(benchmark, request, text_of(request)) for request in batch]
            bar.advance(len(batch) * world.size)
    parts = world.gather(done)
    place = {problem.task_id: i for i, problem in enumerate(benchmark.problems)}
    return parts and sorted((one for part in parts for one in part), key=lambda one: (place[one.task_id], one.temperature, one.sample))


def _completion(benchmark: Benchmark, request: Request, text: str) -> Completion:
    cut, stopped = benchmark.protocol.cut(text)
    return Completion(
        task_id=request.task_id, benchmark=benchmark.name, temperature=request.temperature, sample=request.sample, raw=text, completion=cut,
        truncated=not (request.ended or stopped), n_tokens=len(request.output),
    )  # fmt: skip
