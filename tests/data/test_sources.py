"""Rows of files and folders, good and bad; Hugging Face's library and pyarrow write the oracles. Budget: 10 s."""

import csv
import json
import random
import re
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from gemkit.data.rows import BadRows, Conversation, Pair, Row, Text
from gemkit.data.sources import Source, read_rows
from gemkit.errors import GemkitError, UsageError

TALK = [{"role": "user", "content": "é?"}, {"role": "assistant", "content": "Yes\nno."}]
PAIRS = [{"prompt": f'p{n} é, "x"\n', "completion": f" c{n}"} for n in range(5)]


def read(path: Path, on_bad_row: str = "fail") -> list[Row]:
    return list(read_rows(Source.of(path).train, BadRows(on_bad_row)))


def lines(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def message(path: Path) -> str:
    with pytest.raises(GemkitError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "content"),
    [
        ({"messages": TALK, "task": 3}, Conversation(tuple(TALK))),
        ({"prompt": "a", "completion": " b", "text": "c"}, Pair("a", " b")),
        ({"instruction": "a", "input": "b", "output": "c"}, Pair("a\n\nb", "c")),
        ({"instruction": "a", "input": " ", "output": "c"}, Pair("a", "c")),
        ({"instruction": "a", "input": None, "output": "c"}, Pair("a", "c")),
        ({"instruction": "a", "output": "c"}, Pair("a", "c")),
        ({"text": "a\n"}, Text("a\n")),
    ],
)
def test_the_four_formats(tmp_path, fields, content):
    path = write(tmp_path / "a.jsonl", lines(fields, fields))
    assert [(row.content, row.where) for row in read(path)] == [(content, f"{path}:1"), (content, f"{path}:2")]


def test_content_in_parts(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "more": None}]
    talk = [{"role": "developer", "content": "s"}, {"role": "user", "content": parts, "name": None}, TALK[1]]
    (row,) = read(write(tmp_path / "a.jsonl", lines({"messages": talk})))
    assert row.content.messages[1] == {"role": "user", "content": parts}


def test_every_file_format_gives_the_same_rows(tmp_path):
    wanted = [Pair(row["prompt"], row["completion"]) for row in PAIRS]
    table = pyarrow.Table.from_pylist([{"id": n, **row} for n, row in enumerate(PAIRS)])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["prompt", " completion"], *[row.values() for row in PAIRS]])
    with open(tmp_path / "a.tsv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t").writerows([["prompt", "completion"], *[row.values() for row in PAIRS]])
    write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + lines(*PAIRS).encode())
    write(tmp_path / "b.jsonl", lines(*PAIRS).encode("utf-16"))
    write(tmp_path / "crlf.jsonl", lines(*PAIRS).replace("\n", "\r\n\r\n"))
    write(tmp_path / "a.json", "\n" + json.dumps(PAIRS, indent=1))
    write(tmp_path / "one.json", json.dumps(PAIRS))
    write(tmp_path / "lines.json", lines(*PAIRS))
    found = {path.name: read(path) for path in tmp_path.iterdir()}
    assert len(found) == 9
    for name, rows in found.items():
        assert [row.content for row in rows] == wanted, name
    at = {name: [row.where.removeprefix(str(tmp_path / name)) for row in rows] for name, rows in found.items()}
    assert at["a.parquet"] == [f", row {n}" for n in range(1, 6)]
    assert at["a.jsonl"] == at["lines.json"] == [f":{n}" for n in range(1, 6)]
    assert at["crlf.jsonl"] == [f":{n}" for n in range(1, 11, 2)]
    assert at["a.csv"] == at["a.tsv"] == [f":{n}" for n in range(2, 12, 2)]  # each has a line break in it
    assert at["a.json"] == [f":{n}" for n in range(3, 23, 4)] and at["one.json"] == [":1"] * 5


def test_conversations_in_parquet_and_csv(tmp_path):
    table = pyarrow.Table.from_pylist([{"messages": TALK}, {"messages": [{"role": "system", "content": "s"}, *TALK]}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["messages"], [json.dumps(TALK)]])
    assert [len(row.content.messages) for row in read(tmp_path / "a.parquet")] == [2, 3]
    assert read(tmp_path / "a.csv")[0].content == read(tmp_path / "a.parquet")[0].content == Conversation(tuple(TALK))


def test_data_sets_that_hugging_faces_library_saved(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    rows = [{"messages": TALK, "n": n} for n in range(7)]
    made = datasets.Dataset.from_list(rows).shuffle(seed=1)
    made.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(train=made, test=made, validation=made.select([3, 1])).save_to_disk(tmp_path / "parts")
    assert [row.where for row in read(tmp_path / "one")] == [f"{tmp_path / 'one'}, row {n}" for n in range(1, 8)]
    source = Source.of(tmp_path / "parts")
    assert [path.name for path in source.train + source.validation] == ["train", "validation"]
    assert [row.content for row in read_rows(source.validation, BadRows())] == [Conversation(tuple(TALK))] * 2
    (tmp_path / "one" / "state.json").write_text("{}")
    assert "names no data files" in message(tmp_path / "one")
    next((tmp_path / "parts" / "train").glob("*.arrow")).write_bytes(b"ARROW1")
    assert "data-00000-of-00001.arrow" in message(tmp_path / "parts")


def test_folders_with_parts(tmp_path):
    for name in ("train-00001-of-00002", "train-00000-of-00002", "valid", "test", "trained", "other"):
        write(tmp_path / f"{name}.jsonl", lines({"text": name}))
    source = Source.of(tmp_path)
    assert [row.content.text[:7] + row.content.text[10:11] for row in read_rows(source.train, BadRows())] == [
        "train-00",
        "train-01",
    ]
    assert [path.name for path in source.validation] == ["valid.jsonl"]
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), folder / "train-00000-of-00001.parquet")
    assert len(read(tmp_path / "hub")) == 5 and not Source.of(tmp_path / "hub").validation
    (tmp_path / "empty").mkdir()
    assert "has neither train.jsonl" in message(tmp_path / "empty")
    assert "does not exist" in message(tmp_path / "none.jsonl")


BAD = [
    ({"messages": [*TALK, {"role": "tool", "content": "x"}]}, "messages is no conversation: .*'tool'"),
    ({"messages": TALK[1:]}, "messages is no conversation: .*begins with the model"),
    ({"messages": TALK[:1]}, "messages has no assistant turn"),
    ({"messages": [TALK[0], {"role": "assistant", "content": " \n"}]}, "messages has no assistant turn"),
    ({"messages": []}, "messages is no conversation"),
    ({"messages": "[{"}, "messages is text that is no JSON"),
    ({"messages": {"role": "user"}}, "messages is no list"),
    ({"messages": ["x"]}, "messages is no conversation: message 0"),
    ({"messages": [TALK[0], {"role": "assistant", "content": None}]}, "messages is no conversation: message 1"),
    ({"messages": [TALK[0], TALK[1] | {"weight": 0}]}, "a message has weight: message 1"),
    ({"messages": [TALK[0], TALK[1] | {"tool_calls": [1]}]}, "a message has tool_calls"),
    ({"prompt": "a", "completion": ""}, "completion is empty"),
    ({"prompt": "a", "completion": None}, "completion is no text: it is None"),
    ({"prompt": 3, "completion": "b"}, "prompt is no text: it is 3"),
    ({"instruction": "a", "input": ["b"], "output": "c"}, "input is no text"),
    ({"instruction": "\t", "output": "c"}, "instruction is empty"),
    ({"text": " "}, "text is empty"),
    ({"prompt": "a", "answer": "b"}, "the row has no known format: it has prompt, answer; give"),
    ({}, "the row has no known format: it has no column"),
    ([1], "the row is no object"),
    (None, "the row is no object: it is None"),
    (b'{"text": "a\xff"}', "invalid UTF-8: byte 0xff"),
    (b'{"text": "\\ud800"}', r"half a surrogate pair: U\+D800"),
    (b'{"text": "a"', r"the row is no JSON: .*column"),
    (b'{"text": ' + b"[" * 20000, "the row is no JSON: it is nested too deeply|no text"),
]


@pytest.mark.parametrize(("fields", "reason"), BAD)
def test_bad_rows_are_named_or_left_out(tmp_path, fields, reason):
    line = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    path = write(tmp_path / "a.jsonl", b"\n" + line + b"\n" + lines(*PAIRS).encode())
    said = message(path)
    assert re.match(rf"{re.escape(str(path))}:2: (?:{reason})", said, re.IGNORECASE) and "--on-bad-row skip" in said
    bad = BadRows("skip")
    assert len(list(read_rows([path], bad))) == 5 and bad.count == 1
    (found,) = bad.reasons.values()
    assert found.count == 1 and found.examples[0].startswith(f"{path}:2: ")


def test_mixed_formats(tmp_path):
    path = write(tmp_path / "a.jsonl", lines(PAIRS[0], {"messages": TALK}, PAIRS[1]))
    assert message(path).startswith(f"{path}:2: the row has another format than the first: messages, not prompt and")
    assert len(read(path, "skip")) == 2


def test_invalid_utf8_in_every_format(tmp_path):
    write(tmp_path / "a.json", b'[{"text": "a"},\n {"text": "\xe9"}]')
    write(tmp_path / "a.csv", b'text\na\n"\xe9"\n')
    string = pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xe9")
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": string}), tmp_path / "a.parquet")
    for name, where in (("a.json", ":2"), ("a.csv", ":3"), ("a.parquet", ", row 2")):
        path = tmp_path / name
        assert message(path).startswith(f"{path}{where}: invalid UTF-8")
        assert [row.content.text for row in read(path, "skip")] == ["a"]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", b"", "has no rows"),
        ("a.jsonl", b"\n \n", "has no rows"),
        ("a.json", b"[]", "has no rows"),
        ("a.csv", b"text\n", "has no rows"),
        ("a.csv", b'text\n"a\n', "a.csv:2: the file is no CSV"),
        ("a.csv", b"prompt,completion\na,b\na\n", "a.csv:3: the row and the header differ in length: 1, not 2"),
        ("a.json", b'[{"text": "a"},\n{"text" "b"}]', "a.json:2: the file is no JSON: Expecting"),
        ("a.json", b'[{"text": "a"},\n]', "a.json:2: the file is no JSON"),
        ("a.json", b'[{"text": "a"}\n', "a.json:2: the file is no JSON: the array is not closed"),
        ("a.json", b'[{"text": "a"}] x', "the file is no JSON"),
        ("a.json", b"[" * 30000, "no JSON: it is nested too deeply"),
        ("a.parquet", b"PAR1PAR1", "cannot read .*a.parquet"),
        ("a.xlsx", b"PK", "a format that gemkit does not know: give .json, .jsonl"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16")[:-1], "no UTF-16"),
    ],
)
def test_files_that_are_broken_as_a_whole(tmp_path, name, data, words):
    assert re.search(words, message(write(tmp_path / name, data)))


def test_damaged_files_give_one_line(tmp_path):
    """Bytes changed, lost and added: rows, or one error; and no crash of the library that reads columns."""
    import datasets

    datasets.disable_progress_bars()
    rng, rows = random.Random(4), [{"messages": TALK}] * 10
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    write(tmp_path / "a.json", json.dumps(rows, ensure_ascii=False))
    write(tmp_path / "a.jsonl", lines(*rows))
    write(tmp_path / "b.jsonl", lines(*rows).encode("utf-16"))
    write(tmp_path / "a.csv", "text\n" + '"é, é"\n' * 10)
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".parquet", ".arrow", ".json", ".jsonl", ".csv")]
    refused = 0
    for path in files:
        whole = path.read_bytes()
        for _ in range(100):
            data = bytearray(whole if rng.random() < 0.8 else whole[: rng.randrange(len(whole))])
            for _ in range(rng.randrange(1, 6)):
                at = rng.randrange(len(data) + 1)
                data[at : at + rng.choice([0, 1, 1, 1, 5])] = rng.randbytes(rng.choice([0, 1, 1, 1, 5]))
            path.write_bytes(data)
            try:
                read(path.parent if path.parent.name == "saved" else path, rng.choice(["skip", "fail"]))
            except GemkitError as error:
                refused += 1
                assert "\n" not in str(error)
        path.write_bytes(whole)
    assert len(files) == 8 and refused > 300


def test_long_fields_of_csv(tmp_path):
    path = tmp_path / "a.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], ["x" * 200_000]])
    limit = csv.field_size_limit()
    assert len(read(path)[0].content.text) == 200_000 and csv.field_size_limit() == limit


def test_without_pyarrow(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", b"")
    for name in ("pyarrow", "pyarrow.parquet", "pyarrow.ipc"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "needs the library pyarrow: pip install" in message(path)
    assert read(write(tmp_path / "a.jsonl", lines({"text": "a"})))


def test_options():
    with pytest.raises(UsageError, match="on_bad_row is 'no': give 'fail' or 'skip'"):
        BadRows("no")
