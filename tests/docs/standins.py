"""Small models under the names that the documents use, so that every command runs offline and within seconds.

All of them have the demo's own pieces, or the first of them, and weights that are made up: they write nonsense, but
each verb, option and file format is the real one.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from weights.files import tiny_config

from gemkit.arch.config import ModelConfig
from gemkit.arch.presets import PRESETS
from gemkit.arch.tensors import manifest
from gemkit.hub.demo import demo_path
from gemkit.text.template import DEFAULT_TEMPLATE
from gemkit.text.vocabulary import Vocabulary
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.gguf.read import read_gguf
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.hf.write import write_hf
from gemkit.weights.quant import GGMLType

_FIXED = 494  # control tokens and bytes
_PIECES = 512  # all control tokens and all bytes
_DEMO_PIECES = 4096
_FILLING = {67: "<|fim_prefix|>", 68: "<|fim_middle|>", 69: "<|fim_suffix|>", 70: "<|file_separator|>"}


@cache
def _demo_vocabulary() -> Vocabulary:
    with read_gguf(demo_path()) as checkpoint:
        return checkpoint.vocabulary


def _vocabulary(family: str, count: int | None = _PIECES) -> Vocabulary:
    """The demo's first pieces and the letters that they are made from, the control tokens where a family has them.

    count: of the first pieces; None for all there are.
    """
    whole = _demo_vocabulary()
    chosen = np.arange(len(whole.pieces) if count is None else count)
    if count is not None:
        letters = [
            i for i, piece in enumerate(whole.pieces) if i >= count and len(piece.decode("utf-8", "replace")) == 1
        ]
        ascii_letters = [i for i in letters if whole.pieces[i].isascii() or whole.pieces[i] == "▁".encode()]
        known = {whole.pieces[i].decode() for i in ascii_letters}
        kept = [i for i in chosen if i < _FIXED or set(whole.pieces[i].decode("utf-8", "replace")) <= known]
        chosen = np.array([*kept, *ascii_letters])
    pieces, types = [whole.pieces[i] for i in chosen], np.array(whole.types)[chosen]
    if family != "gemma3_text":
        pieces[105:108] = pieces[107], *pieces[105:107]
        for number, piece in _FILLING.items():
            pieces[number] = piece.encode()
        types[105:108] = types[107], *types[105:107]
    return Vocabulary(pieces, np.array(whole.scores)[chosen], types)


def _config(family: str, pieces: int) -> ModelConfig:
    return tiny_config(family, vocab_size=pieces, head_dim=32, max_position_embeddings=32_768)


def _checkpoint(
    name: str, family: str, vocabulary: Vocabulary, tuned: bool, kind: GGMLType | Callable[[str], GGMLType]
) -> Checkpoint:
    config = _config(family, len(vocabulary.pieces))
    rng = np.random.default_rng(len(name))
    params = {
        key: rng.normal(scale=0.3 if "norm" in key else 0.02, size=spec.shape).astype(np.float32)
        for key, spec in manifest(config).items()
    }
    template = DEFAULT_TEMPLATE if tuned else None
    return Checkpoint.from_params(
        config, params, kind, vocabulary, name=name, chat_template=template, instruction_tuned=tuned
    )


def _qat(name: str) -> GGMLType:
    """The types of Google's 4-bit files."""
    return GGMLType.F16 if "embed" in name else GGMLType.Q4_0


def demo(path: Path, pieces: int | None = _DEMO_PIECES) -> Path:
    """Writes a file in place of the demo's; pieces: None for all of its 262,144."""
    vocabulary = _vocabulary("gemma3_text", pieces)
    return write_gguf(path, _checkpoint("gemma-3-270m", "gemma3_text", vocabulary, False, GGMLType.Q8_0))


def published(served: Path) -> None:
    """Repositories for a hub to serve: of the models that Google publishes, those that the documents name."""
    for name in ("gemma-3-1b-it", "gemma-2b-it", "codegemma-2b"):
        family = PRESETS[name].config.model_type
        tuned = PRESETS[name].instruction_tuned
        if repo := PRESETS[name].qat_id:
            (served / repo).mkdir(parents=True, exist_ok=True)
            write_gguf(served / repo / f"{name}-q4_0.gguf", _checkpoint(name, family, _vocabulary(family), tuned, _qat))
        write_hf(served / "google" / name, _checkpoint(name, family, _vocabulary(family), tuned, GGMLType.BF16))


def adapter(folder: Path, base: str = "gemma-2b-it") -> None:
    """A PEFT adapter for one of the published stand-ins."""
    shape = manifest(_config(PRESETS[base].config.model_type, _PIECES))["model.layers.0.self_attn.q_proj.weight"].shape
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    folder.mkdir()
    tensors = {"lora_A": np.ones((4, shape[1]), np.float32), "lora_B": np.zeros((shape[0], 4), np.float32)}
    save_file({f"{prefix}.{key}.weight": value for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    facts = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(facts), encoding="utf-8")
