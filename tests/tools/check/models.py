"""Small healthy models to plant faults in, made by the programs that users have: transformers, gemkit's GGUF writer."""

import gzip
import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
from parity.transformers_models import build
from testdata import data_file
from weights import hf_files
from weights.files import gguf, info, pair, tiny_config

from gemkit.arch.config import ModelConfig
from gemkit.arch.hf_config import to_hf
from gemkit.arch.presets import preset
from gemkit.arch.tensors import manifest
from gemkit.text.spm_proto import write_model
from gemkit.text.tokenizer_json import read_tokenizer_json
from gemkit.text.vocabulary import Vocabulary
from gemkit.tools.check.files import TERMS
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.gguf.container import GGUFFile
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.quant import GGMLType

PIECES = 512  # of the real tokenizer: all control tokens and some more
# Gemma 1 and 2 share their vocabulary; reading it once saves time
NAMES = {"gemma": "gemma2", "gemma2": "gemma2", "gemma3_text": "gemma3"}
LOOP = (
    "{% for message in loop_messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') + message['content'] | trim + "
    "'<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
NO_SYSTEM_GIVEN = "{% set first = '' %}{% set loop_messages = messages %}"
# As published with Gemma 3, and with Gemma 1 and 2
TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\\n\\n' %}"
    "{% set loop_messages = messages[1:] %}{% else %}" + NO_SYSTEM_GIVEN + "{% endif %}" + LOOP
)
NO_SYSTEM = "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
NO_SYSTEM += "{% endif %}" + NO_SYSTEM_GIVEN + LOOP


def params_of(config: ModelConfig) -> dict[str, np.ndarray]:
    """Random weights with bfloat16 norms, as published ones are, a few of their factors near 0."""
    rng = np.random.default_rng(1)
    params = {}
    for name, spec in manifest(config).items():
        values = rng.normal(scale=0.3 if "norm" in name else 0.02, size=spec.shape).astype(np.float32)
        params[name] = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return params


@cache
def small_tokenizer(name: str) -> bytes:
    """The real tokenizer.json, cut to its first pieces."""
    data = json.loads(gzip.decompress(data_file("tokenizers", f"{name}.tokenizer.json.gz").read_bytes()))
    model = data["model"]
    known = model["vocab"] = {piece: i for piece, i in model["vocab"].items() if i < PIECES}
    data["added_tokens"] = [row for row in data["added_tokens"] if row["id"] < PIECES]
    pairs = [merge if isinstance(merge, list) else merge.split(" ", 1) for merge in model["merges"]]
    model["merges"] = [m for m in pairs if m[0] in known and m[1] in known and m[0] + m[1] in known]
    return json.dumps(data).encode()


def tokenizer_config(model_type: str) -> dict:
    """The real one, without the pieces for images, which follow the pieces that were cut off."""
    data = json.loads(data_file("tokenizers", f"{NAMES[model_type]}.tokenizer_config.json").read_text("utf-8"))
    for key in ("boi_token", "eoi_token", "image_token", "extra_special_tokens", "processor_class"):
        data.pop(key, None)
    rows = data["added_tokens_decoder"]
    return data | {"added_tokens_decoder": {i: row for i, row in rows.items() if int(i) < PIECES}}


def write_json(path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")


def hf_folder(folder: Path, model_type: str, tuned: bool = True, head_dim: int = 32) -> Path:
    """A model as transformers saves it, with a tokenizer as Google publishes it; tuned: it has a chat template."""
    import torch

    config = tiny_config(model_type, vocab_size=PIECES, head_dim=head_dim)
    params = {name: value.copy() for name, value in params_of(config).items()}
    build(config, params, torch.float32).save_pretrained(folder)
    settings = tokenizer_config(model_type)
    settings.setdefault("chat_template", TEMPLATE if model_type == "gemma3_text" else NO_SYSTEM)
    if not tuned:
        del settings["chat_template"]
    write_json(folder / "tokenizer_config.json", settings)
    (folder / "tokenizer.json").write_bytes(small_tokenizer(NAMES[model_type]))
    (folder / "NOTICE").write_text(TERMS + "\n", encoding="utf-8")
    return folder


def sharded_folder(folder: Path, model_type: str) -> Path:
    """The same in two files with an index."""
    rows = list(hf_files.tensors(hf_folder(folder, model_type)).items())
    hf_files.write_shards(folder, [dict(rows[::2]), dict(rows[1::2])])
    return folder


def folder_with_both(folder: Path) -> Path:
    """A Gemma 3 with the tokenizer in both formats."""
    hf_folder(folder, "gemma3_text")
    (folder / "tokenizer.model").write_bytes(write_model(vocabulary("gemma3_text")))
    return folder


def exported_folder(folder: Path, model_type: str) -> Path:
    """A pretrained model as KerasHub's export_to_transformers writes it: without much, and with tokenizer.model.

    Source of the keys: ``keras_hub/src/utils/transformers/export``.
    """
    hf_folder(folder, model_type, tuned=False)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    sizes = (
        "vocab_size num_hidden_layers num_attention_heads num_key_value_heads hidden_size intermediate_size head_dim"
    )
    kept = {key: config[key] for key in f"model_type {sizes}".split()}
    if model_type == "gemma":
        kept |= {"max_position_embeddings": 8192, "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1}
    else:
        kept |= {key: config[key] for key in "rms_norm_eps sliding_window layer_types query_pre_attn_scalar".split()}
        kept |= {"rope_theta": 1_000_000.0, "torch_dtype": "float32"}
    write_json(folder / "config.json", kept)
    settings = tokenizer_config(model_type)
    settings.pop("chat_template", None)
    write_json(folder / "tokenizer_config.json", settings | {"eos_token": "<eos>"})
    (folder / "tokenizer.model").write_bytes(write_model(vocabulary(model_type)))
    for name in ("tokenizer.json", "generation_config.json"):
        (folder / name).unlink()
    return folder


def published_folder(folder: Path, name: str) -> Path:
    """The configuration and tokenizer of a published model, without its weights."""
    config = preset(name).config
    folder.mkdir(parents=True)
    write_json(folder / "config.json", to_hf(config))
    write_json(folder / "generation_config.json", {"bos_token_id": 2, "eos_token_id": list(config.stop_token_ids)})
    (folder / "NOTICE").write_text(TERMS, encoding="utf-8")
    return folder


def vocabulary(model_type: str) -> Vocabulary:
    return read_tokenizer_json(small_tokenizer(NAMES[model_type]))


def gguf_file(path: Path, model_type: str, types: GGMLType = GGMLType.Q8_0, tuned: bool = True) -> Path:
    """A model as gemkit writes it, with its licence."""
    config = tiny_config(model_type, vocab_size=PIECES, head_dim=32)
    name, template = ("Tiny it", TEMPLATE) if tuned else ("Tiny pt", None)
    checkpoint = Checkpoint.from_params(
        config, params_of(config), types, vocabulary(model_type), name=name, chat_template=template
    )
    write_gguf(path, checkpoint)
    return edit_gguf(path, {"general.license": (8, "gemma")})


def edit_gguf(path: Path, keys: dict | None = None, drop=(), tensors: dict | None = None, lose=()) -> Path:
    """Writes a GGUF file again with keys set or dropped and tensors changed: name: (type, shape, bytes)."""
    keys = keys or {}
    with GGUFFile.open(path) as file:
        pairs = [file.raw(key) for key in file.metadata if key not in keys and key not in drop]
        rows = {t.name: (int(t.type), t.shape, t.data.tobytes()) for t in file.tensors.values() if t.name not in lose}
    pairs += [raw if isinstance(raw, bytes) else pair(key, *raw) for key, raw in keys.items()]
    rows |= tensors or {}
    infos, data = [], b""
    for name, (kind, shape, stored) in rows.items():
        infos.append(info(name, shape[::-1], kind, len(data)))
        data += stored + bytes(-len(stored) % 32)
    path.write_bytes(gguf(pairs, infos, data))
    return path


def keras_folder(folder: Path, third: bool = True) -> Path:
    """A KerasHub preset as save_to_preset writes it, with an HDF5 file of which only the superblock is real."""
    import struct

    name = "Gemma3" if third else "Gemma"
    module = f"keras_hub.src.models.{name.lower()}.{name.lower()}_backbone"
    config = {
        "name": f"{name.lower()}_backbone",
        "trainable": True,
        "vocabulary_size": PIECES,
        "num_layers": 7 if third else 2,
        "num_query_heads": 4,
        "num_key_value_heads": 2,
        "hidden_dim": 32,
        "intermediate_dim": 64 if third else 128,
        "head_dim": 32,
        "layer_norm_epsilon": 1e-6,
        "query_head_dim_normalize": True,
        "attention_logit_soft_cap": None,
        "final_logit_soft_cap": None,
        "use_sliding_window_attention": third,
        "sliding_window_size": 8,
        "use_post_ffw_norm": third,
        "use_post_attention_norm": third,
    }
    if third:
        config |= {"use_query_key_norm": True, "global_rope_scaling_factor": 1.0, "local_rope_scaling_factor": 1.0}
    outer = {"module": module, "class_name": f"{name}Backbone", "registered_name": f"keras_hub>{name}Backbone"}
    write_json(folder / "config.json", {**outer, "config": config})
    preprocessor = {"class_name": f"{name}CausalLMPreprocessor", "config": {"add_start_token": True}}
    write_json(folder / "preprocessor.json", preprocessor)
    write_json(folder / "task.json", {"class_name": f"{name}CausalLM", "config": {"preprocessor": preprocessor}})
    write_json(folder / "tokenizer.json", {"class_name": f"{name}Tokenizer", "config": {"add_bos": False}})
    write_json(folder / "metadata.json", {"keras_version": "3.11.0", "keras_hub_version": "0.32.0"})
    assets = folder / "assets" / "tokenizer"
    assets.mkdir(parents=True)
    (assets / "vocabulary.spm").write_bytes(write_model(vocabulary("gemma3_text" if third else "gemma")))
    superblock = (
        b"\x89HDF\r\n\x1a\n" + bytes([0, 0, 0, 0, 0, 8, 8, 0]) + bytes(8) + struct.pack("<4Q", 0, 2**64 - 1, 2048, 0)
    )
    (folder / "model.weights.h5").write_bytes(superblock.ljust(2048, b"\0"))
    (folder / "NOTICE").write_text(TERMS, encoding="utf-8")
    return folder


def copy(source: Path, target: Path) -> Path:
    """A file or folder to be broken."""
    if source.is_dir():
        return Path(shutil.copytree(source, target / source.name))
    return Path(shutil.copy(source, target / source.name))
