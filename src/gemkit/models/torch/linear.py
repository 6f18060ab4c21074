"""The one door to weights in PyTorch: `linear` and `rows`, of a plain matrix and of one with 8 or 4 bits an element.

`gemkit.models.frameworks.quantise` has the format. Activations are never rounded. `linear_plain` is what all forms must
equal.

Letters: O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemkit.models.frameworks import quantise as packed
from gemkit.models.frameworks.quantise import PIECE


class Quantised(nn.Module):
    """A matrix [O, I] in few bits; it stands where a `Parameter` would."""

    def __init__(self, values: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)

    @property
    def shape(self) -> torch.Size:
        return torch.Size(packed.matrix_shape(torch, self.values))

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


class Linear(nn.Linear):
    """``nn.Linear`` whose weight may be `Quantised`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Embedding(nn.Embedding):
    """``nn.Embedding`` whose weight may be `Quantised`; dtype: of its output then."""

    dtype: torch.dtype = torch.float32

    def forward(self, ids: Tensor) -> Tensor:
        return rows(self.weight, ids, self.dtype)


def linear(x: Tensor, w: Tensor | Quantised) -> Tensor:
    """Returns x [..., I] times w [O, I] transposed, by the fastest form that gives the same."""
    if isinstance(w, Tensor):
        return F.linear(x, w)
    if torch.compiler.is_compiling() and x.shape[:-1].numel() == 1:
        return linear_one(x, w)
    return linear_plain(x, w)


def linear_plain(x: Tensor, w: Quantised) -> Tensor:
    """Widens the matrix, a piece of it at a time, and multiplies: any number of rows, more memory traffic."""
    if torch.compiler.is_compiling():
        return F.linear(x, dequantise(w, x.dtype))
    step = max(1, PIECE // w.shape[1])
    pieces = (Quantised(v, s) for v, s in zip(w.values.split(step), w.scales.split(step)))
    return torch.cat([F.linear(x, dequantise(piece, x.dtype)) for piece in pieces], -1)


def linear_one(x: Tensor, w: Quantised) -> Tensor:
    """Multiplies one row, in one pass over the packed bytes when compiled. Not for eager runs."""
    return packed.multiply_row(torch, x, w.values, w.scales).to(x.dtype).view(*x.shape[:-1], -1)


def rows(w: Tensor | Quantised, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns rows [*ids, I] of a matrix; dtype: of a quantised one's."""
    if isinstance(w, Tensor):
        return F.embedding(ids, w)
    flat = ids.reshape(-1)
    return dequantise(Quantised(w.values[flat], w.scales[flat]), dtype).view(*ids.shape, -1)


def quantise(w_OI: Tensor, bits: int) -> Quantised:
    """Returns the matrix in 8 or 4 bits, made piece by piece. Raises ValueError if I is no multiple of 32."""
    pieces = [packed.quantise(torch, piece, bits) for piece in w_OI.split(max(1, PIECE // w_OI.shape[1]))]
    return Quantised(*(torch.cat(parts) for parts in zip(*pieces)))


def dequantise(w: Quantised, dtype: torch.dtype) -> Tensor:
    """Returns the matrix [O, I]."""
    return packed.dequantise(torch, w.values, w.scales, dtype)
