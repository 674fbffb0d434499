import os
import pty
import subprocess
import sys

import pytest

from wmtp import progress


@pytest.fixture(autouse=True)
def ordinary_process(monkeypatch):
    """One rank, level info: what a test changes does not reach the next one."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(progress, "_level", "info")


def lines(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_log_gets_the_first_and_the_last_line_and_no_more_within_the_cadence(monkeypatch, capsys):
    monkeypatch.setattr(progress, "CADENCE", 3600.0)
    assert list(progress.track(range(100), "judge", unit="problems")) == list(range(100))
    first, last = lines(capsys)
    assert first.startswith("judge: 1/100 (1 %)") and "left" not in first, "the first rate is that of a start"
    assert last.startswith("judge: 100/100 (100 %)") and "problems/s" in last and "done in" in last


def test_without_a_pause_every_step_has_its_line(monkeypatch, capsys):
    monkeypatch.setattr(progress, "CADENCE", 0.0)
    with progress.Bar("train", 3) as bar:
        for loss in ("3.1", "2.9", ""):
            bar.advance(note=loss and f"loss {loss}")
    *steps, last = lines(capsys)
    assert [line.split(" ")[1] for line in steps] == ["1/3", "2/3", "3/3"]
    assert steps[0].endswith("loss 3.1") and last.endswith("loss 2.9"), "a note stands until the next one"


def test_the_estimated_end_is_what_remains_at_the_rate_so_far():
    bar = progress.Bar("x", total=200)
    bar.done = 50
    assert "50/200 (25 %), 5/s, about 30 s left, until " in bar.figures(elapsed=10.0)
    bar.done = 200
    assert "left" not in bar.figures(elapsed=10.0)
    assert bar.figures(elapsed=0.0) == "200/200 (100 %)", "no rate before any time has passed"


def test_a_generator_without_a_length_has_a_count_and_no_end(capsys):
    assert list(progress.track((i for i in range(3)), "read", unit="rows")) == [0, 1, 2]
    first, last = lines(capsys)
    assert first.startswith("read: 1 rows") and "left" not in first
    assert last.startswith("read: 3 rows") and "/3" not in last


def test_nothing_to_do_is_no_error(capsys):
    assert list(progress.track([], "nothing")) == []
    assert len(lines(capsys)) == 1


def test_an_error_inside_passes_through_and_the_line_says_stopped(capsys):
    with pytest.raises(KeyError), progress.Bar("work", 5) as bar:
        bar.advance()
        raise KeyError("x")
    assert "stopped in" in lines(capsys)[-1]


@pytest.mark.parametrize("rank, heard", [(None, True), ("0", True), ("1", False), ("7", False)])
def test_rank_0_alone_is_heard(monkeypatch, capsys, rank, heard):
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    progress.say("hello")
    assert list(progress.track([1, 2], "work")) == [1, 2]
    assert bool(lines(capsys)) == heard


@pytest.mark.parametrize("level, heard", [("quiet", []), ("info", ["say"]), ("debug", ["say", "detail"])])
def test_levels(capsys, level, heard):
    progress.set_level(level)
    progress.say("say")
    progress.detail("detail")
    assert lines(capsys) == heard


def test_quiet_silences_bars(capsys):
    progress.set_level("quiet")
    list(progress.track([1], "work"))
    assert lines(capsys) == []


def test_an_unknown_level_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'loud'.*quiet, info, debug"):
        progress.set_level("loud")


@pytest.mark.parametrize(
    "seconds, text", [(0, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3599, "59 min 59 s"), (3600, "1 h 00 min"), (90061, "25 h 01 min")]
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


def on_a_terminal(program: str) -> str:
    """What a program writes to stderr when that is a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", program], stderr=theirs, stdout=theirs, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(ours)
    assert process.wait() == 0, seen.decode()
    return seen.decode()


def test_a_terminal_gets_a_bar_that_lets_lines_and_inner_bars_through():
    seen = on_a_terminal(
        "from wmtp import progress\n"
        "for i in progress.track(range(4), 'outer'):\n"
        "    progress.say(f'line {i}')\n"
        "    list(progress.track(range(2), 'inner'))\n"
    )
    assert "━" in seen and "4/4" in seen
    assert "line 3" in seen and "inner: 2/2 (100 %)" in seen


def test_importing_and_logging_need_neither_torch_nor_rich():
    program = (
        "import sys\nfrom wmtp import progress\nlist(progress.track([1], 'x'))\n"
        "sys.exit(', '.join({'torch', 'rich', 'mlflow', 'pandas'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
