"""Log-probabilities of target tokens without the logits of all rows: the output matrix in chunks of rows, JAX.

The rows' gradients are formed in the forward pass, where the logits of a chunk are in memory: a row's are its upstream
gradient times a row that does not depend on it. The matrix's gradient is too, for upstream gradients that are all
equal, as those of a mean are; for others the logits are computed again.

Letters: R rows, C rows of a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import CustomVJPPrimal

from gemkit.models.jax.linear import Quantised, dequantise, linear

CHUNK_BYTES = 128 << 20  # of float32 logits


def logprobs(hidden_RD: Array, head_VD: Array | Quantised, targets_R: Array, softcap: float | None) -> Array:
    """Return log-probabilities float32 [R] of the targets; equal to `logprobs_plain`, with less memory.

    targets_R: negative in rows of padding, whose result is 0, without a gradient. Chunks behind the last target cost
    nothing, so that one compiled shape serves any number of targets.
    """
    if isinstance(head_VD, Quantised):
        head_VD = dequantise(head_VD, hidden_RD.dtype)
    R, V = len(hidden_RD), head_VD.shape[0]
    chunk = max(1, min(R, CHUNK_BYTES // (4 * V)))
    hidden_RD = jnp.pad(hidden_RD, ((0, -R % chunk), (0, 0)))
    targets_R = jnp.pad(targets_R, (0, -R % chunk), constant_values=-1)
    return _logprobs(hidden_RD, head_VD, targets_R, softcap, chunk)[:R]


def logprobs_plain(hidden_RD: Array, head_VD: Array, targets_R: Array, softcap: float | None) -> Array:
    """Take the log-softmax of all logits [R, V]."""
    logits_RV = _logits(hidden_RD, head_VD, softcap)[0]
    picked_R = jnp.take_along_axis(jax.nn.log_softmax(logits_RV), jnp.maximum(targets_R, 0)[:, None], 1)[:, 0]
    return jnp.where(targets_R >= 0, picked_R, 0)


def _logits(hidden_CD: Array, head_VD: Array, softcap: float | None) -> tuple[Array, Array | float]:
    """Return logits [C, V] and their derivative by the uncapped ones."""
    logits_CV = linear(hidden_CD, head_VD, jnp.promote_types(hidden_CD.dtype, jnp.float32))
    if softcap is None:
        return logits_CV, 1.0
    tanh_CV = jnp.tanh(logits_CV / softcap)
    return softcap * tanh_CV, 1 - jnp.square(tanh_CV)


def _unit_gradient(logits_CV: Array, slope_CV: Array | float, targets_C: Array) -> tuple[Array, Array]:
    """Return log-probabilities [C] and their gradients by the uncapped logits [C, V]; zeros in rows of padding."""
    sums_C1 = jax.nn.logsumexp(logits_CV, axis=-1, keepdims=True)
    picked_C1 = jnp.take_along_axis(logits_CV, jnp.maximum(targets_C, 0)[:, None], 1)
    hot_CV = targets_C[:, None] == jnp.arange(logits_CV.shape[1])
    gradient_CV = (hot_CV - jnp.exp(logits_CV - sums_C1)) * slope_CV
    real_C = targets_C >= 0
    return jnp.where(real_C, (picked_C1 - sums_C1)[:, 0], 0), jnp.where(real_C[:, None], gradient_CV, 0)


def _chunks(targets_R: Array, chunk: int) -> Array:
    """Return the number of chunks up to the last target."""
    last = jnp.max(jnp.where(targets_R >= 0, jnp.arange(1, len(targets_R) + 1), 0), initial=0)
    return -(-last // chunk)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _logprobs(hidden_RD: Array, head_VD: Array, targets_R: Array, softcap: float | None, chunk: int) -> Array:
    return _forward(hidden_RD, head_VD, targets_R, softcap, chunk, rows=False, head=False)[0]


def _forward(
    hidden_RD: Array, head_VD: Array, targets_R: Array, softcap: float | None, chunk: int, *, rows: bool, head: bool
) -> tuple[Array, Array | None, Array | None]:
    """Return log-probabilities [R] and, where asked for, the gradients of their sum by rows [R, D] and head [V, D]."""
    wide = jnp.promote_types(hidden_RD.dtype, jnp.float32)
    plain_VD = head_VD.astype(hidden_RD.dtype)

    def body(i: Array, found: tuple) -> tuple:
        out_R, by_hidden_RD, by_head_VD = found
        hidden_CD, targets_C = (jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk) for x in (hidden_RD, targets_R))
        out_C, gradient_CV = _unit_gradient(*_logits(hidden_CD, plain_VD, softcap), targets_C)
        gradient_CV = gradient_CV.astype(hidden_RD.dtype)
        out_R = jax.lax.dynamic_update_slice_in_dim(out_R, out_C, i * chunk, 0)
        if rows:
            by_hidden_RD = jax.lax.dynamic_update_slice_in_dim(by_hidden_RD, gradient_CV @ plain_VD, i * chunk, 0)
        if head:
            by_head_VD += jnp.matmul(gradient_CV.T, hidden_CD, preferred_element_type=wide)
        return out_R, by_hidden_RD, by_head_VD

    none = (
        jnp.zeros(len(hidden_RD), wide),
        jnp.zeros_like(hidden_RD) if rows else None,
        jnp.zeros(head_VD.shape, wide) if head else None,
    )
    return jax.lax.fori_loop(0, _chunks(targets_R, chunk), body, none)


def _kept(
    hidden_RD: CustomVJPPrimal, head_VD: CustomVJPPrimal, targets_R: CustomVJPPrimal, softcap: float | None, chunk: int
) -> tuple[Array, tuple]:
    values = hidden_RD.value, head_VD.value, targets_R.value
    out_R, *gradients = _forward(*values, softcap, chunk, rows=hidden_RD.perturbed, head=head_VD.perturbed)
    return out_R, (*values, *gradients)


def _backward(softcap: float | None, chunk: int, kept: tuple, upstream_R: Array) -> tuple[Array | None, ...]:
    hidden_RD, head_VD, targets_R, by_hidden_RD, by_head_VD = kept
    if by_hidden_RD is not None:
        by_hidden_RD = (by_hidden_RD * upstream_R[:, None]).astype(by_hidden_RD.dtype)
    if by_head_VD is not None:
        first = upstream_R[jnp.argmax(targets_R >= 0)]
        equal = jnp.all((upstream_R == first) | (targets_R < 0))
        start_VD = by_head_VD * jnp.where(equal, first, 0)
        rounds = jnp.where(equal, 0, _chunks(targets_R, chunk))
        plain_VD = head_VD.astype(hidden_RD.dtype)

        def body(i: Array, found_VD: Array) -> Array:
            parts = (jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk) for x in (hidden_RD, targets_R, upstream_R))
            hidden_CD, targets_C, upstream_C = parts
            _, gradient_CV = _unit_gradient(*_logits(hidden_CD, plain_VD, softcap), targets_C)
            gradient_CV = (gradient_CV * upstream_C[:, None]).astype(hidden_RD.dtype)
            return found_VD + jnp.matmul(gradient_CV.T, hidden_CD, preferred_element_type=found_VD.dtype)

        by_head_VD = jax.lax.fori_loop(0, rounds, body, start_VD).astype(head_VD.dtype)
    return by_hidden_RD, by_head_VD, None


_logprobs.defvjp(_kept, _backward, symbolic_zeros=True)
