import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests.conftest import ROOT, run_ranks
from tests.test_model import random_model
from wmtp import flops
from wmtp.batches import collate
from wmtp.bundle import BundleError, bundle_sha256
from wmtp.checkpoint import save_model
from wmtp.critic import Critic, CriticError, load_critic, save_critic
from wmtp.model import load_bundle
from wmtp.provenance import critic_sha256, read_card
from wmtp.records import sha256_file
from wmtp.scores import ScoreError, Scores, check_out_of_fold, problems_of, write_scores
from wmtp.scoring import critic_value, reference_loss, score_rows, score_split
from wmtp.tokens import TokenData
from wmtp.world import World, joined

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


def a_model(folder, bundle, seed):
    """A bundle in `folder` that replaces what lay there."""
    model = random_model(load_bundle(bundle, n_future=1).args, seed=seed, dtype=torch.float32)
    save_model(model, bundle, folder, ALONE, {"stage": "reference"})
    return bundle_sha256(folder)


def test_scores_of_a_model_that_was_replaced_are_stale(micro, data, tmp_path, monkeypatch):
    made_by, file = tmp_path / "models" / "reference", tmp_path / "data" / "scores" / "reference.safetensors"
    old = a_model(made_by, micro.bundle, 1)
    write_scores(file, numbers(data), data, old, model=made_by)
    assert Scores(file, data).model_sha256 == old
    new = a_model(made_by, micro.bundle, 2)
    message = f"{file}: made by model {old[:12]}, but {made_by} now holds {new[:12]}: stale scores; run dvc repro"
    with pytest.raises(ScoreError) as error:
        Scores(file, data)
    assert str(error.value) == message
    monkeypatch.chdir(tmp_path / "models")
    with pytest.raises(ScoreError, match="stale scores"):
        Scores(file, data)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ScoreError, match=f"but models/reference now holds {new[:12]}"):
        Scores("data/scores/reference.safetensors", data)


def test_scores_alone_are_taken_as_they_are(micro, data, tmp_path):
    """As after `dvc pull` of the scores, or once the model was cleaned away; what lies there unreadable is an error."""
    made_by = tmp_path / "reference"
    write_scores(tmp_path / "s", numbers(data), data, a_model(made_by, micro.bundle, 1), model=made_by)
    (made_by / "metadata.json").unlink()
    with pytest.raises(BundleError, match=r"metadata\.json: no such file"):
        Scores(tmp_path / "s", data)
    shutil.rmtree(made_by)
    assert np.array_equal(Scores(tmp_path / "s", data).row(3), numbers(data)[3])


def test_where_a_repository_lies_does_not_change_its_scores(data, tmp_path, monkeypatch):
    for place in ("one", "two/deeper"):
        write_scores(tmp_path / place / "data" / "s", numbers(data), data, "f" * 64, model=tmp_path / place / "models" / "critic")
    monkeypatch.chdir(tmp_path / "one")
    write_scores(Path("data/again"), numbers(data), data, "f" * 64, model=Path("models/critic"))
    assert len({(tmp_path / name).read_bytes() for name in ("one/data/s", "two/deeper/data/s", "one/data/again")}) == 1


def test_a_key_that_lacks_something_is_named(data, written):
    from safetensors import safe_open

    with safe_open(str(written), framework="np") as file:
        key = json.loads(file.metadata()["key"])
    del key["unit"], key["gate_passed"]
    save_file(load_file(written), written, metadata={"key": json.dumps(key)})
    with pytest.raises(ScoreError, match="not a whole score file: its key lacks gate_passed, unit; run dvc repro"):
        Scores(written, data)


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
        ids = torch.tensor(data.input_ids([row])[0], dtype=torch.long)
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
    ids = torch.tensor(data.input_ids([3])[0], dtype=torch.long)
    response = torch.arange(len(ids))[None] >= data.response_start[3]
    critic.unit = "logit"
    (logits,) = score_rows(critic_value(critic), data, np.array([3]), ALONE, 10_000)
    for i in (0, 5, int(data.response_start[3]), len(ids) - 1):
        alone = critic(ids[None, : i + 1], response[:, : i + 1])[0][0, -1]
        assert float(values[i]) == pytest.approx(float(torch.sigmoid(alone)), rel=1e-5)
        assert float(logits[i]) == pytest.approx(float(alone), rel=1e-5)


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


# --- a critic's scores -------------------------------------------------------------------------------------------------------------


def a_critic(bundle, unit="probability"):
    """Values spread over most of 0..1, their logits of a few units."""
    critic = Critic(random_model(load_bundle(bundle, n_future=1).args, seed=2, dtype=torch.float32, scale=0.2), unit).eval()
    with torch.no_grad():
        critic.value.weight.normal_(std=0.2, generator=torch.Generator().manual_seed(0))[:, -1] = 0.01
    return critic


@torch.no_grad()
def live(critic, data, row):
    """The values of one row alone, as a training that runs its critic would see them."""
    batch = collate(data, np.array([row]))
    logit = critic(batch.tokens_BT, batch.response_BT)[0][0]
    return (torch.sigmoid(logit) if critic.unit == "probability" else logit).numpy()


@pytest.mark.parametrize("unit", ["probability", "logit"])
@pytest.mark.parametrize("token_budget", [1, 700, 4000, 10**6])
def test_cached_scores_equal_live_ones(micro, data, tmp_path, unit, token_budget):
    critic = a_critic(micro.bundle, unit)
    score_split(critic_value(critic), data, "a" * 64, tmp_path / "s", ALONE, token_budget, unit=critic.unit)
    cached = Scores(tmp_path / "s", data)
    assert cached.unit == unit and np.std(cached.flat) > 0.1
    scale = 1 if unit == "probability" else np.abs(cached.flat).max()
    for row in range(len(data)):
        assert np.abs(cached.row(row) - live(critic, data, row)).max() <= 1e-6 * scale


def score_on_ranks(bundle, processed, out):
    torch.set_num_threads(1)
    data = TokenData(processed, "policy")
    with joined("cpu") as world:
        for token_budget in (300, 4000):
            score_split(critic_value(a_critic(bundle)), data, "a" * 64, f"{out}/{token_budget}", world, token_budget)


@pytest.mark.slow
def test_two_ranks_cache_what_one_sees(micro, data, tmp_path):
    for code, error in run_ranks("tests.test_scores", "score_on_ranks", micro.bundle, micro.processed, tmp_path):
        assert code == 0, error
    critic = a_critic(micro.bundle)
    for token_budget in (300, 4000):
        cached = Scores(tmp_path / str(token_budget), data)
        assert all(np.allclose(cached.row(row), live(critic, data, row), rtol=1e-6, atol=1e-7) for row in range(len(data)))


def test_the_problems_of_rows_are_named_once(data):
    wrong = np.flatnonzero(~data.is_correct)[:2]
    entries = [next(e for e in data.problems if row in e["incorrect"]) for row in wrong]
    assert problems_of(data, np.repeat(wrong, 3)) == {
        "task_ids": sorted({e["task_id"] for e in entries}), "groups": sorted({e["group"] for e in entries})
    }  # fmt: skip
    assert problems_of(data, np.arange(len(data)))["task_ids"] == sorted(e["task_id"] for e in data.problems)


def test_scores_are_out_of_fold(micro, data):
    other = TokenData(micro.processed, "validation")
    check_out_of_fold(problems_of(other, np.arange(len(other))), data, "models/critic")
    seen = problems_of(data, np.array([5]))
    (task,), (group,) = seen["task_ids"], seen["groups"]
    n, n_groups = len(data.problems), len({e["group"] for e in data.problems})
    with pytest.raises(ScoreError, match=rf"models/critic: the critic trained on 1 of the {n} problems of .*policy .* {task} for one"):
        check_out_of_fold(seen, data, "models/critic")
    with pytest.raises(ScoreError, match=rf"trained on 1 of the {n_groups} groups of .* {group} for one; its values must be out of fold"):
        check_out_of_fold({"task_ids": ["another problem of its round"], "groups": [group]}, data, "models/critic")


def test_a_references_losses_are_out_of_fold_too(data):
    with pytest.raises(ScoreError, match=r"models/reference: the reference trained on 1 of .* its losses must be out of fold"):
        check_out_of_fold(problems_of(data, np.array([5])), data, "models/reference", "reference")


def reference_stage(micro, folder, extra):
    """What stages.score_reference makes of a reference whose metadata say `extra`."""
    from stages import score_reference

    save_model(
        random_model(load_bundle(micro.bundle, n_future=1).args, seed=2, dtype=torch.float32),
        micro.bundle,
        folder / "reference",
        ALONE,
        extra,
    )
    score_reference.work(PARAMS, None, str(folder / "reference"), str(micro.processed), str(folder / "s"))


def test_the_stage_refuses_a_reference_that_saw_the_problems_and_says_where_it_knows_none(micro, data, tmp_path, capfd):
    other = TokenData(micro.processed, "validation")
    reference_stage(micro, tmp_path, {"learned_from": problems_of(other, np.arange(len(other)))})
    assert "no record" not in capfd.readouterr().err
    reference_stage(micro, tmp_path, {})
    assert f"{tmp_path / 'reference'}: no record of problems that it was tuned on" in capfd.readouterr().err
    (tmp_path / "s").unlink()
    with pytest.raises(ScoreError, match="the reference trained on 1 of the"):
        reference_stage(micro, tmp_path, {"learned_from": problems_of(data, np.array([0]))})
    assert not (tmp_path / "s").exists()


def saved_critic(micro, folder, trained_on, unit="probability"):
    save_critic(a_critic(micro.bundle, unit), micro.bundle, folder / "critic", {"passed": False}, trained_on, ALONE)
    return folder / "critic"


PARAMS = SimpleNamespace(run=SimpleNamespace(device="cpu", dtype="float32"), optimizer=SimpleNamespace(micro_batch_tokens=4000))


def test_scores_tell_what_they_cost(micro, data, tmp_path):
    """The training of the model behind them, as its metadata say, and its forward over every row, right or wrong."""
    from stages import score_critic

    other = TokenData(micro.processed, "validation")
    elsewhere = problems_of(other, np.arange(len(other)))
    reference_stage(micro, tmp_path, {"learned_from": elsewhere, "flops": 10**12})
    network = load_bundle(micro.bundle, n_future=1)
    every = (data.lengths, data.response_start)
    assert Scores(tmp_path / "s", data).flops == 10**12 + flops.forward(network, *every) > 10**12
    save_critic(a_critic(micro.bundle), micro.bundle, tmp_path / "critic", {"passed": False}, elsewhere, ALONE, 10**13)
    score_critic.work(PARAMS, None, str(tmp_path / "critic"), str(micro.processed), str(tmp_path / "c"))
    assert Scores(tmp_path / "c", data).flops == 10**13 + flops.forward(a_critic(micro.bundle), *every)


@pytest.mark.parametrize("unit", ["probability", "logit"])
def test_the_stage_writes_what_the_critic_makes_of_the_rows(micro, data, tmp_path, unit):
    from stages import score_critic

    other = TokenData(micro.processed, "validation")
    path = saved_critic(micro, tmp_path, problems_of(other, np.arange(len(other))), unit)
    score_critic.work(PARAMS, None, str(path), str(micro.processed), str(tmp_path / "s"))
    found = Scores(tmp_path / "s", data)
    assert (found.model_sha256, found.unit, found.gate_passed) == (critic_sha256(path), unit, False)
    assert np.allclose(found.row(2), live(load_critic(path), data, 2), rtol=1e-5, atol=1e-6)


def test_the_stage_refuses_rows_of_problems_that_the_critic_saw(micro, data, tmp_path):
    from stages import score_critic

    path = saved_critic(micro, tmp_path, problems_of(data, np.array([0])))
    with pytest.raises(ScoreError, match="the critic trained on 1 of the"):
        score_critic.work(PARAMS, None, str(path), str(micro.processed), str(tmp_path / "s"))
    (path / "critic.json").unlink()
    with pytest.raises(CriticError, match="no readable description of the critic"):
        score_critic.work(PARAMS, None, str(path), str(micro.processed), str(tmp_path / "s"))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("whose", ["the critic", "the reference"])
def test_scores_under_another_tokenizer_are_refused(micro, data, tmp_path, whose):
    from sentencepiece import sentencepiece_model_pb2

    from stages import score_critic, score_reference

    other = TokenData(micro.processed, "validation")
    path = saved_critic(micro, tmp_path, problems_of(other, np.arange(len(other)))) if whose == "the critic" else tmp_path / "reference"
    if whose == "the reference":
        shutil.copytree(micro.reference, path)
    file = path / "trunk/tokenizer.model" if whose == "the critic" else path / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    model.trainer_spec.input_format = "another"
    file.write_bytes(model.SerializeToString())
    stage = score_critic if whose == "the critic" else score_reference
    with pytest.raises(ValueError, match=whose):
        stage.work(PARAMS, None, str(path), str(micro.processed), str(tmp_path / "s"))
    assert not (tmp_path / "s").exists()


def test_scores_of_a_critic_whose_gate_was_judged_anew_are_stale(micro, data, tmp_path):
    critic, path, nothing = a_critic(micro.bundle), tmp_path / "critic", {"task_ids": [], "groups": []}
    save_critic(critic, micro.bundle, path, {"passed": True}, nothing, ALONE)
    write_scores(tmp_path / "s", numbers(data), data, critic_sha256(path), model=path, unit="probability", gate_passed=True)
    assert Scores(tmp_path / "s", data).gate_passed
    save_critic(critic, micro.bundle, path, {"passed": False}, nothing, ALONE)
    with pytest.raises(ScoreError, match="stale scores; run dvc repro"):
        Scores(tmp_path / "s", data)


@pytest.mark.slow
def test_the_training_stage_refuses_scores_of_an_older_critic(micro, data, tmp_path, monkeypatch):
    from stages import score_critic, train
    from tests import methods
    from wmtp import params
    from wmtp.view import View

    other = TokenData(micro.processed, "validation")
    path = saved_critic(micro, tmp_path, problems_of(other, np.arange(len(other))))
    score_critic.work(PARAMS, None, str(path), str(micro.processed), str(tmp_path / "s"))
    newer = a_critic(micro.bundle)
    with torch.no_grad():
        newer.value.bias += 1
    save_critic(newer, micro.bundle, path, {"passed": True}, read_card(path), ALONE)
    values = params.read_yaml(ROOT / "params.yaml")
    values["methods"]["verifiable"] = methods.block("verifiable", 3)
    values["critic"]["gate"]["train_anyway"] = True
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    seeing = View(params.validate(values), list(params.Params.model_fields), "train@verifiable")
    arguments = ["verifiable", micro.bundle, micro.processed, tmp_path / "s", *(tmp_path / name for name in ("out", "log", "report"))]
    with pytest.raises(ScoreError, match=rf"^\S+/s: made by model \w{{12}}, but {path} now holds \w{{12}}: stale scores; run dvc repro$"):
        train.work(seeing, None, *map(str, arguments))
    assert not (tmp_path / "out").exists()
