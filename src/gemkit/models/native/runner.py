"""The engine's `Runner` on the C++ core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from gemkit import _native, forks
from gemkit.arch.config import ModelConfig
from gemkit.engine.interface import NO_IDS, NOT_NUMBERS, Batch, RunnerInfo, StepResult, page_groups
from gemkit.engine.sampling import SAMPLING, Sampling, sampling_records
from gemkit.errors import GemkitError, UsageError
from gemkit.host import check_memory
from gemkit.models.native.plan import Adapter, Weight, build_plan

ACTIVATIONS = ("int8", "float32")

IMAGE_VERSION: int = _native.image_version

_native.check_sampling(
    {name: (offset, kind.itemsize) for name, (kind, offset) in SAMPLING.fields.items()}, SAMPLING.itemsize
)


def kernel_path() -> str:
    """Return the instruction set in use: "portable", "avx2", "avx512" or "neon"; GEMKIT_ISA forces one."""
    try:
        return _native.path()
    except ValueError as error:
        raise UsageError(f"{error}.") from None


class PackedStore(Protocol):
    """Keeps the packed weights of one model between starts."""

    def find(self) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Return the saved packed image and screen of the head, uint8, mapped; None if there are none."""

    def keep(self, model: _native.Model) -> None:
        """Save a model's image, and give it a screen."""

    def take_in(self, model: _native.Model) -> None:
        """Move the mapped image of a model into faster memory."""

    def settle(self) -> None:
        """Wait until this work is done."""

    def finish(self) -> None:
        """Wait for the work that later starts need, and leave out the rest."""


class NativeRunner:
    """Runs a model on the CPU; results are the same bits for every batch, chunk and thread count.

    config, weights: as in a `Checkpoint`: every tensor of the manifest by canonical name. They are packed at once; the
        caller may close its file afterwards.
    adapters: low-rank additions; `Batch.adapters` says by number which sequence uses which.
    store: where packed weights may be saved from an earlier start; see `gemkit.models.native.packed`.
    threads: None takes every core this process may use.
    activations: "int8" is fast; "float32" dequantises the weights to float32 and keeps activations and cache in
        float32: it needs 4 bytes a parameter, is slow, and serves as the exact form of the weights.
    max_tokens_per_step: bound of the scratch memory.
    Raises GemkitError if the weights do not fit the config or memory is short.
    """

    page_size: int = _native.page_positions

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Weight],
        *,
        adapters: Sequence[Adapter] = (),
        store: PackedStore | None = None,
        threads: int | None = None,
        activations: str = "int8",
        max_tokens_per_step: int = 512,
    ):
        if activations not in ACTIVATIONS:
            raise UsageError(f"activations must be one of {', '.join(ACTIVATIONS)}, not {activations!r}.")
        if threads is not None and not 1 <= threads <= 1024:
            raise UsageError(f"threads must be between 1 and 1024, not {threads}.")
        self.config = config
        self.groups = page_groups(config)
        self.threads = threads or _native.cores()
        self.activations = activations
        self.max_tokens_per_step = max_tokens_per_step
        self.path = kernel_path()
        self.adapter_count = len(adapters)
        # Float activations need float weights, which are made again at each start
        if activations == "float32":
            store = None
        self._store = store
        image, screen = (store.find() if store is not None else None) or (None, None)
        # Whether the packed weights are a file's pages, and whether there will be a screen if there is none yet
        self.mapped, self._screens = image is not None, store is not None
        plan = build_plan(config, weights, adapters, packed=image is not None)
        whole = activations == "float32"
        check_memory("the weights", sum(4 * m * n if whole else data.nbytes for _, m, n, data in plan["tensors"]))
        self._pages = [0] * len(self.groups)
        self._sampling: tuple[Sampling, ...] = ()
        self._settings = sampling_records(())
        self._model = self._call(
            _native.Model.create, plan, self.threads, activations == "float32", max_tokens_per_step, image, screen
        )
        forks.track(self)
        if store is not None:
            (store.keep if image is None else store.take_in)(self._model)

    def hold(self) -> None:
        """Wait for the step under way, before a fork."""
        self._model.hold()

    def release(self, in_child: bool) -> None:
        """Go on after a fork; the child starts threads of its own at its first step."""
        self._model.release(in_child)

    @staticmethod
    def _call(function, *arguments):
        try:
            return function(*arguments)
        except ValueError as error:
            message = str(error)
            raise GemkitError(message if message == NOT_NUMBERS else f"{message}.") from None

    @property
    def info(self) -> RunnerInfo:
        model = self._model
        return RunnerInfo(
            path=self.path,
            activations=self.activations,
            threads=self.threads,
            survives_fork=True,
            weight_bytes=model.weight_bytes,
            private_weight_bytes=model.weight_bytes - (model.image().nbytes if self.mapped else 0),
            token_bytes=model.token_bytes,
            screen_bytes=model.screen_bytes if self._screens or model.has_screen else 0,
        )

    def settle(self) -> None:
        if self._store is not None:
            self._store.settle()

    def close(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            store.finish()

    @property
    def screen_bytes(self) -> int:
        """Memory of the head's screen; 0 where there is none yet, or none is worth its while."""
        return self._model.screen_bytes if self._model.has_screen else 0

    @property
    def scratch_bytes(self) -> int:
        """Memory reserved for activations and logits, touched as far as steps need it."""
        return self._model.scratch_bytes

    def activation_bytes(self, positions: int) -> int:
        """Return the scratch bytes that one sequence touches, with the sums of attention over this many positions."""
        spare = (_native.head_rows - 1) * (-(-self.config.vocab_size // 16) * 16) * 4
        width = self.config.num_attention_heads * self.config.head_dim
        sums = -(-positions // self.page_size) * width * 4 if self.threads > 1 else 0  # threads divide the pages
        return self.scratch_bytes - spare + sums

    def use_screen(self, use: bool) -> None:
        """Allow or forbid the choice of tokens by the head's screen, if it has one; the tokens are equal."""
        self._model.use_screen(use)

    def take_screen_counts(self) -> list[int]:
        """Return the panels of 16 tokens that each screened choice computed since the last call, -1 for all."""
        return self._model.take_screen_counts()

    def reserve(self, pages: Sequence[int]) -> None:
        more = [max(0, count - before) for count, before in zip(pages, self._pages)]
        check_memory(
            "pages of the key-value cache", sum(count * self.page_bytes(group) for group, count in enumerate(more))
        )
        for group, count in enumerate(pages):
            self._call(self._model.reserve, group, count)
            self._pages[group] = max(count, self._pages[group])

    def page_bytes(self, group: int) -> int:
        return self._call(self._model.page_bytes, group)

    def step(self, batch: Batch) -> StepResult:
        rows = batch.draws.nonzero()[0]
        whole = len(rows) == len(batch.sampling)
        sampling = batch.sampling if whole else tuple([batch.sampling[b] for b in rows])
        histories = batch.history if whole else tuple([batch.history[b] for b in rows])
        if sampling != self._sampling:  # mostly the very same ones as in the step before
            self._sampling, self._settings = sampling, sampling_records(sampling)
        records, bias_ids, bias_values = self._settings
        records["row"], records["draws"] = rows, batch.draws[rows]
        records["counter"], records["prompt_length"] = batch.counters[rows], batch.prompt_lengths[rows]
        if any(map(len, histories)):
            history = np.concatenate(histories, dtype=np.int32, casting="unsafe")
            records["history_end"] = np.cumsum([len(ids) for ids in histories])
            records["history_start"] = records["history_end"] - [len(ids) for ids in histories]
        else:
            history, records["history_start"], records["history_end"] = NO_IDS, 0, 0
        return StepResult(
            *self._call(
                self._model.step,
                *self._arrays(batch),
                records.view(np.uint8).reshape(len(rows), SAMPLING.itemsize),
                bias_ids,
                bias_values,
                history,
                batch.masks,
                NO_IDS if batch.targets is None else np.ascontiguousarray(batch.targets, np.int32),
            )
        )

    def logits(self, batch: Batch) -> np.ndarray:
        return self._call(self._model.logits, *self._arrays(batch))

    def score(self, batch: Batch, targets: np.ndarray) -> np.ndarray:
        return self.step(replace(batch, draws=np.zeros_like(batch.draws), masks=(), targets=targets)).target_logprobs

    def hidden(self, batch: Batch) -> np.ndarray:
        return self._call(self._model.hidden, *self._arrays(batch))

    @staticmethod
    def _arrays(batch: Batch) -> tuple:
        return (
            np.ascontiguousarray(batch.tokens, np.int32),
            np.ascontiguousarray(batch.starts, np.int32),
            np.ascontiguousarray(batch.positions, np.int32),
            [np.ascontiguousarray(table, np.int32) for table in batch.pages],
            NO_IDS if batch.adapters is None else np.ascontiguousarray(batch.adapters, np.int32),
        )
