"""What incorrect programs do in policy training, against loops in float64 (METHODS, "What incorrect solutions do in policy training")."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from stages import train as stage
from tests import methods
from tests.conftest import ROOT
from tests.test_policy import (
    EIGHT_BY_ONE,
    EQUAL_LENGTHS,
    FOUR_BY_TWO,
    ONE_BY_EIGHT,
    F,
    cross_entropy,
    prepared,
    same,
    small_model,
    spans_of,
)
from tests.test_policy import whole_step as correct_step
from tests.test_train import signal_of
from tests.test_weighting import exact_projection
from wmtp import critic, params
from wmtp.blocks import reads_pairs
from wmtp.method_schema import AnyMethod
from wmtp.plan import Plan
from wmtp.scores import write_scores
from wmtp.view import View
from wmtp.weighting import METHODS

WEIGHTED = {**methods.PIPELINE, "policy_on_incorrect": "weighted"}
FORMS = {"weighted": WEIGHTED, "binary": methods.BINARY}


def block(form, name="verifiable", **changes):
    common = {"weighting": METHODS[name].weighting, "n_future": F, "mix": 1.0, "head_weights": None, "critic": "separate"}
    return {**common, **FORMS[form], **changes}


def objective(form, name="verifiable", **changes):
    return methods.objective(name, [mixed_step()], values=block(form, name, **changes))


def mixed_step(**changes):
    step = correct_step("verifiable", **changes)
    return replace(step, is_correct_B=torch.arange(len(step.row_B)) % 2 == 0)


def advantages(step, lam=0.95):
    """{(b, i): A}: the sum over j >= i of lam^(j - i) * (v[j] - v[j-1]), the last token's difference left out."""
    found = {}
    for b, (first, last) in enumerate(spans_of(step)):
        v = step.signal_BT[b].tolist()
        for i in range(first, last + 1):
            found[b, i] = math.fsum(lam ** (j - i) * (v[j] - v[j - 1]) for j in range(i, last))
    return found


def reference_weights(step, form):
    A = advantages(step)
    if form == "binary":
        ends = {(b, last) for b, (_, last) in enumerate(spans_of(step)) if step.is_correct_B[b]}
        chosen = {place for place, value in A.items() if value > 0} | ends
        return {place: len(A) / len(chosen) * (place in chosen) for place in A}
    mean = math.fsum(A.values()) / len(A)
    sigma = max(0.01, math.sqrt(math.fsum((value - mean) ** 2 for value in A.values()) / len(A)))
    u = [math.exp(min(5.0, max(-5.0, (value - mean) / sigma)) / 0.9) for value in A.values()]
    return dict(zip(A, exact_projection(u, 0.1, 5.0)))


@pytest.fixture(scope="module")
def model():
    return small_model(torch.float64)


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_of_pairs_is_the_triple_loop_over_correct_and_incorrect_rows(form, model):
    """N, mean, standardisation and bounds are of all targets of both kinds."""
    step = mixed_step()
    ce, weight = cross_entropy(model, step), reference_weights(step, form)
    expected = math.fsum(weight[b, i] * loss for (b, i, _), loss in ce.items()) / len(ce)
    wrong = math.fsum(weight[b, i] for b, i, _ in ce if b % 2) / math.fsum(weight[b, i] for b, i, _ in ce)
    for budget in (10**9, 40):
        loss, _, sums = prepared(model, objective(form), step, budget)
        assert loss == pytest.approx(expected, rel=1e-6)
        assert objective(form).summary(sums)["weight_on_incorrect"] == pytest.approx(wrong, rel=1e-6) and 0.05 < wrong < 0.95


@pytest.mark.parametrize("form", FORMS)
def test_no_split_of_the_step_matters(form, model):
    step = mixed_step(spans=EQUAL_LENGTHS)
    loss, gradients, _ = prepared(model, objective(form), step, ONE_BY_EIGHT)
    for budget, size in ((FOUR_BY_TWO, 1), (EIGHT_BY_ONE, 3)):
        other_loss, other, _ = prepared(model, objective(form), step, budget, size)
        assert other_loss == pytest.approx(loss, rel=1e-10)
        same(other, gradients)


def test_weights_of_incorrect_programs_are_never_zero_where_weighted_and_are_where_binary_says_so():
    step = mixed_step()
    on_wrong = ~step.is_correct_B[:, None] & step.response_BT
    weighted, binary = (objective(form).prepare(step).weight_BT[on_wrong] for form in FORMS)
    assert (weighted >= 0.1 - 1e-6).all() and 0 < int((binary > 0).sum()) < int(on_wrong.sum())
    assert len(set(binary.tolist())) == 2


@pytest.mark.parametrize("terminal_credit", [False, True])
def test_binary_always_trains_the_end_of_text_of_correct_programs_and_never_that_of_incorrect_ones(terminal_credit):
    """Its advantage is 0, or R - v: a policy that trains on neither never stops."""
    step = mixed_step()
    weight = objective("binary", terminal_credit=terminal_credit).prepare(step).weight_BT
    ends = torch.stack([weight[b, last] for b, (_, last) in enumerate(spans_of(step))])
    assert torch.equal(ends > 0, step.is_correct_B)
    inside = [float(weight[b, i]) for b, (first, last) in enumerate(spans_of(step)) for i in range(first, last)]
    assert 0 < sum(w > 0 for w in inside) < len(inside), "the others still by their advantage"


def test_a_step_without_a_positive_advantage_is_an_error():
    with pytest.raises(ValueError, match="A > 0 on none of the step's"):
        objective("binary").prepare(replace(mixed_step(), signal_BT=torch.full_like(mixed_step().signal_BT, 0.5)))


def test_a_constant_critic_that_is_weighted_is_the_uniform_arm_of_the_same_rows():
    step = mixed_step()
    torch.testing.assert_close(objective("weighted", "constant_critic").prepare(step).weight_BT, step.response_BT.float())


@pytest.mark.parametrize("name", ["shuffled", "random_matched", "position_only"])
def test_controls_read_pairs_as_their_critic_does(name):
    changes = {"n_bins": 5} if name == "position_only" else {}
    assert reads_pairs(TypeAdapter(AnyMethod).validate_python(block("weighted", name, **changes)))
    weight = objective("weighted", name, **changes).prepare(mixed_step()).weight_BT
    assert float(weight[mixed_step().response_BT].mean()) == pytest.approx(1, abs=1e-6)


# --- the form ----------------------------------------------------------------------------------------------------------------------


def test_value_only_is_todays_weighting_to_the_bit():
    step, without = (
        correct_step("verifiable"),
        {key: value for key, value in methods.PIPELINE.items() if key not in ("beta", "policy_on_incorrect")},
    )
    expected = METHODS["verifiable"].function()(step.signal_BT, step.response_BT, beta=0.9, **without)
    assert torch.equal(methods.objective("verifiable").prepare(step).weight_BT, expected)


@pytest.mark.parametrize("key", ["sigma_floor", "z_clip", "weight_clip_min", "weight_clip_max", "concentration_floor"])
def test_binary_has_no_key_of_the_exponential(key):
    adapter = TypeAdapter(AnyMethod)
    adapter.validate_python(block("binary"))
    with pytest.raises(ValidationError, match="extra_forbidden"):
        adapter.validate_python({**block("binary"), key: methods.PIPELINE[key]})


@pytest.mark.parametrize("name", ["constant_critic", "random_matched", "position_only"])
def test_binary_is_no_form_of_the_controls_that_it_would_leave_without_a_weight_or_bounds(name):
    with pytest.raises(ValidationError):
        TypeAdapter(AnyMethod).validate_python(block("binary", name))


def test_only_what_trains_on_incorrect_programs_reads_pairs():
    adapter = TypeAdapter(AnyMethod)
    shared = {name for name in METHODS if name.endswith("_shared")}
    assert {name for name in METHODS if reads_pairs(adapter.validate_python(methods.block(name)))} == shared
    assert all(reads_pairs(adapter.validate_python(block(form))) for form in FORMS)


def test_pairs_need_an_even_number_of_rows_a_step():
    values = params.read_yaml(ROOT / "params.yaml")
    values["training"]["batch_rows"] = 15
    params.validate(values)
    values["methods"]["verifiable"] = block("binary")
    with pytest.raises(params.ParameterError, match=r"batch_rows 15 is odd, but methods\.verifiable trains on pairs"):
        params.validate(values)


# --- the stage ---------------------------------------------------------------------------------------------------------------------


def trained(micro, data, root, settings, name="verifiable"):
    """Row numbers of each optimizer step of stages.train, and its report and log."""
    scores = root / "critic.safetensors"
    write_scores(scores, [signal_of(data)(row) for row in range(len(data))], data, "c" * 64, unit="probability")
    values = params.read_yaml(ROOT / "params.yaml")
    values["methods"][name] = settings
    values["training"] |= {"batch_rows": 8, "log_every": 1, "n_epochs": 0.5}
    steps, seen = Plan.step, []

    def noted(plan, number):
        step = steps(plan, number)
        seen.append(step.row_B.numpy())
        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "step", noted)
        patch.setenv("DVC_ROOT", str(root))
        seeing = View(params.validate(values), list(params.Params.model_fields), f"train@{name}")
        paths = [str(root / name) for name in ("out", "log.csv", "report.json")]
        track = SimpleNamespace(log=lambda *_: None)
        stage.work(seeing, track, name, str(micro.bundle), str(micro.processed), str(scores), *paths)
    log = (root / "log.csv").read_text().splitlines()
    records = [dict(zip(log[0].split(","), map(json.loads, line.split(",")))) for line in log[1:]]
    return seen, records


@pytest.mark.slow
@pytest.mark.parametrize("form", ["value_only", *FORMS])
def test_the_stage_reads_correct_programs_alone_or_pairs_and_logs_the_weight_on_incorrect_ones(micro, data, tmp_path, form):
    seen, records = trained(micro, data, tmp_path, methods.block("verifiable", 3) if form == "value_only" else block(form, n_future=3))
    assert len(seen) == len(records) > 2
    units = data.correct_rows() if form == "value_only" else critic.pairs(data)
    expected = Plan(data, units, 8 // units.ndim, 0.5, 0.1, 1)
    assert all(np.array_equal(rows, expected.step(number).row_B.numpy()) for number, rows in enumerate(seen))
    if form == "value_only":
        assert all(data.is_correct[rows].all() for rows in seen) and all(record["weight_on_incorrect"] == 0 for record in records)
        return
    for rows in seen:
        assert data.is_correct[rows].tolist() == [True, False] * 4
        assert (data.problem_of[rows[0::2]] == data.problem_of[rows[1::2]]).all()
    assert all(0.1 < record["weight_on_incorrect"] < 0.9 for record in records)
