"""How a step is run in PyTorch: layer by layer, compiled or not, and on CUDA recorded once and replayed.

Compiled, a layer is one graph for all layers of its kind and all lengths of the cache. A step of one token a sequence
is too short for a GPU to be told its few hundred kernels one by one: for each size it is captured as a CUDA graph,
whose input is one array of integers and whose result one small array.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from gemkit.engine.interface import PageGroup
from gemkit.models.frameworks import padded
from gemkit.models.torch.decoder import Block, Decoder, LayerCache

Kept = list[tuple[Tensor, Tensor]]  # k and v [slots, K, H] of each layer
# Layers by kind, batch size, and one token or more; torch's own limit is 8, after which it would stop
_MOST_GRAPHS = 256


class Steps:
    """The model's steps on a cache.

    compiled: compile them; the first of each batch size takes long. kept: the cache; call `forget` after replacing any
    of its tensors. recorded: how many sizes of a step of one token were recorded.
    """

    def __init__(self, decoder: Decoder, groups: Sequence[PageGroup], device: torch.device, compiled: bool) -> None:
        self.decoder, self.groups, self.device, self.compiled = decoder, groups, device, compiled
        self._layer: dict[bool, Callable] = dict.fromkeys((False, True), _layer)
        self._head: dict[bool, Callable] = dict.fromkeys((False, True), _likeliest)
        if compiled:
            # A product with one row is a matrix read once: tuned to do just that
            options = {"coordinate_descent_tuning": True} if device.type == "cuda" else None
            for one in (False, True):
                self._layer[one] = torch.compile(_layer, fullgraph=True, options=options if one else None)
                self._head[one] = torch.compile(_likeliest, fullgraph=True, options=options if one else None)
        self._records: dict[tuple, _Record] = {}
        self._pool = None

    @property
    def recorded(self) -> int:
        return len(self._records)

    def forget(self) -> None:
        """Drops what was recorded, with the addresses in it."""
        self._records.clear()

    def hidden(self, step: padded.Padded, kept: Kept) -> Tensor:
        """Hidden states [B, T, D] after the final norm."""
        with self._limits():
            return self._hidden(torch.from_numpy(step.flat()).to(self.device), step.sizes, kept)

    def likeliest(self, hidden_RD: Tensor, few: bool) -> tuple[Tensor, Tensor]:
        """Logits [R, V], and for each row what `found` reads; few: no more than the largest logit."""
        with self._limits():
            return self._head[False](self.decoder, hidden_RD, few)

    def decode(self, step: padded.Padded, kept: Kept, few: bool) -> tuple[Tensor, Tensor]:
        """`hidden` and `likeliest` of a step of one token a sequence. The next call overwrites what it returns."""
        key = (*step.sizes, few)
        flat = torch.from_numpy(step.flat())
        if key not in self._records:
            with self._limits():
                self._records[key] = self._record(flat, step.sizes, kept, few)
            return self._records[key].found
        return self._records[key].run(flat)

    def _record(self, flat: Tensor, sizes: padded.Sizes, kept: Kept, few: bool) -> _Record:
        B, one = sizes[0], sizes[0] == 1
        given = flat.to(self.device, copy=True)

        def work() -> tuple[Tensor, Tensor]:
            hidden_BD = self._hidden(given, sizes, kept).view(B, -1)
            return self._head[one](self.decoder, hidden_BD, few)

        if not self.compiled or self.device.type != "cuda":
            return _Record(given, work, work())
        with torch.cuda.device(self.device):
            return self._captured(given, work)

    def _captured(self, given: Tensor, work: Callable[[], tuple[Tensor, Tensor]]) -> _Record:
        # As torch asks: what is compiled and tuned at the first run cannot be captured
        beside = torch.cuda.Stream(self.device)
        beside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(beside):
            for _ in range(2):
                work()
        torch.cuda.current_stream(self.device).wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            found = work()
        graph.replay()
        return _Record(given, graph.replay, found)

    def _hidden(self, flat: Tensor, sizes: padded.Sizes, kept: Kept) -> Tensor:
        tokens_BT, positions_BT, _, places = padded.unpack(flat.long(), sizes)
        caches = [None] * len(kept)
        for group, place in zip(self.groups, places, strict=True):
            for layer in group.layers:
                caches[layer] = LayerCache(*kept[layer], *place)
        return self.decoder.hidden(tokens_BT, positions_BT, caches, self._run_layer)

    def _run_layer(self, layer: Block, x_BTD: Tensor, positions_BT: Tensor, cache: LayerCache) -> Tensor:
        one = positions_BT.numel() == 1
        if self.compiled:
            changing = [(cache.k, 0), (cache.v, 0), (cache.read_BS, 1), (cache.positions_BS, 1)]
            if positions_BT.shape[1] > 1:
                changing += [(x_BTD, 1), (positions_BT, 1), (cache.write_BT, 1)]
            for tensor, axis in changing:
                torch._dynamo.maybe_mark_dynamic(tensor, axis)
        return self._layer[one](layer, x_BTD, positions_BT, cache)

    def _limits(self):
        return torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS, accumulated_recompile_limit=_MOST_GRAPHS)


class _Record:
    """A step of one size: where its input stands, how it is run again, and where its result stands."""

    def __init__(self, given: Tensor, again: Callable, found: tuple[Tensor, Tensor]) -> None:
        self.given, self.again, self.found = given, again, found

    def run(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        self.given.copy_(flat)
        found = self.again()
        return self.found if found is None else found


def _layer(layer: Block, x_BTD: Tensor, positions_BT: Tensor, cache: LayerCache) -> Tensor:
    return layer(x_BTD, positions_BT, cache)


def _likeliest(decoder: Decoder, hidden_RD: Tensor, few: bool) -> tuple[Tensor, Tensor]:
    """Logits [R, V], and float32 [R, 2 k + 1]: the k largest, their ids, Σ exp(logit - largest); k is 1 if few.

    The sum is NaN where a logit is not finite.
    """
    logits_RV = decoder.logits(hidden_RD)
    if few:
        top_RK, ids_RK = logits_RV.max(-1, keepdim=True)
    else:
        top_RK, ids_RK = logits_RV.topk(min(padded.TOP, logits_RV.shape[1]), dim=-1)
    sums_R1 = (logits_RV - logits_RV.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True)
    # A logit of minus infinity leaves no trace in a sum
    sums_R1 = sums_R1.where(logits_RV.amin(-1, keepdim=True).isfinite(), torch.nan)
    # Ids are exact in float32, up to 2**24
    return logits_RV, torch.cat([top_RK, ids_RK.to(top_RK.dtype), sums_R1], -1)


def found(packed_RX: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What was packed: the largest logits [R, k], of equal ones the lower id first, their ids, and log Σ exp [R]."""
    packed = packed_RX.cpu().numpy()
    k = packed.shape[1] // 2
    top, ids, sums = packed[:, :k], packed[:, k : 2 * k].astype(np.int32), packed[:, -1].astype(np.float64)
    order = np.lexsort((ids, -top))
    top, ids = np.take_along_axis(top, order, -1), np.take_along_axis(ids, order, -1)
    return top, ids, top[:, 0].astype(np.float64) + np.log(sums)
