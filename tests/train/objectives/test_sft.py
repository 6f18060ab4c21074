"""The loss of fine-tuning in NumPy, PyTorch and JAX: accumulation is one large batch. Budget: 20 s."""

from types import SimpleNamespace

import numpy as np
import pytest

from gemkit.train.objectives.sft import loss_tokens, mean_nll, sum_nll

V = 7


def ragged() -> list[tuple[np.ndarray, np.ndarray]]:
    """Logits [R, V] and targets [R] of three batches with 2, 1 and 5 loss tokens."""
    rng = np.random.default_rng(0)
    targets = [np.array([1, -1, 3, -1]), np.array([-1, 2]), np.array([0, 1, 2, 3, 6, -1])]
    return [(rng.normal(size=(len(t), V)), t) for t in targets]


def grads_torch(batches, count):
    import torch

    found = []
    for logits, targets in batches:
        x = torch.tensor(logits, requires_grad=True)
        t = torch.tensor(targets)
        logprobs = torch.log_softmax(x, -1).gather(1, t.clamp(min=0)[:, None])[:, 0]
        loss = mean_nll(logprobs, t, count, torch)
        loss.backward()
        found.append((loss.item(), x.grad.numpy()))
    return found


def grads_jax(batches, count):
    import jax
    import jax.numpy as jnp

    def loss(x, t):
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(x), jnp.maximum(t, 0)[:, None], 1)[:, 0]
        return mean_nll(logprobs, t, count, jnp)

    pairs = [jax.value_and_grad(loss)(jnp.asarray(x, jnp.float32), jnp.asarray(t)) for x, t in batches]
    return [(float(value), np.asarray(gradient)) for value, gradient in pairs]


@pytest.mark.parametrize(("gradients", "tolerance"), [(grads_torch, 1e-12), (grads_jax, 1e-6)])
def test_accumulation_over_ragged_batches_is_one_large_batch(gradients, tolerance: float):
    batches = ragged()
    count = sum(int((t >= 0).sum()) for _, t in batches)
    parts = gradients(batches, count)
    whole = gradients([tuple(np.concatenate(arrays) for arrays in zip(*batches))], count)[0]
    assert sum(loss for loss, _ in parts) == pytest.approx(whole[0], rel=1e-6)
    np.testing.assert_allclose(np.concatenate([gradient for _, gradient in parts]), whole[1], atol=tolerance)
    mean_of_means = np.mean([loss * count / int((t >= 0).sum()) for (loss, _), (_, t) in zip(parts, batches)])
    assert abs(mean_of_means - whole[0]) > 0.01
    logits, targets = (np.concatenate(arrays) for arrays in zip(*batches))
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows = targets >= 0
    assert whole[0] == pytest.approx(-logprobs[rows, targets[rows]].mean(), rel=1e-6)


def test_a_row_without_loss_counts_for_nothing_whatever_it_holds():
    import torch

    targets = np.array([3, -1, -1])
    assert sum_nll(np.array([-1.5, np.nan, -np.inf]), targets, np) == 1.5
    logprobs = torch.tensor([-1.5, float("nan"), float("-inf")], requires_grad=True)
    sum_nll(logprobs, torch.tensor(targets), torch).backward()
    assert logprobs.grad.tolist() == [-1.0, 0.0, 0.0]


def test_loss_tokens_are_counted_over_the_batches_of_a_step():
    batches = [SimpleNamespace(targets=np.array([[1, -1], [0, -1]])), SimpleNamespace(targets=np.full((2, 3), -1))]
    assert loss_tokens(batches) == 2 and loss_tokens(batches[1:]) == 0
