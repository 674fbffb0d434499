import hashlib
import io
import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from wmtp import synthetic
from wmtp.protocols import instruction_of, render_prompt
from wmtp.records import AssertTests, Problem, Solution, StdioTests, sha256_file
from wmtp.sources import train_tokenizer
from wmtp.tokens import TokenData, TokenError, Tokenizer, check_same_tokenizer, encode_row, encode_split, write_manifest, write_split

PROGRAM = "def f(xs):\n    if xs:\n        return xs[0]\n    return 'ÄÖ'\n"


def dummy_prefix_tokenizer(texts):
    """As LLaMA's: a space is put before every text, and only bytes know the newline."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.split("\n") if line), model_writer=model, model_type="bpe",
        vocab_size=420, byte_fallback=True, split_digits=True, add_dummy_prefix=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1,
        minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="module", params=["no dummy prefix", "dummy prefix"])
def both(request, tmp_path_factory):
    """A tokenizer of each kind."""
    texts = list(synthetic.corpus(3, 150))
    folder = tmp_path_factory.mktemp("tokenizer")
    train = dummy_prefix_tokenizer if request.param == "dummy prefix" else lambda texts: train_tokenizer(texts, 420)
    (folder / "tokenizer.model").write_bytes(train(texts))
    found = Tokenizer(folder)
    assert (found.pieces.decode(found.pieces.encode("a")) == "a") and len(found.pieces.encode("")) == 0
    assert found.pieces.encode("\n", out_type=str)[0].startswith("▁") == (request.param == "dummy prefix")
    return found


def problem(statement="Add the numbers.", task_id="1_a"):
    return Problem(task_id=task_id, source="codecontests", group="1", statement=statement, tests=StdioTests(inputs=["1"], outputs=["1"]))


def solution(program=PROGRAM, task_id="1_a", number=0, is_correct=True, span=None):
    return Solution(
        task_id=task_id, solution_id=f"{task_id}#{number}", program=program, is_correct=is_correct, origin="test", span=span,
        pair=None if span is None else "other",
    )  # fmt: skip


def row_of(tokenizer, **changes):
    return encode_row(tokenizer, problem(), 0, solution(**changes), "alpaca")


code = st.text(st.sampled_from("abxf01 \n\t():=[]'\"#+_éß漢\N{GRINNING FACE}\r\\"), max_size=60)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(program=code)
@example("    return 1")
@example("\n\n  x = 1\n")
@example(" ")
@example("")
@example("\tpass  \n")
def test_prompt_and_response_decode_to_their_text(both, program):
    prompt = render_prompt(*instruction_of(problem()), "alpaca")
    row = encode_row(both, problem(), 0, solution(program), "alpaca")
    P, text = row.response_start, row.input_ids[1:-1]
    assert both.pieces.decode(text) == prompt + program
    assert both.pieces.decode(row.input_ids[1:P]) == prompt
    assert both.decode_response(row.input_ids[:P], row.input_ids[P:-1]) == program
    assert both.decode_response(both.encode_prompt("def g():"), both.encode_response(program)) == program
    assert row.input_ids[0] == both.bos and row.input_ids[-1] == both.eos
    assert row.input_ids[:P] == both.encode_prompt(prompt), "the prompt is what generation will be given"
    assert not {both.bos, both.eos} & set(text)


def test_text_that_does_not_survive_is_refused(both):
    """SentencePiece's own mark for a space comes back as a space."""
    with pytest.raises(TokenError, match=r"1_a#0: text does not survive .*tokenizer\.model"):
        row_of(both, program="x = '\N{LOWER ONE EIGHTH BLOCK}'")


def test_a_tokenizer_that_merges_newlines_is_refused(tmp_path):
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["def f():", "return x"] * 20), model_writer=model, vocab_size=300, model_type="bpe", byte_fallback=True,
        user_defined_symbols=["\n\n"], normalization_rule_name="identity", minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(TokenError, match="merges a newline with the text after it"):
        Tokenizer(tmp_path).encode_response("\nx = 1")


def test_an_absent_tokenizer_is_an_error(tmp_path):
    with pytest.raises(TokenError, match=r"tokenizer\.model: no tokenizer there"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_damaged_tokenizer_is_an_error(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenError, match=r"tokenizer\.model: not a readable SentencePiece model"):
        Tokenizer(tmp_path)


def test_a_row_says_what_it_was_made_from(tokenizer):
    row = encode_row(tokenizer, problem(), 5, solution(is_correct=False), "alpaca")
    assert (row.problem, row.solution_id, row.is_correct, row.span) == (5, "1_a#0", False, (-1, -1))
    other = encode_row(tokenizer, problem(), 5, solution(), "evaluation_notes")
    assert other.input_ids[other.response_start :] == row.input_ids[row.response_start :] and other.response_start > row.response_start


def check_span(tokenizer, row, program, span):
    """Exactly the tokens that hold a character of the span; which characters a token holds is read off piece by piece."""
    P, (first, last) = row.response_start, row.span
    ends = [len(tokenizer.decode_response((), row.input_ids[P:i])) for i in range(P, len(row.input_ids))]
    assert ends[-1] == len(program)
    holding = [P + i for i, (a, b) in enumerate(pairwise(ends)) if a < span[1] and b > span[0]]
    assert list(range(first, last)) == holding
    assert P <= first < last <= len(row.input_ids) - 1, "the end of text is no part of a span"


def test_spans_map_to_the_tokens_that_hold_their_characters(both):
    program = "def f(xs):\n    return [x + 12 for x in xs if x > 3]\n"
    for start in range(len(program)):
        for end in range(start + 1, min(start + 6, len(program) + 1)):
            check_span(both, row_of(both, program=program, span=(start, end)), program, (start, end))


def test_spans_of_the_micro_task_mark_where_a_pair_differs(tokenizer, corpus):
    by_id, n = {p.task_id: p for p in corpus.training}, 0
    for task, programs in corpus.solutions.items():
        rows = {s.solution_id: encode_row(tokenizer, by_id[task], 0, s, "alpaca") for s in programs}
        for one in programs:
            if one.span is None:
                assert rows[one.solution_id].span == (-1, -1)
                continue
            check_span(tokenizer, rows[one.solution_id], one.program, one.span)
            mine, other = rows[one.solution_id], rows[one.pair]
            before = mine.span[0]
            assert mine.input_ids[:before] == other.input_ids[:before] or before > other.span[0]
            n += 1
    assert n >= 80


def test_rows_come_in_the_problems_order_with_their_index(tokenizer):
    made = [problem(task_id="b"), problem(task_id="none"), problem(task_id="a")]
    programs = {"a": [solution("x = 1", "a"), solution("x = 2", "a", 1, False)], "b": [solution("x = 3", "b")], "elsewhere": [solution()]}
    rows, counts = encode_split(tokenizer, made, programs, "alpaca", 200)
    assert [(row.solution_id, row.problem) for row in rows] == [("b#0", 0), ("a#0", 2), ("a#1", 2)] and counts == {}


@pytest.mark.parametrize("excess", [1, 2, 5, 30, 60])
def test_too_long_rows_lose_the_end_of_their_statement_first(both, excess):
    long = problem("Given the list of numbers, " * 8 + "print the answer.")
    whole = encode_row(both, long, 0, solution(), "alpaca")
    limit = len(whole.input_ids) - excess
    (row,), counts = encode_split(both, [long], {"1_a": [solution()]}, "alpaca", limit)
    assert counts == {"statement shortened": 1} and limit - 12 <= len(row.input_ids) <= limit
    text = both.pieces.decode(row.input_ids[1:-1])
    head, response, tail = text.partition("\n\n### Response:\n")
    assert response and tail == PROGRAM and row.input_ids[row.response_start :] == whole.input_ids[whole.response_start :]
    assert long.statement.startswith(head.removeprefix("### Instruction:\n")) and len(head) > 20
    assert row.input_ids[-1] == both.eos


def test_a_row_that_just_fits_is_left_alone(both):
    whole = encode_row(both, problem(), 0, solution(), "alpaca")
    rows, counts = encode_split(both, [problem()], {"1_a": [solution()]}, "alpaca", len(whole.input_ids))
    assert rows == [whole] and counts == {}


def test_rows_whose_program_is_too_long_are_dropped_and_counted(both):
    programs = {"1_a": [solution("x = 1\n" * 100), solution("x = 1", number=1), solution("y = 2\n" * 100, number=2)]}
    rows, counts = encode_split(both, [problem()], programs, "alpaca", 80)
    assert [row.solution_id for row in rows] == ["1_a#1"]
    assert {reason: n for reason, n in counts.items() if n} == {"dropped: longer than data.max_length": 2}


def test_spans_follow_a_shortened_statement(both):
    long, one = problem("Given the list of numbers, " * 8), solution(span=(4, 5))
    (row,), _ = encode_split(both, [long], {"1_a": [one]}, "alpaca", 120)
    check_span(both, row, PROGRAM, (4, 5))


def test_shortening_cuts_no_character_in_two(both):
    """Where a statement is cut within the bytes of a character, what is left of it must go too."""
    long = problem("漢字" * 30)
    for excess in range(1, 9):
        limit = len(encode_row(both, long, 0, solution(), "alpaca").input_ids) - excess
        (row,), _ = encode_split(both, [long], {"1_a": [solution()]}, "alpaca", limit)
        assert "\N{REPLACEMENT CHARACTER}" not in both.pieces.decode(row.input_ids[1:-1])


def test_mbpp_problems_are_shortened_too(tokenizer):
    tests = AssertTests(asserts=["assert f(1) == 1"])
    long = Problem(task_id="1_a", source="mbpp", group="1", statement="Write a function. " * 20, tests=tests)
    (row,), counts = encode_split(tokenizer, [long], {"1_a": [solution()]}, "alpaca", 150)
    assert counts == {"statement shortened": 1} and "assert f(1) == 1" in tokenizer.pieces.decode(row.input_ids[1:-1])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def rows(tokenizer, corpus):
    return encode_split(tokenizer, corpus.training, corpus.solutions, "alpaca", 256)[0]


def write(folder, tokenizer, rows, problems, names=("policy",)):
    counts = {name: write_split(folder / name, rows, problems) for name in names}
    write_manifest(folder, tokenizer, "alpaca", counts)
    return folder


def test_equal_rows_give_equal_bytes(tokenizer, corpus, rows, tmp_path):
    first, second = (contents(write(tmp_path / name, tokenizer, rows, corpus.training)) for name in "ab")
    assert first == second and "policy/problems.json" in first and any(name.endswith(".arrow") for name in first)


def test_what_was_written_is_what_is_read(tokenizer, corpus, rows, tmp_path):
    data = TokenData(write(tmp_path / "out", tokenizer, rows, corpus.training), "policy")
    assert len(data) == len(rows) and data.tokenizer_sha256 == tokenizer.sha256
    assert [ids.tolist() for ids in data.input_ids(range(len(rows)))] == [row.input_ids for row in rows]
    assert [ids.tolist() for ids in data.input_ids([4, 0, 4])] == [rows[i].input_ids for i in (4, 0, 4)]
    assert data.lengths.tolist() == [len(row.input_ids) for row in rows]
    assert data.response_start.tolist() == [row.response_start for row in rows]
    assert data.is_correct.tolist() == [row.is_correct for row in rows] and data.is_correct.dtype == bool
    assert data.problem_of.tolist() == [row.problem for row in rows]
    assert data.spans().tolist() == [list(row.span) for row in rows]
    assert data.correct_rows().tolist() == [i for i, row in enumerate(rows) if row.is_correct]


def test_the_problem_index_names_each_problems_rows(tokenizer, corpus, rows, tmp_path):
    data = TokenData(write(tmp_path / "out", tokenizer, rows, corpus.training), "policy")
    named = [row for entry in data.problems for row in entry["correct"] + entry["incorrect"]]
    assert sorted(named) == list(range(len(rows)))
    for entry in data.problems:
        one = next(p for p in corpus.training if p.task_id == entry["task_id"])
        assert (entry["source"], entry["group"], entry["difficulty"]) == (one.source, one.group, one.difficulty)
        for label in ("correct", "incorrect"):
            assert all(rows[i].is_correct == (label == "correct") for i in entry[label])
            assert all(rows[i].solution_id.partition("#")[0].partition("/ref")[0] == entry["task_id"] for i in entry[label])


def test_a_row_finds_its_problem_where_others_have_no_rows(tokenizer, corpus, rows, tmp_path):
    kept = [row for row in rows if row.problem % 3 == 1]
    data = TokenData(write(tmp_path / "out", tokenizer, kept, corpus.training), "policy")
    found = [data.problems[place]["task_id"] for place in data.problem_of]
    assert found == [corpus.training[row.problem].task_id for row in kept] and len(data.problems) < len(corpus.training)


def test_counts_are_those_of_the_rows(corpus, rows, tmp_path):
    counts = write_split(tmp_path / "policy", rows, corpus.training)
    n_correct = sum(row.is_correct for row in rows)
    lengths = [len(row.input_ids) for row in rows]
    assert counts == {
        "problems": len({row.problem for row in rows}), "correct": n_correct, "incorrect": len(rows) - n_correct, "tokens": sum(lengths),
        "longest": max(lengths),
    }  # fmt: skip


def test_the_manifest_hashes_every_file_of_each_split(tokenizer, corpus, rows, tmp_path):
    folder = write(tmp_path / "out", tokenizer, rows[:6], corpus.training, ("policy", "critic"))
    manifest = json.loads((folder / "manifest.json").read_text())
    on_disk = {name: hashlib.sha256(content).hexdigest() for name, content in contents(folder).items() if name != "manifest.json"}
    assert manifest["files"] == on_disk and manifest["vocab_size"] == len(tokenizer) == 400 and manifest["template"] == "alpaca"
    assert manifest["tokenizer_sha256"] == sha256_file(tokenizer.path)
    assert manifest["splits"]["policy"]["problems"] == 3
    assert TokenData(folder, "policy").sha256 == manifest["splits"]["policy"]["sha256"]


def test_the_manifest_does_not_hang_on_the_benchmarks(tokenizer, corpus, rows, tmp_path):
    def manifest(name, benchmark):
        counts = {"policy": write_split(tmp_path / name / "policy", rows[:6], corpus.training)}
        (tmp_path / name / "benchmarks").mkdir()
        (tmp_path / name / "benchmarks/mbpp.jsonl").write_text(benchmark)
        write_manifest(tmp_path / name, tokenizer, "alpaca", counts)
        return (tmp_path / name / "manifest.json").read_bytes()

    assert manifest("a", "one") == manifest("b", "another")


def test_a_splits_hash_changes_with_its_own_rows_alone(tokenizer, corpus, rows, tmp_path):
    def hashes(name, policy, critic):
        counts = {"policy": write_split(tmp_path / name / "policy", policy, corpus.training)}
        counts["critic"] = write_split(tmp_path / name / "critic", critic, corpus.training)
        write_manifest(tmp_path / name, tokenizer, "alpaca", counts)
        return {split: TokenData(tmp_path / name, split).sha256 for split in counts}

    first, second = hashes("a", rows[:6], rows[6:]), hashes("b", rows[1:7], rows[6:])
    assert first["critic"] == second["critic"] and first["policy"] != second["policy"]


def test_absent_token_data_is_an_error(micro):
    with pytest.raises(TokenError, match="nowhere: no token data there; run prepare-and-validate-datasets"):
        TokenData(micro.processed, "nowhere")


def test_an_empty_split_is_an_error(tokenizer, tmp_path):
    with pytest.raises(TokenError, match="policy: the split is empty"):
        TokenData(write(tmp_path / "out", tokenizer, [], []), "policy")


def test_a_model_with_another_tokenizer_is_refused(micro, data, both, tmp_path):
    assert check_same_tokenizer(data.tokenizer_sha256, micro.bundle, "policy.start").sha256 == data.tokenizer_sha256
    shutil.copyfile(both.path, tmp_path / "tokenizer.model")
    with pytest.raises(TokenError, match=r"tokenizer\.model: policy\.start: tokenizer \w{12}, expected that of the token data, \w{12}"):
        check_same_tokenizer(data.tokenizer_sha256, tmp_path, "policy.start")


def test_rows_hold_no_token_that_the_model_lacks(data):
    assert all(ids.min() >= 0 and ids.max() < 400 for ids in data.input_ids(range(len(data))))


@pytest.fixture
def written(micro, tmp_path):
    """A copy of token data that may be damaged."""
    return Path(shutil.copytree(micro.processed, tmp_path / "processed"))


def stream_of(split):
    return next((split / "rows").glob("*.arrow"))


def cut_to_half(split):
    file = stream_of(split)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_to_half, r"rows/data-\S+\.arrow: damaged or absent: .*; make it again"),
        (lambda split: stream_of(split).write_bytes(b"not arrow at all"), r"\.arrow: damaged or absent: .*; make it again"),
        (lambda split: stream_of(split).unlink(), r"\.arrow: damaged or absent: .*No such file.*; make it again"),
        (lambda split: (split / "rows/state.json").write_text("{"), r"state\.json: damaged or absent: .*; make it again"),
        (lambda split: (split / "problems.json").unlink(), r"problems\.json: damaged or absent: .*; make it again"),
        (lambda split: (split / "rows/state.json").write_text("{}"), r"state\.json: damaged or absent: '_data_files'; make it again"),
        (lambda split: (split / "rows/state.json").write_text('{"_data_files": []}'), r"state\.json: damaged or absent: .*; make it again"),
        (
            lambda split: (split.parent / "manifest.json").write_text("{}"),
            r"expected .* of policy, found no 'tokenizer_sha256'",
        ),
        (
            lambda split: (split.parent / "manifest.json").write_text("[]"),
            r"manifest\.json: expected the hashes and counts of policy",
        ),
        (lambda split: (split.parent / "manifest.json").write_text(""), r"manifest\.json: damaged or absent: .*; make it again"),
    ],
    ids=["cut", "no stream", "no file", "state", "problems", "state without files", "no files", "empty manifest", "list", "manifest"],
)
def test_damaged_token_data_are_told_by_file(written, damage, message):
    damage(written / "policy")
    with pytest.raises(TokenError, match=message):
        TokenData(written, "policy")


def test_a_stream_without_its_last_rows_is_refused(written, micro):
    """Cut between two batches a stream is whole, only shorter."""
    whole = TokenData(micro.processed, "policy").rows.combine_chunks()
    with pa.OSFile(str(stream_of(written / "policy")), "wb") as sink, pa.ipc.new_stream(sink, whole.schema) as out:
        out.write_table(whole.slice(0, len(whole) - 1))
    with pytest.raises(TokenError, match=rf"rows: expected {len(whole)} rows as in manifest\.json, found {len(whole) - 1}; make"):
        TokenData(written, "policy")


def test_rows_in_several_files_are_one_table(written, micro):
    """As Dataset.save_to_disk writes a split of more than half a gigabyte."""
    from datasets import load_from_disk

    rows = written / "policy" / "rows"
    load_from_disk(str(micro.processed / "policy/rows")).save_to_disk(str(rows), num_shards=3)
    assert len(list(rows.glob("*-of-00003.arrow"))) == 3
    one, several = TokenData(micro.processed, "policy"), TokenData(written, "policy")
    assert all(map(np.array_equal, one.input_ids(range(len(one))), several.input_ids(range(len(one)))))
    assert np.array_equal(one.lengths, several.lengths) and np.array_equal(one.is_correct, several.is_correct)


def test_a_split_that_the_manifest_does_not_have(written):
    shutil.copytree(written / "policy", written / "other")
    with pytest.raises(TokenError, match=r"manifest\.json: expected .* of other, found no 'other'; make it again: dvc repro --single"):
        TokenData(written, "other")
