import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp import runstore, tracking

ROOT = Path(__file__).parents[1]
INHERITED = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "DVC", "WMTP")) and key != "RANK"}


def environment(home: Path, experiment: str, **more: str) -> dict[str, str]:
    return INHERITED | {"PYTHONPATH": str(ROOT), "DVC_ROOT": str(home), "DVC_EXP_NAME": experiment} | more


PATIENT = """
import atexit, os, signal, sys, time
from wmtp import tracking
from wmtp.tracking import stage_run

def start_writer(*arguments, start=tracking.start_writer):
    writer = start(*arguments)
    atexit.register(writer.wait)
    return writer

if "IMPATIENT" not in os.environ:
    tracking.start_writer = start_writer
"""


def start(home: Path, experiment: str, program: str, **more: str) -> "subprocess.Popen[str]":
    """A stage: a process in a folder of its own, as in a temporary run of DVC.

    Before it ends it waits for its writer, so that a busy machine does not decide a test; with IMPATIENT set it does as stages do.
    """
    folder = home / "elsewhere"
    folder.mkdir(exist_ok=True)
    program = PATIENT + textwrap.dedent(program)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen([sys.executable, "-c", program], cwd=folder, env=environment(home, experiment, **more), **options)


def stage(home: Path, experiment: str, program: str, **more: str) -> tuple[int, str]:
    """(exit code, stderr) of a stage that has ended, for all who wait for its pipes too."""
    process = start(home, experiment, program, **more)
    _, said = process.communicate(timeout=400)
    return process.returncode, said


def boxes(home: Path) -> list[Path]:
    return sorted((home / ".mlflow" / "outbox").iterdir())


def writers(home: Path) -> list[int]:
    """Processes whose command line names a box below `home`."""
    mark = str(home / ".mlflow" / "outbox").encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait(condition, seconds: float = 300.0) -> None:
    """The bound is there so that a fault ends the test."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "did not happen"
        time.sleep(0.1)


def delivered(home: Path) -> None:
    wait(lambda: not boxes(home) and not writers(home))


def client(home: Path):
    from mlflow.tracking.client import MlflowClient

    return MlflowClient(f"sqlite:///{home / '.mlflow' / 'mlflow.db'}")


def runs(home: Path, experiment: str, role: str = "stage", store=None) -> list:
    store = store or client(home)
    where = store.get_experiment_by_name("wmtp").experiment_id
    return store.search_runs([where], f"tags.`wmtp.key` = '{experiment}' and tags.`wmtp.role` = '{role}'", order_by=["start_time"])


LIGHT = """
with stage_run(sys.argv[1] if sys.argv[1:] else "light", {"seed": 1}, True) as run:
    run.log(1, {"loss": 0.5})
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A repository whose database exists; each test has an experiment of its own in it."""
    place = tmp_path_factory.mktemp("repository")
    code, said = stage(place, "first", LIGHT)
    assert (code, said) == (0, "")
    delivered(place)
    return place


@pytest.mark.slow
def test_four_stages_at_once_on_a_fresh_database_are_four_children_of_one_parent(tmp_path):
    program = """
    with stage_run("train@{number}", {{"number": {number}}}, True) as run:
        for step in range(50):
            run.log(step, {{"loss": {number} + step}})
    """
    started = [start(tmp_path, "queue", program.format(number=number)) for number in range(4)]
    for process in started:
        assert process.communicate(timeout=400)[1] == "" and process.returncode == 0
    delivered(tmp_path)
    (parent,) = runs(tmp_path, "queue", "parent")
    children = runs(tmp_path, "queue")
    assert sorted(child.info.run_name for child in children) == [f"train@{number}" for number in range(4)]
    for child in children:
        assert child.info.status == "FINISHED" and child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        history = client(tmp_path).get_metric_history(child.info.run_id, "loss")
        assert [(point.step, point.value) for point in history] == [(s, int(child.data.params["number"]) + s) for s in range(50)]


@pytest.mark.slow
def test_all_that_a_stage_says_arrives(home):
    program = """
    import pathlib
    page = pathlib.Path("page.html")
    page.write_text("as it was")
    pathlib.Path("folder").mkdir()
    pathlib.Path("folder", "inner.txt").write_text("inside")
    class Scalar:
        def __float__(self): return 0.25
    params = {"a": {"b": 1, "c": [1, 2.5], "d": None}, "text": "x" * 9000, "k" * 300: True, "k" * 301: False}
    params["many"] = {f"p{i}": i for i in range(250)}
    with stage_run("evaluate@ntp", params, True, {"team": "house", "long": "y" * 9000}) as run:
        run.log(1, {"loss": 2.0, "pass@1": 0.25})
        run.log(7, {"loss": float("nan"), "norm": Scalar()})
        run.log(8, {f"m{i}": i for i in range(1200)})
        run.summary({"humaneval.pass@1": 0.5})
        run.artifact(page)
        run.artifact("folder")
        pathlib.Path("new").write_text("as it is now")
        os.replace("new", page)
    page.unlink()
    """
    assert stage(home, "whole", program) == (0, "")
    delivered(home)
    (run,) = runs(home, "whole")
    assert run.info.status == "FINISHED" and run.info.end_time >= run.info.start_time
    params = run.data.params
    assert (params["a.b"], params["a.c"], params["a.d"]) == ("1", "[1, 2.5]", "null")
    assert params["text"] == "x" * 6000 and len(params) == 4 + 2 + 250
    assert {value for key, value in params.items() if key.startswith("kk")} == {"true", "false"}
    assert run.data.tags["stage"] == "evaluate@ntp" and run.data.tags["team"] == "house" and set(run.data.tags["long"]) == {"y"}
    assert run.data.metrics["pass_at_1"] == 0.25 and run.data.metrics["norm"] == 0.25 and run.data.metrics["m1199"] == 1199
    (summary,) = client(home).get_metric_history(run.info.run_id, "humaneval.pass_at_1")
    assert (summary.step, summary.value) == (8, 0.5)
    assert [point.step for point in client(home).get_metric_history(run.info.run_id, "loss")] == [1, 7]
    kept = home / ".mlflow" / "artifacts" / run.info.run_id / "artifacts"
    assert (kept / "page.html").read_text() == "as it was" and (kept / "folder" / "inner.txt").read_text() == "inside"


@pytest.mark.slow
@pytest.mark.parametrize(
    "end, code, status",
    [
        ("raise ValueError('x')", 1, "FAILED"),
        ("sys.exit(3)", 3, "FAILED"),
        ("sys.exit(0)", 0, "FINISHED"),
        ("os.killpg(0, signal.SIGINT); time.sleep(60)", -2, "FAILED"),
    ],
)
def test_the_end_of_the_block_is_the_status_of_the_run(home, end, code, status):
    experiment = f"end-{code}-{len(end)}"
    # A job that a shell started with & inherits an ignored SIGINT.
    program = f"""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with stage_run("s", {{}}, True) as run:
        run.log(1, {{"loss": 1.0}})
        {end}
    """
    assert stage(home, experiment, program)[0] == code
    delivered(home)
    (run,) = runs(home, experiment)
    assert (run.info.status, run.data.metrics) == (status, {"loss": 1.0})
    assert runs(home, experiment, "parent")[0].info.status == status


@pytest.mark.slow
def test_a_killed_stage_stays_running_and_its_writer_leaves(home):
    program = """
    with stage_run("s", {}, True) as run:
        run.log(1, {"loss": 1.0})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert stage(home, "killed", program)[0] == -signal.SIGKILL
    delivered(home)
    (run,) = runs(home, "killed")
    assert (run.info.status, run.data.metrics) == ("RUNNING", {"loss": 1.0})
    assert stage(home, "killed", LIGHT) == (0, "")
    delivered(home)
    assert [run.info.status for run in runs(home, "killed")] == ["RUNNING", "FINISHED"]


@pytest.fixture(params=["refused", "silent"])
def bad_server(request):
    """The address of a port that nobody listens on, or of one where nobody answers."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        if request.param == "silent":
            held.listen()
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@pytest.mark.slow
def test_a_server_that_is_not_there_switches_tracking_off_and_the_stage_goes_on(home, bad_server):
    program = """
    with stage_run("long", {}, True) as run:
        until = time.monotonic() + 90
        while run.enabled and time.monotonic() < until:
            run.log(1, {"loss": 1.0})
            time.sleep(0.2)
        assert not run.enabled
        run.log(2, {"loss": 1.0}), run.summary({"a": 1.0}), run.artifact("nothing")
    print("worked")
    """
    process = start(home, "off", program, MLFLOW_TRACKING_URI=bad_server)
    said, complaint = process.communicate(timeout=400)
    assert (process.returncode, said) == (0, "worked\n")
    assert complaint.startswith("tracking: off for the rest of long: ") and complaint.count("\n") == 1
    wait(lambda: not writers(home))
    assert boxes(home) == []


@pytest.mark.slow
def test_a_short_stage_does_not_wait_and_the_next_one_tells_of_the_loss(home):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        stalled = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert stage(home, "short", LIGHT, MLFLOW_TRACKING_URI=stalled, IMPATIENT="1") == (0, "")
        assert writers(home), "its pipes are closed while its writer is at work"
        wait(lambda: not writers(home))
    code, said = stage(home, "short-next", LIGHT)
    assert code == 0 and said.startswith("tracking: an earlier run of light was not recorded: ") and said.count("\n") == 1
    delivered(home)
    assert [run.info.status for run in runs(home, "short-next")] == ["FINISHED"]


@pytest.mark.slow
def test_a_writer_leaves_at_its_hour_whatever_holds_it(home):
    assert runstore.LOCK_SECONDS > tracking.LINGER
    with open(home / ".mlflow" / "lock", "w") as lock:  # as if another writer held the store
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert stage(home, "late", LIGHT, IMPATIENT="1") == (0, "")
        assert writers(home)
        wait(lambda: not writers(home))
        (box,) = boxes(home)
    assert [json.loads(line).get("end") for line in (box / "records.jsonl").read_text().splitlines()][-1] == "FINISHED"
    old = time.time() - 2 * tracking.ADOPT_AFTER
    os.utime(box / "records.jsonl", (old, old))
    assert stage(home, "next", LIGHT) == (0, "")
    delivered(home)
    assert [run.info.status for run in runs(home, "late")] == ["FINISHED"], "delivered by the next stage's writer"


def box_of(home: Path, experiment: str, name: str = "s-000") -> Path:
    """A box that a stage left behind, complete."""
    box = home / ".mlflow" / "outbox" / name
    box.mkdir(parents=True)
    records = [
        {"stage": "s", "key": experiment, "params": {"a": "1"}, "tags": {"stage": "s"}, "time": 1000},
        {"step": 1, "metrics": {"loss": 2.0}, "time": 1001},
        {"end": "FINISHED", "time": 1002},
    ]
    (box / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return box


@pytest.mark.slow
def test_a_second_delivery_goes_on_with_the_run_of_the_first(home, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    box = box_of(home, "twice")
    kept = home / "kept"
    first = runstore.Run(home / ".mlflow", json.loads((box / "records.jsonl").read_text().splitlines()[0]), box / "run_id")
    shutil.copytree(box, kept)
    assert tracking.attempt(box, lambda: False) and not box.exists()
    kept.rename(box)
    assert tracking.attempt(box, lambda: False)
    (run,) = runs(home, "twice")
    assert run.info.run_id == first.id and run.data.metrics == {"loss": 2.0} and run.data.params == {"a": "1"}


def test_a_box_that_another_writer_holds_or_has_removed_is_left_alone(tmp_path):
    box = box_of(tmp_path, "held")
    with open(box / "records.jsonl") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert tracking.attempt(box, lambda: False) and box.exists()
    assert list(tracking.left_behind(box.parent)) == [], "it is young"
    os.utime(box / "records.jsonl", (0, 0))
    assert list(tracking.left_behind(box.parent)) == [box]
    (box / "loss.txt").write_text("why")
    assert list(tracking.left_behind(box.parent)) == [], "it was given up"
    assert tracking.take_loss(box) == "why" and not box.exists() and tracking.take_loss(box) == ""


def test_a_box_that_cannot_be_read_is_given_up_with_its_reason(tmp_path):
    box = box_of(tmp_path, "broken")
    (box / "records.jsonl").write_text("{not json\n")
    assert not tracking.attempt(box, lambda: False)
    assert (box / "loss.txt").read_text().startswith("JSONDecodeError: ")


@pytest.mark.parametrize("enabled, rank", [(False, "0"), (True, "1"), (True, "5")])
def test_nothing_happens_when_it_is_off_or_on_other_ranks(tmp_path, monkeypatch, capsys, enabled, rank):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("RANK", rank)
    with tracking.stage_run("s", {"a": object()}, enabled) as run:
        run.log(1, {"loss": 1.0})
        run.summary({"loss": 1.0})
        run.artifact("missing")
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "call, reason",
    [
        ("run.artifact('missing.png')", "FileNotFoundError"),
        ("run.log(2, {'loss': 'high'})", "ValueError"),
        ("run.log(2, 5)", "AttributeError"),
    ],
)
def test_a_wrong_call_costs_the_tracking_and_not_the_stage(home, call, reason):
    experiment = f"wrong-{reason}"
    program = f"""
    with stage_run("s", {{}}, True) as run:
        run.log(1, {{"loss": 1.0}})
        {call}
        run.log(3, {{"loss": 3.0}})
    """
    code, said = stage(home, experiment, program)
    assert code == 0 and said.startswith(f"tracking: off for the rest of s: {reason}: ") and said.count("\n") == 1
    delivered(home)
    (run,) = runs(home, experiment)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 1.0})


def test_calls_that_took_too_long_in_all_end_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(tracking, "start_writer", lambda box, root: None)
    with tracking.stage_run("s", {}, True) as run:
        run.log(1, {"loss": 1.0})
        assert run.enabled
        monkeypatch.setattr(tracking, "WAIT_LIMIT", 0.0)
        run.log(2, {"loss": 1.0})
        assert not run.enabled
        run.log(3, {"loss": 1.0})
    assert capsys.readouterr().err.startswith("tracking: off for the rest of s: its calls took ")
    (box,) = boxes(tmp_path)
    steps = [json.loads(line).get("step") for line in (box / "records.jsonl").read_text().splitlines()]
    assert steps == [None, 1, 2, None]


def test_a_place_that_cannot_be_written_costs_the_tracking_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / ".mlflow").write_text("a file where a folder should be")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("RANK", raising=False)
    with tracking.stage_run("s", {}, True) as run:
        run.log(1, {"loss": 1.0})
    assert capsys.readouterr().err.count("tracking: off for the rest of s: ") == 1


@pytest.mark.slow
def test_the_address_in_the_environment_wins_from_the_root_and_outside_dvc_the_key_is_the_revision(tmp_path):
    from mlflow.tracking.client import MlflowClient

    repository = tmp_path / "repository"
    (repository / "inner").mkdir(parents=True)
    identity = ["-c", "user.name=n", "-c", "user.email=e@x.y"]
    subprocess.run(["git", "init", "-q"], cwd=repository, check=True)
    subprocess.run(["git", *identity, "commit", "-q", "--allow-empty", "-m", "first"], cwd=repository, check=True)
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True, check=True).stdout.strip()
    variables = INHERITED | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "sqlite:///other.db"}
    subprocess.run([sys.executable, "-c", PATIENT + LIGHT], cwd=repository / "inner", env=variables, check=True)
    delivered(repository)
    assert not (repository / ".mlflow" / "mlflow.db").exists()
    (run,) = runs(repository, f"workspace-{revision[:12]}", store=MlflowClient(f"sqlite:///{repository / 'other.db'}"))
    assert run.data.tags["mlflow.source.git.commit"] == revision
    assert run.info.artifact_uri.startswith((repository / ".mlflow" / "artifacts").as_uri())


@pytest.mark.stress
def test_the_readme_s_command_shows_the_runs(home):
    from mlflow.tracking.client import MlflowClient

    words = next(line for line in (Path(__file__).parents[1] / "README.md").read_text().split("`") if line.startswith("mlflow ui"))
    assert stage(home, "shown", 'with stage_run("s", {"a": 1}, True) as run:\n    run.log(1, {"loss": 1.0})') == (0, "")
    delivered(home)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", *words.split(), "--port", str(port), "--workers", "1"]
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(command, cwd=home, env=INHERITED | tracking.ENVIRONMENT, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        wait(lambda: answers(port))
        store = MlflowClient(f"http://127.0.0.1:{port}")
        runs = store.search_runs([one.experiment_id for one in store.search_experiments()])
        assert any(run.data.metrics.get("loss") == 1.0 for run in runs)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(port: int) -> bool:
    with socket.socket() as knock:
        return knock.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.stress
def test_a_real_server(tmp_path):
    from mlflow.tracking.client import MlflowClient

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    backend = ["--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}", "--artifacts-destination", str(tmp_path / "served")]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *backend]
    variables = INHERITED | tracking.ENVIRONMENT
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=quiet, stderr=quiet, start_new_session=True)
    address = f"http://127.0.0.1:{port}"

    try:
        wait(lambda: answers(port))
        program = """
        with stage_run("s", {"a": 1}, True) as run:
            run.log(1, {"loss": 1.0})
            open("note.txt", "w").write("text")
            run.artifact("note.txt")
        """
        patience = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "60"}  # what the environment says goes before the stage's own bounds
        assert stage(tmp_path, "served", program, MLFLOW_TRACKING_URI=address, **patience) == (0, "")
        delivered(tmp_path)
        store = MlflowClient(address)
        (run,) = runs(tmp_path, "served", store=store)
        assert (run.info.status, run.data.metrics, run.data.params) == ("FINISHED", {"loss": 1.0}, {"a": "1"})
        assert [entry.path for entry in store.list_artifacts(run.info.run_id)] == ["note.txt"]
        assert not (tmp_path / ".mlflow" / "mlflow.db").exists()
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_a_stage_imports_nothing_heavy():
    program = (
        "import sys\nfrom wmtp.tracking import stage_run\nwith stage_run('s', {}, False) as run: run.log(1, {})\n"
        "sys.exit(', '.join({'torch', 'mlflow', 'pandas', 'filelock', 'sqlalchemy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=INHERITED | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_telemetry_is_off_in_the_words_that_mlflow_reads():
    program = "import sys\nfrom mlflow.telemetry.utils import is_telemetry_disabled\nsys.exit(0 if is_telemetry_disabled() else 1)"
    bare = {key: value for key, value in INHERITED.items() if key not in ("CI", "GITHUB_ACTIONS", "PYTEST_CURRENT_TEST", "DO_NOT_TRACK")}
    for only in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        assert subprocess.run([sys.executable, "-c", program], env=bare | {only: tracking.ENVIRONMENT[only]}).returncode == 0


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=400), st.integers() | st.text(max_size=10) | st.dictionaries(st.text(), st.floats()), max_size=4
    )
)
def test_names_are_within_mlflows_limits_and_no_value_is_longer_than_it_takes(params):
    for key, value in runstore.flat(params).items():
        assert 0 < len(key) <= 250 and len(value) <= 6000
        assert runstore.name(key) == key, "a name that is taken is taken again"


def test_mlflow_takes_the_names():
    from mlflow.utils.validation import _validate_metric_name, _validate_param_name

    for text in ("humaneval.pass@1", "w/mean", "lr (peak)", "β", "a:b", "x" * 400, "100%"):
        _validate_metric_name(runstore.name(text))
        _validate_param_name(runstore.name(text))
    assert runstore.name("x" * 300) != runstore.name("x" * 301)


def test_a_snapshot_survives_another_file_system(tmp_path):
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one file system")
    source = other / f"wmtp-{os.getpid()}.txt"
    source.write_text("far")
    try:
        assert tracking.snapshot(source, tmp_path / "box").read_text() == "far"
    finally:
        source.unlink()
