"""The steps of a model in PyTorch: run layer by layer, compiled or not, and on CUDA recorded once and replayed.

Compiled, a layer is one graph for all layers of its kind and all lengths of the cache. A step of one token a sequence
is too short for a GPU to be told its few hundred kernels one by one: for each size it is captured as a CUDA graph,
whose input is one array of integers and whose result one small array.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gemkit.engine.interface import PageGroup
from gemkit.models.frameworks.batch import PaddedBatch, Sizes, unpack
from gemkit.models.frameworks.choice import TOP
from gemkit.models.torch.attention import LayerCache, Where
from gemkit.models.torch.decoder import Block, Decoder, Rotation

Caches = list[tuple[Tensor, Tensor]]  # k and v [slots, K, H] of each layer
# Layers by kind, batch size, and one token or more; torch's own limit is 8, after which it would stop
_MOST_GRAPHS = 256


class Steps:
    """The model's steps on a cache.

    compiled: compile them; the first of each batch size takes long. kv: the cache; call `forget` after replacing any of
    its tensors. recorded: how many sizes of a step of one token were recorded.
    """

    def __init__(self, decoder: Decoder, groups: Sequence[PageGroup], device: torch.device, compiled: bool) -> None:
        self.decoder, self.groups, self.device, self.compiled = decoder, groups, device, compiled
        self._layer: dict[bool, Callable] = dict.fromkeys((False, True), _layer)
        self._head: dict[bool, Callable] = dict.fromkeys((False, True), _top)
        if compiled:
            # A product with one row is a matrix read once: tuned to do just that
            options = {"coordinate_descent_tuning": True} if device.type == "cuda" else None
            for one in (False, True):
                self._layer[one] = torch.compile(_layer, fullgraph=True, options=options if one else None)
                self._head[one] = torch.compile(_top, fullgraph=True, options=options if one else None)
        self._records: dict[tuple, _Record] = {}
        self._pool = None

    @property
    def recorded(self) -> int:
        return len(self._records)

    def forget(self) -> None:
        """Drops the records, which hold addresses of the cache."""
        self._records.clear()

    def hidden(self, step: PaddedBatch, kv: Caches) -> Tensor:
        """Return hidden states [B, T, D] after the final norm."""
        with self._limits():
            return self._hidden(torch.from_numpy(step.flat()).to(self.device), step.sizes, kv)

    def top(self, hidden_RD: Tensor, argmax: bool) -> tuple[Tensor, Tensor]:
        """Return logits [R, V] and packed rows; see `gemkit.models.frameworks.choice`. argmax: k is 1."""
        with self._limits():
            return self._head[False](self.decoder, hidden_RD, argmax)

    def decode(self, step: PaddedBatch, kv: Caches, argmax: bool) -> tuple[Tensor, Tensor]:
        """Return `hidden` and `top` of a step of one token a sequence, in memory that the next call overwrites."""
        key = (*step.sizes, argmax)
        flat = torch.from_numpy(step.flat())
        if key not in self._records:
            with self._limits():
                self._records[key] = self._record(flat, step.sizes, kv, argmax)
            return self._records[key].result
        return self._records[key].run(flat)

    def _record(self, flat: Tensor, sizes: Sizes, kv: Caches, argmax: bool) -> _Record:
        B, one = sizes[0], sizes[0] == 1
        given = flat.to(self.device, copy=True)

        def work() -> tuple[Tensor, Tensor]:
            hidden_BD = self._hidden(given, sizes, kv).view(B, -1)
            return self._head[one](self.decoder, hidden_BD, argmax)

        if not self.compiled or self.device.type != "cuda":
            return _Record(given, work, work())
        with torch.cuda.device(self.device):
            return self._captured(given, work)

    def _captured(self, given: Tensor, work: Callable[[], tuple[Tensor, Tensor]]) -> _Record:
        # As torch asks: a first run compiles and tunes, which cannot be captured
        warm_up = torch.cuda.Stream(self.device)
        warm_up.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(warm_up):
            for _ in range(2):
                work()
        torch.cuda.current_stream(self.device).wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            result = work()
        graph.replay()
        return _Record(given, graph.replay, result)

    def _hidden(self, flat: Tensor, sizes: Sizes, kv: Caches) -> Tensor:
        tokens_BT, positions_BT, slots = unpack(flat.long(), sizes)
        caches = [None] * len(kv)
        for group, slot in zip(self.groups, slots, strict=True):
            for layer in group.layers:
                caches[layer] = LayerCache(*kv[layer], *slot)
        return self.decoder.hidden(tokens_BT, Where(positions_BT), caches, run=self._run_layer)[0]

    def _run_layer(
        self, layer: Block, x_BTD: Tensor, rotation: Rotation, mask_BTS: Tensor, cache: LayerCache
    ) -> tuple[Tensor, LayerCache]:
        one = mask_BTS.shape[:2].numel() == 1
        if self.compiled:
            changing = [(cache.k, 0), (cache.v, 0), (cache.read_BS, 1), (cache.positions_BS, 1), (mask_BTS, 2)]
            if mask_BTS.shape[1] > 1:
                changing += [(x_BTD, 1), (rotation[0], 1), (rotation[1], 1), (mask_BTS, 1), (cache.write_BT, 1)]
            for tensor, axis in changing:
                torch._dynamo.maybe_mark_dynamic(tensor, axis)
        return self._layer[one](layer, x_BTD, rotation, mask_BTS, cache), cache

    def _limits(self):
        return torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS, accumulated_recompile_limit=_MOST_GRAPHS)


class _Record:
    """A step of one size: the memory of its input and of its result, and a function that runs it again."""

    def __init__(self, given: Tensor, again: Callable, result: tuple[Tensor, Tensor]) -> None:
        self.given, self.again, self.result = given, again, result

    def run(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        self.given.copy_(flat)
        result = self.again()
        return self.result if result is None else result


def _layer(layer: Block, x_BTD: Tensor, rotation: Rotation, mask_BTS: Tensor, cache: LayerCache) -> Tensor:
    return layer(x_BTD, rotation, mask_BTS, cache)[0]


def _top(decoder: Decoder, hidden_RD: Tensor, argmax: bool) -> tuple[Tensor, Tensor]:
    """Return logits [R, V] and packed rows; see `gemkit.models.frameworks.choice`."""
    logits_RV = decoder.logits(hidden_RD)
    if argmax:
        top_RK, ids_RK = logits_RV.max(-1, keepdim=True)
    else:
        top_RK, ids_RK = logits_RV.topk(min(TOP, logits_RV.shape[1]), dim=-1)
    sums_R1 = (logits_RV - logits_RV.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True)
    # A logit of minus infinity leaves no trace in a sum
    sums_R1 = sums_R1.where(logits_RV.amin(-1, keepdim=True).isfinite(), torch.nan)
    return logits_RV, torch.cat([top_RK, ids_RK.to(top_RK.dtype), sums_R1], -1)
