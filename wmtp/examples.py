"""Programs with what a method's first step makes of their tokens: weights by head, the signal behind them, where the twin differs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from wmtp.align import align_future, future_targets
from wmtp.batches import Batch
from wmtp.model import Transformer
from wmtp.policy import PolicyObjective
from wmtp.pretrain import response_texts
from wmtp.tokens import TokenData, Tokenizer
from wmtp.weighting import array_names


@torch.no_grad()
def first_weights(model: Transformer, work: PolicyObjective, step: Batch) -> torch.Tensor:
    """The weights [B, T, F] by position of a first step from `model`, before `mix` and `head_weights`."""
    F, settings = work.n_future, {**work.settings, **({} if work.lag is None else {"lag": {}})}
    if not work.method.needs_forward:
        return align_future(work.method.weigh(vars(step), settings), F, 0.0)
    targets_BTF, entropy = future_targets(step.tokens_BT, step.response_BT, F), "entropy_BTF" in array_names(work.method.function())
    found = model(step.tokens_BT, targets_BTF, with_entropy=entropy)
    ce_BTF, entropy_BTF = found if entropy else (found, None)
    return work.method.weigh(vars(step) | {"ce_BTF": ce_BTF, "entropy_BTF": entropy_BTF}, settings)


def examples(
    weight_BTF: torch.Tensor, step: Batch, data: TokenData, tokenizer: Tokenizer, kind: str | None, n: int
) -> list[dict[str, Any]]:
    """The first `n` correct programs of a step, those whose decisive place is known before others.

    `prompt` is the text before them, `tokens` are the pieces of the response as the vocabulary writes them, `weights` a list of heads for
    each of them and the end of text, `place` the tokens [start, end) at which the program and its incorrect twin first differ, None where
    that is not known. `signal` is of `kind` and has one number more than there are tokens, from the last prompt token on: values by state
    up to the last but one, or losses by token from the second on; None where the method reads none.
    """
    known = [b for b in range(len(step.row_B)) if bool(step.is_correct_B[b])]
    chosen = sorted(known, key=lambda b: bool(step.span_B2[b, 0] < 0))[:n]
    texts = response_texts(tokenizer, data, np.array([int(step.row_B[b]) for b in chosen]))
    return [
        _example(weight_BTF, step, data, b, kind, tokens) | {"prompt": tokenizer.pieces.decode(_prompt(step, data, b))}
        for b, tokens in zip(chosen, texts)
    ]


def _prompt(step: Batch, data: TokenData, b: int) -> list[int]:
    return step.tokens_BT[b, : data.response_start[int(step.row_B[b])]].tolist()


def _example(weight_BTF: torch.Tensor, step: Batch, data: TokenData, b: int, kind: str | None, tokens: Sequence[str]) -> dict[str, Any]:
    row, place = int(step.row_B[b]), (step.span_B2[b] - data.response_start[int(step.row_B[b])]).tolist()
    start, end = int(data.response_start[row]), int(data.lengths[row])
    by_token = [[float(weight_BTF[b, i - h - 1, h]) for h in range(weight_BTF.shape[2])] for i in range(start, end)]
    signal = None if step.signal_BT is None else step.signal_BT[b, start - 1 : end].tolist()
    return {
        "task_id": data.problems[int(data.problem_of[row])]["task_id"], "tokens": list(tokens),
        "weights": by_token, "place": place if int(step.span_B2[b, 0]) >= 0 else None, "kind": kind, "signal": signal,
    }  # fmt: skip
