"""Writer of a `Checkpoint` as a Flax/Orbax folder with the keys of Google's releases, which the gemma library loads.

In the folder, besides orbax-checkpoint's files: ``config.json`` (the arrays alone do not define the model), the
tokenizer as ``tokenizer.model``, the chat template and the NOTICE that Gemma's terms require of redistributed weights.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gemkit.arch.config import ModelConfig
from gemkit.arch.hf_config import to_hf
from gemkit.errors import GemkitError
from gemkit.weights import tuned
from gemkit.weights.checkpoint import Checkpoint, Tensor
from gemkit.weights.google import flax_names
from gemkit.weights.google.flax_names import Row
from gemkit.weights.google.official import CONFIG, TOKENIZER
from gemkit.weights.google.orbax import orbax_library, quiet, read_orbax
from gemkit.weights.hf.write import NOTICE, _bytes, _main_type, _type_of
from gemkit.weights.quant import GGMLType
from gemkit.weights.staged import Check, check_readable, staged_model

_OFFICIAL_EPS = 1e-6


def write_orbax(
    folder: str | os.PathLike[str],
    checkpoint: Checkpoint,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    check: Check | None = None,
) -> Path:
    """Write the folder under a temporary name, read it back and rename it: there is a good folder or none.

    Arrays are float32, or bfloat16 where all of their tensors are; float16 and quantised ones become float32, without
    loss. Norms become bfloat16 with bfloat16 matrices, if that loses nothing. Memory holds one array at a time.
    progress: called with the bytes written so far and in all.
    check: called with the temporary path before the folder gets its name; whatever it raises leaves no folder.
    Raises GemkitError if the folder exists or cannot be written or read, or if the layout cannot state the model.
    """
    folder = Path(folder)
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise GemkitError(f"{folder} exists: give another name, or delete it first")
    _refuse(checkpoint.config)
    orbax_library()
    with staged_model(folder) as temporary:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        _write_arrays(temporary.absolute(), checkpoint, progress)
        _write_texts(temporary, checkpoint)
        check_readable(temporary, folder, read_orbax, checkpoint, check)
    return folder


def _refuse(config: ModelConfig) -> None:
    """Raise GemkitError for a model that the official classes would compute otherwise."""
    if not config.tie_word_embeddings:
        raise GemkitError("the official Flax layout has no output matrix of its own: choose --to hf or gguf")
    if config.rms_norm_eps != _OFFICIAL_EPS:
        raise GemkitError(
            f"the official Flax classes have norms with epsilon 1e-6, this model's is {config.rms_norm_eps:g}: "
            "choose --to hf or gguf"
        )


# --- arrays ----------------------------------------------------------------------------------------------------------


class _Pending:
    """An array that is made when it is written. shape, dtype, ndim, size: what the library asks of an array."""

    def __init__(self, row: Row, tensors: list[Tensor], config: ModelConfig, kind: GGMLType) -> None:
        self.row, self.tensors, self.sizes = row, tensors, flax_names.sizes(config)
        self.shape = row.shape(self.sizes)
        self.bf16 = all(_type_of(tensor, kind) == GGMLType.BF16 for tensor in tensors)
        self.nbytes = int(np.prod(self.shape)) * (2 if self.bf16 else 4)

    def make(self) -> np.ndarray:
        if not self.bf16:
            return self.row.join([tensor.to_float32() for tensor in self.tensors], self.sizes)
        bits = [_bytes(tensor, GGMLType.BF16).view("<u2") for tensor in self.tensors]
        return self.row.join(bits, self.sizes).view(np.dtype("bfloat16"))  # a type that orbax brings along


def _write_arrays(folder: Path, checkpoint: Checkpoint, progress: Callable[[int, int], None]) -> None:
    config = checkpoint.config
    table = flax_names.rows(config, joined=flax_names.is_joined(config), transposed=flax_names.is_transposed(config))
    kind = _main_type(checkpoint.tensors)
    tree: dict[str, dict[str, _Pending]] = {}
    total = 0
    for name, row in table.items():
        outer, leaf = flax_names.released(name)
        array = _Pending(row, [checkpoint.tensors[part] for part in row.parts], config, kind)
        tree.setdefault(outer, {})[leaf] = array
        total += array.nbytes
    orbax = orbax_library()
    registry = orbax.type_handlers.create_type_handler_registry((_Pending, _handler(orbax, total, progress)))
    with quiet():
        handler = orbax.PyTreeCheckpointHandler(type_handler_registry=registry)
        with orbax.Checkpointer(handler) as writer:
            try:
                writer.save(folder, args=orbax.args.PyTreeSave(tree))
            except (GemkitError, OSError):
                raise
            except Exception as error:  # the library's own, in which the system's error is text
                raise OSError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """Return the system's words for an error of the library, or the library's own on one short line."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else " ".join(str(error).split())[:200] or type(error).__name__


def _handler(orbax: Any, total: int, progress: Callable[[int, int], None]) -> Any:
    """Write one array after the other, so that memory holds one."""

    class Handler(orbax.type_handlers.NumpyHandler):
        async def serialize(self, values: list[_Pending], infos: list[Any], args: Any = None) -> list[Any]:
            done = 0
            for at, (pending, info) in enumerate(zip(values, infos, strict=True)):
                one = None if args is None else [args[at]]
                for future in await super().serialize([pending.make()], [info], one):
                    future.result()
                done += pending.nbytes
                progress(done, total)
            return []

    return Handler(deepcopy_host_arrays=False)


# --- everything else -------------------------------------------------------------------------------------------------


def _write_texts(folder: Path, checkpoint: Checkpoint) -> None:
    raw_config = to_hf(checkpoint.config)
    if tuned.needs_mark(checkpoint):
        raw_config[tuned.CONFIG_KEY] = False
    text = json.dumps(raw_config, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8", newline="\n")
    (folder / "NOTICE").write_text(NOTICE, encoding="utf-8", newline="\n")
    if checkpoint.vocabulary is not None:
        from gemkit.text.spm_proto import write_model

        (folder / TOKENIZER).write_bytes(write_model(checkpoint.vocabulary))
    if template := tuned.template_to_write(checkpoint):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="\n")
