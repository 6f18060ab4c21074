"""Log-probabilities by chunks of rows against the log-softmax of all logits: values and gradients. Budget: 30 s."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.tolerances import FRAMEWORK_FLOAT32, relative_error

from gemkit.models.jax import logprobs as module
from gemkit.models.jax.linear import dequantise, quantise
from gemkit.models.jax.logprobs import logprobs, logprobs_plain

R, D, V = 37, 32, 300


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * V * 8)  # eight rows


def operands() -> tuple:
    """Hidden states, matrix and targets; rows of padding within, and more than a chunk of them at the end."""
    draw = np.random.default_rng(0)
    targets = draw.integers(0, V, R).astype(np.int32)
    targets[[3, 20, *range(25, R)]] = -1
    hidden, head = (draw.standard_normal(shape).astype(np.float32) for shape in ((R, D), (V, D)))
    return jnp.asarray(hidden), jnp.asarray(head), targets


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weighted"])
def test_values_and_gradients_are_those_of_the_plain_form(trained, softcap, weighted):
    hidden, head, targets = operands()
    weights_R = np.random.default_rng(1).random(R, np.float32) - 0.3 if weighted else np.where(targets < 0, 0, 1 / R)
    found = []
    for form in (logprobs, logprobs_plain):

        def loss(hidden, head, form=form):
            values = form(hidden, head, targets, softcap)
            return (values * weights_R).sum(), values

        (_, values), gradients = jax.jit(jax.value_and_grad(loss, (0, 1) if trained else 0, has_aux=True))(hidden, head)
        found.append([values, *jax.tree.leaves(gradients)])
    assert len(found[0]) == (3 if trained else 2)
    assert all(relative_error(a, b) <= FRAMEWORK_FLOAT32 for a, b in zip(*found, strict=True))
    assert relative_error(logprobs(hidden, head, targets, softcap), found[1][0]) <= FRAMEWORK_FLOAT32


def test_a_quantised_head_gives_the_values_of_its_matrix():
    hidden, head, targets = operands()
    packed = quantise(head, 8)
    expected = logprobs_plain(hidden, dequantise(packed, jnp.float32), targets, 30.0)
    assert relative_error(logprobs(hidden, packed, targets, 30.0), expected) <= FRAMEWORK_FLOAT32


def sizes(jaxpr) -> Iterator[tuple[str, int]]:
    """Operation and number of elements of each result of a program and of the programs in it."""
    for equation in jaxpr.eqns:
        yield from ((equation.primitive.name, variable.aval.size) for variable in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values())):
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield from sizes(value)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_the_logits_of_all_rows_are_never_in_memory(trained):
    hidden, head, targets = operands()
    found = {}
    for form in (logprobs, logprobs_plain):
        gradient = jax.grad(lambda *x, form=form: form(*x, targets, 5.0).sum(), (0, 1) if trained else 0)
        found[form] = list(sizes(jax.make_jaxpr(gradient)(hidden, head).jaxpr))
    largest = {form: max(size for _, size in results) for form, results in found.items()}
    assert largest[logprobs] == V * D < R * V == largest[logprobs_plain]
    # A head that takes no gradient costs no product for it
    assert (("dot_general", V * D) in found[logprobs]) == trained
