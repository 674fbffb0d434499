"""The critic's section of the parameters to a network and an objective; its values on pairs of programs, for the gate."""

from typing import Any

import numpy as np

from wmtp import critic, gate, scoring
from wmtp.anchor import AnchoredCritic, AnchoredObjective
from wmtp.model import Transformer
from wmtp.preference import PairwiseObjective
from wmtp.tokens import TokenData, Tokenizer
from wmtp.world import World

MAX_PAIRS = 1000  # judged of a split


def network(settings: Any, trunk: Transformer) -> critic.Critic:
    """`settings` is critic.loss."""
    if settings.kind == "pairwise":
        return critic.Critic(trunk, "logit")
    return critic.Critic(trunk) if settings.anchor is None else AnchoredCritic(trunk)


def objective(settings: Any, lm_coef: float) -> critic.ValueObjective | PairwiseObjective:
    """`settings` is critic.loss."""
    if settings.kind == "pairwise":
        return PairwiseObjective(lm_coef)
    regression = (settings.kind, settings.gamma, settings.lam, lm_coef)
    if settings.anchor is None:
        return critic.ValueObjective(*regression)
    return AnchoredObjective(*regression, settings.anchor.decay, settings.anchor.coef, settings.anchor.value_clip)


def judge(model: critic.Critic, data: TokenData, world: World, token_budget: int) -> tuple[np.ndarray, gate.Judged | None]:
    """Row numbers of at most MAX_PAIRS pairs, correct and incorrect in turn, and what the critic makes of them (rank 0; None elsewhere)."""
    rows = critic.pairs(data)[:MAX_PAIRS].reshape(-1)
    values = scoring.score_rows(scoring.critic_value(model), data, rows, world, token_budget)
    if values is None:
        return rows, None
    known = (data.response_start, data.is_correct, data.problem_of, data.spans())
    return rows, gate.Judged(values, *(column[rows] for column in known), unit=model.unit)


def response_texts(tokenizer: Tokenizer, data: TokenData, rows: np.ndarray) -> list[list[str]]:
    """What each token P..L-1 of these rows stands for, as the vocabulary writes it: \u2581 for a space, <0x0A> for a line's end."""
    spans = zip(data.input_ids(rows), data.response_start[rows])
    return [[tokenizer.pieces.id_to_piece(int(token)) for token in ids[start:-1]] for ids, start in spans]
