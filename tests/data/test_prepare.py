"""Files to samples: real data sets, the split, rows left out and cut, refusals. Budget: 10 s."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from testdata import data_file

from gemkit.data.prepare import DataOptions, Prepared, prepare
from gemkit.data.sample import Sample
from gemkit.errors import GemkitError, UsageError


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def keys(samples: list[Sample]) -> list[bytes]:
    return sorted(sample.tokens.tobytes() + sample.loss.tobytes() for sample in samples)


def same(one: Prepared, other: Prepared) -> bool:
    return keys(one.train) == keys(other.train) and keys(one.validation) == keys(other.validation)


@pytest.fixture(scope="module")
def instructions() -> list[dict]:
    return json.loads(data_file("sft_instruction_data", "instruction-data.json").read_text(encoding="utf-8"))


def test_instructions_in_json(tokenizer, instructions):
    prepared = prepare(data_file("sft_instruction_data", "instruction-data.json"), tokenizer)
    assert len(prepared.train) + len(prepared.validation) == len(instructions) == 1000
    assert 25 <= len(prepared.validation) <= 80 and not prepared.skipped and not prepared.truncated
    texts = {
        tokenizer.decode(sample.tokens[sample.loss].tolist()) for sample in [*prepared.train, *prepared.validation]
    }
    assert texts == {row["output"].strip() for row in instructions}


def test_natural_instructions_in_json_lines(tokenizer):
    path = data_file("sft_natural_instructions", "train.jsonl")
    prepared = prepare(path, tokenizer, DataOptions(max_length=256, validation=0.1, on_bad_row="skip"))
    (reason,) = prepared.skipped.values()
    assert len(prepared.train) + len(prepared.validation) + reason.count == 2444
    assert 0 < reason.count < 1000 and prepared.truncated > 10
    assert max(len(sample.tokens) for sample in prepared.train) == 256


def test_seed_tasks_as_csv_and_parquet(tokenizer, tmp_path):
    source = data_file("sft_self_instruct", "seed_tasks.jsonl").read_text(encoding="utf-8")
    tasks = [json.loads(line) for line in source.splitlines()]
    rows = [{"instruction": task["instruction"], **task["instances"][0]} for task in tasks]
    lines(tmp_path / "a.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["instruction", "input", "output"])
        writer.writeheader()
        writer.writerows(rows)
    options = DataOptions(on_bad_row="skip")
    first, *others = [prepare(tmp_path / name, tokenizer, options) for name in ("a.jsonl", "a.parquet", "a.csv")]
    assert len(first.train) > 140 and all(same(first, other) for other in others)


def test_summaries_and_corrections_as_pairs(tokenizer, tmp_path):
    source = data_file("scitldr", "SciTLDR-A", "train.jsonl").read_text(encoding="utf-8")
    articles = [json.loads(line) for line in source.splitlines()]
    rows = [{"prompt": " ".join(row["source"]), "completion": row["target"][0]} for row in articles]
    folder = data_file("jfleg", "dev")
    pairs = zip(*((folder / f"dev.{name}").read_text(encoding="utf-8").splitlines() for name in ("src", "ref0")))
    rows += [{"prompt": before, "completion": after} for before, after in pairs]
    options = DataOptions(max_length=1024, validation=0.0, template="none")
    prepared = prepare(lines(tmp_path / "a.jsonl", rows), tokenizer, options)
    assert len(prepared.train) == len(rows) == 1992 + 754
    for sample, row in list(zip(prepared.train, rows))[::50]:
        ids = sample.tokens.tolist()
        assert ids[0] == tokenizer.bos_id and tokenizer.bos_id not in ids[1:]
        answer = tokenizer.decode(sample.tokens[sample.loss].tolist())
        assert answer == row["completion"] or (len(ids) == 1024 and row["completion"].startswith(answer))


def test_the_split_stays_when_rows_are_added_or_moved(tokenizer, tmp_path, instructions):
    options = DataOptions(validation=0.2)
    half = prepare(lines(tmp_path / "half.jsonl", instructions[:500]), tokenizer, options)
    more = instructions + instructions[:100]
    random.Random(0).shuffle(more)
    whole = prepare(lines(tmp_path / "whole.jsonl", more), tokenizer, options)
    sides = [set(keys(side)) for side in (half.train, half.validation, whole.train, whole.validation)]
    assert sides[0] <= sides[2] and sides[1] <= sides[3] and not sides[2] & sides[3]


def test_a_folder_with_a_validation_part_is_not_split(tokenizer, tmp_path, instructions):
    lines(tmp_path / "train.jsonl", instructions[:50])
    lines(tmp_path / "valid.jsonl", instructions[50:60])
    prepared = prepare(tmp_path, tokenizer, DataOptions(validation=0.5))
    assert (len(prepared.train), len(prepared.validation)) == (50, 10)


def test_rows_that_are_left_out_are_counted(tokenizer, tmp_path):
    long = {"prompt": "a " * 50, "completion": "b " * 200}
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a"}, {"prompt": 1, "completion": "b"}, long]
    rows += [{"prompt": "a " * 200, "completion": "b"}]
    path = lines(tmp_path / "a.jsonl", rows)

    def run(**options) -> Prepared:
        return prepare(path, tokenizer, DataOptions(max_length=100, validation=0.0, **options))

    prepared = run(on_bad_row="skip")
    assert len(prepared.train) == 2 and prepared.truncated == 1
    assert {reason: found.count for reason, found in prepared.skipped.items()} == {
        "the row has no known format": 1,
        "prompt is no text": 1,
        "no token with loss within 100 tokens": 1,
    }
    assert [example for found in prepared.skipped.values() for example in found.examples] == [
        f"{path}:2: the row has no known format: it has prompt; give messages, or prompt and completion, or "
        "instruction and output, or text",
        f"{path}:3: prompt is no text: it is 1",
        f"{path}:5: no token with loss within 100 tokens: the prompt fills them: raise max_length",
    ]
    prepared = run(on_bad_row="skip", on_long="skip")
    assert len(prepared.train) == 1 and prepared.truncated == 0
    assert prepared.skipped["longer than 100 tokens"].count == 2
    with pytest.raises(GemkitError, match=r"a.jsonl:4: longer than 100 tokens: it has \d+; shorten it"):
        run(on_bad_row="skip", on_long="fail")
    with pytest.raises(GemkitError, match=r"a.jsonl:2: .*--on-bad-row skip"):
        run()
    lines(path, [rows[0], rows[4]])
    with pytest.raises(GemkitError, match=r"a.jsonl:2: no token with loss"):
        run()
    lines(path, rows[3:])  # rows too long are no bad rows
    assert len(run(on_bad_row="skip").train) == 1
    with pytest.raises(GemkitError, match=r"has no row to train on: 2 left out: longer than 100 tokens \(2\)"):
        run(on_long="skip")


def test_a_set_without_training_rows_is_refused(tokenizer, tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(GemkitError, match="no row to train on: all are in the validation part"):
        prepare(path, tokenizer, DataOptions(validation=0.99))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_length": 1}, "max_length is 1: give at least 2"),
        ({"max_length": 2.5}, "max_length is 2.5"),
        ({"validation": 1}, "validation is 1: give a share"),
        ({"validation": "5%"}, "validation is '5%'"),
        ({"validation": float("nan")}, "validation is nan"),
        ({"template": "gemma"}, "template is 'gemma': give one of chat, none"),
        ({"on_long": "cut"}, "on_long is 'cut': give one of truncate, skip, fail"),
        ({"on_bad_row": None}, "on_bad_row is None: give one of fail, skip"),
        ({"mask_prompt": "no"}, "mask_prompt is 'no'; give True or False"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(UsageError, match=words):
        DataOptions(**options)


def test_samples_are_small(tokenizer, tmp_path):
    (sample,) = prepare(lines(tmp_path / "a.jsonl", [{"text": "a b"}]), tokenizer, DataOptions(validation=0)).train
    assert sample.tokens.dtype == np.int32 and sample.loss.dtype == np.bool_
