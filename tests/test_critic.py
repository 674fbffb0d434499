"""The critic's objective against loops in float64, its network, and its pairs (METHODS, "Critic")."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from tests.test_advantage import double_sum
from tests.test_policy import Waits
from wmtp.anchor import AnchoredObjective
from wmtp.batches import Batch, share
from wmtp.bundle import ModelArgs, write_bundle
from wmtp.critic import Critic, CriticError, ValueObjective, load_critic, pairs, save_critic
from wmtp.model import Transformer
from wmtp.preference import PairwiseObjective
from wmtp.provenance import critic_sha256, read_card
from wmtp.tokens import TokenData
from wmtp.world import World

T, VOCABULARY = 20, 23
# P and L of each row: prompts and responses of one token, no padding, much padding.
SPANS = ((1, 19), (9, 9), (5, 19), (7, 14), (6, 19), (4, 8), (19, 19), (10, 16))
KINDS = ("bce", "mse", "huber")


def small_critic(dtype=torch.float64, n_heads=1):
    args = ModelArgs(
        dim=16, n_layers=n_heads + 1, n_heads=2, n_kv_heads=2, vocab_size=VOCABULARY, multiple_of=8, ffn_dim_multiplier=None,
        norm_eps=1e-5, rope_theta=10000.0, n_future_tokens=n_heads,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        critic = Critic(Transformer(args).to(dtype))
        nn.init.normal_(critic.value.weight, std=0.5)
    return critic


def logits_of(critic, step):
    return critic(step.tokens_BT, step.response_BT)[0]


def whole_step(spans=SPANS, seed=0):
    random, position = torch.Generator().manual_seed(seed), torch.arange(T)
    response = torch.stack([(position >= first) & (position <= last) for first, last in spans])
    read = torch.stack([position <= last for _, last in spans])
    tokens = torch.randint(1, VOCABULARY, (len(spans), T), generator=random) * read
    return Batch(torch.arange(len(spans)), tokens, response, is_correct_B=torch.arange(len(spans)) % 2 == 0)


def train(model, objective, step, token_budget=10**9, size=1):
    """(loss, gradients, log sums) of a step as the training loop makes them: divided once, by the count of the whole step."""
    model.zero_grad(set_to_none=True)
    step = objective.prepare(step)
    count, loss, sums = objective.count(step), 0.0, {}
    for batch in [batch for rank in range(size) for batch in share(step, rank, size, token_budget)]:
        total, parts = objective.loss(model, batch)
        (total / count).backward()
        loss += float(total.detach()) / count
        sums = {key: part + sums.get(key, 0.0) for key, part in parts.items()}
    return loss, {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}, sums


def same(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        distance = float((found[name] - gradient).abs().max()) / max(float(gradient.abs().max()), 1e-3)
        assert distance <= tolerance, f"{name}: gradients differ by {distance:.2e}"


def one_loss(kind, logit, target):
    v = 1 / (1 + math.exp(-logit))
    if kind == "bce":
        return -target * math.log(v) - (1 - target) * math.log1p(-v)
    off = abs(v - target)
    return off**2 if kind == "mse" else (off**2 / 2 if off <= 0.1 else 0.1 * (off - 0.05))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.9), (0.97, 0.5), (1.0, 0.0)])
def test_loss_equals_the_loops(kind, gamma, lam):
    """A mean over the states P-1..L-1 of each program, then over the programs: long ones do not dominate."""
    critic, step = small_critic(), whole_step()
    with torch.no_grad():
        logits = logits_of(critic, step)
    rows = []
    for b, (P, L) in enumerate(SPANS):
        v = torch.sigmoid(logits[b]).tolist()
        A = double_sum(v, float(step.is_correct_B[b]), P, L, gamma, lam)
        rows.append(math.fsum(one_loss(kind, float(logits[b, i - 1]), v[i - 1] + A[i]) for i in range(P, L + 1)) / (L - P + 1))
    for token_budget in (10**9, 40):
        found = train(critic, ValueObjective(kind, gamma, lam), step, token_budget)[0]
        assert found == pytest.approx(math.fsum(rows) / len(rows), rel=1e-10)


class Logits(nn.Module):
    """A value logit for every place of one batch, to see which of them a loss moves."""

    def __init__(self, shape):
        super().__init__()
        self.logit_BT = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64))

    def forward(self, tokens_BT, response_BT, **_):
        return self.logit_BT, torch.zeros_like(self.logit_BT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_the_trained_states_run_from_the_last_prompt_token_to_the_last_before_the_end(kind, lam):
    model, step = Logits((len(SPANS), T)), whole_step()
    ValueObjective(kind, 1.0, lam).loss(model, step)[0].backward()
    for b, (P, L) in enumerate(SPANS):
        assert model.logit_BT.grad[b].nonzero().flatten().tolist() == list(range(P - 1, L))


@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_the_target_is_no_part_of_the_gradient(lam):
    """d bce / d logit = v - G with G held fixed, divided by the row's states."""
    model, step = Logits((len(SPANS), T)), whole_step()
    ValueObjective("bce", 1.0, lam).loss(model, step)[0].backward()
    for b, (P, L) in enumerate(SPANS):
        v = torch.sigmoid(model.logit_BT[b]).tolist()
        A = double_sum(v, float(step.is_correct_B[b]), P, L, 1.0, lam)
        for i in range(P, L + 1):
            assert float(model.logit_BT.grad[b, i - 1]) == pytest.approx(-A[i] / (L - P + 1), abs=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_the_label_matters_for_every_lam(lam):
    critic, step = small_critic(), whole_step()
    flipped = replace(step, is_correct_B=~step.is_correct_B)
    assert train(critic, ValueObjective("bce", 1.0, lam), step)[0] != train(critic, ValueObjective("bce", 1.0, lam), flipped)[0]


EQUAL_LENGTHS = ((4, 19), (18, 19), (5, 19), (17, 19), (6, 19), (4, 19), (12, 19), (10, 19))


@pytest.mark.parametrize("kind, lam", [("bce", 1.0), ("mse", 0.9), ("huber", 1.0)])
def test_gradients_do_not_depend_on_the_split(kind, lam):
    critic, step, work = small_critic(), whole_step(EQUAL_LENGTHS), ValueObjective(kind, 1.0, lam)
    assert [len(share(step, 0, 1, budget)) for budget in (8 * T, 2 * T)] == [1, 4]
    loss, gradients, sums = train(critic, work, step, 8 * T)
    for budget, size in ((2 * T, 1), (2 * T, 3)):
        other_loss, other, other_sums = train(critic, work, step, budget, size)
        assert other_loss == pytest.approx(loss, rel=1e-10)
        same(other, gradients)
        assert all(float(other_sums[key]) == pytest.approx(float(sums[key]), rel=1e-10) for key in sums)


def test_filler_rows_count_for_nothing_and_reach_every_parameter():
    critic, step, work = small_critic(), whole_step(), ValueObjective("bce", 1.0, 1.0)
    filler = share(replace(step), 2, 3, T)[-1]
    assert filler.row_B.tolist() == [-1]
    critic.zero_grad()
    total, sums = work.loss(critic, filler)
    total.backward()
    assert float(total.detach()) == 0 and all(float(part) == 0 for part in sums.values())
    trained = {name: p for name, p in critic.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and (p.grad == 0).all() for p in trained.values())


def test_padding_and_the_order_of_rows_change_nothing():
    critic, step, work = small_critic(), whole_step(), ValueObjective("bce", 1.0, 0.9)
    loss, gradients, sums = train(critic, work, step, 60)
    padding = torch.stack([torch.arange(T) > last for _, last in SPANS])
    order = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])
    permuted = Batch(step.row_B[order], step.tokens_BT[order], step.response_BT[order], is_correct_B=step.is_correct_B[order])
    for other in (replace(step, tokens_BT=step.tokens_BT.masked_fill(padding, 7)), permuted):
        other_loss, other_gradients, other_sums = train(critic, work, other, 60)
        assert other_loss == pytest.approx(loss, rel=1e-12)
        same(other_gradients, gradients)
        assert all(float(other_sums[key]) == pytest.approx(float(sums[key]), rel=1e-12) for key in sums)


def test_the_summary_is_a_mean_over_programs():
    critic, step, work = small_critic(), whole_step(), ValueObjective("mse", 1.0, 1.0)
    loss, _, sums = train(critic, work, step, 40, 3)
    with torch.no_grad():
        v = torch.sigmoid(logits_of(critic, step))
    brier = [float(((v[b, P - 1 : L] - float(step.is_correct_B[b])) ** 2).mean()) for b, (P, L) in enumerate(SPANS)]
    figures = work.summary(sums)
    assert figures["loss"] == pytest.approx(loss, rel=1e-9)
    # Undiscounted with lam 1 the target is the label itself, and the squared error its Brier score.
    assert figures["brier"] == pytest.approx(math.fsum(brier) / len(brier), rel=1e-9) == pytest.approx(figures["loss"], rel=1e-9)


def test_the_language_loss_is_that_of_the_correct_programs_a_mean_each():
    critic, step = small_critic(), whole_step()
    plain, both = (train(critic, ValueObjective("bce", lm_coef=coef), step, 40) for coef in (0.0, 0.7))
    with torch.no_grad():
        logits = critic.trunk(step.tokens_BT)[:, :, 0]
    rows = []
    for b, (P, L) in enumerate(SPANS):
        nll = [-float(torch.log_softmax(logits[b, i - 1], -1)[step.tokens_BT[b, i]]) for i in range(P, L + 1)]
        rows.append(float(step.is_correct_B[b]) * math.fsum(nll) / len(nll))
    assert both[0] - plain[0] == pytest.approx(0.7 * math.fsum(rows) / len(rows), rel=1e-9)
    assert ValueObjective("bce").summary(both[2])["ce"] == pytest.approx(math.fsum(rows) / int(step.is_correct_B.sum()), rel=1e-9)


def test_a_value_reads_the_running_surprise_of_the_response_and_no_gradient_comes_back_through_it():
    critic, step = small_critic(), whole_step()
    with torch.no_grad():
        critic.value.weight.zero_()
        critic.value.weight[0, -1] = 1.0
        critic.value.bias.zero_()
    logits = logits_of(critic, step)
    nll = torch.nn.functional.cross_entropy(
        critic.trunk(step.tokens_BT)[:, :-1, 0].transpose(1, 2), step.tokens_BT[:, 1:], reduction="none"
    )
    for b, (P, L) in enumerate(SPANS):
        surprise = [float(nll[b, P - 1 : i].detach().sum()) for i in range(P - 1, L)]
        assert logits[b, P - 1 : L].tolist() == pytest.approx([0.0, *surprise[1:]], abs=1e-12)
    logits.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in critic.trunk.parameters())


@pytest.mark.parametrize("kind", ["mae", "pairwise", "", "BCE"])
def test_an_unknown_loss_is_an_error(kind):
    with pytest.raises(CriticError, match=rf"critic.loss.kind: found '{kind}', expected one of bce, mse, huber"):
        ValueObjective(kind)


# --- the network -------------------------------------------------------------------------------------------------------------------


def test_an_untrained_critic_gives_every_prefix_one_half():
    critic = Critic(small_critic().trunk)
    assert torch.equal(torch.sigmoid(logits_of(critic, whole_step())), torch.full((len(SPANS), T), 0.5, dtype=torch.float64))


@pytest.mark.parametrize(
    "given_dtype, dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_value_logits_are_at_least_float32(given_dtype, dtype):
    assert logits_of(small_critic(given_dtype), whole_step()).dtype == dtype


def test_value_logits_under_autocast_are_those_of_float32_arithmetic():
    """What training in bfloat16 sees: hidden states are of rounded products, values are not rounded once more."""
    critic, step = small_critic(torch.float32), whole_step()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logit, ce = critic(step.tokens_BT, step.response_BT)
        hidden = critic.trunk.hidden(step.tokens_BT)[0]
    surprise = torch.cat([torch.zeros(len(SPANS), 1), ce[:, :-1].double().cumsum(1)], 1)
    expected = hidden.double() @ critic.value.weight[0, :-1].double() + surprise * critic.value.weight[0, -1] + critic.value.bias
    assert logit.dtype == ce.dtype == hidden.dtype == torch.float32
    torch.testing.assert_close(logit.double(), expected.detach(), rtol=0, atol=1e-5)


OBJECTIVES = {
    **{kind: ValueObjective(kind, 0.97, 0.9, 0.5) for kind in KINDS},
    "anchored": AnchoredObjective("bce", coef=0.1, value_clip=0.05),
    "pairwise": PairwiseObjective(0.5),
}


class Given(nn.Module):
    """A network's outputs, whatever it reads, so that nothing but the objective computes."""

    def __init__(self, *outputs_BT):
        super().__init__()
        self.outputs_BT = outputs_BT

    def forward(self, tokens_BT, response_BT, **_):
        return tuple(one[:, : tokens_BT.shape[1]] for one in self.outputs_BT)

    def follow(self, decay):
        pass


def outputs(name, step):
    """Value logits and next-token losses, and an anchored critic's average."""
    random, n = torch.Generator().manual_seed(1), 3 if name == "anchored" else 2
    return [(torch.rand(len(SPANS), T, generator=random) * step.response_BT).requires_grad_() for _ in range(n)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_autocast_does_not_reach_the_loss(name):
    """To the bit, gradients included: what the network gave is all that bfloat16 may touch."""
    work, step, found = OBJECTIVES[name], whole_step(), []
    given = outputs(name, step)
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            total, sums = work.loss(Given(*given), work.prepare(step))
        found.append([total, *torch.autograd.grad(total, given[:2]), *sums.values()])
        assert total.dtype == torch.float32 and all(part.dtype == torch.float64 for part in sums.values())
    assert all(torch.equal(one, other) for one, other in zip(*found))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_from_the_networks_outputs_to_the_steps_sums_nothing_waits_for_the_device(name):
    work, step = OBJECTIVES[name], whole_step()
    ready, given = work.prepare(step), outputs(name, step)
    with Waits() as waits:
        work.loss(Given(*given), ready)[0].backward()
    assert not waits.found


@pytest.mark.parametrize("name", [*KINDS, "anchored"])
def test_a_response_without_a_state_before_it_is_refused_before_the_forward(name):
    with pytest.raises(ValueError, match="response starts at position 0"):
        OBJECTIVES[name].prepare(whole_step(((0, 9), *SPANS[1:])))


def test_values_of_a_half_precision_critic_keep_the_digits_that_differences_need():
    """bfloat16 has steps of 0.004 below 1 and of a whole nat above 128: a third of the differences between values would be 0."""
    critic, step = small_critic(torch.bfloat16), whole_step()
    with torch.no_grad():
        hidden = critic.trunk.hidden(step.tokens_BT, n_future=1)[0].double()
        log_p = torch.log_softmax(critic.trunk(step.tokens_BT)[:, :, 0].double(), dim=-1)
        found, weight, bias = logits_of(critic, step), critic.value.weight.double(), float(critic.value.bias)
    for b, (P, L) in enumerate(SPANS):
        surprise = 0.0
        for i in range(P - 1, L):
            surprise -= float(log_p[b, i - 1, step.tokens_BT[b, i]]) if i >= P else 0.0
            expected = float(hidden[b, i] @ weight[0, :-1]) + float(weight[0, -1]) * surprise + bias
            assert float(found[b, i]) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_value_reads_its_own_prefix_alone():
    critic, step = small_critic(), whole_step()
    tokens, response = step.tokens_BT[:1].clone(), step.response_BT[:1]
    with torch.no_grad():
        before = critic(tokens, response)[0]
        tokens[0, 8] = tokens[0, 8] % (VOCABULARY - 1) + 1
        after = critic(tokens, response)[0]
    assert torch.equal(after[0, :8], before[0, :8]) and (after[0, 8:] != before[0, 8:]).all()


def test_the_value_loss_trains_the_trunk_and_the_language_loss_its_output_too():
    critic = small_critic()
    plain, both = (train(critic, ValueObjective("bce", lm_coef=coef), whole_step())[1] for coef in (0.0, 1.0))
    assert plain.keys() == both.keys() == {name for name, _ in critic.named_parameters()}
    assert {name for name, gradient in plain.items() if not gradient.any()} == {"trunk.output.weight"}
    assert all(gradient.any() for gradient in both.values())


@pytest.mark.slow
def test_a_critic_learns_to_tell_programs_apart():
    critic, work = small_critic(torch.float32), ValueObjective("bce", 1.0, 1.0)
    step = whole_step(((4, 12),) * 8)
    step.tokens_BT[:, 7] = torch.where(step.is_correct_B, 3, 4)
    optimizer = torch.optim.AdamW([p for p in critic.parameters() if p.requires_grad], lr=0.01)
    first = train(critic, work, step)[0]
    for _ in range(60):
        last = train(critic, work, step)[0]
        optimizer.step()
    assert last < 0.75 * first
    with torch.no_grad():
        v = torch.sigmoid(logits_of(critic, step))
    assert float(v[step.is_correct_B, 11].min()) > 0.9 and float(v[~step.is_correct_B, 11].max()) < 0.1


@pytest.fixture
def saved(tmp_path):
    critic = small_critic(torch.float32)
    state = {name: tensor.detach().clone() for name, tensor in critic.trunk.state_dict().items()}
    write_bundle(tmp_path / "start", critic.trunk.args, state, b"tokenizer", source="test", dropped=[], extra={})
    trained_on = {"task_ids": ["3_a"], "groups": ["3"]}
    save_critic(critic, tmp_path / "start", tmp_path / "critic", {"passed": True}, trained_on, World(0, 1, torch.device("cpu")))
    return critic, tmp_path / "critic"


@pytest.mark.slow
def test_a_saved_critic_comes_back_with_the_same_values(saved):
    critic, path = saved
    with torch.no_grad():
        assert torch.equal(logits_of(load_critic(path), whole_step()), logits_of(critic, whole_step()))


def test_the_identity_of_a_critic_follows_its_head(saved):
    _, path = saved
    before, head = critic_sha256(path), load_file(path / "value_head.safetensors")
    save_file({**head, "bias": head["bias"] + 1}, path / "value_head.safetensors")
    assert critic_sha256(path) != before


def test_a_critic_says_what_its_values_are_and_which_problems_it_saw(saved):
    _, path = saved
    assert read_card(path) == {"unit": "probability", "task_ids": ["3_a"], "groups": ["3"]} and load_critic(path).unit == "probability"
    before = critic_sha256(path)
    (path / "critic.json").write_text((path / "critic.json").read_text().replace("probability", "logit"))
    assert load_critic(path).unit == "logit" and critic_sha256(path) != before


def test_the_identity_of_a_critic_follows_its_gate(saved):
    """Scores repeat the verdict of the gate, so those of before another verdict on the same weights are stale."""
    _, path = saved
    before = critic_sha256(path)
    (path / "gate.json").write_text('{"passed": false}\n')
    assert critic_sha256(path) != before


@pytest.mark.parametrize(
    "damage, message", [(None, "no readable description"), ("{", "no readable"), ('{"unit": "logit"}', "lacks groups")]
)
def test_a_critic_that_does_not_say_it_is_refused(saved, damage, message):
    _, path = saved
    (path / "critic.json").unlink()
    if damage is not None:
        (path / "critic.json").write_text(damage)
    with pytest.raises(CriticError, match=rf"critic.json: {message}.*run critic-pretrain again"):
        load_critic(path)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"weight": torch.zeros(1, 5)}, {"other": torch.zeros(1)}, {"bias": torch.zeros(2)}])
def test_a_value_head_of_another_shape_or_name_is_refused(saved, change):
    _, path = saved
    save_file({**load_file(path / "value_head.safetensors"), **change}, path / "value_head.safetensors")
    with pytest.raises(ValueError, match=r"value_head.safetensors: expected \{'weight': \(1, 17\), 'bias': \(1,\)\}, found"):
        load_critic(path)


# --- pairs -------------------------------------------------------------------------------------------------------------------------


def split(*problems, prompt=0, cut=None):
    """Token data of these problems, each (response lengths of correct rows, of incorrect rows), rows numbered in that order.

    Prompts have `prompt` tokens; `cut` names rows whose prompt is another one.
    """
    data, index, lengths, labels = object.__new__(TokenData), [], [], []
    for right, wrong in problems:
        first = len(lengths)
        lengths += [*right, *wrong]
        labels += [True] * len(right) + [False] * len(wrong)
        index.append({"correct": [*range(first, first + len(right))], "incorrect": [*range(first + len(right), len(lengths))]})
    data.path, data.problems, data.is_correct = "here", index, np.array(labels)
    data.response_start = np.full(len(lengths), prompt)
    data.lengths = np.array(lengths) + data.response_start
    cut = cut or {}
    data.input_ids = lambda rows: [np.full(data.lengths[row], cut.get(row, 1)) for row in rows]
    data.problem_of = np.array([p for p, entry in enumerate(index) for kind in ("correct", "incorrect") for _ in entry[kind]])
    return data


rows_of = st.lists(st.integers(10, 200), max_size=6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems=st.lists(st.tuples(rows_of, rows_of), min_size=1, max_size=6).filter(lambda ps: any(r and w for r, w in ps)))
def test_a_pair_is_one_correct_and_one_incorrect_program_of_one_problem_and_no_row_is_used_twice(problems):
    problems = [*problems, ([50], [50])]
    data = split(*problems)
    found = pairs(data)
    assert found.ndim == 2 and found.shape[1] == 2
    assert data.is_correct[found[:, 0]].all() and not data.is_correct[found[:, 1]].any()
    assert (data.problem_of[found[:, 0]] == data.problem_of[found[:, 1]]).all()
    assert len(set(found.reshape(-1).tolist())) == found.size
    assert found.tolist() == pairs(split(*problems)).tolist()


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    "few, many, partners",
    [
        ([100], [10, 100], [100]),
        ([100], [10, 20, 30, 98], [98]),
        ([20, 100], [5, 19, 60, 101, 180], [19, 101]),
        ([10, 50, 90], [10, 50, 90], [10, 50, 90]),
    ],
)
def test_a_program_is_paired_with_one_of_like_length(few, many, partners, swap):
    """Paired by rank alone, a long correct program would meet a short incorrect one, and length would be a shortcut."""
    data = split((many, few) if swap else (few, many))
    lengths = {tuple(sorted(data.lengths[pair].tolist())) for pair in pairs(data)}
    assert lengths == {tuple(sorted(pair)) for pair in zip(few, partners)}


def test_a_long_prompt_makes_no_lengths_alike():
    assert len(pairs(split(([100], [30, 100]), prompt=5000))) == 1
    with pytest.raises(ValueError, match="of like length"):
        pairs(split(([100], [30]), prompt=5000))


def test_programs_under_prompts_that_were_cut_otherwise_make_no_pair():
    """Else the prompt alone would tell the two apart."""
    assert pairs(split(([100, 101], [100, 101]), prompt=5, cut={1: 2, 2: 2})).tolist() == [[0, 3], [1, 2]]
    with pytest.raises(ValueError, match="of like length"):
        pairs(split(([100], [100]), prompt=5, cut={1: 2}))


def test_length_tells_nothing_about_the_label_of_a_pair():
    """Incorrect programs are three times as many and mostly shorter, but each correct one has an incorrect one of its own length."""
    random = np.random.default_rng(0)
    problems = []
    for _ in range(40):
        right = random.integers(60, 120, size=2).tolist()
        problems.append((right, [*right, *random.integers(10, 60, size=4).tolist()]))
    data = split(*problems)
    found = data.lengths[pairs(data)]
    assert len(found) == 80 and (found[:, 0] == found[:, 1]).mean() > 0.95


def test_programs_of_very_different_length_make_no_pair():
    """One length bin: a problem that has a long correct and a short incorrect program only would teach length."""
    assert pairs(split(([200], [10]), ([30], [31]))).tolist() == [[2, 3]]


def test_problems_with_one_kind_of_program_make_no_pair_and_nothing_at_all_is_an_error():
    assert pairs(split(([10, 20], []), ([], [10]), ([30], [31]))).tolist() == [[3, 4]]
    with pytest.raises(ValueError, match="here: no problem has both a correct and an incorrect program"):
        pairs(split(([10, 20], []), ([], [10])))
