"""Faults to be planted, one at a time: what is done to which healthy model, and which rule, alone, must say so."""

import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from weights import hf_files

from gemkit.text.spm_proto import read_model, write_model
from gemkit.text.vocabulary import Vocabulary
from gemkit.weights.gguf.container import GGUFFile
from gemkit.weights.quant import GGMLType, dequantise, quantise

from .models import PIECES, TEMPLATE, edit_gguf, gguf_file, write_json

SHARD = "model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1000\n"


@dataclass(frozen=True)
class Fault:
    """base: the healthy model's name in the test. plant: breaks a copy of it."""

    rule: str
    base: str
    plant: Callable[[Path], object]


def settings(name: str, drop: tuple[str, ...] = (), **changes: object) -> Callable[[Path], None]:
    """Changes keys of a JSON file; a dotted key reaches inside, written with two underscores."""

    def plant(folder: Path) -> None:
        data = json.loads((folder / name).read_text("utf-8"))
        for key, value in changes.items():
            *outer, last = key.split("__")
            inner = data
            for part in outer:
                inner = inner.setdefault(part, {})
            inner[last] = value
        for key in drop:
            data.pop(key, None)
        write_json(folder / name, data)

    return plant


def config(drop: tuple[str, ...] = (), **changes: object) -> Callable[[Path], None]:
    return settings("config.json", drop, **changes)


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names]


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data)


def cut(name: str | None, keep: float) -> Callable[[Path], None]:
    """Keeps the first part of a file."""

    def plant(path: Path) -> None:
        target = path / (name or "")
        target.write_bytes(target.read_bytes()[: int(target.stat().st_size * keep)])

    return plant


def weights(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Changes the tensors of a Hugging Face folder in place."""

    def plant(folder: Path) -> None:
        tensors = hf_files.tensors(folder)
        change(tensors)
        hf_files.write(folder, tensors)

    return plant


def put(name: str, at: tuple, value: float, dtype: torch.dtype | None = None) -> Callable[[Path], None]:
    def change(tensors: dict) -> None:
        tensors[name] = tensors[name].to(dtype) if dtype else tensors[name]
        tensors[name][at] = value

    return weights(change)


def rename(change: Callable[[str], str]) -> Callable[[Path], None]:
    def move(tensors: dict) -> None:
        for name in list(tensors):
            tensors[change(name)] = tensors.pop(name)

    return weights(move)


def template(text: str | None, name: str = "tokenizer_config.json") -> Callable[[Path], None]:
    return settings(name, drop=("chat_template",)) if text is None else settings(name, chat_template=text)


def tokenizer(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        data = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        change(data)
        write_json(folder / "tokenizer.json", data)

    return plant


def swapped(data: dict) -> None:
    vocab = data["model"]["vocab"]
    vocab["<start_of_turn>"], vocab["<end_of_turn>"] = vocab["<end_of_turn>"], vocab["<start_of_turn>"]
    for row in data["added_tokens"]:
        row["id"] = vocab[row["content"]]


def demoted(data: dict) -> None:
    for row in data["added_tokens"]:
        if row["content"] == "<end_of_turn>":
            row["special"] = False


def keys(drop: tuple[str, ...] = (), **changes: tuple[int, object]) -> Callable[[Path], None]:
    """Changes key-values of a GGUF file; the dots of a key are written as two underscores."""
    return lambda path: edit_gguf(path, {key.replace("__", "."): value for key, value in changes.items()}, drop)


def norms(shift: float) -> Callable[[Path], None]:
    """Adds a number to all norms of a GGUF file."""

    def plant(path: Path) -> None:
        with GGUFFile.open(path) as file:
            changed = {
                t.name: (0, t.shape, (t.data.view("<f4") + np.float32(shift)).tobytes())
                for t in file.tensors.values()
                if "norm" in t.name
            }
        edit_gguf(path, tensors=changed)

    return plant


def stored_as(name: str, kind: GGMLType) -> Callable[[Path], None]:
    """Quantise one tensor of a GGUF file again."""

    def plant(path: Path) -> None:
        with GGUFFile.open(path) as file:
            tensor = file.tensors[name]
            values = dequantise(tensor.type, tensor.data, tensor.shape)
            shape = tensor.shape
            del tensor
        edit_gguf(path, tensors={name: (int(kind), shape, quantise(kind, values).tobytes())})

    return plant


def untyped(path: Path) -> None:
    """Marks the turn tokens as ordinary pieces."""
    with GGUFFile.open(path) as file:
        types = file.metadata["tokenizer.ggml.token_type"].numbers()
        raw = bytearray(file.raw("tokenizer.ggml.token_type"))
        types[[105, 106]] = 1
    raw[-4 * len(types) :] = types.astype("<i4").tobytes()
    edit_gguf(path, {"tokenizer.ggml.token_type": bytes(raw)})


def other_type(path: Path) -> None:
    """A tensor in a type that gemkit does not read (IQ4_NL has blocks of 32 elements in 18 bytes)."""
    edit_gguf(path, tensors={"blk.0.ffn_down.weight": (20, (32, 64), bytes(32 * 2 * 18))})


def head(factor: float, tied: bool) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        def change(tensors: dict) -> None:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone() * factor

        weights(change)(folder)
        config(tie_word_embeddings=tied)(folder)

    return plant


def without_a_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def without_a_tensor_of_a_shard(folder: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    save_file(dict(list(load_file(shard).items())[1:]), shard)


def nested(**outer: object) -> Callable[[Path], None]:
    """config.json as a multimodal model has it, with some keys on the outer level."""

    def plant(folder: Path) -> None:
        inner = json.loads((folder / "config.json").read_text("utf-8"))
        write_json(folder / "config.json", {"model_type": "gemma3", "text_config": inner, **outer})

    return plant


def pieces(change: Callable[[list[bytes]], object]) -> Callable[[Path], None]:
    """Changes the pieces of tokenizer.model."""

    def plant(folder: Path) -> None:
        old = read_model((folder / "tokenizer.model").read_bytes())
        found = list(old.pieces)
        change(found)
        count = len(found)
        rows = [np.resize(values, count) for values in (old.scores, old.types)]
        (folder / "tokenizer.model").write_bytes(write_model(Vocabulary(found, *rows)))

    return plant


def gguf_beside(folder: Path) -> None:
    """Puts the GGUF file of another generation next to the weights."""
    gguf_file(folder / "other.gguf", "gemma2")


def unlisted(folder: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    save_file(load_file(shard) | {"model.extra": torch.ones(2)}, shard)


def widened(tensors: dict) -> None:
    name = "model.embed_tokens.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name][:129] * 0.5])


class Runs:
    """Unpickling it would run a command."""

    def __reduce__(self):
        import os

        return os.system, ("true",)


def archive(value: object, protocol: int = 2) -> bytes:
    """A file as torch.save writes it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(value, protocol))
    return out.getvalue()


def rope_old(**changes: object) -> Callable[[Path], None]:
    """config.json as transformers 4 wrote it."""
    return config(("rope_parameters",), **changes)


def pattern(kinds: str) -> Callable[[Path], None]:
    words = {"s": "sliding_attention", "f": "full_attention"}
    return config(layer_types=[words[letter] for letter in kinds])


Q, DOWN = "model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.mlp.down_proj.weight"
FULL, SLIDING = "rope_parameters__full_attention", "rope_parameters__sliding_attention"
EOS, TOKENIZER = "generation_config.json", "tokenizer_config.json"
WIDE = {"content": "<tool>", "id": 600, "special": True, "single_word": False, "normalized": False}

FAULTS: dict[str, Fault] = {
    # stop ids
    "eos without the turn": Fault("stop-turn", "hf3", settings(EOS, eos_token_id=1)),
    "no eos in generation_config": Fault("stop-turn", "hf3", settings(EOS, ("eos_token_id",))),
    "no eos anywhere": Fault("stop-turn", "hf3", lambda f: (remove(EOS)(f), config(("eos_token_id",))(f))),
    "gemma 2 without the turn": Fault("stop-turn", "hf2", settings(EOS, eos_token_id=[1])),
    "eos without the text's end": Fault("stop-text", "hf3", settings(EOS, eos_token_id=[106])),
    "107 in gemma 3": Fault("stop-wrong", "hf3", settings(EOS, eos_token_id=[1, 106, 107])),
    "106 in gemma 2": Fault("stop-wrong", "hf2", settings(EOS, eos_token_id=[1, 107, 106])),
    "gguf without a turn's end": Fault("stop-turn-gguf", "gguf3", keys(("tokenizer.ggml.eot_token_id",))),
    "gguf ends at the wrong id": Fault("stop-wrong", "gguf3", keys(tokenizer__ggml__eos_token_id=(4, 2))),
    # BOS
    "add_bos_token false": Fault("bos-off", "hf3", settings(TOKENIZER, add_bos_token=False)),
    "no bos in the tokenizer": Fault(
        "bos-off",
        "hf3",
        lambda f: (
            settings(TOKENIZER, ("add_bos_token",))(f),
            tokenizer(lambda data: data.update(post_processor=None))(f),
        ),
    ),
    "gguf add_bos false": Fault("bos-off", "gguf3", keys(tokenizer__ggml__add_bos_token=(7, False))),
    "gguf add_bos missing": Fault("bos-unsaid", "gguf3", keys(("tokenizer.ggml.add_bos_token",))),
    "bos id 1": Fault("bos-id", "hf3", config(bos_token_id=1)),
    "gguf bos id 5": Fault("bos-id", "gguf3", keys(tokenizer__ggml__bos_token_id=(4, 5))),
    "gguf no bos id": Fault("bos-id", "gguf3", keys(("tokenizer.ggml.bos_token_id",))),
    "two bos in the template": Fault("bos-doubled", "hf3", template("<bos>" + TEMPLATE)),
    "keras without bos": Fault("bos-off", "keras", settings("preprocessor.json", config__add_start_token=False)),
    # template
    "no template": Fault("template-missing", "hf3", template(None)),
    "gguf no template": Fault("template-missing", "gguf3", keys(("tokenizer.chat_template",))),
    "chatml": Fault("template-markers", "hf3", template(re.sub(r"<(start|end)_of_turn>", r"<|im_\1|>", TEMPLATE))),
    "no generation prompt": Fault("template-prompt", "hf3", template(TEMPLATE.split("{% if add")[0])),
    "system refused": Fault(
        "template-system",
        "hf3",
        template(TEMPLATE + "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"),
    ),
    "no jinja": Fault("template-broken", "hf3", template(TEMPLATE + "{% endfor %}")),
    "refuses users": Fault("template-broken", "hf3", template("{{ bos_token }}{{ raise_exception('no users here') }}")),
    "gguf no jinja": Fault("template-broken", "gguf3", keys(tokenizer__chat_template=(8, "{% if %}"))),
    "system dropped": Fault(
        "template-drops", "hf3", template(TEMPLATE.replace("(first if loop.first else '') + ", ""))
    ),
    "later turns dropped": Fault(
        "template-drops", "hf3", template(TEMPLATE.replace("in loop_", "in [messages[-1]] or loop_"))
    ),
    "no bos": Fault("template-bos", "hf3", template(TEMPLATE.removeprefix("{{ bos_token }}"))),
    "closed by another token": Fault("template-stop", "hf3", template(TEMPLATE.replace("<end_of_turn>", "<unused7>"))),
    "closed by nothing": Fault("template-stop", "hf3", template(TEMPLATE.replace("<end_of_turn>", ""))),
    "another role": Fault("template-other", "hf3", template(TEMPLATE.replace("'model' if", "'assistant' if"))),
    "gguf another role": Fault(
        "template-other", "gguf3", keys(tokenizer__chat_template=(8, TEMPLATE.replace("'model' if", "'assistant' if")))
    ),
    "two templates": Fault("template-twice", "hf3", write("chat_template.jinja", TEMPLATE.encode() + b"{# other #}")),
    "template of a base model": Fault("template-pretrained", "hf3", config(_name_or_path="google/gemma-3-1b-pt")),
    # norms
    "gguf norms doubled": Fault("norm-offset", "gguf3", norms(1)),
    "gguf norms missing": Fault("norm-offset", "gguf3", norms(-1)),
    "gguf gemma 1 norms missing": Fault("norm-offset", "gguf1", norms(-1)),
    "norms doubled": Fault("norm-offset", "hf3", weights(lambda t: [t[name].add_(1) for name in t if "norm" in name])),
    "norms of ones": Fault("norm-offset", "hf2", weights(lambda t: [t[name].fill_(1) for name in t if "norm" in name])),
    # rope
    "no factor in 4b": Fault("rope-factor", "4b", config(**{FULL: {"rope_theta": 1e6}, "rope_scaling": None})),
    "no factor, old style": Fault("rope-factor", "4b", rope_old(rope_scaling=None)),
    "factor in 1b": Fault("rope-factor", "1b", rope_old(rope_scaling={"rope_type": "linear", "factor": 8.0})),
    "bases swapped": Fault(
        "rope-base", "hf3", config(**{f"{FULL}__rope_theta": 10000.0, f"{SLIDING}__rope_theta": 1000000.0})
    ),
    "global base missing": Fault("rope-base", "hf3", config(**{f"{FULL}__rope_theta": 10000.0})),
    "bases swapped, old style": Fault("rope-base", "hf3", rope_old(rope_theta=10000.0, rope_local_base_freq=1000000.0)),
    "gguf base missing": Fault("rope-base", "gguf3", keys(("gemma3.rope.freq_base",))),
    "two bases": Fault("rope-contradiction", "hf3", config(rope_theta=10000.0)),
    "two local bases": Fault("rope-contradiction", "hf3", config(rope_local_base_freq=20000.0)),
    "gemma 2 two bases": Fault("rope-contradiction", "hf2", config(rope_theta=20000.0)),
    "factor under one name": Fault("rope-contradiction", "4b", config(rope_scaling=None)),
    "other factor under one name": Fault("rope-contradiction", "4b", config(**{f"{FULL}__factor": 4.0})),
    "gguf two factors": Fault(
        "rope-contradiction", "gguf3", keys(gemma3__rope__scaling__factor=(6, 8.0), gemma3__rope__scale_linear=(6, 2.0))
    ),
    "gguf factor and no scaling": Fault(
        "rope-contradiction",
        "gguf3",
        keys(gemma3__rope__scaling__factor=(6, 8.0), gemma3__rope__scaling__type=(8, "none")),
    ),
    "gguf half of a head turns": Fault("rope-contradiction", "gguf3", keys(gemma3__rope__dimension_count=(4, 16))),
    # two places, two truths
    "architectures": Fault("config-contradiction", "hf3", config(architectures=["Gemma2ForCausalLM"])),
    "pattern and period": Fault("config-contradiction", "hf3", config(sliding_window_pattern=3)),
    "two dtypes": Fault("config-contradiction", "hf3", config(dtype="float32", torch_dtype="bfloat16")),
    "two levels": Fault("config-contradiction", "hf3", nested(vocab_size=600)),
    "gguf vocab_size": Fault("config-contradiction", "gguf3", keys(gemma3__vocab_size=(4, 600))),
    "a stop id in one file": Fault("stop-contradiction", "hf3", config(eos_token_id=[1, 106, 50])),
    "padded with eos": Fault("pad-id", "hf3", config(pad_token_id=1)),
    "another dtype": Fault("dtype-claim", "hf3", config(dtype="bfloat16")),
    # two tokenizers
    "another tokenizer.model": Fault("tokenizer-differs", "both", pieces(lambda p: p.insert(300, p.pop(310)))),
    "short tokenizer.model": Fault("tokenizer-differs", "both", pieces(lambda p: p.pop())),
    "long tokenizer.model": Fault("tokenizer-differs", "both", pieces(lambda p: p.append(b"xyzzy"))),
    "another id of a token": Fault(
        "tokenizer-differs",
        "hf3",
        settings(TOKENIZER, added_tokens_decoder__50={"content": "<unused9>", "special": True}),
    ),
    "another eos in the map": Fault(
        "tokenizer-differs", "hf3", write("special_tokens_map.json", b'{"eos_token": "<unk>"}')
    ),
    "another tokenizer in a gguf": Fault("tokenizer-differs", "hf3", gguf_beside),
    # window
    "gemma 2 starts full": Fault("layer-pattern", "hf2", pattern("fs")),
    "gemma 3 pattern shifted": Fault("layer-pattern", "hf3", pattern("sssssfs"[::-1])),
    "window of 9b": Fault("window", "9b", config(sliding_window=1024)),
    "window of 4b": Fault("window", "4b", config(sliding_window=512)),
    "gguf no window": Fault("window", "gguf3", keys(("gemma3.attention.sliding_window",))),
    "head stored twice": Fault("head-copy", "hf3", head(1.0, tied=False)),
    "head stored twice, tied": Fault("head-copy", "hf3", head(1.0, tied=True)),
    "head untied": Fault("head-different", "hf3", head(1.1, tied=False)),
    "another head, tied": Fault("head-different", "hf3", head(1.1, tied=True)),
    # precision
    "embedding of 4 bits": Fault("embedding-bits", "gguf3", stored_as("token_embd.weight", GGMLType.Q4_0)),
    "dtype float16": Fault("half", "hf3", config(dtype="float16")),
    "torch_dtype float16": Fault("half", "hf2", config(("dtype",), torch_dtype="float16")),
    "float16 near its end": Fault("half-range", "hf3", put(Q.format(1), (3, 4), 65000.0, torch.float16)),
    "float16 past its end": Fault("not-finite", "hf3", put(Q.format(1), (3, 4), float("inf"), torch.float16)),
    # soft-caps, query scale
    "caps missing": Fault("soft-caps", "hf2", config(attn_logit_softcapping=None, final_logit_softcapping=None)),
    "gguf caps zero": Fault("soft-caps", "gguf2", keys(gemma2__attn_logit_softcapping=(6, 0.0))),
    "a cap in gemma 3": Fault("soft-caps", "hf3", config(final_logit_softcapping=30.0)),
    "query scale of 27b": Fault("query-scale", "27b", config(query_pre_attn_scalar=256)),
    "query scale": Fault("query-scale", "hf3", config(query_pre_attn_scalar=256)),
    # vocabulary
    "token past the rows": Fault("tokens-past-rows", "hf3", tokenizer(lambda d: d["added_tokens"].append(WIDE))),
    "few pieces": Fault("rows-past-tokens", "hf3", lambda f: (weights(widened)(f), config(vocab_size=PIECES + 129)(f))),
    "turns swapped": Fault("special-ids", "hf3", tokenizer(swapped)),
    "turn not special": Fault("control-type", "hf3", tokenizer(demoted)),
    "gguf turn not control": Fault("control-type", "gguf3", untyped),
    "no tokenizer": Fault("tokenizer-missing", "hf3", remove("tokenizer.json")),
    "gguf no tokenizer": Fault(
        "tokenizer-missing", "gguf3", keys(tuple(f"tokenizer.ggml.{k}" for k in ("tokens", "scores", "token_type")))
    ),
    "keras no tokenizer": Fault("tokenizer-missing", "keras", remove("assets/tokenizer/vocabulary.spm")),
    "no tokenizer_config": Fault("tokenizer-config", "pretrained", remove(TOKENIZER)),
    "eos_token of another family": Fault("tokenizer-config", "hf3", settings(TOKENIZER, eos_token="<|im_end|>")),
    # tensors
    "tensor missing": Fault("tensor-missing", "hf3", weights(lambda t: t.pop(Q.format(2)))),
    "tensor too many": Fault("tensor-extra", "hf3", weights(lambda t: t.update({"model.extra": torch.ones(3)}))),
    "tensor misshapen": Fault(
        "tensor-shape", "hf3", weights(lambda t: t.update({Q.format(2): t[Q.format(2)].T.contiguous()}))
    ),
    "nan": Fault("not-finite", "hf3", put(DOWN.format(0), (5, 5), float("nan"))),
    "gguf nan": Fault(
        "not-finite",
        "gguf3",
        lambda p: edit_gguf(
            p, tensors={"blk.3.ffn_up.weight": (0, (64, 32), bytes(64 * 32 * 4 - 4) + b"\0\0\xc0\x7f")}
        ),
    ),
    "zeros": Fault("all-zero", "hf3", weights(lambda t: t[DOWN.format(4)].zero_())),
    "layer twice": Fault("layer-twice", "hf3", weights(lambda t: t[DOWN.format(4)].copy_(t[DOWN.format(3)]))),
    # what gemkit refuses
    "quantised elsewhere": Fault("unloadable", "hf3", config(quantization_config={"quant_method": "gptq"})),
    "no index": Fault("unloadable", "sharded", remove("model.safetensors.index.json")),
    "gguf tensor too many": Fault(
        "unloadable", "gguf3", lambda p: edit_gguf(p, tensors={"blk.0.extra.weight": (0, (32,), bytes(128))})
    ),
    "narrow heads": Fault("engine-limits", "narrow", lambda folder: None),
    # files
    "a pointer for weights": Fault("lfs-pointer", "hf3", write(SHARD, POINTER)),
    "a pointer for a tokenizer": Fault("lfs-pointer", "hf3", write("tokenizer.json", POINTER)),
    "a pointer for a gguf": Fault("lfs-pointer", "gguf3", lambda path: path.write_bytes(POINTER)),
    "a shard of another save": Fault(
        "unlisted", "sharded", lambda f: save_file({"x": torch.ones(2)}, f / "model-00003-of-00003.safetensors")
    ),
    "a tensor that the index does not name": Fault("unlisted", "sharded", unlisted),
    "half a download": Fault("unfinished", "hf3", write("model.safetensors.incomplete", b"abc")),
    "a training run's files": Fault("leftovers", "hf3", write("trainer_state.json", b"{}")),
    "pickle": Fault("pickle", "hf3", write("pytorch_model.bin", archive({"a": [1.0]}))),
    "pickle that runs": Fault("pickle-code", "hf3", write("optimizer.pt", archive(Runs()))),
    "pickle that runs, newer": Fault("pickle-code", "hf3", write("x.pkl", pickle.dumps(Runs(), 5))),
    "half a shard": Fault("truncated", "hf3", cut(SHARD, 0.6)),
    "half a gguf": Fault("truncated", "gguf3", cut(None, 0.8)),
    "keras half a file": Fault("truncated", "keras", cut("model.weights.h5", 0.5)),
    "no shard": Fault("shard-missing", "sharded", without_a_shard),
    "shard without a tensor": Fault("shard-missing", "sharded", without_a_tensor_of_a_shard),
    "no weights": Fault("weights-missing", "hf3", remove(SHARD)),
    "keras no weights": Fault("weights-missing", "keras", remove("model.weights.h5")),
    "keras no task": Fault("keras-files", "keras", remove("task.json")),
    "a page instead of a file": Fault("unreadable", "hf3", write(SHARD, b"<!doctype html><p>Sign in</p>")),
    "broken json": Fault("unreadable", "hf3", write(EOS, b'{"eos_token_id": [1, 106')),
    # terms
    "no notice": Fault("terms", "hf3", remove("NOTICE")),
    "gguf no licence": Fault("terms-unsaid", "gguf3", keys(("general.license",))),
    # sizes
    "other width": Fault("tensor-shape", "hf3", config(intermediate_size=128)),
    "more layers": Fault(
        "layer-count",
        "hf3",
        config(
            num_hidden_layers=8, layer_types=["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 2
        ),
    ),
    "gguf more layers": Fault("layer-count", "gguf3", keys(gemma3__block_count=(4, 8))),
    "gguf fewer layers": Fault("layer-count", "gguf3", keys(gemma3__block_count=(4, 6))),
    "fewer layers": Fault(
        "layer-count", "hf3", config(num_hidden_layers=6, layer_types=["sliding_attention"] * 5 + ["full_attention"])
    ),
    "context": Fault("context", "4b", config(max_position_embeddings=8192)),
    "incomplete": Fault("config-invalid", "hf3", config(("hidden_size",))),
    "gguf calls itself gemma 2": Fault(
        "family",
        "gguf3",
        lambda p: edit_gguf(p, {key.replace("gemma3", "gemma2"): raw for key, raw in _renamed(p).items()}),
    ),
    "calls itself gemma 2": Fault(
        "family",
        "hf3",
        config(("rope_parameters",), model_type="gemma2"),
    ),
    "calls itself a llama": Fault("other-family", "hf3", config(model_type="llama")),
    "says nothing": Fault("other-family", "hf3", write("config.json", b"{}")),
    "says no family": Fault("other-family", "hf3", config(("model_type",))),
    "gguf calls itself a llama": Fault("other-family", "gguf3", keys(general__architecture=(8, "llama"))),
    "eps": Fault("rms-eps", "hf3", config(rms_norm_eps=1e-5)),
    "gguf eps": Fault("rms-eps", "gguf3", keys(gemma3__attention__layer_norm_rms_epsilon=(6, 1e-5))),
    "gguf no key_length": Fault(
        "gguf-key-length",
        "gguf3",
        keys(("gemma3.attention.key_length", "gemma3.attention.value_length")),
    ),
    "gguf other type": Fault("type-unread", "gguf3", other_type),
    "adapter beside": Fault(
        "adapter-beside", "hf3", lambda f: save_file({"a": torch.ones(2)}, f / "adapter_model.safetensors")
    ),
    "adapter in the weights": Fault(
        "lora-names",
        "hf3",
        weights(lambda t: t.update({"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 2)})),
    ),
    "prefixed names": Fault("wrapped-names", "hf3", rename(lambda name: "base_model.model." + name)),
}


def _renamed(path: Path) -> dict[str, object]:
    """The key-values of the architecture as Gemma 2's."""
    with GGUFFile.open(path) as file:
        kinds = {str: 8, int: 4, float: 6, bool: 7}
        return {
            key: (kinds[type(value)], "gemma2" if value == "gemma3" else value)
            for key, value in file.metadata.items()
            if key.startswith("gemma3.") or key == "general.architecture"
        }
