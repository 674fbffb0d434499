import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests.test_model import random_model
from wmtp.critic import Critic
from wmtp.model import load_bundle
from wmtp.records import sha256_file
from wmtp.scores import ScoreError, Scores, write_scores
from wmtp.scoring import critic_value, reference_loss, score_rows, score_split
from wmtp.tokens import TokenData
from wmtp.world import World

ALONE = World(0, 1, torch.device("cpu"))


def numbers(data, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.normal(size=length).astype(np.float32) for length in data.lengths]


@pytest.fixture
def written(data, tmp_path):
    write_scores(tmp_path / "scores.safetensors", numbers(data), data, "f" * 64)
    return tmp_path / "scores.safetensors"


def rewrite(path, flat=None, **changes):
    """The file with other numbers or another key, as something else than this project might leave it."""
    from safetensors import safe_open

    with safe_open(str(path), framework="np") as file:
        key = json.loads(file.metadata()["key"]) | changes
    flat = load_file(path)["scores"] if flat is None else flat
    save_file({"scores": flat}, path, metadata={"key": json.dumps(key)})


def test_each_row_gets_its_own_scores_back(data, written):
    found, expected = Scores(written, data), numbers(data)
    assert all(np.array_equal(found.row(row), expected[row]) for row in range(len(data)))
    assert found.model_sha256 == "f" * 64 and found.gate_passed is True and found.sha256 == sha256_file(written)


def test_equal_scores_give_equal_bytes(data, written, tmp_path):
    write_scores(tmp_path / "again.safetensors", numbers(data), data, "f" * 64)
    assert (tmp_path / "again.safetensors").read_bytes() == written.read_bytes()


@pytest.mark.parametrize("passed", [True, False])
def test_the_gate_travels_with_the_scores(data, tmp_path, passed):
    write_scores(tmp_path / "s", numbers(data), data, "f" * 64, gate_passed=passed)
    assert Scores(tmp_path / "s", data).gate_passed is passed


def test_absent_scores_are_an_error(data, tmp_path):
    with pytest.raises(ScoreError, match="no scores there"):
        Scores(tmp_path / "scores.safetensors", data)


def test_scores_of_another_split_are_stale(micro, written):
    with pytest.raises(ScoreError, match=r"data_sha256 is .* stale scores; run dvc repro"):
        Scores(written, TokenData(micro.processed, "validation"))


@pytest.mark.parametrize("name", ["data_sha256", "tokenizer_sha256"])
def test_scores_with_another_key_are_stale(data, written, name):
    rewrite(written, **{name: "0" * 64})
    with pytest.raises(ScoreError, match=f"{name} is 000000000000, expected .* stale"):
        Scores(written, data)


def test_a_short_file_is_refused(data, written):
    rewrite(written, load_file(written)["scores"][:-1])
    with pytest.raises(ScoreError, match=rf"expected {data.lengths.sum()} scores, found {data.lengths.sum() - 1}"):
        Scores(written, data)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_file_that_holds_what_is_no_number_is_refused(data, written, value):
    flat = load_file(written)["scores"].copy()
    flat[7] = value
    rewrite(written, flat)
    with pytest.raises(ScoreError, match="not finite"):
        Scores(written, data)


@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_damaged_file_is_refused(data, written, damage):
    if damage == "cut":
        written.write_bytes(written.read_bytes()[:-10])
    else:
        save_file({"scores": np.zeros(3, dtype=np.float32)}, written)
    with pytest.raises(ScoreError, match=r"scores\.safetensors"):
        Scores(written, data)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_scores_that_are_no_numbers_are_not_written(data, tmp_path, value):
    scores = numbers(data)
    scores[5][0] = value
    with pytest.raises(ScoreError, match="a score of row 5 is not finite"):
        write_scores(tmp_path / "s", scores, data, "f" * 64)
    assert not list(tmp_path.iterdir())


def test_too_few_scores_are_not_written(data, tmp_path):
    scores = numbers(data)
    scores[-1] = scores[-1][:-1]
    with pytest.raises(ScoreError, match="expected one score for each of"):
        write_scores(tmp_path / "s", scores, data, "f" * 64)
    assert not list(tmp_path.iterdir())


def test_rows_of_wrong_length_are_not_written_although_their_sum_is_right(data, tmp_path):
    scores = numbers(data)
    scores[3], scores[4] = np.append(scores[3], np.float32(0)), scores[4][1:]
    with pytest.raises(ScoreError):
        write_scores(tmp_path / "s", scores, data, "f" * 64)


@pytest.fixture(scope="module")
def reference(micro):
    return random_model(load_bundle(micro.bundle, n_future=1).args, seed=2).eval()


@torch.no_grad()
def test_reference_losses_belong_to_their_target_tokens(data, reference):
    rows = np.array([4, 0, 9])
    found = score_rows(reference_loss(reference), data, rows, ALONE, 10_000)
    for row, losses in zip(rows, found):
        ids = torch.from_numpy(data.input_ids([row])[0]).long()
        logits = reference(ids[None])[0, :, 0]
        assert losses.dtype == np.float32 and len(losses) == len(ids)
        for i in range(len(ids)):
            expected = float(-logits[i - 1].log_softmax(-1)[ids[i]]) if i >= data.response_start[row] else 0.0
            assert float(losses[i]) == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def test_critic_values_belong_to_the_state_that_has_read_their_token(data, reference):
    critic = Critic(reference)
    critic.value.weight.normal_(generator=torch.Generator().manual_seed(0))
    (values,) = score_rows(critic_value(critic), data, np.array([3]), ALONE, 10_000)
    ids = torch.from_numpy(data.input_ids([3])[0]).long()
    response = torch.arange(len(ids))[None] >= data.response_start[3]
    for i in (0, 5, int(data.response_start[3]), len(ids) - 1):
        alone = torch.sigmoid(critic(ids[None, : i + 1], response[:, : i + 1])[0])[0, -1]
        assert float(values[i]) == pytest.approx(float(alone), rel=1e-5)


def test_scores_do_not_depend_on_the_token_budget(data, reference):
    rows = np.arange(len(data))
    small, large = (score_rows(reference_loss(reference), data, rows, ALONE, budget) for budget in (1, 4000))
    assert all(np.allclose(a, b, rtol=1e-6, atol=0) for a, b in zip(small, large))
    assert all(len(values) == length for values, length in zip(large, data.lengths))


def test_a_whole_split_is_scored_and_written(data, reference, tmp_path):
    score_split(reference_loss(reference), data, "a" * 64, tmp_path / "s", ALONE, 4000, gate_passed=False)
    found = Scores(tmp_path / "s", data)
    (expected,) = score_rows(reference_loss(reference), data, np.array([11]), ALONE, 4000)
    assert np.allclose(found.row(11), expected, rtol=1e-6) and (found.model_sha256, found.gate_passed) == ("a" * 64, False)
