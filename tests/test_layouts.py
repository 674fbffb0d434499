"""Strict reading: every malformed file is one RecordError that names file, line and field."""

import gzip
import json

import pytest

from wmtp.layouts import FunctionProblemLine, HumanEvalLine, MbppLine, SanitizedMbppItem, data_file, items, rows
from wmtp.records import RecordError

MBPP = {"task_id": 11, "text": "Do.", "code": "x = 1", "test_list": ["assert x"], "test_setup_code": ""}
OTHER = {**MBPP, "task_id": 12}
ITEM = {"task_id": 11, "prompt": "Do.", "code": "x = 1", "test_list": ["assert x"], "test_imports": []}


def test_line_ends_last_newline_blank_lines_and_compression_do_not_matter(tmp_path):
    lines = [json.dumps(MBPP), json.dumps(OTHER)]
    forms = {
        "a.jsonl": "\n".join(lines) + "\n",
        "b.jsonl": "\r\n".join(lines),
        "c.jsonl": "\n\n".join(lines),
        "d.jsonl.gz": "\n".join(lines),
    }
    for name, text in forms.items():
        content = text.encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    found = [[row for _, row in rows(tmp_path / name, MbppLine)] for name in forms]
    assert found[0] == found[1] == found[2] == found[3] and [row.task_id for row in found[0]] == [11, 12]


def test_unknown_fields_are_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({**MBPP, "challenge_test_list": [], "more": 1}))
    assert [row.task_id for _, row in rows(tmp_path / "a.jsonl", MbppLine)] == [11]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("{", r"a\.jsonl:2: line: Invalid JSON"),
        ("[1]", r"a\.jsonl:2: line: .*object"),
        (json.dumps({key: value for key, value in OTHER.items() if key != "code"}), r"a\.jsonl:2: code: Field required"),
        (json.dumps({**OTHER, "code": None}), r"a\.jsonl:2: code: Input should be a valid string"),
        (json.dumps({**OTHER, "task_id": "12"}), r"a\.jsonl:2: task_id: Input should be a valid integer"),
        (json.dumps({**OTHER, "test_list": []}), r"a\.jsonl:2: test_list: .*at least 1"),
        (json.dumps({**OTHER, "test_list": ["a", 3]}), r"a\.jsonl:2: test_list\.1: Input should be a valid string"),
        (json.dumps(MBPP), r"a\.jsonl:2: task_id: 11 stands at .*a\.jsonl:1 already"),
    ],
)
def test_a_bad_line_is_named(tmp_path, second, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(MBPP) + "\n" + second + "\n")
    with pytest.raises(RecordError, match=message):
        list(rows(tmp_path / "a.jsonl", MbppLine))


def test_nested_fields_are_named(tmp_path):
    line = {"task_id": "f/1", "instruction": "Do.", "test_setup_code": "", "tests": [{"call": "f(1)", "expected": 2}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    with pytest.raises(RecordError, match=r"a\.jsonl:1: tests\.0\.expected: .*string"):
        list(rows(tmp_path / "a.jsonl", FunctionProblemLine))


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(MBPP).encode() * 50)[:-9])
    (tmp_path / "plain.jsonl.gz").write_text(json.dumps(MBPP))
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    for name in ("cut.jsonl.gz", "plain.jsonl.gz", "latin.jsonl", "none.jsonl"):
        with pytest.raises(RecordError, match=name):
            list(rows(tmp_path / name, MbppLine))


def test_an_array_is_read_by_item(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([ITEM, {**ITEM, "task_id": 12}], indent=1))
    assert [(where, row.task_id) for where, row in items(path, SanitizedMbppItem)] == [(f"{path}: item 1", 11), (f"{path}: item 2", 12)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps([ITEM, ITEM]), r"item 2: task_id: 11 stands at .*item 1 already"),
        (json.dumps([ITEM, {}]), r"item 2: task_id: Field required"),
        (json.dumps(ITEM), "expected a JSON array, found dict"),
        ("[", "not JSON"),
        ("[" * 100_000, "not JSON: .*recursion"),
    ],
)
def test_a_bad_array_is_named(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RecordError, match=rf"a\.json: {message}"):
        list(items(tmp_path / "a.json", SanitizedMbppItem))
    with pytest.raises(RecordError, match="no such file"):
        list(items(tmp_path / "b.json", SanitizedMbppItem))


def test_one_file_of_each_kind_lies_in_a_folder(tmp_path):
    with pytest.raises(RecordError, match=r"expected one of problems\.jsonl\.gz and problems\.jsonl, found 0"):
        data_file(tmp_path, "problems")
    (tmp_path / "problems.jsonl").touch()
    assert data_file(tmp_path, "problems").name == "problems.jsonl"
    (tmp_path / "problems.jsonl.gz").touch()
    with pytest.raises(RecordError, match="found 2"):
        data_file(tmp_path, "problems")


def test_reading_is_lazy_so_that_a_line_is_checked_where_it_stands(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"task_id": "x"}))
    found = rows(tmp_path / "a.jsonl", HumanEvalLine)
    with pytest.raises(RecordError, match=r"a\.jsonl:1: prompt"):
        next(found)
