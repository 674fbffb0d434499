"""Which problems of a benchmark are scored: those with a reference that passes, and those without any."""

import pytest

from wmtp.judge import Limits
from wmtp.records import AssertTests, CheckTests, Problem
from wmtp.references import UnscoredError, checked

LIMITS = Limits(cpu_seconds=1.0, wall_seconds=3.0)
RIGHT, WRONG = "def f(x): return x", "def f(x): return 0"


def problem(task_id, reference, tests=None):
    return Problem(
        task_id=task_id, source="mbpp", group=task_id, statement="s", tests=tests or AssertTests(asserts=["assert f(2) == 2"]),
        reference=reference,
    )  # fmt: skip


def test_a_problem_whose_references_fail_is_left_out_and_named():
    problems = [problem("a", RIGHT), problem("b", WRONG), problem("c", None), problem("d", WRONG), problem("e", WRONG)]
    others = {"a": [WRONG], "d": [WRONG, "def f(", RIGHT, "unread"], "e": [WRONG]}
    found = checked("any", problems, others, LIMITS, 2)
    assert found.report == {"problems": 3, "references_passed": 2, "without_reference": 1, "references_failed": ["b", "e"]}
    assert [(one.task_id, one.reference) for one in found.problems] == [("a", RIGHT), ("c", None), ("d", RIGHT)]


def test_a_benchmark_of_which_nothing_can_be_scored_is_an_error():
    with pytest.raises(UnscoredError, match="any: no reference of its 1 problems passes, b for one"):
        checked("any", [problem("b", WRONG)], {}, LIMITS, 1)
    with pytest.raises(UnscoredError, match="any: no reference of its 0 problems passes"):
        checked("any", [], {}, LIMITS, 1)


def test_a_failure_of_the_judge_leaves_no_problem_out():
    broken = problem("b", RIGHT, CheckTests(test="x = 1", entry_point="f"))
    with pytest.raises(UnscoredError, match=r"any: 1 references could not be judged: .*defines no check"):
        checked("any", [problem("a", RIGHT), broken], {}, LIMITS, 2)
