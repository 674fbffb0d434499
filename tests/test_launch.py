import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from wmtp import launch

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"}
for variable in (*launch.NODE_VARIABLES, "RANK", "LOGLEVEL"):
    ENVIRONMENT.pop(variable, None)

WORKER = """
import json, os, pathlib, signal, sys, time

def note():
    pathlib.Path("pids").mkdir(exist_ok=True)
    pathlib.Path("pids", os.environ["RANK"]).write_text(f"{os.getpid()} {os.getppid()}")

if __name__ == "__main__":
    what, rank = sys.argv[1], int(os.environ["RANK"])
    if what == "report":
        kept = {key: os.environ[key] for key in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}
        pathlib.Path(f"seen-{rank}").write_text(json.dumps(kept | {"arguments": sys.argv[1:], "main": __spec__.name}))
        sys.exit(0)
    if what == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if rank == 1:
        if what == "line":
            print("params.yaml: training.beta: found -1, expected more than 0", file=sys.stderr)
            sys.exit(3)
        if what == "message":
            sys.exit("data/train: no such file")
        if what == "raise":
            raise ValueError("shape [2, 3], expected [2, 4]\\nmore")
        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "silent":
            os._exit(5)
        if what == "noise":
            time.sleep(1)
            sys.exit("the cause")
    if rank == 0 and what == "noise":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("a consequence, said later"))
    note()
    time.sleep(120)
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    return tmp_path


def command(*arguments: str, nproc: int = 2) -> list[str]:
    return [sys.executable, "-m", "wmtp.launch", "--nproc", str(nproc), "--threads", "3", "--", "worker", *arguments]


def run(place: Path, *arguments: str, nproc: int = 2) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments, nproc=nproc), cwd=place, env=ENVIRONMENT, capture_output=True, text=True)


def waits(condition, seconds: float = 60.0) -> bool:
    """Whether the condition comes true; the bound is there so that a fault ends the test."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.05)
    return False


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def pids(place: Path) -> list[list[int]]:
    """(worker, launcher) of each rank that has said so."""
    return [[int(pid) for pid in path.read_text().split()] for path in sorted((place / "pids").glob("*")) if path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_every_rank_gets_the_arguments_as_they_are_and_its_threads(place, nproc):
    done = run(place, "report", "--flag", "two words", nproc=nproc)
    assert (done.returncode, done.stderr) == (0, "")
    for rank in range(nproc):
        seen = json.loads((place / f"seen-{rank}").read_text())
        assert seen == {
            "RANK": str(rank),
            "WORLD_SIZE": str(nproc),
            "OMP_NUM_THREADS": "3",
            "arguments": ["report", "--flag", "two words"],
            "main": "worker",
        }


@pytest.mark.slow
@pytest.mark.parametrize(
    "what, status, word",
    [
        ("line", 3, "rank 1 ended with exit code 3: params.yaml: training.beta: found -1, expected more than 0"),
        ("message", 1, "rank 1 ended with exit code 1: data/train: no such file"),
        ("raise", 1, "rank 1 ended with exit code 1: ValueError: shape [2, 3], expected [2, 4]"),
        ("killed", 137, "rank 1 was killed by SIGKILL; the system may have run out of memory"),
        ("silent", 5, "rank 1 ended with exit code 5 and said nothing"),
        ("noise", 1, "rank 1 ended with exit code 1: the cause"),
    ],
)
def test_the_first_rank_that_failed_has_the_last_line(place, what, status, word):
    done = run(place, what)
    assert done.returncode == status
    printed = done.stderr.splitlines()
    assert printed[-1] == f"wmtp.launch: worker: {word}"
    assert "torch/distributed" not in done.stderr and "FAILED" not in done.stderr, "torchrun's own account stays out"
    assert ("Traceback" in done.stderr) == (what == "raise")


PARENT = "import subprocess, sys; process = subprocess.Popen(sys.argv[1:]); print(process.pid, flush=True); process.wait()"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "victim, signum, worker",
    [
        ("parent", signal.SIGKILL, "sleep"),
        ("parent", signal.SIGTERM, "sleep"),
        ("parent", signal.SIGKILL, "stubborn"),
        ("launcher", signal.SIGKILL, "sleep"),
        ("launcher", signal.SIGKILL, "stubborn"),
        ("launcher", signal.SIGTERM, "sleep"),
    ],
)
def test_nobody_outlives_the_generation_above(place, victim, signum, worker):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *command(worker)], cwd=place, env=ENVIRONMENT, stdout=subprocess.PIPE)
    launcher = int(parent.stdout.readline())
    family = [launcher]
    try:
        assert waits(lambda: len(pids(place)) == 2), "the workers did not start"
        family += [worker for worker, _ in pids(place)]
        assert [agent for _, agent in pids(place)] == [launcher, launcher], "torchrun's agent is the launcher itself"
        os.kill(parent.pid if victim == "parent" else launcher, signum)
        assert waits(lambda: all(gone(pid) for pid in family)), [pid for pid in family if not gone(pid)]
    finally:
        parent.kill()
        parent.wait()
        for pid in family:
            if not gone(pid):
                os.kill(pid, signal.SIGKILL)


TIED = """
import os, pathlib, signal, sys, time
from wmtp import launch
if len(sys.argv) > 2:
    sys.platform = sys.argv[2]
launch.tie_to_parent(os.getppid(), signal.SIGKILL)
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(120)
"""


@pytest.mark.parametrize("platform", ["linux", "darwin"])
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_tie_holds_with_and_without_the_kernels_help(tmp_path, platform):
    note = tmp_path / "pid"
    arguments = [sys.executable, "-c", TIED, str(note), platform]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *arguments], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    assert waits(lambda: note.exists() and note.read_text())
    parent.kill()
    parent.wait()
    assert waits(lambda: gone(int(note.read_text())), 20)


def test_a_parent_that_died_before_the_tie_is_noticed():
    gone_already = subprocess.Popen([sys.executable, "-c", ""])
    gone_already.wait()
    program = f"import signal; from wmtp import launch; launch.tie_to_parent({gone_already.pid}, signal.SIGTERM); print('runs')"
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip() == f"wmtp.launch: parent process {gone_already.pid} ended before the start; nothing was run"


@pytest.mark.slow
def test_two_nodes_have_the_ranks_of_their_numbers_whichever_comes_first(place):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def node(rank: int) -> "subprocess.Popen[str]":
        described = dict(zip(launch.NODE_VARIABLES, ("2", str(rank), f"127.0.0.1:{port}")))
        folder = place / str(rank)
        folder.mkdir()
        (folder / "worker.py").write_text(WORKER)
        return subprocess.Popen(command("report", nproc=1), cwd=folder, env=ENVIRONMENT | described, stderr=subprocess.PIPE, text=True)

    second = node(1)
    time.sleep(0.5)
    first = node(0)
    for process in (first, second):
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    for rank in (0, 1):
        assert json.loads((place / str(rank) / f"seen-{rank}").read_text())["WORLD_SIZE"] == "2"


def test_one_node_needs_no_variables_and_several_need_all_three():
    assert launch.rendezvous({}) == ["--standalone"]
    whole = dict(zip(launch.NODE_VARIABLES, ("4", "2", "node0:29500")))
    assert launch.rendezvous(whole) == ["--nnodes", "4", "--node-rank", "2", "--rdzv-endpoint", "node0:29500"]
    for missing in launch.NODE_VARIABLES:
        part = {name: value for name, value in whole.items() if name != missing}
        with pytest.raises(SystemExit, match=f"set without {missing};"):
            launch.rendezvous(part)


def failure(exitcode: int, **word) -> SimpleNamespace:
    return SimpleNamespace(exitcode=exitcode, error_file_data=word, signal_name=lambda: signal.Signals(-exitcode).name)


def test_the_cause_goes_before_its_consequences():
    stopped = failure(-signal.SIGTERM)
    early, late = failure(1, last_word="early", time_ns=10), failure(2, last_word="late", time_ns=20)
    assert launch.first_failure({0: stopped, 1: late, 2: early}) == ("rank 2 ended with exit code 1: early", 1)
    assert launch.first_failure({0: stopped, 1: failure(-signal.SIGSEGV)}) == ("rank 1 was killed by SIGSEGV", 139)
    assert launch.first_failure({0: stopped}) == ("rank 0 was killed by SIGTERM", 143)


def test_the_last_line_is_the_last_that_says_something(capsys):
    stream = launch.LastLine(sys.stderr)
    assert stream.last() == ""
    print("first", file=stream)
    print("sec", end="", file=stream)
    print("ond \n\n", file=stream)
    assert stream.last() == "second"
    assert stream.isatty() == sys.stderr.isatty()
    assert capsys.readouterr().err == "first\nsecond \n\n\n"


@pytest.mark.parametrize(
    "arguments", [["--nproc", "0", "stages.train"], ["--nproc", "2", "--threads", "0", "m"], ["--nproc", "x", "m"], ["m"]]
)
def test_a_wrong_command_line_says_so_before_anything_starts(arguments):
    done = subprocess.run([sys.executable, "-m", "wmtp.launch", *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2 and "error: " in done.stderr.splitlines()[-1]


def test_help_shows_a_whole_command():
    done = subprocess.run([sys.executable, "-m", "wmtp.launch", "--help"], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and "python -m wmtp.launch --nproc 2 --threads 1 -- stages.train ntp" in done.stdout
