"""The engine's `Runner` for a framework: pages, padding, choice of tokens; a subclass holds arrays and runs the model.

Letters: B sequences, T new tokens, R rows of hidden states, D model width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gemkit.engine.interface import Batch, StepResult, page_groups
from gemkit.errors import GemkitError
from gemkit.models.frameworks.batch import Array, PaddedBatch, bucket, in_parts, pad
from gemkit.models.frameworks.choice import Draws, RowLogits, choose, unpack_top
from gemkit.models.frameworks.info import FrameworkInfo

AtLeast = tuple[int, int, int]  # sequences, tokens and pages to pad to


class FrameworkRunner(FrameworkInfo, ABC):
    """A decoder behind the engine's protocol. Its weights may change between steps.

    activations: name of the type to compute in. element_size: bytes of an element of the cache. path: backend and
    device, for reports.
    caches: of each layer, keys and values [slots, K, H].
    """

    page_size = 64
    head_rows = 32  # rows of logits at a time
    first_pages = 32  # a cache that grows is another shape: start with 2,000 tokens
    rounded: Callable[[int], int] = staticmethod(bucket)  # numbers of pages
    adapter_count = 0  # 1: the decoder has an adapter, for all requests

    def __init__(
        self, decoder: Any, activations: str, element_size: int, path: str, threads: int, max_tokens_per_step: int
    ) -> None:
        self.decoder, self.config = decoder, decoder.config
        self.activations, self.element_size, self.path, self.threads = activations, element_size, path, threads
        self.max_tokens_per_step = max_tokens_per_step
        self.groups = page_groups(self.config)
        self.clear()

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""
        return sum(self._weight_sizes().values())

    @property
    def token_bytes(self) -> int:
        """Bytes of weights that one token reads: an untied embedding, of which it reads a row, is not counted."""
        embedding = 0 if self.config.tie_word_embeddings else self._weight_sizes()["model.embed_tokens.weight"]
        return self.weight_bytes - embedding

    def page_bytes(self, group: int) -> int:
        row = self.config.num_key_value_heads * self.config.head_dim * self.element_size
        return 2 * self.page_size * row * len(self.groups[group].layers)

    def clear(self) -> None:
        """Free the cache."""
        self.caches: list[tuple[Array, Array]] = [self._call(self._allocate, 1) for _ in self.config.layers]

    def reserve(self, pages: Sequence[int]) -> None:
        for group, count in zip(self.groups, pages, strict=True):
            for layer in group.layers:
                if self.caches[layer][0].shape[0] < (count + 1) * self.page_size:
                    wanted = max(self.first_pages, self.rounded(count + 1))
                    self.caches[layer] = self._call(self._grown, self.caches[layer], wanted)

    # --- steps -------------------------------------------------------------------------------------------------------

    def step(self, batch: Batch, at_least: AtLeast | None = None) -> StepResult:
        """Run the new tokens, their draws and targets. at_least: sizes to pad to, so that shapes stay."""
        return in_parts(self._step, batch) if at_least is None else self._step(batch, at_least)

    def _step(self, batch: Batch, at_least: AtLeast | None = None) -> StepResult:
        step, draws = self._padded(batch, at_least), Draws.of(batch)
        argmax, everything = draws.are_argmax(), np.arange(len(draws.sequences))
        if step.tokens.shape[1] == 1 and len(step.tokens) <= self.head_rows and batch.targets is None:
            top = self._call(self._decode, step, argmax)
            return choose(self._row_logits(*top, draws.sequences, draws, everything), draws)
        rows, hidden_BTD = [], self._call(self._hidden, step)
        for part, hidden_RD in self._parts(hidden_BTD, step.rows[draws.tokens], at_least):
            drawn = everything[part]
            rows += self._row_logits(*self._call(self._top, hidden_RD, argmax), drawn - part.start, draws, drawn)
        result = choose(rows, draws)
        if batch.targets is not None:
            result.target_logprobs = self._target_logprobs(hidden_BTD, step, batch.targets)
        return result

    def _row_logits(
        self, logits_RV: Array, packed: Array, rows: np.ndarray, draws: Draws, drawn: np.ndarray
    ) -> list[RowLogits]:
        """Read some rows of logits, for these draws."""
        found = []
        for row, r, ids, top, log_sum in zip(rows, drawn, *unpack_top(self._numpy(packed)[rows]), strict=True):
            whole = self._numpy(logits_RV[int(row)]) if draws.needs_whole(r) else None
            found.append(RowLogits(ids, top, float(log_sum), whole))
        return found

    def _target_logprobs(self, hidden_BTD: Array, step: PaddedBatch, targets: np.ndarray) -> np.ndarray:
        out = np.zeros(len(targets), np.float32)
        wanted = np.flatnonzero(targets >= 0)
        for part, hidden_RD in self._parts(hidden_BTD, step.rows[wanted]):
            rows = wanted[part]
            ids = np.zeros(hidden_RD.shape[0], np.int32)
            ids[: len(rows)] = targets[rows]
            out[rows] = self._call(self._logprobs, hidden_RD, ids)[: len(rows)]
        return out

    def logits(self, batch: Batch) -> np.ndarray:
        step = self._padded(batch)
        hidden_BTD = self._call(self._hidden, step)
        out = np.empty((len(batch.tokens), self.config.vocab_size), np.float32)
        for part, hidden_RD in self._parts(hidden_BTD, step.rows):
            out[part] = self._numpy(self._call(self._top, hidden_RD, True)[0])[: len(out[part])]
        return out

    def score(self, batch: Batch, targets: np.ndarray) -> np.ndarray:
        none = np.zeros_like(batch.draws)
        return self.step(replace(batch, draws=none, masks=(), targets=targets)).target_logprobs

    def hidden(self, batch: Batch) -> np.ndarray:
        step = self._padded(batch)
        hidden_BTD = self._call(self._hidden, step)
        return self._numpy(hidden_BTD).reshape(-1, self.config.hidden_size)[step.rows]

    def _parts(
        self, hidden_BTD: Array, rows: np.ndarray, at_least: AtLeast | None = None
    ) -> Iterator[tuple[slice, Array]]:
        """Yield `head_rows` of the rows at a time: their slice of `rows`, and hidden states [R, D], padded."""
        least = min(at_least[0], self.head_rows) if at_least else 1
        for first in range(0, len(rows), self.head_rows):
            part = rows[first : first + self.head_rows]
            padded = np.zeros(max(bucket(len(part)), least), np.int32)
            padded[: len(part)] = part
            yield slice(first, first + len(part)), self._call(self._take, hidden_BTD, padded)

    def _padded(self, batch: Batch, at_least: AtLeast | None = None) -> PaddedBatch:
        if self.adapter_count and (batch.adapters is None or (batch.adapters < 0).any()):
            raise GemkitError(
                f"{self.path} runs the adapter in all requests: load the model without it for its own answers"
            )
        if at_least is None:
            return pad(batch, self.page_size, [group.window for group in self.groups], self.rounded)
        sequences, tokens, pages = at_least
        return pad(batch, self.page_size, rounded=lambda n: self.rounded(max(n, pages)), minimum=(sequences, tokens))

    # --- what a framework defines ------------------------------------------------------------------------------------

    @abstractmethod
    def _weight_sizes(self) -> dict[str, int]:
        """Return the bytes of each weight by its canonical name."""

    @abstractmethod
    def _allocate(self, pages: int) -> tuple[Array, Array]:
        """Return keys and values of an empty cache of a layer."""

    @abstractmethod
    def _grown(self, cache: tuple[Array, Array], pages: int) -> tuple[Array, Array]:
        """Return a larger cache of a layer that begins with this one."""

    @abstractmethod
    def _hidden(self, step: PaddedBatch) -> Array:
        """Run the layers and write the caches; return hidden states [B, T, D] after the final norm."""

    @abstractmethod
    def _take(self, hidden_BTD: Array, rows: np.ndarray) -> Array:
        """Return rows [R, D] of the flat [B * T, D]."""

    @abstractmethod
    def _top(self, hidden_RD: Array, argmax: bool) -> tuple[Array, Array]:
        """Return logits [R, V] and packed rows; see `gemkit.models.frameworks.choice`. argmax: k is 1."""

    def _decode(self, step: PaddedBatch, argmax: bool) -> tuple[Array, Array]:
        """Return `_top` of `_hidden` of a step of one token a sequence."""
        return self._top(self._take(self._hidden(step), np.arange(len(step.tokens), dtype=np.int32)), argmax)

    @abstractmethod
    def _logprobs(self, hidden_RD: Array, ids_R: np.ndarray) -> np.ndarray:
        """Return log-probabilities [R] of ids, NaN where a logit of the row is not finite."""

    @abstractmethod
    def _numpy(self, array: Array) -> np.ndarray:
        """Return an array in float32."""

    def _call(self, function: Callable, *arguments: Any) -> Any:
        """Call a function that allocates memory of the device."""
        return check_memory(function, *arguments)


def check_memory(function: Callable, *arguments: Any) -> Any:
    """Call a function; raises GemkitError for an out-of-memory error of any framework."""
    try:
        return function(*arguments)
    except Exception as error:
        kinds = ("MemoryError", "OutOfMemoryError", "ResourceExhaustedError")
        if type(error).__name__ in kinds or "RESOURCE_EXHAUSTED" in str(error):
            raise GemkitError(
                "memory is short for this model: choose a smaller one, a shorter context, or a narrower dtype"
            ) from None
        raise
