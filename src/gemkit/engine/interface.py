"""Interface of engine and model: one call per step, which returns tokens, not the logits of the vocabulary.

Letters: B sequences in a step, T new tokens in a step, D model width, V vocabulary, R draws in a step,
P columns of a page table.
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
    """Raise GemkitError unless all values are finite: the error that a step gives, whatever was asked of the model."""
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
    draws: int32 [B]; a token is drawn after each of the last ``draws[b]`` new tokens of sequence b, 0 for none.
    sampling: B records.
    counters: int64 [B], the index of the seed's random number for a sequence's first draw; the i-th draw after it
        uses ``counters[b] + i``. For a request, the number of tokens generated so far.
    history: B int32 arrays with all ids so far, new ones included; empty where no penalty needs them. A draw uses
        the ids up to its own position.
    prompt_lengths: int32 [B]; history[prompt_lengths[b]:] was generated.
    adapters: int32 [B], the number of each sequence's adapter, -1 for none; None if no sequence has one.
    masks: one per draw, in the order of `StepResult`: uint32 [ceil(V / 32)], where bit i % 32 of word i // 32 allows
        token i, or None to allow all. Empty if no draw has a mask.
    targets: int32 [T], the token after each new token whose log-probability is wanted, -1 for none; None if there is
        no target.
    """

    tokens: np.ndarray
    starts: np.ndarray
    positions: np.ndarray
    pages: tuple[np.ndarray, ...]
    draws: np.ndarray
    sampling: tuple[Sampling, ...]
    counters: np.ndarray
    history: tuple[np.ndarray, ...]
    prompt_lengths: np.ndarray
    adapters: np.ndarray | None = None
    masks: tuple[np.ndarray | None, ...] = ()
    targets: np.ndarray | None = None


NO_IDS = np.empty(0, np.int32)
GREEDY = Sampling()


def build_batch(
    tokens: Sequence[np.ndarray],
    positions: Sequence[int],
    pages: tuple[np.ndarray, ...],
    *,
    draws: Sequence[int] = (),
    sampling: tuple[Sampling, ...] = (),
    counters: Sequence[int] = (),
    history: tuple[np.ndarray, ...] = (),
    prompt_lengths: Sequence[int] = (),
    adapters: Sequence[int] = (),
    masks: tuple[np.ndarray | None, ...] = (),
    targets: np.ndarray | None = None,
) -> Batch:
    """Build a batch from the new tokens of each sequence, int32, and one value a sequence of everything else.

    Defaults, for an empty argument: no draws, greedy, counters and prompt lengths 0, no history, no adapters.
    The tokens of a single sequence are not copied.
    """
    size, none = len(tokens), (0,) * len(tokens)
    if size == 1:
        starts = np.array((0, len(tokens[0])), np.int32)
    else:
        starts = np.zeros(size + 1, np.int32)
        np.cumsum([len(ids) for ids in tokens], out=starts[1:])
    return Batch(
        tokens[0] if size == 1 else np.concatenate(tokens, dtype=np.int32),
        starts,
        np.array(positions, np.int32),
        pages,
        np.array(draws if len(draws) else none, np.int32),
        sampling or (GREEDY,) * size,
        np.array(counters if len(counters) else none, np.int64),
        history or (NO_IDS,) * size,
        np.array(prompt_lengths if len(prompt_lengths) else none, np.int32),
        np.array(adapters, np.int32) if len(adapters) and max(adapters) >= 0 else None,
        masks,
        targets,
    )


@dataclass(slots=True)
class StepResult:
    """Tokens drawn in a step, and log-probabilities of targets.

    There are R = ``batch.draws.sum()`` rows, in the order of sequences and, within one, of positions.

    tokens: int32 [R].
    logprobs: float32 [R], natural logarithm of the token's probability under the softmax of the unmodified logits;
        undefined where `Sampling.logprobs` is None.
    top_ids, top_logprobs: int32 and float32 [R, n], n the largest `Sampling.logprobs` of the batch: the most probable
        tokens under the same softmax, best first, padded with -1 and -inf.
    target_logprobs: float32 [T], of ``batch.targets`` under the same softmax, 0 where the target is -1 and not finite
        where a logit is not, see `check_finite`; None without targets.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray
    target_logprobs: np.ndarray | None = None


@dataclass(frozen=True)
class RunnerInfo:
    """Kernels, precision and memory of a runner, as they are when asked.

    path: the instruction set of the native core ("avx2", …), or framework and device ("torch cuda").
    activations: their dtype. threads: of the CPU.
    survives_fork: the runner works in a child of this process.
    weight_bytes: memory of the weights. private_weight_bytes: the part that other processes do not share.
    token_bytes: bytes of weights that one greedy token of one sequence reads.
    screen_bytes: memory of the head's screen, present or to be made in the background; 0 without one.
    """

    path: str
    activations: str
    threads: int
    survives_fork: bool
    weight_bytes: int
    private_weight_bytes: int
    token_bytes: int
    screen_bytes: int = 0


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

    @property
    def info(self) -> RunnerInfo: ...

    def activation_bytes(self, positions: int) -> int | None:
        """Bytes touched by a sequence of `positions` tokens besides weights and cache; None if unknown."""

    def settle(self) -> None:
        """Wait until background work that makes this runner, or the next start, faster is done."""

    def close(self) -> None:
        """End background work; the runner is not used any more."""

    def reserve(self, pages: Sequence[int]) -> None:
        """Allocate this many pages per group and keep cached values; raises GemkitError if memory is short."""

    def page_bytes(self, group: int) -> int:
        """Size of one page of a group, over all its layers."""

    def step(self, batch: Batch) -> StepResult:
        """Run the new tokens with their draws and targets; raises GemkitError for those that it does not support."""

    def logits(self, batch: Batch) -> np.ndarray:
        """Run the new tokens and return all logits, float32 [T, V]: slow and large."""

    def score(self, batch: Batch, targets: np.ndarray) -> np.ndarray:
        """Run the new tokens and return the `StepResult.target_logprobs` of ``targets``, without a draw."""

    def hidden(self, batch: Batch) -> np.ndarray:
        """Run the new tokens and return the hidden states after the final norm, float32 [T, D]."""
