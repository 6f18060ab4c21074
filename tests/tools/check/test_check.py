"""Every planted fault is found by its rule, healthy models pass in silence, broken files never crash. Budget: 30 s."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest

import gemkit
from gemkit.arch.hf_config import to_hf
from gemkit.errors import GemkitWarning, UsageError
from gemkit.hub.demo import demo_path
from gemkit.text.spm_proto import write_model
from gemkit.text.tokenizer_json import write_tokenizer_json
from gemkit.text.vocabulary import PieceType, Vocabulary
from gemkit.tools.check import RULES, Finding, check, files, norms, read, tokenizers
from gemkit.tools.check.finding import LEVELS
from gemkit.tools.check.subject import HF, Subject, TensorView
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.google.orbax_write import write_orbax
from gemkit.weights.quant import GGMLType, quantise

from . import models
from .faults import FAULTS, settings

# Published sizes are too large for weights in a test: these folders have only their configuration.
WITHOUT_WEIGHTS = {"1b", "4b", "9b", "27b"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Healthy models by the names that faults use; each is made when it is first asked for."""
    root = tmp_path_factory.mktemp("healthy")
    make = {
        "hf1": lambda p: models.hf_folder(p, "gemma"),
        "hf2": lambda p: models.hf_folder(p, "gemma2"),
        "hf3": lambda p: models.hf_folder(p, "gemma3_text"),
        "pretrained": lambda p: models.hf_folder(p, "gemma3_text", tuned=False),
        "both": lambda p: models.folder_with_both(p),
        "narrow": lambda p: models.hf_folder(p, "gemma3_text", head_dim=16),
        "sharded": lambda p: models.sharded_folder(p, "gemma3_text"),
        "exported1": lambda p: models.exported_folder(p, "gemma"),
        "exported3": lambda p: models.exported_folder(p, "gemma3_text"),
        "gguf1": lambda p: models.gguf_file(p.with_suffix(".gguf"), "gemma"),
        "gguf2": lambda p: models.gguf_file(p.with_suffix(".gguf"), "gemma2"),
        "gguf3": lambda p: models.gguf_file(p.with_suffix(".gguf"), "gemma3_text"),
        "gguf pretrained": lambda p: models.gguf_file(p.with_suffix(".gguf"), "gemma3_text", tuned=False),
        "keras": lambda p: models.keras_folder(p),
        "keras1": lambda p: models.keras_folder(p, third=False),
        "1b": lambda p: models.published_folder(p, "gemma-3-1b-pt"),
        "4b": lambda p: models.published_folder(p, "gemma-3-4b-pt"),
        "27b": lambda p: models.published_folder(p, "gemma-3-27b-pt"),
        "9b": lambda p: models.published_folder(p, "gemma-2-9b"),
    }

    class Made(dict):
        def __missing__(self, name: str) -> Path:
            self[name] = make[name](
                root / f"{name}-it" if name.startswith(("hf", "sharded", "both", "narrow")) else root / name
            )
            return self[name]

    return Made()


def rules(findings: list[Finding]) -> set[str]:
    return {finding.rule for finding in findings}


def text_of(finding: Finding) -> str:
    return f"{finding.where}: {finding.found}"


def assert_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without errors must load, in the engine itself."""
    monkeypatch.setenv("GEMKIT_PACKED", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GemkitWarning)
        gemkit.load(path, threads=1).close()


HEALTHY = ["hf1", "hf2", "hf3", "pretrained", "sharded", "both", "exported1", "exported3"]
HEALTHY += ["gguf1", "gguf2", "gguf3", "gguf pretrained", "keras", "keras1"]


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_found_in_a_healthy_model_and_it_loads(name, bases, monkeypatch):
    assert check(bases[name], deep=True) == []
    if not name.startswith("keras"):
        assert_loads(bases[name], monkeypatch)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_by_its_rule_alone(name, bases, tmp_path, monkeypatch):
    fault = FAULTS[name]
    before = {text_of(f) for f in check(bases[fault.base])} if fault.base in WITHOUT_WEIGHTS else set()
    path = models.copy(bases[fault.base], tmp_path)
    fault.plant(path)
    new = [finding for finding in check(path) if text_of(finding) not in before]
    assert rules(new) == {fault.rule}, [(f.rule, text_of(f)) for f in new]
    assert all("\n" not in text_of(f) and f.what and f.why and f.remedy for f in new)
    if not any(f.level == "error" for f in new) and not before and not fault.base.startswith("keras"):
        assert_loads(path, monkeypatch)


def test_every_rule_has_a_planted_fault():
    unplanted = {rule.id for rule in RULES} - {fault.rule for fault in FAULTS.values()}
    assert unplanted == {"norm-offset-likely"}  # it takes a trained model, and has a test of its own
    assert len(FAULTS) > 80


def test_a_consequence_that_is_left_out_is_a_rule():
    ids = {rule.id for rule in RULES}
    assert all(set(rule.causes) <= ids - {rule.id} for rule in RULES)


def test_a_healthy_tokenizer_as_transformers_saves_it(bases, tmp_path):
    """transformers leaves add_bos_token out and puts the template into a file of its own."""
    import transformers

    folder = models.copy(bases["hf3"], tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert "add_bos_token" not in json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    assert (folder / "chat_template.jinja").exists()
    assert check(folder) == []


def test_a_template_of_tokens_that_only_the_settings_add_is_healthy(bases, tmp_path):
    import safetensors.torch
    import torch

    folder = models.copy(bases["hf3"], tmp_path)
    rows = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"]
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("embed_tokens.weight"))
    weights[name] = torch.cat([weights[name], weights[name][:2]])
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    settings("config.json", vocab_size=rows + 2)(folder)
    names = ["<|im_start|>", "<|im_end|>"]
    added = {str(rows + at): {"content": name, "special": True} for at, name in enumerate(names)}
    source = (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    settings("tokenizer_config.json", added_tokens_decoder=added, chat_template=source, eos_token=names[1])(folder)
    assert {f.rule for f in check(folder) if f.level == "error"} == set()
    settings("tokenizer_config.json", chat_template=source.replace("im_end", "no_such"))(folder)
    found = check(folder)
    assert {f.rule for f in found if f.level == "error"} == set()
    assert "template-markers" in {f.rule for f in found if f.level == "warning"}


def test_the_demo_model_is_clean():
    assert check(demo_path()) == []


def test_multimodal_files_are_healthy_too(bases, tmp_path):
    """The text model under the other prefixes, with an image tower, with the configuration nested."""
    from safetensors.torch import load_file, save_file

    for number, prefix in enumerate(("language_model.model.", "model.language_model.")):
        folder = models.copy(bases["hf3"], tmp_path / str(number))
        tensors = load_file(folder / "model.safetensors")
        renamed = {prefix + name.removeprefix("model."): value for name, value in tensors.items()}
        tower = {"vision_tower.embeddings.weight": next(iter(tensors.values())).clone()}
        save_file(renamed | tower, folder / "model.safetensors")
        inner = json.loads((folder / "config.json").read_text("utf-8"))
        outer = {"model_type": "gemma3", "text_config": inner, "eos_token_id": [1, 106], "vision_config": {}}
        models.write_json(folder / "config.json", outer)
        assert check(folder) == []


def test_packed_weights_of_other_projects_are_not_compared(bases, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = models.copy(bases["hf3"], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        tensors[name.replace(".weight", ".qweight")] = tensors.pop(name).int()
    save_file(tensors, folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    models.write_json(folder / "config.json", settings | {"quantization_config": {"quant_method": "gptq"}})
    found = check(folder)
    assert rules(found) == {"type-unread"}


def test_in_a_hub_cache_the_name_is_the_models_and_no_notice_is_asked_for(bases, tmp_path):
    folder = tmp_path / "models--google--gemma-3-1b-pt" / "snapshots" / "0123abc"
    folder.parent.mkdir(parents=True)
    models.copy(bases["hf3"], tmp_path).rename(folder)
    (folder / "NOTICE").unlink()
    assert rules(check(folder)) == {"template-pretrained"}
    other = folder.parents[1].rename(tmp_path / "models--google--shieldgemma-2b") / "snapshots" / "0123abc"
    FAULTS["eos without the turn"].plant(other)
    FAULTS["no generation prompt"].plant(other)
    assert check(other) == []


def test_rounded_norms_are_judged_by_statistics():
    """The demo's own norms as bfloat16, right and with a one too many, which leaves no other trace."""
    demo = read(demo_path())

    def subject(shift: float) -> Subject:
        views = []
        for view in norms._norms(demo):
            values = view.numbers().reshape(-1) - 1 + np.float32(shift)
            stored = quantise(GGMLType.BF16, values)
            views.append(TensorView(view.name, view.key, "BF16", view.shape, "x", GGMLType.BF16, stored))
        return Subject(Path("x"), HF, family="gemma3_text", tensors=views)

    assert not list(norms.likely(subject(0))) and not list(norms.certain(subject(0)))
    assert [found for _, found in norms.likely(subject(1))] and not list(norms.certain(subject(1)))
    assert [found for _, found in norms.likely(subject(-1))]


@pytest.mark.parametrize("kind", ["flax", "ckpt", "ckpt file"])
def test_googles_own_checkpoints_are_read_as_they_are_loaded(kind, tmp_path, monkeypatch):
    from weights.files import tiny_config
    from weights.google import official_files

    config = tiny_config("gemma3_text", vocab_size=models.PIECES, head_dim=32)
    tokenizer = models.vocabulary("gemma3_text")

    def save(name: str, value: float) -> Path:
        params = models.params_of(config)
        params["model.layers.3.mlp.down_proj.weight"][2, 5] = value
        if kind == "flax":
            folder = write_orbax(tmp_path / name, Checkpoint.from_params(config, params, vocabulary=tokenizer))
        else:
            state = official_files.torch_state(config)
            state["model.layers.3.mlp.down_proj.weight"][2, 5] = value
            folder = official_files.save_torch(tmp_path / name / "model.ckpt", state, config).parent
        (folder / "config.json").write_text(json.dumps(to_hf(config)))
        (folder / "tokenizer.model").write_bytes(write_model(tokenizer))
        (folder / "NOTICE").write_text(files.TERMS)
        return folder / "model.ckpt" if kind == "ckpt file" else folder

    good = save("good", 0.01)
    assert check(good) == [] and read(good).kind == "google"
    assert_loads(good, monkeypatch)
    assert rules(check(save("nan", float("nan")))) == {"not-finite"}
    lacking = save("lacking", 0.01)
    (lacking.parent / "tokenizer.model" if kind == "ckpt file" else lacking / "tokenizer.model").unlink()
    assert any(f.level == "error" for f in check(lacking))


def test_two_tokenizers_with_equal_pieces_and_other_merges_differ(tmp_path):
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    pieces = [*special, *(f"<0x{i:02X}>" for i in range(256)), "h", "e", "r", "he", "er"]
    kinds = [PieceType.CONTROL] * 6 + [PieceType.BYTE] * 256 + [PieceType.NORMAL] * 5
    kinds[3] = PieceType.UNKNOWN

    def vocabulary(he: float, er: float) -> Vocabulary:
        scores = np.array([0.0] * 262 + [-10.0, -11.0, -12.0, he, er], np.float32)
        return Vocabulary([piece.encode() for piece in pieces], scores, np.array(kinds, np.int32))

    (tmp_path / "tokenizer.json").write_bytes(write_tokenizer_json(vocabulary(-1, -2)))
    for he, er, differs in ((-1, -2, False), (-2, -1, True)):
        (tmp_path / "tokenizer.model").write_bytes(write_model(vocabulary(he, er)))
        assert bool(list(tokenizers._encodings(tmp_path))) is differs


def test_deep_reads_what_sampling_leaves_out(tmp_path, bases):
    from safetensors.torch import load_file, save_file

    folder = models.copy(bases["hf3"], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    import torch

    rows = 1 << 17
    big = torch.full((rows, 32), 0.5)
    big[1000:, 0] = torch.arange(rows - 1000)
    big[1234, 5] = float("nan")
    tensors["model.embed_tokens.weight"] = big
    save_file(tensors, folder / "model.safetensors")
    models.write_json(folder / "config.json", config | {"vocab_size": rows})
    assert "not-finite" not in rules(check(folder))
    assert [f.where for f in check(folder, deep=True) if f.rule == "not-finite"] == [
        "model.safetensors: model.embed_tokens.weight"
    ]


def test_findings_are_sorted_and_say_where(bases, tmp_path):
    folder = models.copy(bases["hf3"], tmp_path)
    for name in ("eps", "nan", "no notice", "dtype float16", "pickle"):
        FAULTS[name].plant(folder)
    found = check(folder)
    order = [LEVELS.index(f.level) for f in found]
    assert order == sorted(order) and {"rms-eps", "not-finite", "terms", "half", "pickle"} <= rules(found)
    nan = next(f for f in found if f.rule == "not-finite")
    assert nan.where == "model.safetensors: model.layers.0.mlp.down_proj.weight"


def test_rules_are_well_formed():
    ids = [rule.id for rule in RULES]
    assert len(ids) == len(set(ids)) > 50
    for rule in RULES:
        assert rule.level in LEVELS and rule.what.endswith(".") and not rule.remedy.endswith(".")
        assert "\n" not in rule.what + rule.why + rule.remedy and "|" not in rule.what + rule.why


def test_nothing_to_check(tmp_path):
    for path in (tmp_path, tmp_path / "nothing.gguf", Path(os.devnull)):
        with pytest.raises(UsageError):
            check(path)


@pytest.mark.parametrize("base", ["hf3", "gguf3", "keras"])
def test_damaged_files_never_crash_and_load_if_no_error_is_found(base, bases, tmp_path, monkeypatch):
    """Random bytes in, and ends cut off, every kind of file: there are findings, and nothing else."""
    path = models.copy(bases[base], tmp_path)
    targets = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file() and p.name != "NOTICE"]
    rng = np.random.default_rng(3)
    for round_ in range(60 if path.is_file() else 16):
        target = targets[round_ % len(targets)]
        whole = target.read_bytes()
        bad = bytearray(whole[: int(rng.integers(0, len(whole)))] if round_ % 3 == 0 else whole)
        reach = min(len(bad), 20_000)
        for at in rng.integers(0, max(1, reach), 5 if reach else 0).tolist():
            bad[at] = int(rng.integers(0, 256))
        target.write_bytes(bad)
        found = check(path)
        assert all("\n" not in text_of(f) for f in found)
        if base != "keras" and not any(f.level == "error" for f in found):
            assert_loads(path, monkeypatch)
        target.write_bytes(whole)


HOSTILE_JSON = {
    "deep": b"[" * 100_000,
    "list": b"[]",
    "number": b"1e999",
    "null": b"null",
    "long number": b'{"hidden_size": ' + b"9" * 5000 + b"}",
    "not utf-8": b'{"a": "\xff"}',
    "types": json.dumps(
        {
            key: [{"a": None}]
            for key in "model_type hidden_size vocab_size layer_types rope_parameters eos_token_id bos_token_id dtype "
            "text_config add_bos_token chat_template added_tokens model post_processor weight_map config".split()
        }
    ).encode(),
    "objects": json.dumps(
        {key: {"vocab": {}} for key in "hidden_size eos_token_id chat_template model weight_map post_processor".split()}
        | {"model_type": "gemma3_text"}
    ).encode(),
    "huge": json.dumps(
        {"model_type": "gemma2", "num_hidden_layers": 65535, "hidden_size": 2**30, "intermediate_size": 2**30}
    ).encode(),
    "control letters": json.dumps({"model_type": "\x1b[31m\n" * 1000, "class_name": "GemmaBackbone\n"}).encode(),
}


@pytest.mark.parametrize("case", HOSTILE_JSON)
def test_hostile_json_never_crashes(case, bases, tmp_path):
    whole_objects = case in ("types", "objects", "huge", "control letters")  # some files may hold anything
    for base in ("hf3", "keras"):
        folder = models.copy(bases[base], tmp_path)
        for target in sorted(folder.rglob("*.json")):
            whole = target.read_bytes()
            target.write_bytes(HOSTILE_JSON[case])
            found = check(folder)
            assert (found or whole_objects) and all(text_of(f).isprintable() for f in found), target
            target.write_bytes(whole)


def test_a_fifo_and_a_link_to_nowhere_are_not_read_but_said(bases, tmp_path):
    folder = models.copy(bases["hf3"], tmp_path)
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to(folder / "nowhere")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "chat_template.jinja")
        os.mkfifo(folder / "other.safetensors")
    assert rules(check(folder)) == {"unloadable"}
