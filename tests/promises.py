"""`python -m tests.promises` after a `dvc repro` of the micro experiment: do its numbers lie where docs/micro-task.md says?

Not a test of pytest: it reads the run's own metrics.
"""

import csv
import json
import sys
from pathlib import Path


def read(name: str) -> dict:
    return json.loads(Path("metrics", name).read_text())


def checks() -> dict[str, tuple[float, bool]]:
    """Each figure by what it is, and whether it lies in its range."""
    baseline, critic = read("baseline/eval.json")["humaneval"]["pass@1"], read("critic.json")
    with open("metrics/differences.csv", encoding="utf-8") as file:
        rows = [
            row for row in csv.DictReader(file) if (row["method"], row["benchmark"], row["measure"]) == ("start", "humaneval", "pass@1")
        ]
    (start,) = (float(row["high"]) for row in rows)
    budgets = {(one["steps"], one["tokens"]) for one in (read(f"{name}/train.json") for name in ("ntp", "baseline", "verifiable", "rho1"))}
    changed = sum(read(f"{name}/heads.json")["drafts"]["n_different"] for name in ("start", "baseline", "verifiable", "rho1"))
    return {
        "baseline pass@1, HumanEval form, 0.30 to 0.80": (baseline, 0.30 <= baseline <= 0.80),
        "start - baseline, upper end of its interval, below 0": (start, start < 0),
        "critic's held-out AUC, at least 0.80": (critic["auc"], critic["auc"] >= 0.80),
        "largest drop within a token of the fault, at least half": (critic["bug_localisation"], critic["bug_localisation"] >= 0.5),
        "budgets among the four methods, 1": (len(budgets), len(budgets) == 1),
        "greedy texts that the heads' drafts change, 0": (changed, changed == 0),
    }


def main() -> None:
    found = checks()
    for what, (figure, good) in found.items():
        print(f"{'ok  ' if good else 'MISS'} {figure:.3f}  {what}")
    sys.exit(not all(good for _, good in found.values()))


if __name__ == "__main__":
    main()
