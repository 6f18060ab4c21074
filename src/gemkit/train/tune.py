"""Tuning from a model's name and a data set to a folder that everything else loads: `Tuning`.

The folder of a run holds its log and checkpoints (`gemkit.train.run`) and, once it is finished, the result: an adapter
in PEFT's layout, or a model in Hugging Face's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np

from gemkit.api.load import find, load_tokenizer
from gemkit.api.model import Model
from gemkit.data.batch import Batches, TokenBatch
from gemkit.data.prepare import DataOptions, prepare
from gemkit.data.report import report
from gemkit.data.sources import Source
from gemkit.errors import GemkitError, UsageError
from gemkit.host import free_memory
from gemkit.hub.hf_cache import repo_of
from gemkit.models.frameworks.runner import check_memory
from gemkit.text.chat_template import ChatTemplate
from gemkit.train.adapter import new_parts, trained_parts
from gemkit.train.log import RunLog
from gemkit.train.loop import Loop
from gemkit.train.options import TrainOptions
from gemkit.train.plan import Plan, measured_rate, plan
from gemkit.train.run import Result, run
from gemkit.weights.checkpoint import Checkpoint, Tensor
from gemkit.weights.dtype import convert
from gemkit.weights.hf.write import write_hf
from gemkit.weights.lora import LoraAdapter, LoraConfig, LoraPart, check_fits
from gemkit.weights.open import open_checkpoint
from gemkit.weights.peft.config import CONFIG as ADAPTER_CONFIG
from gemkit.weights.peft.read import read_peft
from gemkit.weights.peft.write import write_peft
from gemkit.weights.quant import GGMLType

BITS = {"int8": 8, "int4": 4}
RECOMPUTE = ("cheap", "layers", "none")
_MODEL_CONFIG = "config.json"
_FLOATS = {GGMLType.F32: "float32", GGMLType.F16: "float16", GGMLType.BF16: "bfloat16"}
_DEMO = "google/gemma-3-270m"  # the original of the model that the extra demo installs
_ANSWER = 64  # tokens of an answer during training
_SAMPLED = 4096  # bytes at both ends of a tensor that identify it
_NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"
    "The weights in this folder were modified: they were tuned on other data with gemkit.\n"
)


@dataclass(frozen=True)
class Request:
    """A run as it is asked for.

    model: a name or path, as in `gemkit.load`. data: file or folder of rows. folder: of the run and its result.
    lora: settings of a new adapter. start: the folder of an adapter to go on from, in their place. Neither is given
    where all weights are trained.
    device: as in `gemkit.load`. quantize: "int8" or "int4" matrices under an adapter.
    recompute: see `TorchLoop` and `JaxLoop`.
    """

    model: str
    data: str | os.PathLike[str]
    folder: Path
    options: TrainOptions = field(default_factory=TrainOptions)
    data_options: DataOptions = field(default_factory=DataOptions)
    lora: LoraConfig | None = None
    start: str | os.PathLike[str] | None = None
    backend: str = "torch"
    device: str | None = None
    quantize: str | None = None
    recompute: str = "cheap"
    offline: bool = False


class Tuning:
    """A run that is prepared: files found, rows tokenized, adapter checked; no weights are read yet.

    Raises GemkitError for a model, adapter or data set that cannot be used, UsageError for options that do not fit.
    """

    def __init__(self, request: Request) -> None:
        self.request, options = request, request.options
        if request.quantize is not None and options.method == "full":
            raise UsageError("all weights can be trained as floats alone: leave out quantize, or train an adapter")
        self.path = find(request.model, request.offline, original=True)
        with open_checkpoint(self.path) as checkpoint:
            self.config, self.checkpoint = checkpoint.config, checkpoint
            self.tokenizer = load_tokenizer(self.path)
            self.tokenizer.template = ChatTemplate.of(checkpoint, self.tokenizer)
            self._digest = _digest_of(checkpoint)
        self.start: LoraAdapter | None = None
        self.lora = request.lora
        if request.start is not None:
            self.start = read_peft(request.start)
            check_fits(self.start, self.config)
            self.lora = self.start.config
        if self.lora is not None:
            self.lora.weights(self.config)
        self.prepared = prepare(request.data, self.tokenizer, request.data_options)
        if self.teaches_turns:
            self.checkpoint.instruction_tuned = True
        self.batches = self._batches(self.prepared.train, shuffle=True)
        held_out = self.prepared.validation
        self.validation: list[TokenBatch] | None = (
            list(self._batches(held_out, shuffle=False).once()) if held_out else None
        )

    @property
    def teaches_turns(self) -> bool:
        """True if the rows are conversations, so that the result expects turns."""
        turn = self.tokenizer.start_of_turn_id
        own = self.tokenizer.template is not None and self.tokenizer.template.is_own
        return own or (turn is not None and bool((self.prepared.train[0].tokens == turn).any()))

    def plan(self) -> Plan:
        """Return memory and work of the run. With dtype "auto", those of the CPU's float32."""
        options = self.request.options
        loss, total = (
            sum(int(part(sample)) for sample in self.prepared.train)
            for part in (lambda s: s.loss.sum(), lambda s: len(s.tokens))
        )
        return plan(
            self.config,
            self.lora,
            options.total_steps(self.batches.per_epoch),
            max(self.batches.shapes),
            options.grad_accum,
            self.batches.fill * loss / total,
            "float32" if options.dtype == "auto" else options.dtype,
            BITS.get(self.request.quantize or ""),
            self.request.recompute,
        )

    def report(self, colour: bool = False) -> str:
        """Return the text of a dry run: samples with their loss marked, statistics, memory and time."""
        data = report(self.prepared, self.batches, self.tokenizer, colour=colour)
        on_cpu = self.request.device in (None, "cpu")
        found = self.plan().text(free_memory() if on_cpu else None, measured_rate() if on_cpu else None)
        return f"{data}\n{found}\n"

    def train(self, *, resume: bool = False, log: RunLog | None = None) -> Result:
        """Train, write the result into the folder and return its losses.

        resume: go on from the newest checkpoint. Raises GemkitError if the folder holds something else, if memory is
        short, and as `gemkit.train.run.run`.
        """
        request, options, folder = self.request, self.request.options, Path(self.request.folder)
        log = RunLog(folder, every=options.log_every) if log is None else log
        _check_folder(folder, resume)
        planned = self.plan()
        if request.device in (None, "cpu"):
            planned.check(free_memory())
        backend = _backend(request.backend)
        with open_checkpoint(self.path) as stored:
            decoder = backend.open_decoder(
                self.config, stored.tensors, options, request.device, BITS.get(request.quantize or "")
            )
        start: dict[str, LoraPart] = {}
        if self.lora is not None:
            norms = partial(backend.row_norms, decoder)
            start = dict(self.start.parts) if self.start else new_parts(self.lora, self.config, options.seed, norms)
            decoder = backend.adapt(decoder, start, self.lora.dropout)
        loop = getattr(backend, f"{request.backend.capitalize()}Loop")(decoder, options, request.recompute)
        log.say(
            f"{len(self.prepared.train):,} rows for training, {len(self.prepared.validation):,} for validation; "
            f"{planned.trained / 1e6:,.2f} M of {planned.parameters / 1e6:,.1f} M parameters are trained"
        )
        samples = partial(self._answers, backend, loop) if options.sample_prompts else None
        result = check_memory(
            partial(run, resume=resume, identity=self._identity(), samples=samples, log=log),
            loop,
            self.batches,
            self.validation,
            options,
            folder,
        )
        if self.lora is not None:
            parts = trained_parts(start, loop.parameters())
            template = _turns(self.checkpoint) if self.teaches_turns else None
            write = partial(
                write_peft, config=self.lora, parts=parts, base_model=self._base_name(), chat_template=template
            )
            _put(folder, write, ADAPTER_CONFIG)
        else:
            _put(folder, partial(self._write_model, parameters=loop.parameters()), _MODEL_CONFIG)
        return result

    def _batches(self, samples: Sequence, *, shuffle: bool) -> Batches:
        o = self.request.options
        return Batches(samples, o.batch_size, o.max_length, o.packing, o.seed, shuffle)

    def _answers(self, backend: ModuleType, loop: Loop, step: int) -> Iterable[tuple[str, str]]:
        """Yield the sample prompts with the answers of the model in training, the most probable tokens."""
        turns = self.teaches_turns
        with Model(self.checkpoint, backend.make_runner(loop.decoder), self.tokenizer) as model:
            for prompt in self.request.options.sample_prompts:
                asked = [{"role": "user", "content": prompt}] if turns else prompt
                yield prompt, model.generate(asked, max_tokens=_ANSWER, temperature=0).text

    def _identity(self) -> dict[str, str]:
        """Return the digests of all that the steps depend on, besides the options."""
        treatment = self.request.data_options
        found = {
            "model": self._digest,
            "data set": _digest_of_files(self.request.data),
            "template": treatment.template,
            "masking of prompts": str(bool(treatment.mask_prompt)),
            "share for validation": str(treatment.validation),
            "backend": self.request.backend,
            "type of the frozen weights": self.request.quantize or "float",
        }
        if self.lora is not None:
            values = dataclasses.asdict(self.lora)
            found |= {f"{name} of the adapter": str(value) for name, value in values.items()}
            found["adapter to start from"] = _digest_of_parts(self.start.parts) if self.start else "none"
        return found

    def _base_name(self) -> str:
        """Return the name or path that peft loads the model by."""
        if self.request.model == "demo":
            return _DEMO
        return repo_of(self.path) or str(self.path.absolute())

    def _write_model(self, folder: Path, parameters: Mapping[str, np.ndarray]) -> None:
        with open_checkpoint(self.path) as stored:
            kind = _FLOATS.get(stored.tensors["model.embed_tokens.weight"].type, "bfloat16")
            tensors = {
                name: Tensor(GGMLType.F32, values.shape, np.ascontiguousarray(values, "<f4").reshape(-1).view(np.uint8))
                for name, values in parameters.items()
            }
            tuned = stored.with_tensors(tensors)
            if self.teaches_turns:
                tuned.instruction_tuned, tuned.chat_template = True, _turns(stored)
                stops = {*self.config.stop_token_ids, self.tokenizer.end_of_turn_id} - {None}
                tuned.config = dataclasses.replace(self.config, stop_token_ids=tuple(sorted(stops)))
            write_hf(folder, convert(tuned, kind))
        (folder / "NOTICE").write_text(_NOTICE, encoding="utf-8", newline="\n")


def _backend(name: str) -> ModuleType:
    """Return the training loop of a framework."""
    if name == "keras":
        from gemkit.api.load import choose_keras_backend

        choose_keras_backend()
    try:
        return import_module(f"gemkit.train.loop_{name}")
    except ModuleNotFoundError as error:
        from gemkit.extras import install

        raise GemkitError(f"training with {name} needs {error.name}: {install(name)}") from None


def _turns(checkpoint: Checkpoint) -> str:
    """Return the chat template of the result: the model's own, or that of Gemma's turns."""
    from gemkit.text.template import DEFAULT_TEMPLATE

    return checkpoint.chat_template or DEFAULT_TEMPLATE


def _check_folder(folder: Path, resume: bool) -> None:
    """Raise GemkitError for a folder with something else than a run."""
    if folder.exists() and not folder.is_dir():
        raise GemkitError(f"{folder} is a file: give another folder for the run")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / "metrics.csv").exists() and not (folder / "checkpoints").exists():
        raise GemkitError(f"{folder} is not empty: give another folder for the run")
    if not resume:
        raise GemkitError(f"{folder} has a run: resume it (--resume), give another folder, or delete it")


def _put(folder: Path, write: Callable[[Path], object], mark: str) -> None:
    """Write a result and move its files into the folder, `mark` last: a folder with it is whole."""
    temporary = folder / ".result"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        write(temporary)
        for stale in (folder / mark, *folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
            stale.unlink(missing_ok=True)
        for file in sorted(temporary.iterdir(), key=lambda path: path.name == mark):
            os.replace(file, folder / file.name)
        temporary.rmdir()
    except OSError as error:
        raise GemkitError(
            f"the result cannot be written to {folder} ({error.strerror or error}): free some space and resume the run"
        ) from None


def _digest_of(checkpoint: Checkpoint) -> str:
    """Return a checksum of a model's configuration and of both ends of each tensor."""
    digest = hashlib.sha256(repr(checkpoint.config).encode())
    for name, tensor in checkpoint.tensors.items():
        data = np.asarray(tensor.data).reshape(-1)
        digest.update(f"{name} {tensor!r}".encode() + data[:_SAMPLED].tobytes() + data[-_SAMPLED:].tobytes())
    return digest.hexdigest()


def _digest_of_files(path: str | os.PathLike[str]) -> str:
    """Return a checksum of a data set's files."""
    source, digest = Source.of(path), hashlib.sha256()
    for found in (*source.train, *source.validation):
        for file in sorted(found.rglob("*")) if found.is_dir() else [found]:
            if file.is_file():
                with open(file, "rb") as opened:
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _digest_of_parts(parts: Mapping[str, LoraPart]) -> str:
    digest = hashlib.sha256()
    for name, part in sorted(parts.items()):
        digest.update(f"{name} {part.scale!r}".encode() + part.a.tobytes() + part.b.tobytes())
        digest.update(b"" if part.magnitude is None else part.magnitude.tobytes())
    return digest.hexdigest()
