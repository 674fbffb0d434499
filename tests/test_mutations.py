"""Errors that a comparison of weightings would survive in silence, each made in a copy of the code: the test that guards the line fails.

METHODS, "Errors others made". A mutation names the one place that it changes; a place that is no longer there is an error here too.
"""

import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest

from wmtp.dependencies import ROOT

pytestmark = pytest.mark.stress


class Mutation(NamedTuple):
    file: str
    line: str
    instead: str
    guard: str


MUTATIONS = {
    "sign of the excess": Mutation(
        "wmtp/weighting/excess.py",
        "by_target(ce_BTF).double() - reference_BT.double()[..., None]",
        "reference_BT.double()[..., None] - by_target(ce_BTF).double()",
        "tests/test_weighting.py::test_the_excess_is_signed",
    ),
    "shift by one, later": Mutation(
        "wmtp/align.py",
        "functional.pad(q_BT[:, 1:], (0, n_future), value=fill)",
        "functional.pad(q_BT[:, 2:], (0, n_future + 1), value=fill)",
        "tests/test_align.py::test_a_single_target_reaches_its_own_entries_and_no_others",
    ),
    "shift by one, earlier": Mutation(
        "wmtp/align.py",
        "functional.pad(q_BT[:, 1:], (0, n_future), value=fill)",
        "functional.pad(q_BT, (0, n_future - 1), value=fill)",
        "tests/test_align.py::test_a_single_target_reaches_its_own_entries_and_no_others",
    ),
    "terminal delta in the policy's signal": Mutation(
        "wmtp/advantage.py",
        "_discounted_sum(delta_BT.masked_fill(last_BT, 0.0), _rate",
        "_discounted_sum(delta_BT, _rate",
        "tests/test_advantage.py::test_the_policy_signal_holds_no_terminal_difference",
    ),
    "reward left out of delta": Mutation(
        "wmtp/advantage.py",
        "delta_BT + reward_B.to(values_BT)[:, None] * last_BT",
        "delta_BT",
        "tests/test_advantage.py::test_the_reward_matters_for_every_lam",
    ),
    "lam ignored": Mutation(
        "wmtp/advantage.py",
        "gamma * lam_B.expand",
        "gamma * torch.ones_like(lam_B).expand",
        "tests/test_advantage.py::test_equals_the_double_sum",
    ),
    "mask on positions": Mutation(
        "wmtp/align.py",
        "align_future(tokens_BT.masked_fill(~response_BT, IGNORE), n_future, IGNORE)",
        "align_future(tokens_BT, n_future, IGNORE).masked_fill(~response_BT[..., None], IGNORE)",
        "tests/test_align.py::test_targets_are_the_response_tokens_and_the_mask_belongs_to_the_target",
    ),
    "mean of means": Mutation(
        "wmtp/train.py",
        "(loss * scale).backward()",
        "(loss * world.size / objective.count(batch) / len(batches)).backward()",
        "tests/test_weighting_split.py::test_micro_batches_give_the_gradient_of_the_whole[baseline]",
    ),
    "clip, then renormalise": Mutation(
        "wmtp/weighting/projection.py",
        "((high.exp() * u64).clamp(lo, hi) * valid)",
        "(u64.clamp(lo, hi) * valid / (total(u64.clamp(lo, hi) * valid, by_row) / n_valid).clamp(min=1e-300))",
        "tests/test_weighting.py::test_projection_is_the_exact_one",
    ),
    "weights that do not reach the loss": Mutation(
        "wmtp/policy.py",
        "return (weight_BTF * ce_BTF * valid_BTF).sum(), _sums(",
        "return (ce_BTF * valid_BTF).sum(), _sums(",
        "tests/test_policy.py::test_loss_equals_the_triple_loop",
    ),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The code and its tests, to be changed."""
    folder = tmp_path_factory.mktemp("mutated")
    for name in ("wmtp", "stages", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("params.yaml", "dvc.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def run(folder, guard):
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "", "-p", "no:cacheprovider", guard]
    return subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(folder), "PATH": ""}, capture_output=True, text=True)


@pytest.mark.parametrize("guard", sorted({one.guard for one in MUTATIONS.values()}))
def test_guards_pass_on_the_code_as_it_is(copy, guard):
    done = run(copy, guard)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_fails_its_guard(copy, name):
    mutation = MUTATIONS[name]
    file, text = copy / mutation.file, (ROOT / mutation.file).read_text()
    assert text.count(mutation.line) == 1, f"{mutation.file}: {mutation.line!r} is not there once; bring this mutation up to date"
    try:
        file.write_text(text.replace(mutation.line, mutation.instead))
        done = run(copy, mutation.guard)
    finally:
        file.write_text(text)
    assert done.returncode == 1 and " failed" in done.stdout, done.stdout[-3000:]
