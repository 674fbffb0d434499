import gzip
import json
import shutil
from pathlib import Path

import pytest

from wmtp.raw_data import FOLDERS, copy_folders, read_raw
from wmtp.records import RecordError

DATASETS = Path(__file__).parents[2] / "shared" / "datasets"
SAME_NAMES = {name: name for name in FOLDERS}
REAL_NAMES = {"codecontests": "codecontests_slice", "functions": "refactory", "humaneval": "humaneval", "mbpp": "mbpp"}


@pytest.fixture
def raw(micro, tmp_path):
    return shutil.copytree(micro.raw_data, tmp_path / "raw")


def ids(problems):
    return [problem.task_id for problem in problems]


def test_what_is_trained_on_and_what_is_held_out(corpus):
    sources = [problem.source for problem in corpus.training]
    assert set(sources) == {"codecontests", "functions", "mbpp"} and sources.count("mbpp") == 36
    assert all(601 <= int(task.partition("/")[2]) <= 636 for task in ids(corpus.training) if task.startswith("mbpp/"))
    assert ids(corpus.benchmarks["humaneval"]) == ["HumanEval/0", "HumanEval/1", "HumanEval/2"]
    assert ids(corpus.benchmarks["mbpp"]) == ["mbpp/11", "mbpp/12", "mbpp/13"]
    assert len(corpus.benchmarks["codecontests"]) == 3
    assert all(one.reference and one.tests.kind == "stdio" for one in corpus.benchmarks["codecontests"])
    assert not {one.group for one in corpus.training} & {one.group for one in corpus.benchmarks["codecontests"]}
    assert not set(ids(corpus.training)) & {task for benchmark in corpus.benchmarks.values() for task in ids(benchmark)}
    assert not corpus.dropped


def test_programs_belong_to_training_problems_and_mbpp_trains_on_its_references(corpus):
    by_id = {problem.task_id: problem for problem in corpus.training}
    assert set(corpus.solutions) == set(by_id)
    for task, programs in corpus.solutions.items():
        assert {program.task_id for program in programs} == {task}
        assert [program.is_correct for program in programs] == ([True] if task.startswith("mbpp/") else [True, False])
    (only,) = corpus.solutions["mbpp/601"]
    assert only.program == by_id["mbpp/601"].reference and only.origin == "reference"


@pytest.mark.parametrize("absent", ["codecontests", "functions"])
def test_a_training_folder_may_be_absent(raw, absent):
    shutil.rmtree(raw / absent)
    assert absent not in {problem.source for problem in read_raw(raw).training}


def test_contest_problems_to_evaluate_on_may_be_absent_and_need_no_program(raw):
    solutions = raw / "codecontests_test" / "solutions.jsonl.gz"
    solutions.write_bytes(gzip.compress(b""))
    assert [one.reference for one in read_raw(raw).benchmarks["codecontests"]] == [None] * 3
    shutil.rmtree(raw / "codecontests_test")
    assert list(read_raw(raw).benchmarks) == ["humaneval", "mbpp"]


def test_mbpp_alone_gives_something_to_train_on(raw):
    shutil.rmtree(raw / "codecontests")
    shutil.rmtree(raw / "functions")
    assert {problem.source for problem in read_raw(raw).training} == {"mbpp"}


@pytest.mark.parametrize("name, stem", [("humaneval", "HumanEval"), ("mbpp", "mbpp")])
def test_an_absent_benchmark_is_an_error(raw, name, stem):
    shutil.rmtree(raw / name)
    with pytest.raises(RecordError, match=rf"{name}: expected one of {stem}\.jsonl\.gz and {stem}\.jsonl, found 0"):
        read_raw(raw)


def test_half_a_training_folder_is_an_error(raw):
    (raw / "functions" / "solutions.jsonl.gz").unlink()
    with pytest.raises(RecordError, match="functions: expected one of solutions"):
        read_raw(raw)


def test_a_file_of_another_kind_is_an_error_with_file_and_line(raw):
    (raw / "mbpp" / "mbpp.jsonl").write_text('{"task_id": 11, "question": "?"}\n')
    with pytest.raises(RecordError, match=r"mbpp\.jsonl:1: text: Field required"):
        read_raw(raw)


def test_a_damaged_archive_is_an_error(raw):
    path = raw / "humaneval" / "HumanEval.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RecordError, match="not a readable JSONL file"):
        read_raw(raw)


def test_dropped_lines_are_counted_by_folder_and_reason(raw):
    path = raw / "functions" / "problems.jsonl.gz"
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    lines[0]["instruction"] = " "
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    assert read_raw(raw).dropped == {"functions: problem: empty statement": 1, "functions: solution: its problem is dropped": 2}


def test_a_file_may_be_plain_or_compressed_but_not_both(raw, corpus):
    plain = raw / "mbpp" / "mbpp.jsonl"
    packed = plain.with_name("mbpp.jsonl.gz")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(RecordError, match=r"mbpp: expected one of mbpp\.jsonl\.gz and mbpp\.jsonl, found 2"):
        read_raw(raw)
    plain.unlink()
    assert read_raw(raw) == corpus


def test_copies_the_jsonl_files_of_the_named_folders(raw, tmp_path):
    (raw / "mbpp" / "README.md").write_text("not data")
    counts = copy_folders(raw, SAME_NAMES | {"codecontests": None, "codecontests_test": None, "functions": "functions"}, tmp_path / "out")
    assert counts == {"functions": 2, "humaneval": 1, "mbpp": 1}
    copied = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert copied == ["functions/problems.jsonl.gz", "functions/solutions.jsonl.gz", "humaneval/HumanEval.jsonl.gz", "mbpp/mbpp.jsonl"]
    assert all((tmp_path / "out" / name).read_bytes() == (raw / name).read_bytes() for name in copied)


def test_an_absent_folder_is_an_error_before_anything_is_copied(raw, tmp_path):
    shutil.rmtree(raw / "mbpp")
    with pytest.raises(RecordError, match=r"mbpp: no such folder; source\.data\.path and source\.data\.folders\.mbpp"):
        copy_folders(raw, SAME_NAMES, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_data_is_an_error_before_anything_is_copied(raw, tmp_path):
    (raw / "mbpp" / "mbpp.jsonl").rename(raw / "mbpp" / "mbpp.txt")
    with pytest.raises(RecordError, match=r"mbpp: no \.jsonl or \.jsonl\.gz file there"):
        copy_folders(raw, SAME_NAMES, tmp_path / "out")
    assert not list(tmp_path.glob("out/**/*.jsonl*"))


def test_a_bad_line_is_told_by_the_callers_file_before_anything_is_copied(raw, tmp_path):
    """DVC does not see a folder from outside change: a bad copy would stay when the line is mended."""
    file = raw / "mbpp" / "mbpp.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:2], "{\n", *lines[3:]]))
    with pytest.raises(RecordError, match=rf"^{file}:3: line: Invalid JSON"):
        copy_folders(raw, SAME_NAMES, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    file.write_text("".join(lines))
    assert copy_folders(raw, SAME_NAMES, tmp_path / "out")["mbpp"] == 1


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_a_benchmark_cannot_be_left_out(raw, tmp_path, name):
    with pytest.raises(RecordError, match=rf"source\.data\.folders\.{name}: expected a folder, .* found null"):
        copy_folders(raw, SAME_NAMES | {name: None}, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.skipif(not DATASETS.is_dir(), reason="the real data sets are not here")
def test_the_real_folder_reads_through(tmp_path):
    counts = copy_folders(DATASETS, REAL_NAMES, tmp_path / "raw")
    assert counts == {"codecontests": 2, "functions": 2, "humaneval": 1, "mbpp": 1}
    found = read_raw(tmp_path / "raw")
    assert {name: len(problems) for name, problems in found.benchmarks.items()} == {"humaneval": 164, "mbpp": 500}
    by_source = {name: [p for p in found.training if p.source == name] for name in ("codecontests", "functions", "mbpp")}
    assert {name: len(problems) for name, problems in by_source.items()} == {"codecontests": 261, "functions": 5, "mbpp": 374}
    assert found.dropped["codecontests: problem: unverified"] == 39
    programs = [program for task in found.solutions.values() for program in task]
    assert len(programs) + sum(n for reason, n in found.dropped.items() if "solution" in reason) == 1059 + 4225 + 374
