"""Converted models load in transformers and llama.cpp and say the same. Budget: 110 s."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from engine.vocabulary import vocabulary
from parity.cases import CASES
from parity.tolerances import relative_error
from weights.files import tiny_config, tiny_params
from weights.google.official_files import save_torch, torch_state

import gemkit
from gemkit.cli import main
from gemkit.errors import GemkitError, UsageError
from gemkit.hub.demo import demo_path
from gemkit.text.spm_proto import write_model
from gemkit.tools.convert import SAMPLE, convert, verify
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.google.orbax_write import write_orbax
from gemkit.weights.hf.write import write_hf
from gemkit.weights.open import open_checkpoint
from gemkit.weights.quant import GGMLType

TEXT = "the sea was calm and the boats lay in the harbour"
MODELS = ("gemma", "gemma2", "gemma3_text")


def tiny(model_type: str, kind: GGMLType = GGMLType.F32) -> Checkpoint:
    config = tiny_config(model_type, head_dim=32, vocab_size=len(vocabulary().pieces))
    return Checkpoint.from_params(config, tiny_params(config), kind, vocabulary(), name="Tiny")


def equal(one, other) -> bool:
    with open_checkpoint(one) as a, open_checkpoint(other) as b:
        assert a.config.layers == b.config.layers and set(a.config.stop_token_ids) == set(b.config.stop_token_ids)
        assert a.tensors.keys() == b.tensors.keys()
        return all(np.array_equal(a.tensors[name].to_float32(), b.tensors[name].to_float32()) for name in a.tensors)


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("kind", [GGMLType.F32, GGMLType.Q8_0, GGMLType.BF16])
def test_there_and_back_loses_nothing(tmp_path, model_type, kind):
    start = write_gguf(tmp_path / "start.gguf", tiny(model_type, kind))
    folder = convert(start, tmp_path / "folder", "hf")
    back = convert(folder, tmp_path / "back.gguf", "gguf")
    assert equal(start, folder) and equal(folder, back)
    found = verify(start, back, TEXT)
    assert found.tensor is None and found.same_ids and found.logits == found.kl == 0 and found.agreement == 1


@pytest.mark.parametrize("model_type", MODELS)
def test_through_a_flax_folder_and_back_loses_nothing(tmp_path, model_type):
    start = write_gguf(tmp_path / "start.gguf", tiny(model_type, GGMLType.BF16))
    folder = convert(start, tmp_path / "flax", "orbax")
    back = convert(folder, tmp_path / "hf", "hf")
    assert equal(start, folder) and equal(folder, back)
    found = verify(start, folder, TEXT)
    assert found.tensor is None and found.same_ids and found.logits == found.kl == 0 and found.agreement == 1
    with gemkit.load(folder, threads=2) as one, gemkit.load(start, threads=2) as other:
        assert (
            one.generate(TEXT, max_tokens=4, temperature=0).ids == other.generate(TEXT, max_tokens=4, temperature=0).ids
        )


@pytest.mark.parametrize("name", ["gemma1_2b", "gemma3"])
def test_googles_pytorch_checkpoints_are_a_source(tmp_path, name):
    config = dataclasses.replace(CASES[name].config, vocab_size=len(vocabulary().pieces))
    path = save_torch(tmp_path / "theirs" / "model.ckpt", torch_state(config), config)
    (path.parent / "tokenizer.model").write_bytes(write_model(vocabulary()))
    for to, target in (("hf", tmp_path / "hf"), ("gguf", tmp_path / "x.gguf"), ("orbax", tmp_path / "flax")):
        written = convert(path, target, to)
        found = verify(path, written, TEXT)
        assert found.same_ids and found.logits == 0 and found.tensor is None, to


def test_a_folder_is_not_taken_for_another_one_that_was_loaded_before(tmp_path):
    """The packed copies of weights are found by what a checkpoint was read from."""
    texts = []
    for number in range(2):
        config = tiny_config("gemma", head_dim=32, vocab_size=len(vocabulary().pieces))
        checkpoint = Checkpoint.from_params(config, tiny_params(config, number), GGMLType.BF16, vocabulary())
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        folder = write_orbax(tmp_path / "model", checkpoint)
        for _ in range(2):
            with gemkit.load(folder, threads=2) as model:
                texts.append(model.score(TEXT).logprobs.tolist())
    assert texts[0] == texts[1] != texts[2] == texts[3]


@pytest.mark.parametrize("model_type", MODELS)
def test_transformers_loads_the_folder(tmp_path, model_type):
    """Logits, tokenizer and stop ids, from several shards."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write_hf(tmp_path / "folder", tiny(model_type), shard_bytes=100_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with gemkit.load(folder, threads=2, activations="float32") as model:
        ids = model.tokenizer.encode(TEXT)
        assert tokenizer(TEXT).input_ids == ids
        with torch.inference_mode():
            logprobs = torch.log_softmax(theirs(torch.tensor([ids])).logits[0].double(), -1)
        expected = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
        assert np.abs(model.score(TEXT).logprobs - expected).max() < 2e-4
        assert set(theirs.generation_config.eos_token_id) == set(model.config.stop_token_ids)
    assert "Gemma Terms of Use" in (folder / "NOTICE").read_text()


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The demo as a folder in bfloat16."""
    return convert(demo_path(), tmp_path_factory.mktemp("real") / "demo", "hf", "bfloat16")


def test_transformers_writes_the_same_text(real):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real)
    theirs = AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32)
    prompt = "The planets, in order from the Sun, are  \n\n\tMercury, 金星, <b>Earth</b>,"
    with gemkit.load(real, threads=2, activations="float32") as model:
        ids = model.tokenizer.encode(prompt)
        assert tokenizer(prompt).input_ids == ids
        with torch.inference_mode():
            out = theirs.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)
        assert model.generate(prompt, max_tokens=8, temperature=0.0).ids == out[0, len(ids) :].tolist()


def test_llama_cpp_reads_what_was_a_folder(real, tmp_path):
    from parity.test_native_real import llama_cpp_nll

    file = convert(real, tmp_path / "demo.gguf", "gguf", "int8")
    with gemkit.load(file, threads=2) as model:
        ids = np.array(model.tokenizer.encode(SAMPLE), np.int32)
        ours = -float(model.score(ids.tolist()).logprobs.mean())
        assert llama_cpp_nll(file, ids, model.config.vocab_size) == pytest.approx(ours, rel=1e-2)


def test_the_command_reports(tmp_path, capsys):
    start = write_gguf(tmp_path / "start.gguf", tiny("gemma3_text"))

    def run(*args: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as exit_:
            main(["convert", str(start), *map(str, args)])
        output = capsys.readouterr()
        return exit_.value.code or 0, output.out or output.err

    code, out = run(tmp_path / "same", "--to", "hf", "--verify")
    assert code == 0 and "none, all are equal" in out, out
    code, out = run(tmp_path / "rounded.gguf", "--to", "gguf", "--dtype", "int8", "--verify", "--json")
    found = json.loads(out)["verify"]
    assert code == 0 and found["tensor"][0] == "model.embed_tokens.weight" and 0 < found["logits"] < 0.2


def test_what_cannot_be_converted_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    start = write_gguf(tmp_path / "start.gguf", tiny("gemma3_text"))
    with pytest.raises(UsageError, match="no int8 blocks"):
        convert(start, tmp_path / "x", "hf", "int8")
    for dtype in ("int8", "float16"):
        with pytest.raises(UsageError, match="float32 or bfloat16"):
            convert(start, tmp_path / "x", "orbax", dtype)
    with pytest.raises(GemkitError, match="exists"):
        convert(start, start, "gguf")
    large = tiny("gemma")
    large.tensors["model.layers.0.mlp.up_proj.weight"].data.view("<f4")[0] = 1e5
    huge = write_gguf(tmp_path / "huge.gguf", large)
    with pytest.raises(GemkitError, match=r"model\.layers\.0\.mlp\.up_proj\.weight: a number is too large for float16"):
        convert(huge, tmp_path / "half", "hf", "float16")
    monkeypatch.setattr("gemkit.weights.hf.write.NOTICE", None)
    with pytest.raises(TypeError):
        convert(start, tmp_path / "half", "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["huge.gguf", "start.gguf"]


def test_every_case_is_a_folder_that_reads_back(tmp_path):
    for name in ("gemma1_7b", "gemma2", "gemma3", "untied_embedding"):
        case = CASES[name]
        folder = write_hf(tmp_path / name, Checkpoint.from_params(case.config, case.params()))
        with open_checkpoint(folder) as back:
            assert back.config.layers == case.config.layers
            for key, value in case.params().items():
                assert relative_error(back.tensors[key].to_float32(), value) == 0
