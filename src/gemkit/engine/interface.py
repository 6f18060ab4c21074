"""What the engine needs from a model: one call per step that returns tokens, never the logits of a whole vocabulary.

Letters: B sequences in a step, T new tokens in a step, D model width, V vocabulary, P columns of a page table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gemkit.arch.config import ModelConfig
from gemkit.engine.sampling import Sampling
from gemkit.errors import GemkitError


@dataclass(frozen=True)
class PageGroup:
    """Layers that share a page table because they see the same positions.

    window: None for full attention; W lets position i attend j if and only if 0 <= i - j < W.
    layers: their indices.
    """

    window: int | None
    layers: tuple[int, ...]


def page_groups(config: ModelConfig) -> tuple[PageGroup, ...]:
    """Layers by window, full attention first."""
    windows = sorted({layer.sliding_window or 0 for layer in config.layers})
    members: dict[int, list[int]] = {window: [] for window in windows}
    for i, layer in enumerate(config.layers):
        members[layer.sliding_window or 0].append(i)
    return tuple(PageGroup(window or None, tuple(layers)) for window, layers in members.items())


NOT_NUMBERS = "the model produced logits that are not numbers; the weights are damaged or out of range"


def check_finite(values: np.ndarray) -> None:
    """Raises GemkitError unless all values are finite: the error that a step gives, whatever was asked of the model."""
    if not np.isfinite(values).all():
        raise GemkitError(NOT_NUMBERS)


@dataclass(slots=True)
class Batch:
    """One forward step over ragged sequences. The arrays are the engine's own and valid during the call only.

    tokens: int32 [T], the new tokens of sequence 0, then of sequence 1, ….
    starts: int32 [B + 1]; tokens[starts[b]:starts[b + 1]] belong to sequence b.
    positions: int32 [B], the position of each sequence's first new token; all before it are in the cache.
    pages: one int32 [B, P] per page group; keys and values of position p are in page ``pages[g][b, p // page_size]``.
        -1: no page, because it left the window or is not needed yet. P differs between groups and steps.
    sample: bool [B], whether a token is drawn after the sequence's last new token.
    sampling: B records.
    counters: int64 [B], tokens generated so far: which random number of the seed is drawn.
    history: B int32 arrays with all ids so far, new ones included; empty where no penalty needs them.
    prompt_lengths: int32 [B]; history[prompt_lengths[b]:] was generated.
    adapters: int32 [B], the number of each sequence's adapter, -1 for none; None if no sequence has one.
    """

    tokens: np.ndarray
    starts: np.ndarray
    positions: np.ndarray
    pages: tuple[np.ndarray, ...]
    sample: np.ndarray
    sampling: tuple[Sampling, ...]
    counters: np.ndarray
    history: tuple[np.ndarray, ...]
    prompt_lengths: np.ndarray
    adapters: np.ndarray | None = None


@dataclass(slots=True)
class StepResult:
    """What a step chose.

    tokens: int32 [B], -1 where nothing was drawn.
    logprobs: float32 [B], natural logarithm of the token's probability under the softmax of the unmodified logits; of
        no meaning where `Sampling.logprobs` is None.
    top_ids, top_logprobs: int32 and float32 [B, n], n the largest `Sampling.logprobs` of the batch: the likeliest
        tokens under the same softmax, best first, padded with -1 and -inf.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


class Runner(Protocol):
    """A model with its cache. Results must not depend on how a sequence is cut into steps or who shares them.

    page_size: positions per page, in every group.
    groups: the page groups; every layer is in exactly one.
    max_tokens_per_step: the largest T that a call accepts.
    adapter_count: adapters go by number from 0 up to this.
    """

    config: ModelConfig
    page_size: int
    groups: tuple[PageGroup, ...]
    max_tokens_per_step: int
    adapter_count: int

    def reserve(self, pages: Sequence[int]) -> None:
        """Makes room for so many pages per group and keeps what is cached; raises GemkitError if memory is short."""

    def page_bytes(self, group: int) -> int:
        """Size of one page of a group, over all its layers."""

    def step(self, batch: Batch) -> StepResult:
        """Runs the new tokens and draws a token where ``batch.sample`` is set."""

    def logits(self, batch: Batch) -> np.ndarray:
        """Runs the new tokens and returns all logits, float32 [T, V]: slow and large."""

    def score(self, batch: Batch, targets: np.ndarray) -> np.ndarray:
        """Runs the new tokens; float32 [T]: log-probability of ``targets[t]`` (int32) after token t, 0 for -1."""

    def hidden(self, batch: Batch) -> np.ndarray:
        """Runs the new tokens and returns the hidden states after the final norm, float32 [T, D]."""
