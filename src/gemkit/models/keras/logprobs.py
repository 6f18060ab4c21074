"""Log-probabilities of target tokens without the logits of all rows, a translation of ``models/torch/logprobs.py``.

The rows' gradients are formed in the forward pass, where the logits of a chunk are in memory: a row's are its upstream
gradient times a row that does not depend on it. The matrix's gradient, where it is trained, takes logits that are
computed again.

Letters: R rows, C rows of a chunk, K chunks, D model width, V vocabulary.
"""

from __future__ import annotations

import keras
from keras import KerasTensor as Tensor
from keras import ops

from gemkit.models.keras.linear import linear

CHUNK_BYTES = 128 << 20  # of float32 logits
CHUNK_ROWS = 512  # at most: more make no product faster


def logprobs(
    hidden_RD: Tensor, head_VD: Tensor | keras.Variable, targets_R: Tensor, softcap: float | None, training: bool = True
) -> Tensor:
    """Return log-probabilities float32 [R] of the targets; equal to `logprobs_plain`, with less memory.

    head_VD: a variable that is not trainable gets no gradient. training: False forms no gradients, for evaluation.
    """
    frozen = isinstance(head_VD, keras.Variable) and not head_VD.trainable
    # TensorFlow looks for variables that a custom gradient uses, and wants theirs too
    head_VD = ops.stop_gradient(ops.convert_to_tensor(head_VD)) if frozen else ops.convert_to_tensor(head_VD)
    rows = ops.shape(hidden_RD)[0]
    chunk = max(1, min(CHUNK_BYTES // (4 * head_VD.shape[0]), CHUNK_ROWS))
    if isinstance(rows, int):  # TensorFlow may learn it later
        chunk = max(1, min(chunk, rows))
    targets_KC = _chunks(targets_R, chunk, -rows % chunk)

    def values_only(hidden_RD: Tensor) -> Tensor:
        def body(part: tuple[Tensor, Tensor]) -> Tensor:
            return _picked(_logits(part[0], head_VD, softcap)[0], part[1])

        return ops.reshape(ops.map(body, (_chunks(hidden_RD, chunk, -rows % chunk), targets_KC)), (-1,))[:rows]

    def forward(hidden_RD: Tensor, head_VD: Tensor = head_VD) -> tuple:
        hidden_KCD, plain_VD = _chunks(hidden_RD, chunk, -rows % chunk), ops.cast(head_VD, hidden_RD.dtype)

        def body(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            values_C, gradient_CV = _unit_gradient(part[0], plain_VD, part[1], softcap)
            return values_C, ops.matmul(ops.cast(gradient_CV, plain_VD.dtype), plain_VD)

        values_KC, by_hidden_KCD = ops.map(body, (hidden_KCD, targets_KC))

        def backward(*arguments: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, ...] | Tensor:
            upstream_R = arguments[-1] if upstream is None else upstream  # by keyword on PyTorch alone
            by_hidden_RD = ops.reshape(by_hidden_KCD, (-1, hidden_RD.shape[1]))[:rows]
            by_hidden_RD = by_hidden_RD * ops.cast(upstream_R, by_hidden_RD.dtype)[:, None]
            if frozen:
                return by_hidden_RD
            upstream_KC = _chunks(upstream_R, chunk, -rows % chunk)

            def add(k: Tensor, sum_VD: Tensor) -> Tensor:
                gradient_CV = _unit_gradient(hidden_KCD[k], plain_VD, targets_KC[k], softcap)[1]
                gradient_VC = ops.transpose(ops.cast(gradient_CV * upstream_KC[k][:, None], head_VD.dtype))
                return sum_VD + ops.matmul(gradient_VC, ops.cast(hidden_KCD[k], head_VD.dtype))

            return by_hidden_RD, ops.fori_loop(0, ops.shape(hidden_KCD)[0], add, ops.zeros_like(head_VD))

        return ops.reshape(values_KC, (-1,))[:rows], backward

    if not training:
        return values_only(hidden_RD)
    return ops.custom_gradient(forward)(hidden_RD, *([] if frozen else [head_VD]))


def logprobs_plain(hidden_RD: Tensor, head_VD: Tensor, targets_R: Tensor, softcap: float | None) -> Tensor:
    """Take the log-softmax of all logits [R, V]."""
    return _picked(_logits(hidden_RD, ops.convert_to_tensor(head_VD), softcap)[0], targets_R)


def _chunks(x: Tensor, chunk: int, missing: int | Tensor) -> Tensor:
    """Return rows [R, …] as chunks [K, C, …], with zeros after the last row."""
    x = ops.pad(x, [(0, missing), *([(0, 0)] * (len(x.shape) - 1))])
    return ops.reshape(x, (-1, chunk, *x.shape[1:]))


def _logits(hidden_CD: Tensor, head_VD: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Return logits [C, V] and their derivative by the uncapped ones, None where it is one."""
    logits_CV = ops.cast(linear(hidden_CD, head_VD), "float32")
    if softcap is None:
        return logits_CV, None
    tanh_CV = ops.tanh(logits_CV / softcap)
    return softcap * tanh_CV, 1 - ops.square(tanh_CV)


def _picked(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    picked_C = ops.take_along_axis(logits_CV, ops.cast(targets_C, "int32")[:, None], axis=1)[:, 0]
    return picked_C - ops.logsumexp(logits_CV, axis=-1)


def _unit_gradient(
    hidden_CD: Tensor, head_VD: Tensor, targets_C: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities [C] and their gradients by the uncapped logits [C, V]."""
    logits_CV, slope_CV = _logits(hidden_CD, head_VD, softcap)
    gradient_CV = ops.one_hot(targets_C, logits_CV.shape[1], dtype="float32") - ops.softmax(logits_CV, axis=-1)
    return _picked(logits_CV, targets_C), gradient_CV if slope_CV is None else gradient_CV * slope_CV
