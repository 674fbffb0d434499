"""The critic's section of the parameters: each form of its loss to a network and an objective; what is judged and shown."""

import json
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages import critic_pretrain
from tests.test_critic import small_critic
from tests.test_model import random_model
from tests.test_params import changed
from wmtp import critic_report, params, pretrain
from wmtp.anchor import AnchoredCritic, AnchoredObjective
from wmtp.critic import Critic, ValueObjective, load_critic, pairs
from wmtp.model import load_bundle
from wmtp.params import ParameterError, validate
from wmtp.preference import PairwiseObjective
from wmtp.scoring import critic_value, score_rows
from wmtp.tokens import TokenData
from wmtp.view import View
from wmtp.world import World

ALONE = World(0, 1, torch.device("cpu"))
ANCHOR = {"decay": 0.9, "coef": 0.1, "value_clip": 0.2}


def section(**loss):
    return validate(changed("critic.loss", loss)).critic.loss


@pytest.mark.parametrize("kind", ["bce", "mse", "huber"])
def test_a_regression_and_its_anchor(kind):
    plain, held = (section(kind=kind, gamma=0.9, lam=0.8, anchor=anchor) for anchor in (None, ANCHOR))
    assert pretrain.objective(plain, 0.5) == ValueObjective(kind, 0.9, 0.8, 0.5)
    assert pretrain.objective(held, 0.5) == AnchoredObjective(kind, 0.9, 0.8, 0.5, 0.9, 0.1, 0.2)
    trunk = small_critic().trunk
    assert type(pretrain.network(plain, trunk)) is Critic and type(pretrain.network(held, trunk)) is AnchoredCritic
    assert pretrain.network(plain, trunk).unit == pretrain.network(held, trunk).unit == "probability"


def test_pairwise_values_are_logits():
    pairwise = section(kind="pairwise")
    assert pretrain.objective(pairwise, 0.5) == PairwiseObjective(0.5)
    assert pretrain.network(pairwise, small_critic().trunk).unit == "logit"


@pytest.mark.parametrize(
    "loss, message",
    [
        ({"kind": "mae", "gamma": 1.0, "lam": 1.0, "anchor": None}, r"critic\.loss\.kind: .*'huber', 'pairwise', found 'mae'"),
        ({"kind": "pairwise", "gamma": 1.0}, r"critic\.loss\.gamma: unknown key"),
        ({"kind": "pairwise", "anchor": None}, r"critic\.loss\.anchor: unknown key"),
        ({"kind": "bce", "gamma": 1.0, "lam": 1.0}, r"critic\.loss\.anchor: this key is missing"),
        ({"kind": "mse", "gamma": 1.0, "lam": 1.0, "anchor": ANCHOR | {"coef": 0.0, "value_clip": None}}, "such an anchor holds nothing"),
        ({"kind": "mse", "gamma": 1.0, "lam": 1.0, "anchor": ANCHOR | {"decay": 1.0}}, r"decay: Input should be less than 1"),
        ("bce", r"critic\.loss: "),
    ],
)  # fmt: skip
def test_a_key_that_a_form_does_not_have_is_one_line(loss, message):
    with pytest.raises(ParameterError, match=message) as caught:
        validate(changed("critic.loss", loss))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def critic(micro):
    critic = Critic(random_model(load_bundle(micro.bundle, n_future=1).args, seed=2, dtype=torch.float32, scale=0.2)).eval()
    torch.nn.init.normal_(critic.value.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return critic


@pytest.mark.parametrize("unit", ["probability", "logit"])
def test_pairs_are_judged_in_turn_in_the_critics_own_unit(data, critic, unit, monkeypatch):
    monkeypatch.setattr(pretrain, "MAX_PAIRS", 5)
    monkeypatch.setattr(critic, "unit", unit)
    rows, judged = pretrain.judge(critic, data, ALONE, 4000)
    assert rows.tolist() == pairs(data)[:5].reshape(-1).tolist() and judged.unit == unit
    assert judged.is_correct.tolist() == [True, False] * 5 and (judged.problem[0::2] == judged.problem[1::2]).all()
    for found, expected in zip(judged.values, score_rows(critic_value(critic), data, rows, ALONE, 4000)):
        assert np.array_equal(found, expected)
    assert judged.span.tolist() == data.spans()[rows].tolist() and judged.start.tolist() == data.response_start[rows].tolist()


def test_other_ranks_judge_nothing(data, critic):
    class Second(World):
        def gather(self, value):
            return None

    assert pretrain.judge(critic, data, Second(1, 2, torch.device("cpu")), 4000)[1] is None


def test_texts_are_those_of_the_response_without_its_end(data, tokenizer):
    rows = np.array([3, 0])
    for row, texts in zip(rows, pretrain.response_texts(tokenizer, data, rows)):
        ids = data.input_ids([row])[0]
        assert len(texts) == len(ids) - data.response_start[row] - 1
        assert [tokenizer.pieces.piece_to_id(text) for text in texts] == ids[data.response_start[row] : -1].tolist()


def test_the_stage_judges_no_problem_that_it_trains_on(micro, monkeypatch):
    """Before anything is trained: the held-out split must not share a problem with the critic's."""
    from wmtp.scores import ScoreError

    same = critic_pretrain.TokenData(micro.processed, "policy")
    monkeypatch.setattr(critic_pretrain, "TokenData", lambda processed, split: same)
    settings = SimpleNamespace(gate=SimpleNamespace(confidence=0.95, min_delta_std=0.0))
    seeing = SimpleNamespace(
        critic=settings, seed=1, optimizer=SimpleNamespace(micro_batch_tokens=4000), run=SimpleNamespace(device="cpu", checkpoint_every=5)
    )
    with pytest.raises(ScoreError, match=r"the gate: the critic trained on .* problems of .*policy that it is to judge"):
        critic_pretrain.work(seeing, None, str(micro.bundle), str(micro.processed), "out", "log", "report", "pictures")


@torch.no_grad()
def ordered_share(critic, data, within_problems):
    """How often a correct program ends with a higher value than an incorrect one, of all that make pairs, scored one at a time."""
    last = []
    for row in pairs(data).reshape(-1):
        ids, place = torch.tensor(data.input_ids([row])[0], dtype=torch.long)[None], int(data.response_start[row])
        value = float(critic(ids, torch.arange(ids.shape[1])[None] >= place)[0][0, -2])
        last.append((value, data.is_correct[row], data.problem_of[row]))
    won = {}
    for right, wrong in product(*([one for one in last if one[1] == label] for label in (True, False))):
        if not within_problems or right[2] == wrong[2]:
            won.setdefault(right[2] if within_problems else None, []).append((right[0] > wrong[0]) + (right[0] == wrong[0]) / 2)
    return np.mean([np.mean(shares) for shares in won.values()])


REGRESSION = {"kind": "bce", "gamma": 1.0, "lam": 1.0, "anchor": None}


@pytest.mark.slow
@pytest.mark.parametrize("loss", [REGRESSION, {"kind": "pairwise"}], ids=["bce", "pairwise"])
def test_the_auc_in_fold_is_that_of_the_pairs_that_the_critic_trained_on(micro, data, tmp_path, monkeypatch, loss):
    """Not that of the held-out pairs, which is far lower where a critic has learned its pairs by heart."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(critic_report, "write", lambda *_, **__: None)
    monkeypatch.setattr(critic_pretrain, "TokenData", lambda folder, split: TokenData(folder, {"critic": "policy"}.get(split, split)))
    values = changed("critic.loss", loss)
    values["critic"] |= {"n_epochs": 12.0, "learning_rate": 0.005, "batch_rows": 8, "lm_coef": 0.0}
    values["optimizer"]["micro_batch_tokens"], values["run"]["device"] = 4000, "cpu"
    seeing, track = View(validate(values), list(params.Params.model_fields), "critic-pretrain"), SimpleNamespace(log=lambda *_: None)
    paths = [str(tmp_path / name) for name in ("critic", "log.csv", "critic.json", "pictures")]
    critic_pretrain.work(seeing, track, str(micro.bundle), str(micro.processed), *paths)
    figures, critic = json.loads((tmp_path / "critic.json").read_text()), load_critic(paths[0])
    by_problem = loss["kind"] == "pairwise"
    own, held_out = (ordered_share(critic, split, by_problem) for split in (data, TokenData(micro.processed, "validation")))
    assert figures["auc_in_fold"] == pytest.approx(own, abs=2e-3) and figures["auc"] == pytest.approx(held_out, abs=1e-2)
    assert own > held_out + 0.1
