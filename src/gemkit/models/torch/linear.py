"""The one door to weights in PyTorch: `linear` and `rows`, of a matrix that is plain, quantised or low-rank adapted.

`gemkit.models.frameworks.quantise` has the format of 8 and 4 bits. A plain matrix may be wider than the activations
(float32 that is trained, in a bfloat16 model): it is rounded to their type where it is used.

Letters: O outputs, I inputs, R rank.
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


class LowRank(nn.Module):
    """A matrix [O, I] with an adapter: base + scale · B·A; with magnitude (DoRA), its rows scaled to that norm.

    dropout: probability of zeroing an input of the adapter in training.
    Source: arXiv:2106.09685, arXiv:2402.09353 (section 4.3: the norm is a constant of the gradient).
    """

    def __init__(
        self,
        base: Tensor | Quantised,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
        magnitude_O: Tensor | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.base = nn.Parameter(base, requires_grad=False) if isinstance(base, Tensor) else base
        self.a, self.b = nn.Parameter(a_RI), nn.Parameter(b_OR)
        self.magnitude = None if magnitude_O is None else nn.Parameter(magnitude_O)
        self.scale, self.dropout = scale, dropout
        self.register_buffer("fixed_gain", None)

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + sum(parameter.nbytes for parameter in (self.a, self.b))

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Return the norm of each row of base + scale · B·A, float32 [O]."""
        base = self.base if isinstance(self.base, Tensor) else dequantise(self.base, torch.float32)
        return torch.linalg.vector_norm(base.float() + self.scale * (self.b @ self.a).float(), dim=1)

    def gain(self) -> Tensor | None:
        """Return the factor of each row that gives it its magnitude, float32 [O]; None without magnitudes."""
        if self.magnitude is None or self.fixed_gain is not None:
            return self.fixed_gain
        return self.magnitude / self.norms()

    @torch.no_grad()
    def freeze(self) -> None:
        """Compute the gain once, and take no more gradients."""
        self.fixed_gain = self.gain()
        self.requires_grad_(False)


class Linear(nn.Linear):
    """``nn.Linear`` whose weight may be `Quantised` or `LowRank`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Embedding(nn.Embedding):
    """``nn.Embedding`` whose weight may be `Quantised`. dtype: of its output; None for a plain weight's, or float32."""

    dtype: torch.dtype | None = None

    @property
    def output_dtype(self) -> torch.dtype:
        return self.dtype or (self.weight.dtype if isinstance(self.weight, Tensor) else torch.float32)

    def forward(self, ids: Tensor) -> Tensor:
        return rows(self.weight, ids, self.output_dtype)


def linear(x: Tensor, w: Tensor | Quantised | LowRank) -> Tensor:
    """Return x [..., I] times w [O, I] transposed, by the fastest form that gives the same."""
    if isinstance(w, Tensor):
        return F.linear(x, w.to(x.dtype))
    if isinstance(w, LowRank):
        added = linear(linear(F.dropout(x, w.dropout, w.training), w.a), w.b) * w.scale
        y = linear(x, w.base) + added
        gain = w.gain()
        return y if gain is None else y * gain.to(y.dtype)
    if torch.compiler.is_compiling() and x.shape[:-1].numel() == 1:
        return linear_one(x, w)
    return linear_plain(x, w)


def linear_plain(x: Tensor, w: Quantised) -> Tensor:
    """Widen the matrix, a piece of it at a time, and multiply: any number of rows, more memory traffic."""
    if torch.compiler.is_compiling():
        return F.linear(x, dequantise(w, x.dtype))
    step = max(1, PIECE // w.shape[1])
    pieces = (Quantised(v, s) for v, s in zip(w.values.split(step), w.scales.split(step)))
    return torch.cat([F.linear(x, dequantise(piece, x.dtype)) for piece in pieces], -1)


def linear_one(x: Tensor, w: Quantised) -> Tensor:
    """Multiply one row, in one pass over the packed bytes when compiled. Not for eager runs."""
    return packed.multiply_row(torch, x, w.values, w.scales).to(x.dtype).view(*x.shape[:-1], -1)


def rows(w: Tensor | Quantised, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows [*ids, I] of a matrix in dtype."""
    if isinstance(w, Tensor):
        return F.embedding(ids, w).to(dtype)
    flat = ids.reshape(-1)
    return dequantise(Quantised(w.values[flat], w.scales[flat]), dtype).view(*ids.shape, -1)


def quantise(w_OI: Tensor, bits: int) -> Quantised:
    """Return the matrix in 8 or 4 bits, made piece by piece. Raises ValueError if I is no multiple of 32."""
    pieces = [packed.quantise(torch, piece, bits) for piece in w_OI.split(max(1, PIECE // w_OI.shape[1]))]
    return Quantised(*(torch.cat(parts) for parts in zip(*pieces)))


def dequantise(w: Quantised, dtype: torch.dtype) -> Tensor:
    """Return the matrix [O, I]."""
    return packed.dequantise(torch, w.values, w.scales, dtype)
