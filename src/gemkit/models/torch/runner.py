"""The engine's `Runner` on PyTorch: a static cache of pages, few shapes, optionally compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from gemkit.arch.config import ModelConfig
from gemkit.engine.interface import Batch, StepResult, check_finite, page_groups
from gemkit.errors import GemkitError, UsageError
from gemkit.models.frameworks import padded
from gemkit.models.frameworks.info import FrameworkInfo
from gemkit.models.torch.decoder import Decoder
from gemkit.models.torch.load import BITS, load_decoder, pick_dtype
from gemkit.models.torch.steps import Steps, found
from gemkit.weights.checkpoint import Tensor

_HEAD_ROWS = 64  # rows of logits at a time
_FIRST_PAGES = 32  # a cache that grows is recorded anew: start with room for 2,000 tokens


class TorchRunner(FrameworkInfo):
    """Runs a model with PyTorch, on the CPU or an accelerator.

    config, weights: as in a `Checkpoint`; memory holds the model and one tensor more while it loads.
    device: "cpu", "cuda", "cuda:1", …; None takes CUDA where there is one. dtype: see `load.pick_dtype`; "int8" and
    "int4" are of the matrices alone, see `linear`.
    threads: on the CPU, of the whole process.
    compile: compile the model, and on CUDA record its steps (see `steps`); the first steps take long. None does so on
    CUDA.
    Raises UsageError for a device or type that cannot be had, GemkitError if memory is short.
    """

    page_size = 64
    scratch_bytes = 0  # torch keeps its own

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        *,
        device: str | None = None,
        dtype: str = "auto",
        compile: bool | None = None,
        threads: int | None = None,
        max_tokens_per_step: int = 512,
    ) -> None:
        place = _device(device)
        activations = pick_dtype(dtype, config, place)
        decoder: Decoder = _memory(load_decoder, config, weights, activations, place, BITS.get(dtype))
        self._start(decoder, activations, place, compile, threads, max_tokens_per_step)

    @classmethod
    def of(
        cls, decoder: Decoder, dtype: torch.dtype, *, compile: bool | None = None, max_tokens_per_step: int = 512
    ) -> TorchRunner:
        """A runner of a decoder that is there already; dtype: of its activations."""
        runner = cls.__new__(cls)
        device = next(decoder.parameters()).device
        runner._start(decoder, dtype, device, compile, None, max_tokens_per_step)
        return runner

    def _start(
        self,
        decoder: Decoder,
        dtype: torch.dtype,
        device: torch.device,
        compile: bool | None,
        threads: int | None,
        max_tokens_per_step: int,
    ) -> None:
        self.decoder, self.dtype, self.device = decoder, dtype, device
        self.config = decoder.config
        self.groups = page_groups(self.config)
        self.max_tokens_per_step = max_tokens_per_step
        self.adapter_count = 0
        self.activations = str(dtype).removeprefix("torch.")
        self.path = f"torch {device.type}"
        if threads is not None:
            torch.set_num_threads(threads)
        self.threads = torch.get_num_threads()
        compiled = device.type == "cuda" if compile is None else compile
        self.steps = Steps(decoder, self.groups, device, compiled)
        self._cache: list[tuple[torch.Tensor, torch.Tensor]] = [self._empty(1) for _ in self.config.layers]

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""
        return sum(tensor.nbytes for tensor in (*self.decoder.parameters(), *self.decoder.buffers()))

    @property
    def token_bytes(self) -> int:
        """Bytes of weights that one token reads: an untied embedding gives a row alone."""
        if self.config.tie_word_embeddings:
            return self.weight_bytes
        return self.weight_bytes - self.decoder.model.embed_tokens.weight.nbytes

    def page_bytes(self, group: int) -> int:
        size = torch.empty((), dtype=self.dtype).element_size()
        row = self.config.num_key_value_heads * self.config.head_dim * size
        return 2 * self.page_size * row * len(self.groups[group].layers)

    def reserve(self, pages: Sequence[int]) -> None:
        for group, count in zip(self.groups, pages, strict=True):
            for layer in group.layers:
                old = self._cache[layer]
                if len(old[0]) < (count + 1) * self.page_size:
                    self.steps.forget()
                    wanted = max(_FIRST_PAGES, padded.quarter(count + 1))
                    self._cache[layer] = new = _memory(self._empty, wanted)
                    for kept, grown in zip(old, new):
                        grown[: len(kept)] = kept

    def _empty(self, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (pages * self.page_size, self.config.num_key_value_heads, self.config.head_dim)
        k, v = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        return k, v

    # --- steps ---------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> StepResult:
        return padded.in_parts(self._step, batch)

    def _step(self, batch: Batch) -> StepResult:
        step = self._padded(batch)
        wanted = np.flatnonzero(batch.draws)
        few = all(padded.greedy(batch.sampling[b]) for b in wanted)
        known = []
        with torch.inference_mode():
            if step.tokens.shape[1] == 1 and len(step.tokens) <= _HEAD_ROWS:
                logits_BV, packed = _memory(self.steps.decode, step, self._cache, few)
                known = self._known(logits_BV, packed, wanted, batch)
            else:
                hidden_XD = _memory(self.steps.hidden, step, self._cache).flatten(0, 1)
                last = step.rows[batch.starts[wanted + 1] - 1]
                for first in range(0, len(wanted), _HEAD_ROWS):
                    some = slice(first, first + _HEAD_ROWS)
                    logits_RV, packed = self.steps.likeliest(hidden_XD[self._put(last[some])], few)
                    known += self._known(logits_RV, packed, np.arange(len(last[some])), batch, wanted[some])
        return padded.choose(known, batch, wanted)

    def _known(
        self,
        logits_RV: torch.Tensor,
        packed: torch.Tensor,
        rows: np.ndarray,
        batch: Batch,
        wanted: np.ndarray | None = None,
    ) -> list[padded.Logits]:
        """What `padded.choose` needs of some rows, of the batch's sequences `wanted`."""
        top, ids, log_sums = found(packed)
        check_finite(log_sums[rows])
        known = []
        for r, b in zip(rows, rows if wanted is None else wanted, strict=True):
            whole = logits_RV[int(r)].cpu().numpy() if padded.needs_whole(batch.sampling[b]) else None
            known.append(padded.Logits(ids[r], top[r], float(log_sums[r]), whole))
        return known

    def logits(self, batch: Batch) -> np.ndarray:
        step, hidden_BTD = self._run(batch)
        with torch.inference_mode():
            return self.decoder.logits(self._rows(step, hidden_BTD)).cpu().numpy()

    def score(self, batch: Batch, targets: np.ndarray) -> np.ndarray:
        step, hidden_BTD = self._run(batch)
        out = np.zeros(len(targets), np.float32)
        wanted = np.flatnonzero(targets >= 0)
        with torch.inference_mode():
            hidden_TD = self._rows(step, hidden_BTD)
            for first in range(0, len(wanted), _HEAD_ROWS):
                rows = wanted[first : first + _HEAD_ROWS]
                logits_RV = self.decoder.logits(hidden_TD[torch.from_numpy(rows).to(self.device)]).double()
                ids = torch.from_numpy(targets[rows].astype(np.int64)).to(self.device)
                picked = logits_RV.gather(1, ids[:, None])[:, 0] - logits_RV.logsumexp(-1)
                picked = picked.where(logits_RV.isfinite().all(-1), torch.nan)
                out[rows] = picked.float().cpu().numpy()
        return out

    def hidden(self, batch: Batch) -> np.ndarray:
        step, hidden_BTD = self._run(batch)
        return self._rows(step, hidden_BTD).float().cpu().numpy()

    def _rows(self, step: padded.Padded, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return hidden_BTD.flatten(0, 1)[self._put(step.rows)]

    def _put(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self.device)

    def _padded(self, batch: Batch) -> padded.Padded:
        return padded.pad(batch, self.page_size, [group.window for group in self.groups], padded.quarter)

    def _run(self, batch: Batch) -> tuple[padded.Padded, torch.Tensor]:
        """The padded step and the hidden states [B, T, D] after the final norm."""
        step = self._padded(batch)
        with torch.inference_mode():
            return step, _memory(self.steps.hidden, step, self._cache)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UsageError(f"torch has no device {name!r} here; leave it out, or choose cpu") from None
    return device


def _memory(function, *arguments):
    """Calls a function whose want of memory is a user's error."""
    try:
        return function(*arguments)
    except (torch.OutOfMemoryError, MemoryError):
        raise GemkitError(
            "memory is short for this model: choose a smaller one, a shorter context, or a narrower dtype"
        ) from None
