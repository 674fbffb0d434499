"""python -m wmtp.experiments [REV...]: the methods over the training seeds that DVC's experiments hold, with intervals over both.

A REV is an experiment's name, a branch or a commit; all must have the same parameters but for `training.seed` and the report's. Without
any, HEAD and those of its experiments that have another seed and else the same parameters; the others are named and left out. A page,
tables and a picture go to OUT; nothing in the working tree is changed.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wmtp import study, study_report
from wmtp.arms import controls
from wmtp.params import Params, parse_yaml, validate
from wmtp.progress import say

START = "start"
EVALUATE = "evaluate-humaneval-mbpp"
FILES = ("eval.json", "train.json", "train.csv")


class ExperimentError(ValueError):
    """Experiments that are not there, or that differ in more than their training seed."""


def output_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ExperimentError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'failed'}")
    return done.stdout


def named_experiments(base: str = "") -> dict[str, str]:
    """Commits of experiments by name, of those made from the commit `base` alone where it is given.

    DVC keeps them as refs/exps/BA/SE.../NAME, the first two parts being the commit that they were made from.
    """
    found = {}
    for line in output_of("git", "for-each-ref", "--format=%(refname) %(objectname)", "refs/exps").splitlines():
        name, commit = line.split()
        parts = name.split("/")
        if len(parts) == 5 and (parts[2] + parts[3]).startswith(base):
            found[parts[4]] = commit
    return found


def resolved(revs: Sequence[str]) -> list[str]:
    """Revisions that git knows: an experiment's name is none. What neither knows stays as it is, to be told by git."""
    known = named_experiments()
    return [known.get(rev, rev) for rev in revs]


def made_from_head() -> list[str]:
    """HEAD, and the commits of those of its experiments, in the order of their names, that are further seeds of it."""
    chosen, seeds, whole = ["HEAD"], {parameters("HEAD").training.seed}, parameters("HEAD").model_dump(mode="json")
    for name, rev in sorted(named_experiments(output_of("git", "rev-parse", "HEAD").strip()).items()):
        values = parameters(rev).model_dump(mode="json")
        apart = _apart(whole, values) or (["training.seed"] if values["training"]["seed"] in seeds else [])
        if apart:
            say(f"{name}: left out, {'its seed is there already' if apart == ['training.seed'] else f'its {apart[0]} is another'}")
        else:
            chosen.append(rev)
            seeds.add(values["training"]["seed"])
    return chosen


def parameters(rev: str) -> Params:
    return validate(parse_yaml(output_of("git", "show", f"{rev}:params.yaml")), f"{rev}:params.yaml")


def by_seed(revs: Sequence[str]) -> dict[int, str]:
    """Revisions by training seed; ExperimentError where two have one seed, or parameters differ elsewhere."""
    found: dict[int, str] = {}
    first = parameters(revs[0]).model_dump(mode="json")
    for rev in revs:
        values = parameters(rev).model_dump(mode="json")
        seed = values["training"]["seed"]
        if apart := _apart(first, values):
            raise ExperimentError(f"{rev}: {apart[0]} is another than in {revs[0]}; only training.seed may differ, name the revisions")
        if seed in found:
            raise ExperimentError(f"{rev}: training.seed {seed} again, as in {found[seed]}; name each seed's revision once")
        found[seed] = rev
    if len(found) < 2:
        raise ExperimentError(
            f"{' '.join(revs)}: one training seed, expected two at least; make more with `dvc exp run --queue -S training.seed=2,3 && dvc"
            " queue start`"
        )
    return found


def _apart(one: Any, other: Any) -> list[str]:
    """Keys that must not differ and do: all but the seed's and those that only shape a report."""
    return [key for key in _differences(one, other) if key != "training.seed" and not key.startswith("report.")]


def _differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Dotted keys at which two trees of parameters differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = dict.fromkeys([*one, *other])
        return [found for key in keys for found in _differences(one.get(key), other.get(key), f"{path}.{key}" if path else key)]
    return [] if one == other else [path]


def check_trained_with(seed: int, rev: str, methods: Sequence[str]) -> None:
    """ExperimentError unless in the revision's dvc.lock each method was trained and sampled with this seed, and each stage read what the
    one before it wrote: an experiment may have run a part alone.
    """
    stages = locked_stages(rev)
    mend = "run the experiment without a target"
    for method in methods:
        for name in (f"train@{method}", f"sample@{method}"):
            locked = stages.get(name, {}).get("params", {}).get("params.yaml", {}).get("training.seed")
            if locked != seed:
                raise ExperimentError(f"{rev}: {name} was last run with training.seed {locked}, expected {seed}; {mend}")
        for maker, path, taker in (("train", f"models/{method}", "sample"), ("sample", f"data/completions/{method}.jsonl", EVALUATE)):
            wrote, read = (
                {one["path"]: one.get("md5") for one in stages.get(f"{stage}@{method}", {}).get(kind, [])}.get(path)
                for stage, kind in ((maker, "outs"), (taker, "deps"))
            )
            if wrote is None or wrote != read:
                raise ExperimentError(f"{rev}: {taker}@{method} did not read the {path} that {maker}@{method} wrote last; {mend}")


def locked_stages(rev: str) -> dict[str, Any]:
    return parse_yaml(output_of("git", "show", f"{rev}:dvc.lock"))["stages"]


def made_from(rev: str, method: str) -> dict[str, Any]:
    """All that a revision's dvc.lock says of what a method's results were made from, but for the seed and the method's own files."""
    stages, found = locked_stages(rev), {}
    for stage in ("train", "sample", EVALUATE):
        entry = stages.get(f"{stage}@{method}", {})
        own = {out["path"] for name in ("train", "sample") for out in stages.get(f"{name}@{method}", {}).get("outs", [])}
        found |= {f"{stage} {dep['path']}": dep.get("md5") for dep in entry.get("deps", []) if dep["path"] not in own}
        found |= {
            f"{stage} {key}": value for key, value in entry.get("params", {}).get("params.yaml", {}).items() if key != "training.seed"
        }
    return found


def check_alike(revs: Mapping[int, str], methods: Sequence[str]) -> None:
    """ExperimentError where methods were made from other data, models, code or parameters than with the first seed, or where a metrics
    file is not the one that dvc.lock knows.
    """
    first = next(iter(revs.values()))
    for rev in revs.values():
        for method in methods:
            one, other = made_from(first, method), made_from(rev, method)
            if apart := [key for key in {**one, **other} if one.get(key) != other.get(key)]:
                raise ExperimentError(f"{rev}: {method} was made from another {apart[0]} than in {first}; run both again with one code")
            outs = [out for stage in ("train", EVALUATE) for out in locked_stages(rev).get(f"{stage}@{method}", {}).get("outs", [])]
            for out in outs:
                if out["path"].startswith("metrics/") and hashlib.md5(bytes_of(rev, out["path"])).hexdigest() != out.get("md5"):
                    raise ExperimentError(f"{rev}: {out['path']} is not the file that dvc.lock knows; run the experiment again")


def bytes_of(rev: str, path: str) -> bytes:
    return subprocess.run(["git", "show", f"{rev}:{path}"], capture_output=True, check=True).stdout


def extracted(revs: Mapping[int, str], methods: Sequence[str], folder: Path) -> None:
    """FOLDER/metrics/METHOD-SEED/ and FOLDER/verdicts/METHOD-SEED.jsonl, as a study has them, out of git and DVC's cache."""
    import dvc.api

    for seed, rev in revs.items():
        for method in methods:
            for name in FILES:
                into = folder / "metrics" / f"{method}-{seed}" / name
                into.parent.mkdir(parents=True, exist_ok=True)
                into.write_text(output_of("git", "show", f"{rev}:metrics/{method}/{name}"))
            verdicts = folder / "verdicts" / f"{method}-{seed}.jsonl"
            verdicts.parent.mkdir(exist_ok=True)
            verdicts.write_text(dvc.api.read(f"data/verdicts/{method}.jsonl", repo=".", rev=rev, encoding="utf-8"))


def trained(rev: str) -> list[str]:
    """The methods that a revision has results of."""
    names = output_of("git", "ls-tree", "-r", "--name-only", rev, "metrics").split()
    return [method for method in parameters(rev).methods if f"metrics/{method}/train.json" in names]


def compare(revs: Sequence[str], out: Path) -> str:
    """Writes OUT and returns its page."""
    seeds = by_seed(revs)
    methods, whole = trained(revs[0]), parameters(revs[0])
    for seed, rev in seeds.items():
        check_trained_with(seed, rev, methods)
    check_alike(seeds, methods)
    against = controls({method: whole.methods[method] for method in methods})
    start = json.loads(output_of("git", "show", f"{revs[0]}:metrics/{START}/eval.json"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        extracted(seeds, methods, folder)
        found = study.read_arms(against, sorted(seeds), folder / "metrics", folder / "verdicts")
    return study_report.write(found, against, whole.report.bootstrap, {"": start}, out)[0]


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m wmtp.experiments", description=__doc__, formatter_class=form)
    parser.add_argument("revs", metavar="REV", nargs="*", help="experiments, branches or commits (default: HEAD and its experiments)")
    parser.add_argument("--out", type=Path, default=Path("seeds"), help="where the page goes (default: seeds/)")
    given = parser.parse_args()
    try:
        print(compare(resolved(given.revs) if given.revs else made_from_head(), given.out))
    except (ValueError, OSError) as error:
        sys.exit(f"wmtp.experiments: {error}")


if __name__ == "__main__":
    main()
