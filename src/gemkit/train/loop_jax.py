"""The training loop in JAX: `JaxLoop` takes the steps of `gemkit.train.run`.

Activations of a layer are recomputed in the backward pass but for the results of matrix products and of attention: the
others cost little time and most of the memory. A step is compiled once for each shape of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from gemkit.arch.config import ModelConfig
from gemkit.data.batch import TokenBatch
from gemkit.models.frameworks.layers import call
from gemkit.models.jax import Decoder, JaxRunner, Where, load_decoder
from gemkit.models.jax.decoder import Params
from gemkit.models.jax.linear import KEPT, LowRank, Quantised
from gemkit.models.jax.load import adapt as adapt
from gemkit.models.jax.load import pick_device, pick_dtype
from gemkit.train.loop import StepMetrics
from gemkit.train.objectives.sft import loss_tokens, mean_nll, sum_nll
from gemkit.train.options import TrainOptions
from gemkit.weights.checkpoint import Tensor as Weight

Arrays = dict[str, Array]

_PARTS = ("a", "b", "magnitude")
_POLICIES = {"cheap": jax.checkpoint_policies.save_only_these_names(KEPT), "layers": None}


def open_decoder(
    config: ModelConfig, weights: Mapping[str, Weight], options: TrainOptions, device: str | None, bits: int | None
) -> Decoder:
    """Load the model of a run: all of it trained, or frozen, with matrices of 8 or 4 bits if `bits` says so.

    device: see `pick_device`. Raises as `load_decoder` and `pick_dtype`.
    """
    place = pick_device(device)
    trainable = (lambda spec: True) if options.method == "full" else None
    return load_decoder(config, weights, pick_dtype(options.dtype, config, place), place, bits, trainable)


def make_runner(decoder: Decoder) -> JaxRunner:
    """Return a runner of the model in training, for samples, until the next step."""
    return JaxRunner(decoder)


def row_norms(decoder: Decoder, name: str) -> np.ndarray:
    """Return the norm of each row of a matrix, float32 [out]."""
    weight = decoder.params[name]
    rows, columns = weight.shape
    return np.asarray(jax.jit(LowRank.norms)(LowRank(weight, jnp.zeros((1, columns)), jnp.zeros((rows, 1)), 0.0)))


class JaxLoop:
    """Steps of AdamW on a decoder's adapter, or without one on all parameters that are not quantised.

    The decoder's trained arrays are donated to the first step: use `decoder` from then on.
    recompute: "cheap", see above; "layers", everything but the inputs of the layers; "none".
    """

    def __init__(self, decoder: Decoder, options: TrainOptions, recompute: str = "cheap") -> None:
        self.options = options
        self.trained, self._frozen = _split(decoder.params)
        self._model = model = replace(
            decoder, params={}
        )  # parameters are an argument: in the graph they were constants
        (self.device,) = decoder.params["model.norm.weight"].devices()
        self._optimizer = optax.chain(
            optax.scale_by_adam(*options.betas, options.eps),
            optax.add_decayed_weights(
                options.weight_decay, lambda p: {name: value.ndim > 1 for name, value in p.items()}
            ),
        )
        self._moments = jax.device_put(self._optimizer.init(self.trained), self.device)
        self._steps = 0
        assert recompute in {*_POLICIES, "none"}
        self._gradient = jax.jit(partial(_gradient, model, recompute, options.seed), donate_argnums=0)
        self._update = jax.jit(partial(_update, self._optimizer), donate_argnums=(0, 1))
        self._evaluate = jax.jit(partial(_evaluate, model))

    @property
    def decoder(self) -> Decoder:
        """The decoder as it is now, until the next step, which is given its trained arrays."""
        return replace(self._model, params=_join(self.trained, self._frozen))

    def step(self, batches: Sequence[TokenBatch], lr: float) -> StepMetrics:
        count, parts, gradient = loss_tokens(batches), [], None
        for at, batch in enumerate(batches):
            draw = np.array([self._steps, at], np.uint32)
            part, gradient = self._gradient(gradient, self.trained, self._frozen, _rows(batch), np.float32(count), draw)
            parts.append(part)
        squares = {name: float(value) for name, value in jax.device_get(_squares(gradient)).items()}
        loss, norm, broken = float(sum(map(float, parts))), math.sqrt(sum(squares.values())), None
        if math.isfinite(loss) and math.isfinite(norm):
            clip = 1.0 if self.options.clip is None else min(1.0, self.options.clip / (norm + 1e-6))
            scalars = np.float32(clip), np.float32(lr)
            self.trained, self._moments = self._update(self.trained, self._moments, gradient, *scalars)
            self._steps += 1
        else:
            broken = next((name for name, square in squares.items() if not math.isfinite(square)), None)
        tokens = sum(int((batch.segments > 0).sum()) for batch in batches)
        memory = (self.device.memory_stats() or {}).get("peak_bytes_in_use")
        return StepMetrics(loss, tokens, count, norm, broken, memory)

    def evaluate(self, batch: TokenBatch) -> tuple[float, int]:
        return float(self._evaluate(self.trained, self._frozen, _rows(batch))), loss_tokens([batch])

    def state(self) -> dict[str, np.ndarray]:
        adam = self._moments[0]
        kinds = {"parameter": self.trained, "exp_avg": adam.mu, "exp_avg_sq": adam.nu}
        found = {
            f"{kind}.{name}": np.asarray(value) for kind, arrays in kinds.items() for name, value in arrays.items()
        }
        return found | {"step": np.array(self._steps)}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        kinds = ("parameter", "exp_avg", "exp_avg_sq")
        self.trained, mu, nu = (
            {name: jax.device_put(np.array(arrays[f"{kind}.{name}"]), self.device) for name in self.trained}
            for kind in kinds
        )
        self._steps = int(arrays["step"])
        adam = self._moments[0]._replace(count=jnp.asarray(self._steps, jnp.int32), mu=mu, nu=nu)
        self._moments = jax.device_put((adam, *self._moments[1:]), self.device)

    def parameters(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(value) for name, value in self.trained.items()}


def _put(decoder: Decoder, value: np.ndarray) -> Array:
    (device,) = decoder.params["model.norm.weight"].devices()
    return jax.device_put(np.array(value), device)


def _split(params: Params) -> tuple[Arrays, Params]:
    """Return the arrays to train by name, float32, and the parameters without them."""
    adapters = {name: value for name, value in params.items() if isinstance(value, LowRank)}
    if adapters:
        trained = {f"{name}.{key}": getattr(value, key) for name, value in adapters.items() for key in _PARTS}
        trained = {name: value for name, value in trained.items() if value is not None}
        frozen = {name: replace(value, **dict.fromkeys(_PARTS)) for name, value in adapters.items()}
    else:
        trained = {name: value for name, value in params.items() if not isinstance(value, Quantised)}
        frozen = dict.fromkeys(trained)
    return {name: value.astype(jnp.float32) for name, value in trained.items()}, {**params, **frozen}


def _join(trained: Arrays, frozen: Params, key: Array | None = None) -> Params:
    """Return the whole parameters. key: of dropout; None: there is none."""
    whole = {**frozen, **{name: value for name, value in trained.items() if name in frozen}}
    for i, (name, value) in enumerate(frozen.items()):
        if isinstance(value, LowRank):
            parts = {part: trained.get(f"{name}.{part}") for part in _PARTS}
            drawn = None if key is None or not value.dropout else jax.random.fold_in(key, i)
            whole[name] = replace(value, **parts, key=drawn)
    return whole


def _rows(batch: TokenBatch) -> tuple[np.ndarray, ...]:
    """Return the batch, and indices and ids of its targets int32 [B·T], padded with 0 and −1."""
    found = np.flatnonzero(batch.targets >= 0)
    where_R, targets_R = np.zeros(batch.targets.size, np.int32), np.full(batch.targets.size, -1, np.int32)
    where_R[: len(found)], targets_R[: len(found)] = found, batch.targets.ravel()[found]
    return batch.tokens, batch.positions, batch.segments, where_R, targets_R


def _logprobs(decoder: Decoder, run: Callable, rows: tuple[Array, ...]) -> Array:
    tokens, positions, segments, where_R, targets_R = rows
    hidden_BTD, _ = decoder.hidden(tokens, Where(positions, segments), run=run)
    return decoder.logprobs(hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[where_R], targets_R)


def _gradient(
    model: Decoder,
    recompute: str,
    seed: int,
    earlier: Arrays | None,
    trained: Arrays,
    frozen: Params,
    rows: tuple[Array, ...],
    count: Array,
    draw: Array,
) -> tuple[Array, Arrays]:
    """Return a batch's part of the loss, and its gradient added to that of earlier batches. draw: step and batch."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), draw[0]), draw[1])
    once = (count > 0).astype(jnp.int32)
    run = call if recompute == "none" else partial(_recompute, _POLICIES[recompute], once)

    def loss(trained: Arrays) -> Array:
        decoder = replace(model, params=_join(trained, frozen, key))
        return mean_nll(_logprobs(decoder, run, rows), rows[-1], count, jnp)

    part, gradient = jax.value_and_grad(loss)(trained)
    return part, gradient if earlier is None else jax.tree.map(jnp.add, earlier, gradient)


def _update(
    optimizer: optax.GradientTransformation, trained: Arrays, moments: tuple, gradient: Arrays, clip: Array, lr: Array
) -> tuple[Arrays, tuple]:
    clipped = {name: value * clip for name, value in gradient.items()}
    updates, moments = optimizer.update(clipped, moments, trained)
    return {name: value - lr * updates[name] for name, value in trained.items()}, moments


def _evaluate(model: Decoder, trained: Arrays, frozen: Params, rows: tuple[Array, ...]) -> Array:
    return sum_nll(_logprobs(replace(model, params=_join(trained, frozen)), call, rows), rows[-1], jnp)


@jax.jit
def _squares(gradient: Arrays) -> Arrays:
    return {name: jnp.sum(jnp.square(value)) for name, value in gradient.items()}


def _recompute(policy: Callable | None, once: Array, layer: Callable, x_BTD: Array, *others: object) -> object:
    """Call a layer whose backward pass computes again what the policy does not save.

    once: 1, unknown to the compiler. On CPUs, XLA undoes ``jax.checkpoint`` alone: it finds equal operations in the
    forward pass and keeps their results. Here they are in a loop of one round, on arrays that depend on the round.
    """
    plain, constants = jax.closure_convert(lambda x: layer(x, *others), x_BTD)

    @jax.custom_vjp
    def run(once: Array, *arrays: Array) -> object:
        return plain(*arrays)

    def forward(once: Array, *arrays: Array) -> tuple:
        out, backward = jax.vjp(jax.checkpoint(plain, policy=policy), *arrays)
        return out, (once, backward)

    def backward(kept: tuple, upstream: object) -> tuple:
        once, backward = kept

        def body(i: Array, found: tuple) -> tuple:
            late = (jnp.where(i < 0, 0, x) if jnp.issubdtype(x.dtype, jnp.number) else x for x in leaves)
            return jax.tree.unflatten(tree, late)(upstream)

        leaves, tree = jax.tree.flatten(backward)
        none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(backward, upstream))
        return None, *jax.lax.fori_loop(0, once, body, none)

    run.defvjp(forward, backward)
    return run(once, x_BTD, *constants)
