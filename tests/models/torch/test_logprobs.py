"""Log-probabilities by chunks of rows against the log-softmax of all logits: values and gradients. Budget: 20 s."""

import pytest
import torch
from parity.tolerances import FRAMEWORK_FLOAT32, relative_error

from gemkit.models.torch import logprobs as module
from gemkit.models.torch.linear import dequantise, quantise
from gemkit.models.torch.logprobs import logprobs, logprobs_plain

R, D, V = 37, 64, 300


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * V * 8)  # eight rows


def operands(trained: bool) -> tuple:
    torch.manual_seed(0)
    return torch.randn(R, D, requires_grad=True), torch.randn(V, D, requires_grad=trained), torch.randint(0, V, (R,))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weighted"])
def test_values_and_gradients_are_those_of_the_plain_form(trained, softcap, weighted):
    weights_R = torch.rand(R) - 0.3 if weighted else torch.full((R,), 1 / R)
    found = {}
    for form in (logprobs, logprobs_plain):
        hidden, head, targets = operands(trained)
        values = form(hidden, head, targets, softcap)
        (values * weights_R).sum().backward()
        found[form] = [values.detach(), hidden.grad] + ([head.grad] if trained else [])
    assert all(relative_error(a, b) <= FRAMEWORK_FLOAT32 for a, b in zip(*found.values(), strict=True))
    with torch.no_grad():
        assert relative_error(logprobs(*operands(trained), softcap), found[logprobs_plain][0]) <= FRAMEWORK_FLOAT32


def test_a_quantised_head_gives_the_values_of_its_matrix():
    hidden, head, targets = operands(False)
    packed = quantise(head, 8)
    expected = logprobs_plain(hidden, dequantise(packed, torch.float32), targets, 30.0)
    assert relative_error(logprobs(hidden, packed, targets, 30.0).detach(), expected.detach()) <= FRAMEWORK_FLOAT32


def test_the_logits_of_all_rows_are_never_in_memory():
    seen = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            seen.extend(x.numel() for x in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(x))
            return result

    hidden, head, targets = operands(True)
    with Sizes():
        logprobs(hidden, head, targets, 5.0).sum().backward()
    assert max(seen) == V * D and sum(size == R * V for size in seen) == 0
