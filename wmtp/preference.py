"""Bradley-Terry on pairs of programs: which of the two passes its tests (METHODS, "Critic", loss `pairwise`).

Only differences of value logits within a problem are identified. Their level means nothing, so no reward ever meets them: there is no
return, no Brier score and no calibration.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from wmtp.advantage import check_starts
from wmtp.batches import Batch


class PairError(ValueError):
    """A step that is not made of pairs."""


@dataclass(frozen=True)
class Pairs(Batch):
    """A row is a pair: token t of the correct program stands at 2t, of the incorrect one at 2t+1, so that no split of a step parts them.

    `response_BT` is one run that covers both responses, for lengths; `member_BT` (bool) is the response mask of each program.
    """

    member_BT: Tensor | None = None


def interleave(step: Batch) -> Pairs:
    """The step's rows 2k (correct) and 2k+1 (incorrect) as row k, twice as wide; `row_B` is the correct row's number."""
    right_N, wrong_N = step.is_correct_B[0::2], step.is_correct_B[1::2]
    if len(right_N) != len(wrong_N) or not right_N.all() or wrong_N.any():
        raise PairError(f"pairwise loss: expected rows in turn correct and incorrect, found {step.is_correct_B.int().tolist()}")
    tokens_NT, member_NT = (torch.stack([x_BT[0::2], x_BT[1::2]], -1).flatten(1) for x_BT in (step.tokens_BT, step.response_BT))
    either_NT = step.response_BT[0::2] | step.response_BT[1::2]
    run_NT = (either_NT.cumsum(1) > 0) & (either_NT.flip(1).cumsum(1).flip(1) > 0)
    return Pairs(
        step.row_B[0::2], tokens_NT, run_NT.repeat_interleave(2, 1), is_correct_B=right_N, shortest_prompt=2 * step.shortest_prompt,
        member_BT=member_NT,
    )  # fmt: skip


def apart(pairs_NT: Tensor) -> Tensor:
    """[N, 2T] interleaved to [2N, T], the correct programs first."""
    return pairs_NT.unflatten(1, (-1, 2)).movedim(2, 0).flatten(0, 1)


@dataclass(frozen=True)
class PairwiseObjective:
    """-log sigmoid(z_right - z_wrong) of every state of the correct program against every state of the incorrect one, P-1..L-1 of each,
    and `lm_coef` times the next-token loss of the correct rows.

    States at one place alone would leave a trend along the program free, and with it the differences that weights are made of. A pair's
    loss is the mean over both programs' states and counts for both rows.
    """

    lm_coef: float = 0.0

    def prepare(self, step: Batch) -> Pairs:
        check_starts(step.response_BT)
        return interleave(step)

    def count(self, step: Batch) -> float:
        return 2.0 * len(step.row_B)

    def loss(self, model: nn.Module, batch: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        first, response_BT = max(0, batch.shortest_prompt // 2 - 1), apart(batch.member_BT)
        logit_BT, ce_BT = model(apart(batch.tokens_BT), response_BT, first=first)
        state_BT = functional.pad(response_BT[:, 1:], (0, 1), value=False)
        n_B = state_BT.sum(1).clamp(min=1)
        value_loss_N = _every_state_against_every(logit_BT[:, first:], state_BT[:, first:]) / n_B.view(2, -1).prod(0)
        language_N = (ce_BT.sum(1) / n_B).chunk(2)[0]
        right_N, wrong_N = _last(logit_BT.detach(), state_BT).chunk(2)
        real_N = (batch.row_B >= 0).double()
        ordered_N = (torch.sign(right_N - wrong_N) / 2 + 0.5) * real_N
        sums = {"n": real_N, "loss": value_loss_N, "language": language_N, "ordered": ordered_N}
        total = (2 * value_loss_N + self.lm_coef * language_N).sum()
        return total, {name: part.detach().double().sum() for name, part in sums.items()}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        names = {"loss": "loss", "pair_accuracy": "ordered", "ce": "language"}
        return {name: float(sums[part] / sums["n"]) for name, part in names.items()}


def _every_state_against_every(logit_BT: Tensor, state_BT: Tensor) -> Tensor:
    """Sum [N] of softplus(z_wrong - z_right) over all pairs of states; rows are correct programs, then their incorrect twins."""
    (right_NT, wrong_NT), (of_right_NT, of_wrong_NT) = logit_BT.chunk(2), state_BT.chunk(2)
    loss_NTT = functional.softplus(wrong_NT[:, None, :] - right_NT[:, :, None])
    return (loss_NTT * (of_right_NT[:, :, None] & of_wrong_NT[:, None, :])).sum((1, 2))


def _last(logit_BT: Tensor, state_BT: Tensor) -> Tensor:
    """The value logit [B] of the last judged state, L-1."""
    place_BT = torch.arange(logit_BT.shape[1], device=logit_BT.device) * state_BT
    return logit_BT.gather(1, place_BT.argmax(1, keepdim=True)).squeeze(1)
