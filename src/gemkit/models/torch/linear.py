"""The one door to weights in PyTorch: `linear` and `rows`, of a plain matrix and of one with 8 or 4 bits a number.

    bits   values                              scales                             bytes a number
    8      int8 [O, C, 32]                     bfloat16 [O, C, 1]: scale          1.06
    4      uint8 [O, C, 16]                    bfloat16 [O, C, 2]: scale, least   0.63

A group is 32 numbers along the input, each its integer times the scale, plus the least one if there is such. Of 4 bits,
byte j holds number j in its low half and number j + 16 in its high half. Activations are never rounded. `linear_plain`
is what all forms must equal.

Letters: O outputs, I inputs, C groups, J numbers of a group or bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUP = 32
_PIECE = 1 << 23  # numbers that are widened at a time


class Quantised(nn.Module):
    """A matrix [O, I] in few bits; it stands where a `Parameter` would."""

    def __init__(self, values: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)

    @property
    def shape(self) -> torch.Size:
        inputs = self.values.shape[1:].numel() * (1 if self.values.dtype == torch.int8 else 2)
        return torch.Size((self.values.shape[0], inputs))

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


class Linear(nn.Linear):
    """``nn.Linear`` whose weight may be `Quantised`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Embedding(nn.Embedding):
    """``nn.Embedding`` whose weight may be `Quantised`; dtype: of what comes out then."""

    dtype: torch.dtype = torch.float32

    def forward(self, ids: Tensor) -> Tensor:
        return rows(self.weight, ids, self.dtype)


def linear(x: Tensor, w: Tensor | Quantised) -> Tensor:
    """x [..., I] times w [O, I] transposed, by the fastest form that gives the same."""
    if isinstance(w, Tensor):
        return F.linear(x, w)
    if torch.compiler.is_compiling() and x.shape[:-1].numel() == 1:
        return linear_one(x, w)
    return linear_plain(x, w)


def linear_plain(x: Tensor, w: Quantised) -> Tensor:
    """Widens the matrix, a piece of it at a time, and multiplies: any number of rows, more memory traffic."""
    if torch.compiler.is_compiling():
        return F.linear(x, dequantise(w, x.dtype))
    step = max(1, _PIECE // w.shape[1])
    pieces = (Quantised(v, s) for v, s in zip(w.values.split(step), w.scales.split(step)))
    return torch.cat([F.linear(x, dequantise(piece, x.dtype)) for piece in pieces], -1)


def linear_one(x: Tensor, w: Quantised) -> Tensor:
    """One row: products and their sum, which a compiler makes one pass over the packed bytes. Not for eager runs."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_CJ = x.reshape(-1, GROUP).to(wide)
    if w.values.dtype == torch.int8:
        products_OCJ = w.values.to(wide) * x_CJ * w.scales.to(wide)
    else:
        low_OCJ, high_OCJ = _halves(w, wide)
        products_OCJ = low_OCJ * x_CJ[:, : GROUP // 2] + high_OCJ * x_CJ[:, GROUP // 2 :]
    return products_OCJ.sum((1, 2)).to(x.dtype).view(*x.shape[:-1], -1)


def rows(w: Tensor | Quantised, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [*ids, I] of a matrix; dtype: of a quantised one's."""
    if isinstance(w, Tensor):
        return F.embedding(ids, w)
    flat = ids.reshape(-1)
    return dequantise(Quantised(w.values[flat], w.scales[flat]), dtype).view(*ids.shape, -1)


def quantise(w_OI: Tensor, bits: int) -> Quantised:
    """The matrix in 8 or 4 bits, a piece of it widened at a time. Raises ValueError if I is no multiple of 32."""
    if w_OI.shape[1] % GROUP:
        raise ValueError(f"rows of {w_OI.shape[1]} numbers are not whole groups of {GROUP}")
    pieces = [_quantise(piece.float(), bits) for piece in w_OI.split(max(1, _PIECE // w_OI.shape[1]))]
    values, scales = (torch.cat(parts) for parts in zip(*pieces))
    return Quantised(values, scales)


# How much of a group's range 4 bits span: the rest may gain more than the ends lose
SPANS = (1.0, 0.9)


def _quantise(w_OI: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    w_OCJ = w_OI.view(len(w_OI), -1, GROUP)
    if bits == 8:
        scales = (w_OCJ.abs().amax(-1, keepdim=True) / 127).bfloat16()
        return (w_OCJ / _divisor(scales)).round().clamp(-127, 127).to(torch.int8), scales
    low, high = w_OCJ.amin(-1, keepdim=True), w_OCJ.amax(-1, keepdim=True)
    best = None
    for span in SPANS:
        scales = torch.cat([(high - low) * (span / 15), low * span], -1).bfloat16()
        scale, least = scales.float().split(1, -1)
        numbers = ((w_OCJ - least) / _divisor(scale)).round().clamp(0, 15)
        found = (numbers * scale + least - w_OCJ).square().sum(-1, keepdim=True), scales, numbers
        if best is not None:
            better = found[0] < best[0]
            found = tuple(torch.where(better, new, old) for new, old in zip(found, best))
        best = found
    _, scales, numbers = best
    bytes_OCJ = numbers.to(torch.uint8)
    return bytes_OCJ[..., : GROUP // 2] | bytes_OCJ[..., GROUP // 2 :] << 4, scales


def _divisor(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 1, scales).float()


def dequantise(w: Quantised, dtype: torch.dtype) -> Tensor:
    """The matrix [O, I]."""
    wide = torch.promote_types(dtype, torch.float32)
    if w.values.dtype == torch.int8:
        return (w.values.to(wide) * w.scales.to(wide)).to(dtype).flatten(1)
    return torch.cat(_halves(w, wide), -1).to(dtype).flatten(1)


def _halves(w: Quantised, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers 0 to 15 and 16 to 31 of each group [O, C, 16], of a matrix of 4 bits."""
    scale, least = w.scales.to(dtype).split(1, -1)
    return (w.values & 15).to(dtype) * scale + least, (w.values >> 4).to(dtype) * scale + least
