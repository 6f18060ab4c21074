"""Stop ids that the files of a folder name; transformers says which id a token has. Budget: 10 s."""

import json
from pathlib import Path

import pytest
from engine.vocabulary import vocabulary

from gemkit.errors import GemkitError
from gemkit.text.spm_proto import write_model
from gemkit.text.tokenizer_json import write_tokenizer_json
from gemkit.weights.hf.stop import special_tokens, stop_ids

SIZE = len(vocabulary().pieces)


def write(folder: Path, **files: object) -> Path:
    for name, data in files.items():
        (folder / f"{name}.json").write_text(json.dumps(data))
    return folder


def added(*names: str, at: int) -> dict:
    return {str(at + i): {"content": name, "special": True} for i, name in enumerate(names)}


def test_of_generation_config(tmp_path):
    assert stop_ids(tmp_path, SIZE) == ()
    for eos, wanted in [([7, 1, 7], (7, 1)), (9, (9,)), (None, ()), ([], ())]:
        assert stop_ids(write(tmp_path, generation_config={"eos_token_id": eos}), SIZE) == wanted
    assert stop_ids(write(tmp_path, generation_config={"eos_token_id": [SIZE, 7, -1]}), SIZE) == (7,)
    for wrong in ("1", [1, None], True, 1.0, {}):
        with pytest.raises(GemkitError, match=r"generation_config\.json: eos_token_id names"):
            stop_ids(write(tmp_path, generation_config={"eos_token_id": wrong}), SIZE)


@pytest.mark.parametrize("eos", ["<|im_end|>", {"__type": "AddedToken", "content": "<|im_end|>", "special": True}])
def test_of_the_tokenizers_eos_token(tmp_path, eos):
    rows = added("<|im_start|>", "<|im_end|>", at=4)
    write(tmp_path, generation_config={"eos_token_id": 1})
    write(tmp_path, tokenizer_config={"eos_token": eos, "added_tokens_decoder": rows})
    assert stop_ids(tmp_path, SIZE) == (1, 5)
    assert stop_ids(tmp_path, 5) == (1,)  # a token that the embedding lacks ends nothing
    assert stop_ids(write(tmp_path, tokenizer_config={"eos_token": eos}), SIZE) == (1,)
    for odd in (7, None, "", {"content": None}, []):
        assert stop_ids(write(tmp_path, tokenizer_config={"eos_token": odd, "added_tokens_decoder": rows}), SIZE) == (
            1,
        )


def test_newer_files_list_the_token_in_the_tokenizer_alone(tmp_path):
    import transformers

    data = json.loads(write_tokenizer_json(vocabulary()))
    data["added_tokens"].append({**data["added_tokens"][-1], "id": SIZE, "content": "<|im_end|>", "special": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    write(tmp_path, tokenizer_config={"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert stop_ids(tmp_path, SIZE + 1) == (theirs.eos_token_id,) == (SIZE,)
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"id": ')
    assert stop_ids(tmp_path, SIZE + 1) == ()
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(write_model(vocabulary()))
    assert stop_ids(tmp_path, SIZE) == ()
    assert stop_ids(tmp_path, SIZE + 1) == (SIZE,)  # added for its name
    for eos in ("<end_of_turn>", "<eos>"):
        wanted = vocabulary().pieces.index(eos.encode())
        assert stop_ids(write(tmp_path, tokenizer_config={"eos_token": eos}), SIZE) == (wanted,)


@pytest.mark.parametrize("pieces", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("where", ["decoder", "old list", "map", "old list alone", "extra", "name alone"])
def test_of_tokens_that_older_files_add(tmp_path, pieces, where):
    import transformers

    data = {"tokenizer.json": write_tokenizer_json, "tokenizer.model": write_model}[pieces](vocabulary())
    (tmp_path / pieces).write_bytes(data if isinstance(data, bytes) else data.encode())
    names = ["<|im_start|>", "<|im_end|>"]
    settings, old = {"tokenizer_class": "GemmaTokenizer", "eos_token": "<|im_end|>"}, {}
    if where == "decoder":
        settings["added_tokens_decoder"] = added(*names, at=SIZE)
        old["special_tokens_map"] = {"eos_token": "<eos>"}  # which the list replaces
    elif where == "extra":
        settings["additional_special_tokens"] = names
    elif where != "name alone":
        old["added_tokens"] = {name: SIZE + number for number, name in enumerate(names)}
    if where == "map":
        settings["eos_token"] = "<eos>"
        old["special_tokens_map"] = {"eos_token": {"content": "<|im_end|>"}}
    if where == "old list alone":
        old["special_tokens_map"] = {"eos_token": "<|im_end|>"}
        settings = None
    write(tmp_path, **old, **({"tokenizer_config": settings} if settings else {}))
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token == "<|im_end|>" and theirs.eos_token_id >= SIZE
    assert stop_ids(tmp_path, SIZE + 2) == (theirs.eos_token_id,)
    assert special_tokens(tmp_path)["eos_token"] == "<|im_end|>"
