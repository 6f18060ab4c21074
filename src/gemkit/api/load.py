"""From a name to a loaded model: find the files, read them, start the core.

This file imports nothing heavy: the tokenizer of a model that was loaded before is read while NumPy, the core and the
weights' reader are still being imported.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from gemkit.api.options import Adapters, LoadKeywords, LoadOptions, merged
from gemkit.cache import cache_dir, try_atomic_write
from gemkit.errors import GemkitError, UsageError, brief
from gemkit.host import default_threads

if TYPE_CHECKING:
    from gemkit.api.model import Model
    from gemkit.arch.config import ModelConfig
    from gemkit.text.tokenizer import Tokenizer
    from gemkit.weights.checkpoint import Checkpoint
    from gemkit.weights.lora import LoraAdapter


def load(
    path_or_name: str | os.PathLike[str], *, options: LoadOptions | None = None, **keywords: Unpack[LoadKeywords]
) -> Model:
    """Load a model: a GGUF file, a folder with one, a Hugging Face folder, a hub's name, or "demo".

    path_or_name: a path, or one of the names "gemma-3-1b-it" and the like, "hf:org/name[:file]", "kaggle:…"; see
        `gemkit.hub.resolve`. A short name means Google's 4-bit file where there is one, unless a dtype, an adapter or
        another backend asks for the original. "demo" is the model that the extra `demo` installs.
    options: see `LoadOptions`, whose fields may be given as keywords too; a keyword replaces the field.

    Raises GemkitError if there is no such model or its file is broken, UsageError for a bad value.
    """
    return Loading(path_or_name, merged(LoadOptions, options, keywords)).model()


class Loading:
    """A load in two halves, with other work between them: the constructor finds the files, `model` reads them.

    keep: keep a packed copy of the weights for later starts.
    """

    def __init__(self, path_or_name: str | os.PathLike[str], options: LoadOptions, *, keep: bool = True) -> None:
        _check_path("a model", path_or_name)
        self.options, self.keep = options, keep
        self.threads = default_threads() if options.threads is None else options.threads
        # Read before the model, which may be gigabytes away
        self.adapters = _adapters(options.adapter)
        original = wants_original(options.backend, options.dtype, options.adapter)
        self.path = find(path_or_name, options.offline, original=original)
        self._background = ThreadPoolExecutor(1)
        self._early: Future[Tokenizer | None] = self._background.submit(_remembered_tokenizer, self.path)

    def model(self) -> Model:
        """Read the files, start the runner and return the model."""
        options = self.options
        if options.backend != "native":
            return self._framework_model()
        from gemkit.api.model import Model
        from gemkit.models.native import NativeRunner, PackedStore
        from gemkit.weights.open import open_checkpoint

        with self._background, open_checkpoint(self.path) as stored:
            # The vocabulary is read while the core packs the weights: each takes a tenth of a second or more.
            tokenizer = self._background.submit(lambda: self._early.result() or _tokenizer(stored))
            checkpoint = _converted(stored, options.dtype, self.options.activations)
            _check_adapters(self.adapters, checkpoint.config)
            _take_turns(checkpoint, self.adapters)
            store = PackedStore.of(stored.source, checkpoint.tensors, self.keep)
            runner = NativeRunner(
                checkpoint.config,
                checkpoint.tensors,
                adapters=list(self.adapters.values()),
                store=store,
                threads=self.threads,
                activations=options.activations,
            )
            return Model(checkpoint, runner, tokenizer.result(), self.threads, options.ctx_size, self.adapters)

    def _framework_model(self) -> Model:
        from gemkit.api.model import Model
        from gemkit.weights.open import open_checkpoint

        options, backend = self.options, self.options.backend
        if backend == "keras":
            choose_keras_backend()
        try:
            module = importlib.import_module(f"gemkit.models.{backend}")
        except ModuleNotFoundError as error:
            from gemkit.extras import install

            raise GemkitError(f"the backend {backend} needs {error.name}: {install(backend)}") from None
        with self._background, open_checkpoint(self.path) as checkpoint:
            _check_adapters(self.adapters, checkpoint.config)
            _take_turns(checkpoint, self.adapters)
            runner = module.load_runner(
                checkpoint.config,
                checkpoint.tensors,
                threads=self.threads,
                device=options.device,
                dtype=options.dtype,
                adapter=next(iter(self.adapters.values()), None),
            )
            tokenizer = self._early.result() or _tokenizer(checkpoint)
            return Model(checkpoint, runner, tokenizer, self.threads, options.ctx_size, self.adapters)


def choose_keras_backend() -> None:
    """Set KERAS_BACKEND unless it is set: Keras would take TensorFlow, installed or not."""
    if "KERAS_BACKEND" in os.environ or "keras" in sys.modules or Path.home().joinpath(".keras/keras.json").exists():
        return
    installed = [name for name in ("jax", "torch", "tensorflow") if find_spec(name)]
    if not installed:
        from gemkit.extras import install

        raise GemkitError(f"Keras needs JAX, PyTorch or TensorFlow: {install('keras', 'jax')}")
    os.environ["KERAS_BACKEND"] = installed[0]


def wants_original(backend: str = "native", dtype: str = "auto", adapter: object = None) -> bool:
    """Return whether a short name means the original weights of a model, not Google's 4-bit file of it.

    The other backends take no 4-bit blocks, a type is asked for to be had of the original, and adapters are trained on
    it.
    """
    return backend != "native" or dtype != "auto" or adapter is not None


def find(
    path_or_name: str | os.PathLike[str], offline: bool = False, *, download: bool = True, original: bool = False
) -> Path:
    """Return the model's file or folder.

    download: fetch it if it is missing; False raises GemkitError instead. original: of `gemkit.hub.resolve.resolve`.
    """
    _check_path("a model", path_or_name)
    if path_or_name == "demo":
        from gemkit.hub.demo import demo_path

        return Path(demo_path())
    path = Path(path_or_name)
    if path.exists():
        return path
    from gemkit.hub.resolve import resolve

    return resolve(path_or_name, offline=offline, download=download, original=original)


def _check_path(what: str, path: object) -> None:
    """Raise UsageError unless a path is text, not blank, or a path object."""
    if not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes) or not os.fspath(path).strip():
        raise UsageError(f"{what} is {brief(path)}; give a path or a name as text")


def _converted(checkpoint: Checkpoint, dtype: str, activations: str) -> Checkpoint:
    if dtype == "auto" and activations == "int8" and _is_quick(checkpoint.source):
        from gemkit.weights.dtype import narrow_head

        return narrow_head(checkpoint)
    if dtype == "auto":
        return checkpoint
    from gemkit.weights.dtype import convert

    return convert(checkpoint, dtype)


def _is_quick(source: Path | None) -> bool:
    """Return whether a file is Google's 4-bit file of a model, in the cache where it was downloaded to."""
    if source is None or "-qat-" not in str(source):
        return False
    from gemkit.hub.hf_cache import repo_of
    from gemkit.hub.names import original_of

    return original_of(repo_of(source) or "") is not None


def _adapters(paths: Adapters | None) -> dict[str, LoraAdapter]:
    """Read the adapters, by name."""
    if paths is None:
        return {}
    from gemkit.api.model import BASE, ONLY
    from gemkit.weights.peft.read import read_peft

    adapters = {}
    for name, path in paths.items() if isinstance(paths, Mapping) else [(ONLY, paths)]:
        if isinstance(paths, Mapping) and (name in (BASE, ONLY) or not isinstance(name, str)):
            raise UsageError(f"an adapter is named {name!r}: give it another name")
        _check_path("an adapter", path)
        adapters[name] = read_peft(path)
    return adapters


def _check_adapters(adapters: Mapping[str, LoraAdapter], config: ModelConfig) -> None:
    """Raise GemkitError for an adapter that does not fit the model."""
    if adapters:
        from gemkit.weights.lora import check_fits

        for adapter in adapters.values():
            check_fits(adapter, config)


def _take_turns(checkpoint: Checkpoint, adapters: Mapping[str, LoraAdapter]) -> None:
    """Let a pretrained model expect the turns that its only adapter was trained on."""
    from gemkit.api.model import ONLY

    only = adapters.get(ONLY)
    if only is not None and only.chat_template and not checkpoint.instruction_tuned:
        checkpoint.instruction_tuned = True
        checkpoint.chat_template = checkpoint.chat_template or only.chat_template


def load_tokenizer(path_or_name: str | os.PathLike[str], *, offline: bool = False) -> Tokenizer:
    """Load the tokenizer of a model, or a ``tokenizer.model`` or ``tokenizer.json``, without reading weights.

    Raises GemkitError as `load` does.
    """
    path = find(path_or_name, offline)
    if path.is_file() and (path.suffix == ".model" or path.name.endswith("tokenizer.json")):
        from gemkit.text.tokenizer import Tokenizer

        return Tokenizer.from_file(path)
    if (tokenizer := _remembered_tokenizer(path)) is not None:
        return tokenizer
    from gemkit.weights.open import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        return _tokenizer(checkpoint)


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    from gemkit.text.tokenizer import Tokenizer

    key = checkpoint.vocabulary_key
    if key is None:
        raise GemkitError(
            f"{checkpoint.source} has no vocabulary: get the file again, or another conversion of the model"
        )
    try:
        tokenizer = Tokenizer.from_cached(key, lambda: checkpoint.vocabulary)
    except GemkitError as error:
        if checkpoint.source is None or str(checkpoint.source) in str(error):
            raise
        raise GemkitError(f"{checkpoint.source}: {error}") from None
    if checkpoint.source is not None and (record := _key_record(checkpoint.source)) is not None:
        try_atomic_write(record, key.encode())
    return tokenizer


def _remembered_tokenizer(path: Path) -> Tokenizer | None:
    """Return the tokenizer of a file that was loaded before, without opening it; None if it is not known."""
    record = _key_record(path)
    try:
        key = record.read_text() if record is not None else None
    except (OSError, ValueError):
        return None
    if key is None:
        return None
    from gemkit.text.tokenizer import Tokenizer

    return Tokenizer.find_cached(key)


def _key_record(path: Path) -> Path | None:
    """Return the file with the checksum of a model's vocabulary, named by path, size and time of its sources."""
    try:
        files = _vocabulary_files(path)
        keys = [
            f"{file.absolute()}\n{status.st_size}\n{status.st_mtime_ns}\n{status.st_ino}"
            for file in files
            for status in (file.stat(),)
        ]
        name = hashlib.sha256("\n".join(keys).encode()).hexdigest()[:32]
        return cache_dir() / "tokenizers" / f"{name}.key" if files else None
    except (OSError, GemkitError):
        return None


def _vocabulary_files(path: Path) -> list[Path]:
    """Return the files from which a model's vocabulary is read; none where only opening the model tells."""
    if path.suffix == ".gguf" and path.is_file():
        return [path]
    if not path.is_dir():
        return []
    from gemkit.weights import folder

    names = folder.top_level(path)
    if not folder.is_hugging_face(names):
        return [path / name for name in folder.ggufs_of(names)]
    found = folder.tokenizer(names)
    settings = [name for name in (folder.CONFIG, *folder.TOKENIZER_SETTINGS) if name in names]
    return [path / name for name in (found, *settings)] if found else []
