"""Rules about what gemkit itself makes of the files: they are opened as `gemkit.load` opens them."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from gemkit.errors import GemkitError, GemkitWarning, listed
from gemkit.text.tokenizer import Tokenizer
from gemkit.tools.check.finding import ERROR, Hit, fault_of, rule
from gemkit.tools.check.subject import KERAS, Subject
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.open import open_checkpoint

# Limits of the native engine: native/src/plan.cc, validate
_HEAD_STEP = 32
_MAX_CONTEXT = 1 << 24


def load(subject: Subject, path: Path) -> None:
    """Open the model and its tokenizer: `checkpoint`, or `refusal`. The checkpoint stays open for the rules."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GemkitWarning)  # each has a rule here
        try:
            checkpoint = open_checkpoint(path)
            _take_converted(subject, checkpoint)
            key = checkpoint.vocabulary_key
            if key is None:
                raise GemkitError("it has no tokenizer")
            subject.tokenizer = Tokenizer.from_cached(key, lambda: checkpoint.vocabulary)
        except GemkitError as error:
            subject.refusal = str(error)
            return
    subject.checkpoint = checkpoint


def _take_converted(subject: Subject, checkpoint: Checkpoint) -> None:
    """Take the values of tensors from the loader where it converts their types."""
    for at, view in enumerate(subject.tensors):
        if view.form is None and (tensor := checkpoint.tensors.get(view.key)) is not None:
            read_data = lambda tensor=tensor: tensor.data  # noqa: E731
            subject.tensors[at] = dataclasses.replace(view, form=tensor.type, data=read_data)


@rule(
    "unloadable",
    ERROR,
    "gemkit cannot load the model.",
    why="what is found is what gemkit.load says; other programs may be laxer, or load it wrongly",
    remedy="mend what it names, or get the files again",
    causes=("tensor-extra",),
)
def unloadable(s: Subject) -> Iterator[Hit]:
    if s.refusal is not None:
        yield s.path.name, fault_of(s.path, s.refusal)


@rule(
    "engine-limits",
    ERROR,
    "gemkit's own engine cannot run a model of these sizes.",
    why="its kernels read whole vectors of a head; no published Gemma is outside these limits",
    remedy="run it with --backend torch, jax or keras",
)
def engine_limits(s: Subject) -> Iterator[Hit]:
    if s.config is None or s.kind == KERAS:
        return
    if s.config.head_dim % _HEAD_STEP:
        yield f"{s.config_file}: head_dim", f"it is {s.config.head_dim}, no multiple of {_HEAD_STEP}"
    if s.config.max_position_embeddings > _MAX_CONTEXT:
        yield f"{s.config_file}: max_position_embeddings", f"it is {s.config.max_position_embeddings:,}"
    bases = sorted({layer.rope_theta for layer in s.config.layers if layer.rope_theta <= 1})
    if bases:
        yield f"{s.config_file}: rope_theta", f"it is {listed(bases)}, not above 1"


@rule(
    "layer-count",
    ERROR,
    "The configuration names another number of layers than there are tensors of.",
    why="missing layers stop loaders or are filled with random numbers; layers too many are dropped without a word",
    remedy="set num_hidden_layers (in GGUF block_count) to the layers that the weights have, or get the rest of them",
    causes=("tensor-missing", "tensor-extra", "unloadable", "layer-pattern", "rope-base", "rope-factor"),
)
def layer_count(s: Subject) -> Iterator[Hit]:
    if s.config is None or not s.tensors_known or s.absent_shards:
        return
    numbers = {
        int(m[1]) for view in s.tensors if (m := re.search(r"(?:^|\.)(?:layers|blk)\.(\d{1,6})\.", view.key or ""))
    }
    wanted = s.config.num_hidden_layers
    if numbers and len(numbers) != wanted and numbers == set(range(len(numbers))):
        yield s.config_file, f"it says {wanted}, the tensors are of {len(numbers)}"
