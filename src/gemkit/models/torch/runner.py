"""The engine's `Runner` on PyTorch: a static cache of pages, few shapes, optionally compiled."""

from __future__ import annotations

from operator import attrgetter

import numpy as np
import torch
from torch import Tensor

from gemkit.arch.tensors import manifest
from gemkit.models.frameworks.batch import PaddedBatch, quarter
from gemkit.models.frameworks.runner import FrameworkRunner
from gemkit.models.torch.decoder import Decoder
from gemkit.models.torch.steps import Steps


class TorchRunner(FrameworkRunner):
    """Run a decoder with PyTorch, where its parameters are.

    compile: compile the model, and on CUDA record its steps (see `steps`); the first steps take long. None does so on
    CUDA. threads: on the CPU, of the whole process.
    """

    head_rows = 64
    rounded = staticmethod(quarter)

    def __init__(
        self,
        decoder: Decoder,
        *,
        compile: bool | None = None,
        threads: int | None = None,
        max_tokens_per_step: int = 512,
    ) -> None:
        self.dtype, self.device = decoder.dtype, next(decoder.parameters()).device
        if threads is not None:
            torch.set_num_threads(threads)
        name, path = str(self.dtype).removeprefix("torch."), f"torch {self.device.type}"
        super().__init__(decoder, name, self.dtype.itemsize, path, torch.get_num_threads(), max_tokens_per_step)
        compiled = self.device.type == "cuda" if compile is None else compile
        self.steps = Steps(decoder, self.groups, self.device, compiled)

    def _weight_sizes(self) -> dict[str, int]:
        return {name: attrgetter(name)(self.decoder).nbytes for name in manifest(self.config)}

    def _allocate(self, pages: int) -> tuple[Tensor, Tensor]:
        shape = (pages * self.page_size, self.config.num_key_value_heads, self.config.head_dim)
        k, v = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        return k, v

    def _grown(self, cache: tuple[Tensor, Tensor], pages: int) -> tuple[Tensor, Tensor]:
        self.steps.forget()
        grown = self._allocate(pages)
        for old, new in zip(cache, grown):
            new[: len(old)] = old
        return grown

    @torch.inference_mode()
    def _hidden(self, step: PaddedBatch) -> Tensor:
        return self.steps.hidden(step, self.caches)

    @torch.inference_mode()
    def _take(self, hidden_BTD: Tensor, rows: np.ndarray) -> Tensor:
        return hidden_BTD.flatten(0, 1)[torch.from_numpy(rows).to(self.device)]

    @torch.inference_mode()
    def _top(self, hidden_RD: Tensor, argmax: bool) -> tuple[Tensor, Tensor]:
        return self.steps.top(hidden_RD, argmax)

    @torch.inference_mode()
    def _decode(self, step: PaddedBatch, argmax: bool) -> tuple[Tensor, Tensor]:
        return self.steps.decode(step, self.caches, argmax)

    @torch.inference_mode()
    def _logprobs(self, hidden_RD: Tensor, ids_R: np.ndarray) -> np.ndarray:
        logits_RV = self.decoder.logits(hidden_RD).double()
        ids = torch.from_numpy(ids_R.astype(np.int64)).to(self.device)
        picked = logits_RV.gather(1, ids[:, None])[:, 0] - logits_RV.logsumexp(-1)
        return self._numpy(picked.where(logits_RV.isfinite().all(-1), torch.nan))

    def _numpy(self, array: Tensor) -> np.ndarray:
        return array.float().cpu().numpy()
