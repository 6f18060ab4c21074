"""Model folders as transformers and safetensors write them, and broken safetensors files.

transformers is imported by the functions that need it: it takes seconds.
"""

import json
import struct
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from parity.cases import CASES

from gemkit.arch.hf_config import to_hf
from gemkit.engine.interface import build_batch
from gemkit.models.native import NativeRunner
from gemkit.weights.hf.safetensors import INDEX, SINGLE

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def raw(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file field by field; a header that is not bytes is written as JSON."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(shape=(2,), dtype="F32", offsets=(0, 8), **more) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


def save(folder: Path, name: str, dtype: str = "F32", **options) -> torch.nn.Module:
    """transformers' folder of a parity case; returns its model."""
    from parity import transformers_models as hf

    case = CASES[name]
    model = hf.build(case.config, case.params(), TORCH[dtype])
    model.save_pretrained(folder, **options)
    return model


def multimodal(name: str = "gemma3", **changes) -> torch.nn.Module:
    """transformers' multimodal model around a parity case of Gemma 3, its tower and projector random."""
    import transformers
    from parity import transformers_models as hf

    case = CASES[name]
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    tokens = {"image_token_index": 500, "boi_token_index": 501, "eoi_token_index": 502}
    config = transformers.Gemma3Config(
        text_config=hf.config_class("gemma3_text")(**to_hf(case.config)),
        vision_config=vision | {"vision_use_head": False},
        mm_tokens_per_image=4,
        **tokens | changes,
    )
    config._attn_implementation = "eager"
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    state = {"model.language_model." + key[len("model.") :]: torch.from_numpy(v) for key, v in case.params().items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("vision" in key or "projector" in key or key == "lm_head.weight" for key in missing)
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder with one file."""
    return {key: value.clone() for key, value in safetensors.torch.load_file(folder / SINGLE).items()}


def write(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Replaces a folder's weights by one file."""
    state = {key: value.contiguous().clone() for key, value in state.items()}  # none may share memory
    safetensors.torch.save_file(state, folder / SINGLE, metadata={"format": "pt"})


def write_shards(folder: Path, parts: list[dict[str, torch.Tensor]]) -> Path:
    """The same as shards with an index; returns the index."""
    (folder / SINGLE).unlink(missing_ok=True)
    index = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        safetensors.torch.save_file(part, folder / name)
        index |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder / INDEX


def edit(path: Path, **changes) -> None:
    """Changes keys of a JSON file; ... removes one."""
    facts = json.loads(path.read_text()) if path.exists() else {}
    facts = {key: value for key, value in (facts | changes).items() if value is not ...}
    path.write_text(json.dumps(facts))


def native_logits(config, weights, tokens: np.ndarray, adapters=(), use: int = -1) -> np.ndarray:
    """Logits [T, V] of the C++ core with float32 activations; use: the adapter's number."""
    runner = NativeRunner(config, weights, adapters=adapters, threads=2, activations="float32")
    pages = -(-len(tokens) // runner.page_size)
    runner.reserve([pages] * len(runner.groups))
    table = np.arange(pages, dtype=np.int32)[None]
    batch = build_batch([np.asarray(tokens, np.int32)], [0], (table,) * len(runner.groups), adapters=[use])
    return runner.logits(batch)
