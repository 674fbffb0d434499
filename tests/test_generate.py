import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tests.test_model import GROUPED, random_model
from wmtp.bundle import NotFinite
from wmtp.generate import Decoding, Request, _together, batches, choose, generate, gumbel
from wmtp.protocols import PROTOCOLS, with_sampling
from wmtp.sampling import Benchmark, complete
from wmtp.world import World

EOS = 2
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def model():
    """Float64, so that no rounding of a batched product can turn an arg max."""
    return random_model(replace(GROUPED, n_layers=3, n_future_tokens=2)).eval()


def requests(n_prompts=5, n_samples=3, temperature=0.9, seed=0):
    """Prompts of unequal length, two of them equal, one greedy and some sampled completions of each."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(3, 40) for _ in range(draw.randint(1, 9))] for _ in range(n_prompts)]
    prompts[-1] = prompts[0]
    greedy = [Request(f"task/{i}", 0, prompt, 0.0) for i, prompt in enumerate(prompts)]
    return greedy + [Request(f"task/{i}", s, prompt, temperature) for i, prompt in enumerate(prompts) for s in range(n_samples)]


def run(model, made, **changes):
    """{(task, temperature, sample): (output, ended)}."""
    batch_rows, settings = changes.pop("batch_rows", 64), {"max_tokens": 12, "eos": EOS, "seed": 7} | changes
    parts = batches(made, batch_rows)
    assert sorted(id(request) for batch in parts for request in batch) == sorted(map(id, made))
    for batch in parts:
        generate(model, batch, Decoding(**settings))
    return {(request.task_id, request.temperature, request.sample): (request.output, request.ended) for request in made}


@torch.no_grad()
def naive(model, request, max_tokens=12, seed=7):
    """One row, the whole text again for every token, no cache."""
    text, output = list(request.prompt), []
    for _ in range(max_tokens):
        scores = model(torch.tensor([text]))[0, -1, 0].float()
        if request.temperature > 0:
            key, place = torch.tensor([request.noise_key(seed)]), torch.tensor([len(text)])
            scores = scores / request.temperature + gumbel(key, place, len(scores))[0]
        token = int(scores.argmax())
        if token == EOS:
            return output, True
        output.append(token)
        text.append(token)
    return output, False


def test_completions_are_those_of_a_loop_without_cache(model):
    expected = {(r.task_id, r.temperature, r.sample): naive(model, r) for r in requests(9, 4)}
    assert run(model, requests(9, 4)) == expected
    ends = [ended for _, ended in expected.values()]
    assert any(ends) and not all(ends), "the test needs rows that end early, beside rows that do not"


def test_end_of_text_is_not_part_of_the_output_and_the_limit_holds(model):
    for output, ended in run(model, requests(9, 4), max_tokens=6).values():
        assert EOS not in output and len(output) <= 6 and (ended or len(output) == 6)


@pytest.fixture(scope="module")
def drafting():
    """Four heads, the extra ones noisy copies of head 0's block: some drafts are right, some are not."""
    model = random_model(replace(GROUPED, n_layers=5, n_future_tokens=4), seed=3).eval()
    with torch.no_grad():
        for head in model.extra_heads:
            head.load_state_dict(model.layers[-1].state_dict())
        # Small attention and a dominant embedding make texts that repeat, which copies of head 0 can foresee.
        for block in [*model.layers, *model.extra_heads]:
            block.attention.wo.weight.mul_(0.3)
            block.feed_forward.w2.weight.mul_(0.3)
    return model


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("n_heads", [2, 3, 4])
def test_drafts_change_no_text(drafting, n_heads, top_p):
    """Greedy and sampled, whatever share of them is right; rows that are ahead of others, end early and are dropped among them."""
    plain, fast = requests(9, 4, temperature=0.7), requests(9, 4, temperature=0.7)
    expected = run(drafting, plain, max_tokens=17, top_p=top_p)
    for batch_rows in (64, 3):
        fast = requests(9, 4, temperature=0.7)
        assert run(drafting, fast, max_tokens=17, top_p=top_p, n_heads=n_heads, batch_rows=batch_rows) == expected
    for one in plain:
        assert one.n_forwards == len(one.output) + one.ended, "without drafts a token a forward"
    saved = [(one.n_forwards, len(one.output) + one.ended) for one in fast]
    assert all(-(-n_tokens // n_heads) <= n_forwards <= n_tokens for n_forwards, n_tokens in saved)
    assert sum(n for n, _ in saved) < 0.95 * sum(n for _, n in saved) and any(n > n_tokens / n_heads + 1 for n, n_tokens in saved)


def test_drafts_that_are_always_right_give_as_many_tokens_a_forward_as_there_are_heads(model):
    """A model that writes one token for ever, whichever head is asked."""
    constant = random_model(replace(GROUPED, n_layers=3, n_future_tokens=2)).eval()
    with torch.no_grad():
        constant.norm.weight.zero_()
    made = requests(3, 2, temperature=0.0)
    found = run(constant, made, n_heads=2, max_tokens=11)
    assert all(output == [0] * 11 for output, _ in found.values()) and all(one.n_forwards == 6 for one in made)


def test_drafts_of_no_number_are_not_kept(model):
    broken = random_model(replace(GROUPED, n_layers=3, n_future_tokens=2)).eval()
    with torch.no_grad():
        for parameter in broken.extra_heads.parameters():
            parameter.fill_(torch.nan)
    assert run(broken, requests(), n_heads=2) == run(model, requests())


@pytest.mark.parametrize("batch_rows", [1, 2, 3, 7])
def test_completions_do_not_depend_on_the_batch(model, batch_rows):
    assert run(model, requests(), batch_rows=batch_rows) == run(model, requests())


@pytest.mark.parametrize("budget", [1, 11, 20])
def test_completions_do_not_depend_on_which_prompts_are_read_together(model, monkeypatch, budget):
    expected = run(model, requests(9, 2))
    monkeypatch.setattr("wmtp.generate.PREFILL_TOKENS", budget)
    assert run(model, requests(9, 2)) == expected


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 60))
def test_prompts_are_read_together_as_far_as_the_budget_goes(lengths, budget):
    parts = list(_together(lengths, budget))
    assert [place for first, after in parts for place in range(first, after)] == list(range(len(lengths)))
    for (first, after), (_, following) in pairwise([*parts, (0, 0)]):
        assert after == first + 1 or (after - first) * max(lengths[first:after]) <= budget
        if following:
            assert (after + 1 - first) * max(lengths[first : after + 1]) > budget, "one more would have fitted"


def test_completions_do_not_depend_on_order_or_company(model):
    expected, shuffled = run(model, requests()), requests()
    random.Random(3).shuffle(shuffled)
    assert run(model, shuffled, batch_rows=4) == expected
    shares = [run(model, requests()[rank::3], batch_rows=4) for rank in range(3)]
    assert {name: found for share in shares for name, found in share.items()} == expected


def test_batches_hold_at_most_batch_rows_and_like_prompts_stand_together():
    parts = batches(requests(), 6)
    assert [len(batch) for batch in parts] == [6, 6, 6, 2]
    lengths = [len(request.prompt) for batch in parts for request in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_samples_differ_from_each_other_and_between_seeds(model):
    found = run(model, requests(1, 8))
    assert len({tuple(output) for output, _ in found.values()}) > 4
    assert run(model, requests(1, 8), seed=8) != found
    assert run(model, requests(1, 8), seed=8)["task/0", 0.0, 0] == found["task/0", 0.0, 0], "greedy has no seed"


def test_a_nucleus_of_one_token_is_greedy(model):
    found = run(model, requests(), top_p=1e-6)
    assert all(found[task, 0.9, sample] == found[task, 0.0, 0] for task, temperature, sample in found if temperature)


@pytest.mark.parametrize("n_heads", [1, 2])
def test_stops_are_asked_for_every_few_tokens_and_end_a_row_alone(model, monkeypatch, n_heads):
    """At the same lengths with drafts as without: the raw text is the same."""
    monkeypatch.setattr("wmtp.generate.STOP_EVERY", 4)
    whole, asked = run(model, requests(), eos=-1), []

    def stopped(request):
        asked.append(len(request.output))
        return len(request.output) >= 4 and request.task_id == "task/2"

    cut = run(model, requests(), eos=-1, stopped=stopped, n_heads=n_heads)
    assert set(asked) == {4, 8, 12}
    for (task, temperature, sample), (output, _) in whole.items():
        assert cut[task, temperature, sample] == (output[:4] if task == "task/2" else output, False)


def test_generation_leaves_the_model_as_it_was(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(model, requests())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def keys(n, seed=0):
    return torch.tensor([Request(f"task/{i % 40}", i // 40, [], 1.0).noise_key(seed) for i in range(n)])


def test_noise_is_a_pure_function_of_key_position_and_token():
    key_B, place_B = keys(6), torch.tensor([0, 1, 5, 5, 900, 40])
    noise = gumbel(key_B, place_B, 50)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    assert torch.equal(gumbel(key_B[order], place_B[order], 50), noise[order])
    assert torch.equal(torch.cat([gumbel(key_B[i : i + 1], place_B[i : i + 1], 50) for i in range(6)]), noise)
    assert torch.equal(gumbel(key_B, place_B, 20), noise[:, :20]), "a larger vocabulary changes nothing for the smaller one's tokens"
    assert noise.unique().numel() == noise.numel()
    assert not torch.isclose(gumbel(key_B, place_B + 1, 50), noise).any(1).all()


def test_request_keys_separate_seed_task_and_sample():
    base = Request("a", 1, [], 1.0).noise_key(1)
    others = [Request("b", 1, [], 1.0).noise_key(1), Request("a", 2, [], 1.0).noise_key(1), Request("a", 1, [], 1.0).noise_key(2)]
    assert len({base, *others}) == 4 and Request("a", 1, [5], 0.3).noise_key(1) == base


def test_noise_is_standard_gumbel_and_independent_across_tokens_positions_and_keys():
    key_B = keys(60).repeat_interleave(20)
    noise = gumbel(key_B, torch.arange(20).repeat(60), 50).reshape(60, 20, 50)
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-3
    for axis in range(3):
        before, after = noise.narrow(axis, 0, noise.shape[axis] - 1), noise.narrow(axis, 1, noise.shape[axis] - 1)
        assert stats.pearsonr(before.flatten().numpy(), after.flatten().numpy()).pvalue > 1e-3


def test_noise_is_finite_where_the_counter_is_extreme():
    """A vocabulary of 32,000 meets such a counter every few hundred tokens: infinite noise there is a token drawn at random."""
    noise = gumbel(torch.tensor([37]), torch.tensor([0]), 201_221)
    assert torch.isfinite(noise).all()


def chi_square(tokens, probability):
    counts = torch.bincount(tokens, minlength=len(probability)).double()
    possible = probability > 0
    assert counts[~possible].sum() == 0
    return stats.chisquare(counts[possible].numpy(), (probability[possible] * len(tokens)).numpy()).pvalue


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_tokens_follow_the_softmax(temperature):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -0.5, 0.9, 0.2])
    n = 8000
    found = choose(logits.expand(n, 8), torch.full((n,), temperature), keys(n), torch.arange(n) % 13, 1.0)
    assert chi_square(found, (logits.double() / temperature).softmax(0)) > 1e-3


def nucleus(probability, top_p):
    """The likeliest tokens until their sum reaches top_p, renormalised."""
    kept = torch.zeros_like(probability)
    for token in sorted(range(len(probability)), key=lambda token: (-probability[token], token)):
        if float(kept.sum()) >= top_p - 1e-9:
            break
        kept[token] = probability[token]
    return kept / kept.sum()


@pytest.mark.parametrize("top_p", [0.2, 0.5, 0.8, 0.97])
def test_top_p_keeps_the_nucleus_of_the_tempered_distribution(top_p):
    logits, n = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -0.5, 0.9, 0.2]), 6000
    found = choose(logits.expand(n, 8), torch.full((n,), 0.7), keys(n), torch.arange(n) % 13, top_p)
    expected = nucleus((logits.double() / 0.7).softmax(0), top_p)
    assert set(found.tolist()) == set(expected.nonzero().flatten().tolist())
    assert expected.count_nonzero() == 1 or chi_square(found, expected) > 1e-3


def test_top_p_with_equal_tokens_keeps_just_enough_of_them():
    n = 400
    found = choose(torch.zeros(n, 8), torch.ones(n), keys(n), torch.zeros(n, dtype=torch.int64), 0.5)
    assert len(set(found.tolist())) == 4


def test_greedy_and_sampled_rows_stand_side_by_side():
    logits = torch.randn(6, 30, generator=torch.Generator().manual_seed(1))
    temperature = torch.tensor([0.0, 1.0, 0.0, 0.5, 2.0, 0.0])
    key_B, place_B = keys(6), torch.arange(6)
    found = choose(logits, temperature, key_B, place_B, 0.9)
    alone = [choose(logits[i : i + 1], temperature[i : i + 1], key_B[i : i + 1], place_B[i : i + 1], 0.9) for i in range(6)]
    assert found.tolist() == torch.cat(alone).tolist()
    assert found[[0, 2, 5]].tolist() == logits[[0, 2, 5]].argmax(-1).tolist()


@pytest.fixture(scope="module")
def writer(micro):
    """The tiny bundle's shape with weights that write varied text."""
    from wmtp.model import load_bundle

    return random_model(load_bundle(micro.bundle).args, seed=4).eval()


def asked(corpus, **changes):
    protocol = with_sampling(PROTOCOLS["alpaca"], **({"n_samples": 2, "max_tokens": 10} | changes))
    return Benchmark("humaneval", protocol, corpus.benchmarks["humaneval"], "alpaca")


def test_complete_gives_one_greedy_and_n_samples_of_each_problem_in_order(writer, tokenizer, corpus):
    found = complete(writer, tokenizer, asked(corpus), ALONE, seed=1, batch_rows=4)
    expected = [(p.task_id, t, s) for p in corpus.benchmarks["humaneval"] for t, s in ((0.0, 0), (0.8, 0), (0.8, 1))]
    assert [(one.task_id, one.temperature, one.sample) for one in found] == expected
    assert all(one.benchmark == "humaneval" and one.raw == one.completion for one in found)
    assert all(one.truncated == (one.n_tokens == 10) for one in found), "without a stop, the limit is what truncates"
    assert complete(writer, tokenizer, asked(corpus), ALONE, seed=1, batch_rows=64) == found


@pytest.mark.parametrize("place", [slice(3, 5), slice(-2, None)], ids=["early", "after the last look"])
def test_complete_cuts_at_the_first_stop_and_stops_change_nothing_before_it(writer, tokenizer, corpus, place):
    plain = complete(writer, tokenizer, asked(corpus, max_tokens=21), ALONE, seed=1, batch_rows=64)
    # Half a character's bytes decode to a replacement mark, which later bytes take back: no stop is made of one.
    chosen = next(i for i, one in enumerate(plain) if one.truncated and "\N{REPLACEMENT CHARACTER}" not in one.raw[place])
    stop = plain[chosen].raw[place]
    stopped = complete(writer, tokenizer, asked(corpus, max_tokens=21, stops=(stop,)), ALONE, seed=1, batch_rows=5)
    assert not stopped[chosen].truncated and stopped[chosen].completion != stopped[chosen].raw
    for before, after in zip(plain, stopped):
        assert before.raw.startswith(after.raw.rstrip("\N{REPLACEMENT CHARACTER}")), "a stop ends a text early, it does not change it"
        assert after.completion == before.raw.partition(stop)[0]
        assert after.truncated == (before.truncated and stop not in before.raw)


def test_complete_survives_a_model_with_more_rows_than_the_tokenizer_has_pieces(tokenizer, corpus, writer):
    """Vocabularies are padded to round numbers; conversion allows it, so an untrained padding row may win an arg max."""
    padded = random_model(replace(writer.args, vocab_size=len(tokenizer) + 40), seed=4).eval()
    found = complete(padded, tokenizer, asked(corpus), ALONE, seed=1, batch_rows=64)
    assert len(found) == 9


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_make_no_completion(temperature, number):
    model = random_model(replace(GROUPED, n_layers=3, n_future_tokens=2)).eval()
    with torch.no_grad():
        model.output.weight[7] = number
    with pytest.raises(NotFinite, match=r"task/a: the model's logits for token 1 of a completion are not finite"):
        run(model, [Request("task/a", 0, [3, 4, 5], temperature)])


def test_what_an_interrupted_sampling_finished_is_not_made_again(writer, tokenizer, corpus, tmp_path, monkeypatch):
    expected, made = complete(writer, tokenizer, asked(corpus), ALONE, seed=1, batch_rows=4), []

    def counted(model, batch, decoding, fail_at):
        if len(made) == fail_at:
            raise KeyboardInterrupt
        made.append(len(batch))
        generate(model, batch, decoding)

    def again(fail_at):
        made.clear()
        monkeypatch.setattr("wmtp.sampling.generate", lambda *given: counted(*given, fail_at))
        return complete(writer, tokenizer, asked(corpus), ALONE, seed=1, batch_rows=4, kept=tmp_path)

    with pytest.raises(KeyboardInterrupt):
        again(fail_at=1)
    n_batches = -(-len(expected) // 4)
    assert again(fail_at=-1) == expected and len(made) == n_batches - 1
    assert again(fail_at=0) == expected and not made


def test_completions_of_other_requests_are_not_taken_for_this_batchs(writer, tokenizer, corpus, tmp_path):
    complete(writer, tokenizer, asked(corpus), ALONE, seed=1, batch_rows=4, kept=tmp_path)
    with pytest.raises(ValueError, match=r"humaneval-0-0.jsonl: completions of other requests than this batch's; remove"):
        complete(writer, tokenizer, asked(corpus), ALONE, seed=1, batch_rows=3, kept=tmp_path)


@pytest.mark.parametrize("batch_rows", [1, 3, 64])
def test_drafted_completions_are_those_without_drafts_in_float32(writer, tokenizer, corpus, batch_rows):
    """Stops, cut, ends and a vocabulary with padding rows included; small batches are drafted, large ones are not."""
    padded = random_model(replace(writer.args, vocab_size=len(tokenizer) + 40), seed=4, dtype=torch.float32).eval()
    plain = complete(padded, tokenizer, asked(corpus, max_tokens=21), ALONE, seed=1, batch_rows=64)
    stop = next(one.raw[5:7] for one in plain if one.truncated and "\N{REPLACEMENT CHARACTER}" not in one.raw[5:7])
    settings = {"max_tokens": 21, "stops": (stop,), "n_samples": 4}
    expected = complete(padded, tokenizer, asked(corpus, **settings), ALONE, seed=1, batch_rows=64)
    found = complete(padded, tokenizer, asked(corpus, **settings), ALONE, seed=1, batch_rows=batch_rows, draft_rows=3)
    assert [one.model_copy(update={"n_forwards": 1}) for one in found] == [one.model_copy(update={"n_forwards": 1}) for one in expected]
    fewer = sum(one.n_forwards for one in found) < sum(one.n_forwards for one in expected)
    assert fewer == (batch_rows <= 3) and any(one.completion != one.raw for one in found)


@pytest.mark.parametrize("n_heads", [0, 3])
def test_more_heads_than_the_model_has_are_refused(model, n_heads):
    with pytest.raises(ValueError, match=rf"n_heads: expected 1\.\.2, the heads that the model has, found {n_heads}"):
        generate(model, requests(1, 1), Decoding(5, EOS, n_heads=n_heads))
