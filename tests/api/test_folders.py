"""A folder as Hugging Face and peft write it, from load to text, compared with their own results. Budget: 60 s."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from engine.vocabulary import vocabulary
from parity import transformers_models as hf
from weights.files import tiny_config, tiny_params

import gemkit
from gemkit.api import load as loading
from gemkit.cli import main
from gemkit.engine.sampling import Sampling
from gemkit.errors import GemkitError, UsageError
from gemkit.text.spm_proto import write_model

TEXT = "the sea was calm and the boats lay in the harbour"
CONFIG = tiny_config("gemma3_text", head_dim=32, vocab_size=len(vocabulary().pieces))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A model's folder and those of two adapters."""
    root = tmp_path_factory.mktemp("folders")
    model = hf.build(CONFIG, tiny_params(CONFIG), torch.float32)
    model.save_pretrained(root / "model", max_shard_size="40KB")
    (root / "model" / "tokenizer.model").write_bytes(write_model(vocabulary()))
    for number, name in enumerate(("first", "second")):
        torch.manual_seed(number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.LoraConfig(
                task_type="CAUSAL_LM",
                r=3 + number,
                lora_alpha=9,
                target_modules=["q_proj", "down_proj"],
                use_dora=name == "second",
            )
            adapted = peft.get_peft_model(model, config)
            for key, parameter in adapted.named_parameters():
                if "lora_B" in key:
                    torch.nn.init.normal_(parameter, std=0.3)
            adapted.save_pretrained(root / name)
            model = adapted.unload()
    assert len(list((root / "model").glob("*.safetensors"))) > 1
    return root


def run(capsys, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main(list(args))
    output = capsys.readouterr()
    return exit_.value.code or 0, output.out, output.err


def theirs(world: Path, ids: list[int], adapter: str | None) -> np.ndarray:
    """transformers' log-probabilities of ids[1:]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, world / adapter)
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    return logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


@pytest.mark.parametrize("adapter", [None, "first", "second"])
def test_scores_equal_theirs(world, adapter):
    with gemkit.load(
        world / "model", threads=2, activations="float32", adapter=world / adapter if adapter else None
    ) as model:
        ours = model.score(TEXT)
        assert np.abs(ours.logprobs - theirs(world, ours.ids, adapter)).max() < 2e-4
        base = model.score(TEXT, adapter="base").logprobs
        assert np.array_equal(base, ours.logprobs) == (adapter is None)


@pytest.mark.parametrize("adapter", ["first", "second"])
@pytest.mark.parametrize("backend", ["torch", "jax", "keras"])
def test_frameworks_run_one_adapter(world, backend, adapter, monkeypatch):
    """In all requests; the second is DoRA."""
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    with gemkit.load(world / "model", threads=1, backend=backend, adapter=world / adapter) as model:
        ours = model.score(TEXT)
        assert np.abs(ours.logprobs - theirs(world, ours.ids, adapter)).max() < 2e-4
        with pytest.raises(GemkitError, match="runs the adapter in all requests"):
            model.score(TEXT, adapter="base")
        assert len(model.generate(TEXT, max_tokens=3, ignore_eos=True).ids) == 3


def test_every_request_has_its_adapter(world):
    """In one batch, the same bits as each alone."""
    adapters = {"first": world / "first", "second": world / "second"}
    options = {"max_tokens": 12, "ignore_eos": True}
    drawn = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 7, "logprobs": 0}
    with gemkit.load(world / "model", threads=2, adapter=adapters) as model:
        alone = [
            model.generate(TEXT, adapter=name, **drawn, **options).logprobs
            for name in ("first", "second", None, "first")
        ]
        engine = model.engine
        requests = [
            engine.prepare(model.tokenizer.encode(TEXT), Sampling(**drawn), **options, adapter=number)
            for number in (0, 1, -1, 0)
        ]
        for request in requests:
            engine.submit(request)
        while not all(request.finished for request in requests):
            engine.step()
        assert [[token.logprob for token in request.tokens] for request in requests] == alone
        assert alone[0] == alone[3] and len({tuple(values) for values in alone}) == 3
        with pytest.raises(UsageError, match="there is no adapter 'third': choose from first, second, base"):
            model.generate(TEXT, adapter="third")


@pytest.mark.parametrize("dtype, kind", [("auto", "F32"), ("bfloat16", "BF16"), ("int8", "Q8_0")])
def test_the_type_of_the_weights_is_chosen_and_stated(world, dtype, kind, capsys):
    arguments = [str(world / "model"), "--dtype", dtype, "--threads", "2"]
    code, out, _ = run(capsys, "show", *arguments, "--json")
    sizes = json.loads(out)["bytes_by_type"]
    assert code == 0 and max(sizes, key=sizes.get) == kind
    options = ["--prompt", TEXT, "--max-tokens", "4", "--temp", "0", "--verbose"]
    code, _, err = run(capsys, "generate", *arguments, *options)
    assert code == 0 and f"weights: {'float32' if dtype == 'auto' else dtype} ({kind})" in err


def test_the_second_start_maps_converted_weights(world, tmp_path, monkeypatch):
    monkeypatch.setenv("GEMKIT_CACHE", str(tmp_path))
    scores = []
    for _ in range(2):
        with gemkit.load(world / "model", threads=2, dtype="int8") as model:
            scores.append(model.score(TEXT).logprobs)
            model.settle()
    assert len(list((tmp_path / "packed").glob("*.packed"))) == 1
    assert np.array_equal(*scores)


def test_an_adapter_on_the_command_line(world, capsys):
    arguments = ["score", str(world / "model"), "--text", TEXT, "--json"]
    plain = run(capsys, *arguments)
    adapted = run(capsys, *arguments, "--adapter-path", str(world / "first"))
    assert plain[0] == adapted[0] == 0
    assert json.loads(plain[1])["perplexity"] != json.loads(adapted[1])["perplexity"]
    code, _, err = run(capsys, *arguments, "--adapter-path", str(world / "model"))
    assert code == 1 and "adapter_config.json" in err


@pytest.mark.parametrize("backend", ["torch", "jax", "keras"])
def test_every_backend_says_what_the_native_core_says(world, backend):
    with gemkit.load(world / "model", threads=1, backend=backend, device="cpu") as model:
        ours = model.score(TEXT)
        assert np.abs(ours.logprobs - theirs(world, ours.ids, None)).max() < 2e-4
        text = model.generate(TEXT, max_tokens=8, temperature=0.0, ignore_eos=True)
    with gemkit.load(world / "model", threads=2, activations="float32") as model:
        assert model.generate(TEXT, max_tokens=8, temperature=0.0, ignore_eos=True).ids == text.ids


@pytest.fixture(scope="module")
def speller(tmp_path_factory) -> Path:
    """A model that writes "stop" after "x" and then ends: the head has each letter's row at the one before."""
    size = len(vocabulary().pieces)
    config = tiny_config("gemma3_text", head_dim=32, vocab_size=size, hidden_size=size + 20, tie_word_embeddings=False)
    params = {name: np.zeros_like(value) for name, value in tiny_params(config).items()}
    np.fill_diagonal(params["model.embed_tokens.weight"], 1)
    letters = [vocabulary().pieces.index(letter.encode()) for letter in "xstop"]
    for before, letter in zip(letters, [*letters[1:], 1]):
        params["lm_head.weight"][letter, before] = 5
    folder = tmp_path_factory.mktemp("speller") / "model"
    hf.build(config, params, torch.float32).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(write_model(vocabulary()))
    return folder


@pytest.mark.parametrize("backend", ["native", "torch", "jax", "keras"])
def test_generation_ends_after_any_stop_id_that_the_files_name(speller, tmp_path, backend):
    folder = tmp_path / "model"
    shutil.copytree(speller, folder)
    s, t, o, p = (vocabulary().pieces.index(letter.encode()) for letter in "stop")
    options = {"max_tokens": 8, "temperature": 0.0}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 9, o]}))
    with gemkit.load(folder, threads=1, backend=backend) as model:
        assert o in model.stop_ids and o not in model.tokenizer.stop_ids
        answer = model.generate("x", **options)
        assert (answer, answer.ids, answer.finish_reason) == ("st", [s, t, o], "stop")
        assert "".join(model.stream("x", **options)) == "st"
        assert model.generate("x", **options, ignore_eos=True).ids[:5] == [s, t, o, p, 1]
    (folder / "generation_config.json").unlink()
    with gemkit.load(folder, threads=1, backend=backend) as model:
        answer = model.generate("x", **options)
        assert (answer, answer.ids) == ("stop", [s, t, o, p, 1])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"backend": "onnx"}, "choose from native, torch, jax, keras"),
        ({"backend": "keras", "dtype": "int8"}, "with the backend keras choose from auto, bfloat16, float32, float16"),
        ({"dtype": "float16"}, "with the backend native choose from auto, bfloat16, float32, int8"),
        ({"device": "cuda"}, "the native backend runs on the CPU: choose backend torch or jax"),
        ({"backend": "torch", "activations": "float32"}, "are for the native backend"),
        ({"backend": "torch", "adapter": {"a": "x"}}, "adapters by name are for the native backend: give one adapter"),
    ],
)
def test_what_a_backend_cannot_do_is_refused(world, options, words):
    with pytest.raises(UsageError, match=words):
        gemkit.load(world / "model", **options)


def test_a_tokenizer_is_found_again_without_opening_the_folder(world, tmp_path, monkeypatch):
    """Until one of the files that it is read from changes."""
    monkeypatch.setenv("GEMKIT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    shutil.copytree(world / "model", folder)
    assert loading._remembered_tokenizer(folder) is None
    gemkit.load(folder, threads=1).close()
    known = loading._remembered_tokenizer(folder)
    assert known is not None and known.encode("the sea") == gemkit.load(folder, threads=1).tokenizer.encode("the sea")
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (folder / name).write_text('{"x": 1}')
        assert loading._remembered_tokenizer(folder) is None
    (tmp_path / "gguf").mkdir()
    assert loading._remembered_tokenizer(tmp_path / "gguf") is None
