"""The engine's `Runner` on PyTorch: a static cache of pages, few shapes, optionally compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from gemkit.arch.config import ModelConfig
from gemkit.engine.runner import Batch, StepResult, page_groups
from gemkit.errors import GemkitError, UsageError
from gemkit.models import padded
from gemkit.models.torch.decoder import Decoder, LayerCache
from gemkit.models.torch.load import load_decoder, pick_dtype
from gemkit.weights.checkpoint import Tensor

_HEAD_ROWS = 32  # rows of logits at a time


class TorchRunner:
    """Runs a model with PyTorch, on the CPU or an accelerator.

    config, weights: as in a `Checkpoint`; memory holds the model and one tensor more while it loads.
    device: "cpu", "cuda", "cuda:1", …; None takes CUDA where there is one. dtype: see `load.pick_dtype`.
    threads: on the CPU, of the whole process.
    compile: compile the model; the first steps take long, and as many graphs are made as there are shapes.
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
        compile: bool = False,
        threads: int | None = None,
        max_tokens_per_step: int = 512,
    ) -> None:
        self.config = config
        self.groups = page_groups(config)
        self.max_tokens_per_step = max_tokens_per_step
        self.adapter_count = 0
        self.device = _device(device)
        self.dtype = pick_dtype(dtype, config, self.device)
        self.activations = str(self.dtype).removeprefix("torch.")
        self.path = f"torch {self.device.type}"
        if threads is not None:
            torch.set_num_threads(threads)
        self.threads = torch.get_num_threads()
        self.decoder: Decoder = _memory(load_decoder, config, weights, self.dtype, self.device)
        self._hidden: Callable[..., torch.Tensor] = self.decoder.hidden
        if compile:
            self._hidden = torch.compile(self.decoder.hidden, dynamic=False)
        self._cache: list[tuple[torch.Tensor, torch.Tensor]] = [self._empty(1) for _ in config.layers]

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""
        return sum(p.numel() * p.element_size() for p in self.decoder.parameters())

    @property
    def token_bytes(self) -> int:
        """Bytes of weights that one token reads: an untied embedding gives a row alone."""
        if self.config.tie_word_embeddings:
            return self.weight_bytes
        embedding = self.decoder.model.embed_tokens.weight
        return self.weight_bytes - embedding.numel() * embedding.element_size()

    def page_bytes(self, group: int) -> int:
        size = torch.empty((), dtype=self.dtype).element_size()
        row = self.config.num_key_value_heads * self.config.head_dim * size
        return 2 * self.page_size * row * len(self.groups[group].layers)

    def reserve(self, pages: Sequence[int]) -> None:
        for group, count in zip(self.groups, pages, strict=True):
            for layer in group.layers:
                old = self._cache[layer]
                if len(old[0]) < (count + 1) * self.page_size:
                    self._cache[layer] = new = _memory(self._empty, count + 1)
                    for kept, grown in zip(old, new):
                        grown[: len(kept)] = kept

    def _empty(self, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (pages * self.page_size, self.config.num_key_value_heads, self.config.head_dim)
        k, v = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        return k, v

    # --- steps ---------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> StepResult:
        step, hidden_BTD = self._run(batch)
        wanted = np.flatnonzero(batch.sample)
        last = torch.from_numpy(step.last[wanted].astype(np.int64)).to(self.device)
        rows = torch.from_numpy(wanted.astype(np.int64)).to(self.device)
        found = []
        with torch.inference_mode():
            for first in range(0, len(wanted), _HEAD_ROWS):
                part = slice(first, first + _HEAD_ROWS)
                logits_RV = self.decoder.logits(hidden_BTD[rows[part], last[part]])
                found += self._reduced(logits_RV, [batch.sampling[b] for b in wanted[part]])
        return padded.choose(found, batch, wanted)

    def _reduced(self, logits_RV: torch.Tensor, samplings: list) -> list[padded.Logits]:
        top_RK, ids_RK = logits_RV.topk(min(padded.TOP, logits_RV.shape[1]), dim=-1)
        log_sums = None
        if any(s.logprobs is not None for s in samplings):
            log_sums = logits_RV.double().logsumexp(-1).cpu().numpy()
        top, ids = top_RK.cpu().numpy(), ids_RK.cpu().numpy().astype(np.int32)
        if not np.isfinite(top[:, 0]).all():
            raise GemkitError("the model produced logits that are not numbers; the weights are damaged or out of range")
        found = []
        for r, sampling in enumerate(samplings):
            order = np.lexsort((ids[r], -top[r]))
            whole = logits_RV[r].cpu().numpy() if padded.needs_whole(sampling) else None
            log_sum = None if log_sums is None else float(log_sums[r])
            found.append(padded.Logits(ids[r][order], top[r][order], log_sum, whole))
        return found

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
                out[rows] = picked.float().cpu().numpy()
        return out

    def hidden(self, batch: Batch) -> np.ndarray:
        step, hidden_BTD = self._run(batch)
        return self._rows(step, hidden_BTD).float().cpu().numpy()

    def _rows(self, step: padded.Padded, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return hidden_BTD.flatten(0, 1)[torch.from_numpy(step.rows).to(self.device)]

    def _run(self, batch: Batch) -> tuple[padded.Padded, torch.Tensor]:
        """The padded step and the hidden states [B, T, D] after the final norm."""
        step = padded.pad(batch, self.page_size)

        def put(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(self.device, torch.int64)

        places = [tuple(map(put, group)) for group in zip(step.write, step.read, step.seen, strict=True)]
        caches = [None] * len(self.config.layers)
        for group, (write_BT, read_BS, seen_BS) in zip(self.groups, places, strict=True):
            for layer in group.layers:
                caches[layer] = LayerCache(*self._cache[layer], write_BT, read_BS, seen_BS)
        with torch.inference_mode():
            return step, _memory(self._hidden, put(step.tokens), put(step.positions), caches)


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
