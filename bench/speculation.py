"""python -m bench.speculation [MODEL]: completions with the extra heads' drafts and without, side by side, after a `dvc repro`.

For several numbers of rows side by side: tokens a forward, how many times as fast the text comes, and the bound that the two set:
tokens a forward divided by what a forward with drafts costs of one without, each timed on a cache as full as half way. Every text is
compared: one that differs though the two likeliest tokens lay further apart than NEAR where it parts is counted as wrong.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from wmtp.generate import Decoding, Request, batches, generate
from wmtp.model import Transformer, load_bundle
from wmtp.protocols import PROTOCOLS, with_sampling
from wmtp.records import Problem, read_jsonl
from wmtp.sampling import Benchmark
from wmtp.tokens import Tokenizer

NEAR = 1e-4  # of logits: closer ones may change places with the shape of a product
ROUNDS = 3


def seconds(model: Transformer, requests: list[Request], rows: int, decoding: Decoding) -> float:
    start = time.perf_counter()
    for batch in batches(requests, rows):
        generate(model, batch, decoding)
    return time.perf_counter() - start


@torch.inference_mode()
def forward_seconds(model: Transformer, rows: int, length: int, n_heads: int) -> float:
    """Median of a forward as generation makes it: `n_heads` tokens a row through as many heads, head 0's vocabulary at each of them."""
    cache = model.new_cache(1, length, n_heads)
    model.hidden(torch.ones(1, length, dtype=torch.long), cache, n_future=n_heads)
    fork = cache.fork(torch.zeros(rows, dtype=torch.long), torch.tensor([length]), length)
    place = torch.arange(length + length // 2, length + length // 2 + n_heads).expand(rows, -1)
    tokens, found = torch.ones(rows, n_heads, dtype=torch.long), []
    for _ in range(12):
        start = time.perf_counter()
        hidden = model.hidden(tokens, fork, place, n_future=n_heads)
        model.output(hidden[0]), [model.output(x_BTD[:, :1]) for x_BTD in hidden[1:]]
        found.append(time.perf_counter() - start)
    return statistics.median(found[2:])


@torch.no_grad()
def wrong(model: Transformer, plain: list[Request], drafted: list[Request]) -> tuple[int, int]:
    """Greedy texts that differ: between near equals, and beyond them."""
    near = far = 0
    for one, other in zip(plain, drafted):
        if one.temperature == 0 and one.output != other.output:
            place = next((i for i, (a, b) in enumerate(zip(one.output, other.output)) if a != b), min(len(one.output), len(other.output)))
            best = model(torch.tensor([[*one.prompt, *one.output[:place]]]))[0, -1, 0].topk(2).values
            close = float(best[0] - best[1]) < NEAR
            near, far = near + close, far + (not close)
    return near, far


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="models/baseline", help="a bundle with extra heads (default: models/baseline)")
    parser.add_argument("--problems", default="data/processed/benchmarks/humaneval.jsonl", help="Problem lines")
    parser.add_argument("--rows", default="1,8,64", help="completions side by side, several after commas (default: 1,8,64)")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, tokenizer = load_bundle(given.model, dtype=torch.float32), Tokenizer(given.model)
    problems, protocol = list(read_jsonl(Path(given.problems), Problem)), with_sampling(PROTOCOLS["alpaca"], n_samples=1, max_tokens=96)
    benchmark = Benchmark("humaneval", protocol, problems, "alpaca")
    print(f"{given.model}, {given.threads} thread(s), torch {torch.__version__}; median of {ROUNDS} rounds, in turns")
    print("| rows | heads | tokens a forward | times as fast | bound | share of it | texts that differ, near / wrong |")
    print("|---|---|---|---|---|---|---|")
    for rows in map(int, given.rows.split(",")):
        some = problems[: max(12, min(len(problems), rows * 4))]
        prompts, timed = benchmark.prompts(tokenizer, some), {1: [], model.n_future: []}
        for _ in range(ROUNDS):
            made = {}
            for n_heads, taken in timed.items():
                made[n_heads] = benchmark.requests(prompts)
                taken.append(seconds(model, made[n_heads], rows, Decoding(96, tokenizer.eos, n_tokens=len(tokenizer), n_heads=n_heads)))
        drafted, longest = made[model.n_future], max(map(len, prompts.values()))
        tokens = sum(len(one.output) + one.ended for one in drafted) / sum(one.n_forwards for one in drafted)
        fast = statistics.median(plain / other for plain, other in zip(*timed.values()))
        bound = tokens * forward_seconds(model, rows, longest, 1) / forward_seconds(model, rows, longest, model.n_future)
        near, far = wrong(model, made[1], drafted)
        print(
            f"| {rows} | {model.n_future} | {tokens:.2f} | {fast:.2f} | {bound:.2f} | {fast / bound:.0%} | {near} / {far} of {len(some)} |"
        )


if __name__ == "__main__":
    main()
