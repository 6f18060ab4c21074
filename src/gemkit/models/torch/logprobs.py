"""Log-probabilities of target tokens without the logits of all rows: the output matrix in chunks of rows, PyTorch.

The rows' gradients are formed in the forward pass, where the logits of a chunk are in memory: a row's are its upstream
gradient times a row that does not depend on it. The matrix's gradient is too, for upstream gradients that are all
equal, as those of a mean are; for others the logits are computed again.

Letters: R rows, C rows of a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemkit.models.torch.linear import Quantised, dequantise, linear

CHUNK_BYTES = 256 << 20  # of float32 logits; products of fewer rows are slower


def logprobs(hidden_RD: Tensor, head_VD: Tensor | Quantised, targets_R: Tensor, softcap: float | None) -> Tensor:
    """Return log-probabilities float32 [R] of the targets; equal to `logprobs_plain`, with less memory."""
    if isinstance(head_VD, Quantised):
        head_VD = dequantise(head_VD, hidden_RD.dtype)
    return _Logprobs.apply(hidden_RD, head_VD, targets_R, softcap, torch.is_grad_enabled())


def logprobs_plain(hidden_RD: Tensor, head_VD: Tensor, targets_R: Tensor, softcap: float | None) -> Tensor:
    """Take the log-softmax of all logits [R, V]."""
    logits_RV = _logits(hidden_RD, head_VD, softcap)[0]
    return logits_RV.log_softmax(-1).gather(1, targets_R[:, None])[:, 0]


def _logits(hidden_CD: Tensor, head_VD: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Return logits [C, V] and their derivative by the uncapped ones, None where it is one."""
    wide = torch.promote_types(hidden_CD.dtype, torch.float32)
    logits_CV = linear(hidden_CD, head_VD).to(wide)
    if softcap is None:
        return logits_CV, None
    tanh_CV = torch.tanh(logits_CV / softcap)
    return softcap * tanh_CV, 1 - tanh_CV.square()


def _unit_gradient(logits_CV: Tensor, slope_CV: Tensor | None, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities [C] and their gradients by the uncapped logits [C, V], in the memory of the logits."""
    picked_C1 = logits_CV.gather(1, targets_C[:, None])
    # On a CPU a row at a time, which stays in its cache
    rows = logits_CV.split(1) if logits_CV.is_cpu else (logits_CV,)
    sums_C1 = torch.cat([_negative_softmax_(row) for row in rows])
    logits_CV.scatter_add_(1, targets_C[:, None], torch.ones_like(picked_C1))
    return (picked_C1 - sums_C1)[:, 0], logits_CV if slope_CV is None else logits_CV.mul_(slope_CV)


def _negative_softmax_(logits_CV: Tensor) -> Tensor:
    """Replace logits by their softmax times -1; return the log-sum-exp of each row [C, 1]."""
    top_C1 = logits_CV.amax(-1, keepdim=True)
    total_C1 = logits_CV.sub_(top_C1).exp_().sum(-1, keepdim=True)
    logits_CV.mul_(-1 / total_C1)
    return top_C1 + total_C1.log()


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RD: Tensor, head_VD: Tensor, targets_R: Tensor, softcap: float | None, training: bool):
        R, V = len(hidden_RD), head_VD.shape[0]
        wide = torch.promote_types(hidden_RD.dtype, torch.float32)
        chunk = max(1, CHUNK_BYTES // (4 * V))
        rows, head = (training and needed for needed in ctx.needs_input_grad[:2])
        out_R = hidden_RD.new_empty(R, dtype=wide)
        by_hidden_RD = torch.empty_like(hidden_RD) if rows else None
        by_head_VD = torch.zeros_like(head_VD) if head else None
        plain = head_VD.to(hidden_RD.dtype)
        for at in range(0, R, chunk):
            part = slice(at, at + chunk)
            logits_CV, slope_CV = _logits(hidden_RD[part], plain, softcap)
            if not rows and not head:
                out_R[part] = logits_CV.gather(1, targets_R[part, None])[:, 0] - logits_CV.logsumexp(-1)
                continue
            out_R[part], gradient_CV = _unit_gradient(logits_CV, slope_CV, targets_R[part])
            gradient_CV = gradient_CV.to(hidden_RD.dtype)
            if rows:
                torch.mm(gradient_CV, plain, out=by_hidden_RD[part])
            if head:
                by_head_VD.addmm_(gradient_CV.T.to(head_VD.dtype), hidden_RD[part].to(head_VD.dtype))
        ctx.save_for_backward(hidden_RD, head_VD, targets_R)
        ctx.softcap, ctx.chunk, ctx.formed = softcap, chunk, (by_hidden_RD, by_head_VD)
        return out_R

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream_R: Tensor):
        (by_hidden_RD, by_head_VD), ctx.formed = ctx.formed, (None, None)
        if by_hidden_RD is not None:
            by_hidden_RD = by_hidden_RD.mul_(upstream_R[:, None])
        if by_head_VD is not None and len(upstream_R):
            if torch.equal(upstream_R, upstream_R[:1].expand_as(upstream_R)):
                by_head_VD.mul_(upstream_R[0])
            else:
                _head_gradient(by_head_VD.zero_(), *ctx.saved_tensors, upstream_R, ctx.softcap, ctx.chunk)
        return by_hidden_RD, by_head_VD, None, None, None


def _head_gradient(
    out_VD: Tensor,
    hidden_RD: Tensor,
    head_VD: Tensor,
    targets_R: Tensor,
    upstream_R: Tensor,
    softcap: float | None,
    chunk: int,
) -> None:
    """Add the gradient of the output matrix, from logits that are computed again."""
    for at in range(0, len(hidden_RD), chunk):
        part = slice(at, at + chunk)
        logits_CV, slope_CV = _logits(hidden_RD[part], head_VD, softcap)
        _, gradient_CV = _unit_gradient(logits_CV, slope_CV, targets_R[part])
        gradient_CV.mul_(upstream_R[part, None])
        out_VD.addmm_(gradient_CV.T.to(out_VD.dtype), hidden_RD[part].to(out_VD.dtype))
