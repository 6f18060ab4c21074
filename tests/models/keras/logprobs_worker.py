"""Compares `logprobs` of Keras with the plain form on the backend that KERAS_BACKEND names; prints errors as JSON."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[2]))

import keras
import numpy as np
from keras import ops
from parity.tolerances import relative_error

from gemkit.models.keras import logprobs as module
from gemkit.models.keras.logprobs import logprobs, logprobs_plain

BACKEND = keras.backend.backend()
R, D, V = 37, 64, 300


def value_and_gradients(function, arrays: list[np.ndarray], dynamic: bool) -> list[np.ndarray]:
    """Return a scalar function's value and gradients. dynamic: TensorFlow does not know the number of rows."""
    if BACKEND == "jax":
        import jax

        value, gradients = jax.jit(jax.value_and_grad(function, tuple(range(len(arrays)))))(*arrays)
    elif BACKEND == "torch":
        import torch

        tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
        value = function(*tensors)
        gradients = torch.autograd.grad(value, tensors)
    else:
        import tensorflow as tf

        shapes = [tf.TensorSpec((None, D) if dynamic else array.shape) for array in arrays[:1]]

        @tf.function(input_signature=[*shapes, *(tf.TensorSpec(array.shape) for array in arrays[1:])])
        def both(*tensors):
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                value = function(*tensors)
            return value, tape.gradient(value, tensors)

        value, gradients = both(*map(tf.convert_to_tensor, arrays))
    return [ops.convert_to_numpy(ops.stop_gradient(x)) for x in (value, *gradients)]


def main() -> None:
    module.CHUNK_ROWS, found = 8, {}
    draw = np.random.default_rng(0)
    hidden, head = (draw.standard_normal(shape).astype(np.float32) for shape in ((R, D), (V, D)))
    targets, weights = draw.integers(0, V, R).astype(np.int32), draw.uniform(-0.3, 0.7, R).astype(np.float32)
    variable = keras.Variable(head)
    variable.trainable = False  # as an adapter leaves it: TensorFlow's own variable does not learn of it
    for softcap in (None, 5.0):
        for frozen in (False, True):
            for dynamic in (False, True)[: 1 + (BACKEND == "tensorflow")]:
                arrays, results = [hidden] if frozen else [hidden, head], []
                for form in (logprobs, logprobs_plain):

                    def total(hidden, head=variable, form=form, softcap=softcap):
                        values = form(hidden, head, ops.convert_to_tensor(targets), softcap)
                        return ops.sum(values * ops.convert_to_tensor(weights))

                    results.append(value_and_gradients(total, arrays, dynamic))
                name = f"softcap {softcap}, frozen {frozen}, dynamic {dynamic}"
                found[name] = max(relative_error(a, b) for a, b in zip(*results, strict=True))
        rows = [ops.convert_to_tensor(x) for x in (hidden, head, targets)]
        values = [logprobs(*rows, softcap, training=False), logprobs_plain(*rows, softcap)]
        found[f"softcap {softcap}, evaluation"] = relative_error(*map(ops.convert_to_numpy, values))
    if BACKEND == "jax":
        found |= {form.__name__: has_all_logits(form, hidden, head, targets) for form in (logprobs, logprobs_plain)}
    print(json.dumps(found))


def has_all_logits(form, hidden: np.ndarray, head: np.ndarray, targets: np.ndarray) -> bool:
    """Look for an array of R rows or more of logits in the program of values and gradients."""
    import jax

    program = str(jax.make_jaxpr(jax.grad(lambda *x: form(*x, targets, 5.0).sum(), (0, 1)))(hidden, head))
    return any(shape in program for shape in (f"[{R},{V}]", f"[5,8,{V}]", f"[40,{V}]"))


if __name__ == "__main__":
    main()
