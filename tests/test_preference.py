"""The pairwise objective against loops in float64, and that no split parts a pair (METHODS, "Critic", loss `pairwise`)."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.test_critic import SPANS, T, logits_of, same, small_critic, train, whole_step
from wmtp.batches import share
from wmtp.preference import PairError, PairwiseObjective, apart, interleave


def states(logits, spans):
    """For each pair, the value logits of both programs' states P-1..L-1."""
    rows = [[float(logits[b, i]) for i in range(P - 1, L)] for b, (P, L) in enumerate(spans)]
    return list(zip(rows[0::2], rows[1::2]))


def by_loops(logits, spans):
    return [
        math.fsum(math.log1p(math.exp(w - r)) for r in right for w in wrong) / (len(right) * len(wrong))
        for right, wrong in states(logits, spans)
    ]


def test_loss_equals_the_loops():
    """A mean over all pairs of states of two programs, then over the pairs: long programs do not dominate."""
    critic, step = small_critic(), whole_step()
    with torch.no_grad():
        expected = by_loops(logits_of(critic, step), SPANS)
    for token_budget, size in ((10**9, 1), (3 * T, 1), (3 * T, 3)):
        loss, _, sums = train(critic, PairwiseObjective(), step, token_budget, size)
        assert loss == pytest.approx(math.fsum(expected) / len(expected), rel=1e-10)
        assert PairwiseObjective().summary(sums)["loss"] == pytest.approx(loss, rel=1e-10)


def test_the_language_loss_is_that_of_the_correct_programs_over_all_rows():
    critic, step = small_critic(), whole_step()
    plain, both = (train(critic, PairwiseObjective(coef), step, 3 * T) for coef in (0.0, 0.7))
    with torch.no_grad():
        logits = critic.trunk(step.tokens_BT)[:, :, 0]
    rows = []
    for b, (P, L) in list(enumerate(SPANS))[0::2]:
        rows.append(math.fsum(-float(torch.log_softmax(logits[b, i - 1], -1)[step.tokens_BT[b, i]]) for i in range(P, L + 1)) / (L - P + 1))
    assert both[0] - plain[0] == pytest.approx(0.7 * math.fsum(rows) / len(SPANS), rel=1e-9)
    assert PairwiseObjective().summary(both[2])["ce"] == pytest.approx(math.fsum(rows) / len(rows), rel=1e-9)


def test_gradients_do_not_depend_on_the_split():
    critic, step, work = small_critic(), whole_step(), PairwiseObjective(0.5)
    _, gradients, sums = train(critic, work, step)
    for budget, size in ((2 * T, 1), (5 * T, 2), (2 * T, 3), (1, 8)):
        _, other, other_sums = train(critic, work, step, budget, size)
        same(other, gradients)
        assert all(float(other_sums[key]) == pytest.approx(float(sums[key]), rel=1e-10) for key in sums)


def test_a_micro_batch_holds_whole_pairs_and_counts_both_programs():
    packed = interleave(whole_step())
    batches = share(packed, 0, 1, 4 * T)
    assert sorted(row for batch in batches for row in batch.row_B.tolist()) == [0, 2, 4, 6]
    assert all(len(batch.row_B) == 1 or batch.tokens_BT.numel() <= 4 * T for batch in batches) and len(batches) > 1
    assert all(batch.tokens_BT.shape == batch.member_BT.shape and batch.tokens_BT.shape[1] % 2 == 0 for batch in batches)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(spans=st.lists(st.integers(1, T - 1).flatmap(lambda P: st.tuples(st.just(P), st.integers(P, T - 1))), min_size=2, max_size=8))
def test_both_programs_come_out_of_a_split_as_they_went_in(spans):
    step = whole_step(spans := spans[: len(spans) // 2 * 2])
    for batch in share(interleave(step), 0, 1, 3 * T):
        tokens, response = apart(batch.tokens_BT), apart(batch.member_BT)
        rows = torch.cat([batch.row_B, batch.row_B + 1])
        for row, ids, mask in zip(rows.tolist(), tokens, response):
            P, L = spans[row]
            assert mask.nonzero().flatten().tolist() == list(range(P, L + 1))
            assert torch.equal(ids[: L + 1], step.tokens_BT[row, : L + 1])
        assert batch.shortest_prompt // 2 <= min(spans[row][0] for row in rows.tolist())


def test_the_level_of_values_is_not_identified():
    critic, step = small_critic(), whole_step()
    loss, gradients, _ = train(critic, PairwiseObjective(), step)
    with torch.no_grad():
        critic.value.bias.add_(3.0)
    higher, others, _ = train(critic, PairwiseObjective(), step)
    assert higher == pytest.approx(loss, rel=1e-12) and abs(float(gradients["value.bias"])) < 1e-15
    same(others, gradients, 1e-9)


class Table(nn.Module):
    """A logit of its own for every state of every row of a whole, unsplit step."""

    def __init__(self, n_rows):
        super().__init__()
        self.logit_BT = nn.Parameter(torch.randn((n_rows, T), generator=torch.Generator().manual_seed(3), dtype=torch.float64))

    def forward(self, tokens_BT, response_BT, **_):
        # Rows arrive with the correct programs first.
        order = torch.cat([torch.arange(0, len(tokens_BT), 2), torch.arange(1, len(tokens_BT), 2)])
        return self.logit_BT[order], torch.zeros_like(self.logit_BT)


def test_the_trained_states_run_from_the_last_prompt_token_to_the_last_before_the_end():
    model, work = Table(len(SPANS)), PairwiseObjective()
    total, _ = work.loss(model, work.prepare(whole_step()))
    total.backward()
    for b, (P, L) in enumerate(SPANS):
        assert model.logit_BT.grad[b].nonzero().flatten().tolist() == list(range(P - 1, L))
        assert (model.logit_BT.grad[b, P - 1 : L] < 0).all() if b % 2 == 0 else (model.logit_BT.grad[b, P - 1 : L] > 0).all()


def test_a_program_against_itself_is_pulled_to_one_level():
    """All that can be told of two equal programs is nothing; a trend along them costs more than log 2."""
    critic, step = small_critic(), whole_step(((5, 15),) * 4)
    step.tokens_BT[1], step.tokens_BT[3] = step.tokens_BT[0], step.tokens_BT[2]
    assert train(critic, PairwiseObjective(), step)[0] > math.log(2) + 1e-3
    with torch.no_grad():
        critic.value.weight.zero_()
    loss, gradients, sums = train(critic, PairwiseObjective(), step)
    assert loss == pytest.approx(math.log(2))
    assert max(float(g.abs().max()) for g in gradients.values()) < 1e-12, "the rounding of sums that cancel, which is the processor's"
    assert PairwiseObjective().summary(sums)["pair_accuracy"] == 0.5


def test_differences_along_a_program_are_identified():
    """The optimum is the log odds of the label given the state, up to one level: shared states flat, then a step at the difference."""
    model, work = Table(2), PairwiseObjective()
    step = whole_step(((4, 13), (4, 13)))
    optimizer = torch.optim.Adam([model.logit_BT], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        with torch.no_grad():  # states 3..8 have read the same tokens in both programs
            model.logit_BT[:, 3:9] = model.logit_BT[:, 3:9].mean(0)
        total, _ = work.loss(model, work.prepare(step))
        total.backward()
        model.logit_BT.grad[:, 3:9] = model.logit_BT.grad[:, 3:9].mean(0)
        optimizer.step()
    right, wrong = model.logit_BT.detach()
    assert float(right[3:9].std()) < 0.01
    assert float(right[9:13].min() - right[8]) > 1 and float(wrong[9:13].max() - wrong[8]) < -1


def test_the_accuracy_is_that_of_the_last_judged_states():
    critic, step, work = small_critic(), whole_step(), PairwiseObjective()
    with torch.no_grad():
        rows = states(logits_of(critic, step), SPANS)
    assert work.summary(train(critic, work, step, 2 * T, 3)[2])["pair_accuracy"] == sum(r[-1] > w[-1] for r, w in rows) / len(rows)


def test_a_response_without_a_state_before_it_is_refused():
    with pytest.raises(ValueError, match="response starts at position 0"):
        PairwiseObjective().prepare(replace(whole_step(((4, 9), (0, 9))), is_correct_B=torch.tensor([True, False])))


@pytest.mark.parametrize("labels", [[True, True], [False, True], [True], [True, False, True]])
def test_a_step_that_is_not_made_of_pairs_is_refused(labels):
    step = whole_step(((4, 9),) * len(labels))
    with pytest.raises(PairError, match="in turn correct and incorrect, found"):
        PairwiseObjective().prepare(replace(step, is_correct_B=torch.tensor(labels)))


@pytest.mark.slow
def test_a_critic_learns_to_order_programs():
    critic, work = small_critic(torch.float32), PairwiseObjective()
    step = whole_step(((4, 12),) * 8)
    step.tokens_BT[1::2] = step.tokens_BT[0::2]
    step.tokens_BT[:, 7] = torch.where(step.is_correct_B, 3, 4)
    optimizer = torch.optim.AdamW([p for p in critic.parameters() if p.requires_grad], lr=0.01)
    first = train(critic, work, step)[0]
    for _ in range(60):
        last, _, sums = train(critic, work, step)
        optimizer.step()
    # Three of nine states have read the same in both programs, so that not all can be told.
    assert last < 0.7 * first and work.summary(sums)["pair_accuracy"] == 1
