"""Two whole experiments through DVC's queue, as typed, on the tiny preset in a clone: the longest test, in a file of its own."""

import csv
import time

import pytest

from tests.pipeline import run, typed

pytestmark = pytest.mark.slow


def test_two_seeds_through_the_queue(finished):
    run(finished, "dvc", "exp", "run", "--queue", "-S", "training.seed=2,3")
    run(finished, "dvc", "queue", "start", "-j", "1")
    deadline = time.monotonic() + 1800
    while "Running" in (status := run(finished, "dvc", "queue", "status").stdout) or "Queued" in status:
        assert time.monotonic() < deadline, status
        time.sleep(10)  # asking takes DVC seconds of a core
    assert status.count("Success") == 2, status
    rows = csv.DictReader(run(finished, "dvc", "exp", "show", "--csv").stdout.splitlines())
    names = {row["training.seed"]: row["Experiment"] for row in rows if row["Experiment"]}
    assert {"2", "3"} <= set(names)
    before = run(finished, "git", "status", "--porcelain").stdout
    page = typed(finished, "python -m wmtp.experiments").stdout
    assert "mean of 3 training seeds" in page and "verifiable - baseline" in page
    assert page.strip() == (finished / "seeds/table.md").read_text().strip()
    assert typed(finished, f"python -m wmtp.experiments HEAD {names['2']} {names['3']}").stdout == page
    assert run(finished, "git", "status", "--porcelain").stdout == before, "nothing in the working tree has changed"
