"""Lines of JSON between the stages: what is wrong with one is told by file and line."""

import gzip
import json

import pytest

from wmtp.records import Completion, RecordError, Verdict, read_jsonl, write_jsonl

VERDICT = Verdict(task_id="t/1", benchmark="mbpp", temperature=0.8, sample=3, verdict="pass", detail="")


def test_lines_come_back_as_they_were_written(tmp_path):
    write_jsonl(tmp_path / "verdicts.jsonl", [VERDICT, VERDICT])
    assert list(read_jsonl(tmp_path / "verdicts.jsonl", Verdict)) == [VERDICT, VERDICT]


@pytest.mark.parametrize("name", ["verdicts.jsonl", "verdicts.jsonl.gz"])
def test_bytes_that_are_no_text_are_told_by_their_line(tmp_path, name):
    write_jsonl(tmp_path / name, [VERDICT] * 3)
    opened = gzip.open if name.endswith("gz") else open
    with opened(tmp_path / name, "rb") as file:
        lines = file.read().splitlines(keepends=True)
    with opened(tmp_path / name, "wb") as file:
        file.writelines([*lines[:2], b'{"detail": "\xff"}\n', *lines[2:]])
    with pytest.raises(RecordError, match=rf"{name}:3: not a readable JSONL file: .*0xff"):
        list(read_jsonl(tmp_path / name, Verdict))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"verdicts\.jsonl:2: line: Invalid JSON: .*\(expected a Verdict line\)"),
        ("[1, 2]", r"verdicts\.jsonl:2: line: .*\(expected a Verdict line\)"),
        (json.dumps(VERDICT.model_dump() | {"verdict": "splendid"}), r"verdicts\.jsonl:2: verdict: .*'pass'.*\(expected a Verdict line\)"),
        (json.dumps(VERDICT.model_dump(exclude={"sample"})), r"verdicts\.jsonl:2: sample: Field required \(expected a Verdict line\)"),
        (json.dumps(VERDICT.model_dump() | {"score": 1}), r"verdicts\.jsonl:2: score: Extra inputs are not permitted"),
        (json.dumps(VERDICT.model_dump() | {"sample": "3"}), r"verdicts\.jsonl:2: sample: Input should be a valid integer"),
    ],
    ids=["not JSON", "a list", "an unknown verdict", "a field less", "a field more", "text for a number"],
)
def test_a_bad_line_is_told_by_file_and_line(tmp_path, line, message):
    write_jsonl(tmp_path / "verdicts.jsonl", [VERDICT])
    with open(tmp_path / "verdicts.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(RecordError, match=message):
        list(read_jsonl(tmp_path / "verdicts.jsonl", Verdict))


def test_a_line_of_another_kind_is_refused(tmp_path):
    write_jsonl(tmp_path / "verdicts.jsonl", [VERDICT])
    with pytest.raises(RecordError, match=r":1: .*\(expected a Completion line\)"):
        list(read_jsonl(tmp_path / "verdicts.jsonl", Completion))
