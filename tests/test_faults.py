"""Messages about parameters: each names keys of the file, and all that it takes to mend its block."""

import copy
import re
from typing import Any

import pytest

from tests.test_house import leaves
from tests.test_params import COMMITTED
from wmtp.params import ParameterError, validate

ABSENT = object()


def said(changes: dict[str, Any]) -> str:
    """What the schema says of params.yaml with `changes` by dotted key, ABSENT ones removed."""
    values = copy.deepcopy(COMMITTED)
    for key, value in changes.items():
        *path, last = key.split(".")
        section = values
        for part in path:
            section = section[part]
        section[last] = value
        if value is ABSENT:
            del section[last]
    with pytest.raises(ParameterError) as caught:
        validate(values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("section", COMMITTED)
def test_a_bad_value_is_found_where_the_message_says(section):
    for key in leaves({section: COMMITTED[section]}):
        assert re.match(rf"params\.yaml: {re.escape(key)}(\.0)?: ", said({key: [{}]}))


@pytest.mark.parametrize("section", COMMITTED)
def test_a_missing_key_is_missing_where_the_message_says(section):
    for key in leaves({section: COMMITTED[section]}):
        if key != "methods.uniform_shared.critic":  # without it a whole block of another form
            assert said({key: ABSENT}).startswith(f"params.yaml: {key}: this key is missing")


VERIFIABLE = "params.yaml: methods.verifiable"
KEYS = "(wmtp/method_schema.py says what each means)"
VALUE_LOSS = {"kind": "bce", "gamma": 1.0, "lam": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"critic": "shared"},
            f"{VERIFIABLE} (with weighting 'advantage', critic 'shared'): missing keys: value_coef, value_loss; unknown keys:"
            f" concentration_floor; add the missing, remove the unknown or correct their spelling {KEYS}",
        ),
        (
            {"critic": "shared", "value_coef": 0.5, "value_loss": VALUE_LOSS},
            f"{VERIFIABLE}.concentration_floor: unknown key (with weighting 'advantage', critic 'shared'); remove it or correct its"
            " spelling",
        ),
        (
            {"policy_on_incorrect": "binary"},
            f"{VERIFIABLE} (with weighting 'advantage', critic 'separate', policy_on_incorrect 'binary'): unknown keys: beta, sigma_floor,"
            f" z_clip, weight_clip_min, weight_clip_max, concentration_floor; remove the unknown or correct their spelling {KEYS}",
        ),
        (
            {"lam": ABSENT, "gamma": ABSENT},
            f"{VERIFIABLE} (with weighting 'advantage', critic 'separate', policy_on_incorrect 'value_only'): missing keys: gamma, lam;"
            f" add the missing {KEYS}",
        ),
        (
            {"critic": "shared", "advantage": {"shared": {"value_coef": 0.5}}},  # names of forms that are keys after all
            f"{VERIFIABLE} (with weighting 'advantage', critic 'shared'): missing keys: value_coef, value_loss; unknown keys:"
            f" concentration_floor, advantage; add the missing, remove the unknown or correct their spelling {KEYS}",
        ),
    ],
)
def test_all_missing_and_unknown_keys_of_a_block_stand_in_one_line(changes, message):
    assert said({f"methods.verifiable.{key}": value for key, value in changes.items()}) == message


def test_what_the_one_line_asks_for_is_enough():
    values = copy.deepcopy(COMMITTED)
    del values["methods"]["verifiable"]["concentration_floor"]
    values["methods"]["verifiable"] |= {"critic": "shared", "value_coef": 0.5, "value_loss": VALUE_LOSS}
    values["study"]["arms"] = ["baseline", "verifiable", "uniform_shared"]
    assert validate(values).methods["verifiable"].critic == "shared"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "methods.shuffled.critic",
            "shared",
            "methods.shuffled: weighting 'shuffled' does not go with critic 'shared', which expects weighting 'advantage'; change one of"
            " the two",
        ),
        (
            "methods.random_matched.policy_on_incorrect",
            "binary",
            "methods.random_matched: weighting 'random_matched' does not go with policy_on_incorrect 'binary', which expects weighting"
            " 'advantage' or 'shuffled'; change one of the two",
        ),
        (
            "methods.baseline.critic",
            "separate",
            "methods.baseline.critic: Input should be 'shared', found 'separate' (with weighting 'uniform')",
        ),
        (
            "methods.verifiable.critic",
            "magic",
            "methods.verifiable.critic: Input should be one of 'separate', 'shared', found 'magic' (with weighting 'advantage')",
        ),
        (
            "methods.rho1.scope",
            "lagged",
            "methods.rho1.scope: Input should be sequence, two_pass or {kind: lagged, ema: 0.0}, found 'lagged'",
        ),
        (
            "methods.verifiable.critic",
            ABSENT,
            "methods.verifiable.critic: this key is missing; add it, one of 'separate', 'shared' (with weighting 'advantage')"
            " (wmtp/method_schema.py says what they mean)",
        ),
        ("critic.batch_rows", 15, "critic: batch_rows 15 is odd, expected pairs of one correct and one incorrect row"),
    ],
)
def test_a_value_that_the_form_cannot_have_is_told_before_missing_keys(key, value, message):
    assert said({key: value}) == f"params.yaml: {message}"


def test_a_weighting_left_out_is_a_missing_key_with_the_values_that_it_may_have():
    found = said({"methods.verifiable.weighting": ABSENT})
    assert found.startswith("params.yaml: methods.verifiable.weighting: this key is missing; add it, one of 'uniform', 'advantage', ")
    assert found.endswith("'excess' (wmtp/method_schema.py says what they mean)")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training.batch_rows": 15, "study.arms": ["baseline", "verifiable_shared"]},
            "training.batch_rows 15 is odd, but methods.verifiable_shared trains on pairs of one correct and one incorrect row (its critic"
            " or policy_on_incorrect); make it even",
        ),
        (
            {"study.arms": ["baseline", "dpo"]},
            f"study.arms: 'dpo' is none of methods: {', '.join(COMMITTED['methods'])}; correct its spelling or add methods.dpo",
        ),
        (
            {"study.arms": ["baseline", "a-b"], "methods.a-b": COMMITTED["methods"]["baseline"]},
            "study.arms: 'a-b' has a hyphen, which parts arm and seed in the names of the study; rename its block",
        ),
    ],
)
def test_a_fault_between_sections_is_told_without_the_whole_file(changes, message):
    assert said(changes) == f"params.yaml: {message}"
