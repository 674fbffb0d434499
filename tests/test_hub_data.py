"""Data sets in the hub's own columns, read by Hugging Face's `datasets` from local folders, into the layouts of data/raw."""

import json

import pytest

from wmtp.hub_data import MAX_PROGRAMS, codecontests_lines, download
from wmtp.raw_data import read_raw
from wmtp.records import RecordError

SUM = "print(sum(map(int, input().split())))"


def contest(name="1_A. Sum", right=((3, SUM), (2, "int main(){}")), wrong=((3, "print(0)"),)):
    programs = {
        kind: {"language": [language for language, _ in found], "solution": [text for _, text in found]}
        for kind, found in (("solutions", right), ("incorrect_solutions", wrong))
    }
    tests = {
        "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
        "private_tests": {"input": [], "output": []},
        "generated_tests": {"input": ["5\n"], "output": ["5\n"]},
    }
    head = {"name": name, "description": "Print the sum.", "cf_contest_id": 1, "cf_index": "A", "difficulty": 7, "cf_tags": ["math"]}
    return {**head, **tests, **programs}


def folder_of(path, **parts):
    """As the hub lays out parts whose names are not train, validation or test."""
    (path / "data").mkdir(parents=True)
    for part, rows in parts.items():
        (path / "data" / f"{part}-00000-of-00001.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def mbpp_row(number):
    tests = [f"assert f({n}) == {n}" for n in range(3)]
    code = "def f(x):\r\n    return x"
    return {"task_id": number, "text": "Return it.", "code": code, "test_list": tests, "test_setup_code": "", "challenge_test_list": []}


@pytest.fixture
def sources(tmp_path):
    humaneval = {"task_id": "HumanEval/0", "prompt": "def f(x):\n", "entry_point": "f", "canonical_solution": "    return x\n"}
    humaneval |= {"test": "def check(candidate):\n    assert candidate(1) == 1\n"}
    only_cpp = contest("1_B. Twice", right=((2, "int main(){}"),), wrong=())
    return {
        "codecontests": folder_of(
            tmp_path / "contests", train=[contest(), only_cpp, contest("1_C. Again")], test=[only_cpp, contest("2_A. New")]
        ),
        "humaneval": folder_of(tmp_path / "humaneval", test=[humaneval]),
        "mbpp": folder_of(tmp_path / "mbpp", prompt=[mbpp_row(2)], test=[mbpp_row(11)], validation=[mbpp_row(511)], train=[mbpp_row(601)]),
    }


@pytest.mark.slow
def test_what_is_downloaded_is_what_prepare_reads(sources, tmp_path):
    assert download(tmp_path / "raw", **sources, max_problems=None) == {
        "codecontests": 2, "codecontests_test": 2, "humaneval": 1, "mbpp": 4,
    }  # fmt: skip
    corpus = read_raw(tmp_path / "raw")
    contests = [problem for problem in corpus.training if problem.source == "codecontests"]
    assert [len(corpus.solutions[problem.task_id]) for problem in contests] == [2, 2]
    assert contests[0].tests.inputs == ["1 2\n", "5\n"] and contests[0].difficulty == 7
    assert [problem.task_id for problem in corpus.benchmarks["humaneval"]] == ["HumanEval/0"]
    assert len(corpus.benchmarks["mbpp"]) == 1
    assert [one.reference for one in corpus.benchmarks["codecontests"]] == [None, SUM], "one that nobody solved in Python 3 is still asked"


@pytest.mark.slow
def test_a_limit_counts_problems_that_are_kept(sources, tmp_path):
    assert download(tmp_path / "raw", **sources, max_problems=1)["codecontests"] == 1


def test_python_3_of_both_labels_and_at_most_so_many():
    many = tuple((3, f"print({n})") for n in range(MAX_PROGRAMS + 5))
    problem, programs = codecontests_lines(contest(right=many, wrong=((1, "print 0"), (3, "print(0)"))), 4)
    assert problem["task_id"] == "1_A. Sum#4" and problem["test_cases"] == {"input": ["1 2\n", "5\n"], "output": ["3\n", "5\n"]}
    assert sum(one["is_correct"] for one in programs) == MAX_PROGRAMS
    assert [one["output"] for one in programs if not one["is_correct"]] == ["print(0)"]


@pytest.mark.slow
def test_an_id_that_leads_nowhere_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RecordError, match="check the id, the network and HF_TOKEN") as caught:
        download(tmp_path / "raw", codecontests=str(tmp_path / "absent"), humaneval="x", mbpp="x", max_problems=None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "raw" / "codecontests" / "problems.jsonl").exists()
