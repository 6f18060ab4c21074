"""Training in Keras 3 on JAX, PyTorch or TensorFlow: `Tuner` for ``compile`` and ``fit``, `KerasLoop` for runs.

`KerasLoop` is the translation of `gemkit.train.loop_torch`. Layers are recomputed in the backward pass; not with
dropout, whose seeds Keras would draw a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import keras
import numpy as np
from keras import KerasTensor as Tensor
from keras import ops

from gemkit.arch.config import ModelConfig
from gemkit.data.batch import TokenBatch
from gemkit.errors import UsageError
from gemkit.models.frameworks.layers import call
from gemkit.models.keras import Decoder, KerasRunner, Where, load_decoder
from gemkit.models.keras.load import adapt as adapt
from gemkit.models.keras.load import check_device
from gemkit.train.loop import StepMetrics
from gemkit.train.objectives.sft import loss_tokens, mean_nll, sum_nll
from gemkit.train.options import TrainOptions
from gemkit.weights.checkpoint import Tensor as Weight

Inputs = dict[str, Tensor]
_ROWS = 8  # steps in which the number of rows with loss may grow: each is compiled once on JAX


def open_decoder(
    config: ModelConfig, weights: Mapping[str, Weight], options: TrainOptions, device: str | None, bits: int | None
) -> Decoder:
    """Load the model of a run; trained weights are float32. "auto" is the dtype that Keras is set to.

    Raises UsageError for bits and for a device that Keras does not use here, and as `load_decoder`.
    """
    if bits is not None:
        raise UsageError("weights of 8 and 4 bits are for the backends torch and jax: choose one of them")
    check_device(device)
    mixed = "mixed_" if options.method == "full" and options.dtype == "bfloat16" else ""
    policy = keras.config.dtype_policy().name if options.dtype == "auto" else f"{mixed}{options.dtype}"
    return load_decoder(config, weights, policy)


def make_runner(decoder: Decoder) -> KerasRunner:
    """Return a runner of the model in training, for samples."""
    return KerasRunner(decoder)


def row_norms(decoder: Decoder, name: str) -> np.ndarray:
    """Return the norm of each row of a matrix, float32 [out]."""
    weight = ops.cast(decoder.tensors()[name], "float32")
    return _numpy(ops.sqrt(ops.sum(ops.square(weight), axis=1)))


def inputs_of(batch: TokenBatch) -> dict[str, np.ndarray]:
    """Return a batch as the inputs of `Tuner`."""
    names = ("tokens", "targets", "positions", "segments")
    return {name: getattr(batch, name) for name in names}


def feed(batches: Iterable[TokenBatch]) -> Iterator[tuple[dict[str, np.ndarray]]]:
    """Yield batches as ``fit`` takes them, with ``steps_per_epoch`` where they are endless."""
    for batch in batches:
        yield (inputs_of(batch),)


@keras.saving.register_keras_serializable("gemkit")
class Tuner(keras.Model):
    """Log-probabilities float32 [B, T] of the targets, and the loss for ``fit``: the mean of -log p over a batch.

    Inputs: a dict of tokens, targets (-1 where there is no loss), positions and segments, int [B, T]; the fields of
    `TokenBatch`. With rows, int [R], only these of all B·T rows go through the output matrix, and [R] comes back.
    recompute: computes layers again in the backward pass, for less memory.

    Example: ``tuner = Tuner(decoder); tuner.compile(keras.optimizers.AdamW(1e-4)); tuner.fit(inputs, batch_size=4)``
    """

    def __init__(self, decoder: Decoder, recompute: bool = True, **kwargs) -> None:
        super().__init__(**kwargs)
        self.decoder, self.recompute = decoder, recompute
        self.built = True

    def call(self, inputs: Inputs, training: bool = False) -> Tensor:
        plain = not training or not self.recompute or any(parts[3] for parts in self.decoder.adapted.values())
        where = Where(inputs["positions"], inputs["segments"])
        hidden_BTD, _ = self.decoder.hidden(inputs["tokens"], where, run=call if plain else _recompute)
        hidden_RD = ops.reshape(hidden_BTD, (-1, hidden_BTD.shape[-1]))
        if "rows" in inputs:
            hidden_RD = ops.take(hidden_RD, inputs["rows"], axis=0)
        targets_R = ops.reshape(targets_of(inputs), (-1,))
        values_R = self.decoder.logprobs(hidden_RD, ops.maximum(targets_R, 0), bool(training))
        return values_R if "rows" in inputs else ops.reshape(values_R, ops.shape(inputs["targets"]))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True) -> Tensor:
        count = ops.sum(ops.cast(x["targets"] >= 0, "float32"))
        return mean_nll(y_pred, x["targets"], ops.maximum(count, 1), ops)

    def get_config(self) -> dict:
        config = {"decoder": keras.saving.serialize_keras_object(self.decoder), "recompute": self.recompute}
        return {**super().get_config(), **config}

    @classmethod
    def from_config(cls, config: dict, custom_objects: dict | None = None) -> Tuner:
        decoder = keras.saving.deserialize_keras_object(config["decoder"])
        return cls(**{**config, "decoder": decoder})


def targets_of(inputs: Inputs) -> Tensor:
    """Return the targets of the rows of `Tuner`'s result: [R] with rows, else [B, T]. Rows past the end have none."""
    if "rows" not in inputs:
        return inputs["targets"]
    targets_R = ops.take(ops.reshape(inputs["targets"], (-1,)), inputs["rows"], axis=0)
    return ops.where(ops.arange(ops.shape(targets_R)[0]) < inputs["count"], targets_R, -1)


@keras.saving.register_keras_serializable("gemkit")
class AdamW(keras.optimizers.AdamW):
    """AdamW with the steps of `torch.optim.AdamW`: eps is added to the corrected moment, where Keras adds it before.

    That is 30 times as much in the first step, which elements with small gradients show.
    """

    def update_step(self, gradient: Tensor, variable: keras.Variable, learning_rate: Tensor) -> None:
        index, step = self._get_variable_index(variable), ops.cast(self.iterations + 1, "float32")
        first, second = self._momentums[index], self._velocities[index]
        self.assign_add(first, (gradient - first) * (1 - self.beta_1))
        self.assign_add(second, (ops.square(gradient) - second) * (1 - self.beta_2))
        rate = learning_rate / (1 - ops.power(self.beta_1, step))
        root = ops.sqrt(second / (1 - ops.power(self.beta_2, step))) + self.epsilon
        self.assign_sub(variable, rate * first / root)


class KerasLoop:
    """Steps of AdamW on a decoder's trainable variables: jitted on JAX, graphs on TensorFlow, eager on PyTorch.

    recompute: "none", or in Keras everything but the inputs of the layers.
    """

    def __init__(self, decoder: Decoder, options: TrainOptions, recompute: str = "cheap") -> None:
        self.decoder, self.options = decoder, options
        self.tuner = Tuner(decoder, recompute != "none")
        self.trained = {_name(variable): variable for variable in decoder.trainable_variables}
        variables = list(self.trained.values())
        beta_1, beta_2 = options.betas
        self.optimizer = AdamW(options.lr, options.weight_decay, beta_1, beta_2, options.eps, name="adamw")
        self.optimizer.exclude_from_weight_decay([v for v in variables if len(v.shape) == 1])
        self.optimizer.build(variables)
        weights = {id(variable) for variable in decoder.weights}
        self.seeds = [v for v in decoder.non_trainable_variables if id(v) not in weights]  # of dropout
        for index, seed in enumerate(self.seeds):
            # Keras counts up the second number
            first = np.random.SeedSequence([options.seed, index]).generate_state(1)[0] >> 1
            seed.assign(np.array([first, 0]).astype(keras.backend.standardize_dtype(seed.dtype)))
        self._backend = {"jax": _Jax, "torch": _Torch, "tensorflow": _TensorFlow}[keras.backend.backend()](self)

    def step(self, batches: Sequence[TokenBatch], lr: float) -> StepMetrics:
        count, loss, gradients = loss_tokens(batches), 0.0, None
        for batch in batches:
            part, new = self._backend.gradients(_inputs(batch), np.float32(count))
            gradients = new if gradients is None else [ops.add(a, b) for a, b in zip(gradients, new, strict=True)]
            loss += float(_numpy(part))
        norm, broken = float(_numpy(_norm(gradients))), None
        if np.isfinite(loss) and np.isfinite(norm):
            scale = 1.0 if self.options.clip is None else min(1.0, self.options.clip / (norm + 1e-6))
            self.optimizer.learning_rate = lr
            self._backend.apply(gradients, np.float32(scale))
        else:
            named = zip(self.trained, gradients, strict=True)
            broken = next((name for name, gradient in named if not _numpy(ops.all(ops.isfinite(gradient)))), None)
        tokens = sum(int((batch.segments > 0).sum()) for batch in batches)
        return StepMetrics(loss, tokens, count, norm, broken)

    def evaluate(self, batch: TokenBatch) -> tuple[float, int]:
        return float(_numpy(self._backend.evaluate(_inputs(batch)))), loss_tokens([batch])

    def state(self) -> dict[str, np.ndarray]:
        return {name: np.array(_numpy(variable)) for name, variable in self._variables().items()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        for name, variable in self._variables().items():
            variable.assign(arrays[name])

    def parameters(self) -> dict[str, np.ndarray]:
        return {name: np.array(_numpy(variable)) for name, variable in self.trained.items()}

    def _variables(self) -> dict[str, keras.Variable]:
        found = {f"parameter.{name}": variable for name, variable in self.trained.items()}
        found |= {f"optimizer.{variable.path}": variable for variable in self.optimizer.variables}
        return found | {f"random.{index}": seed for index, seed in enumerate(self.seeds)}


class _Torch:
    """Gradients, updates and sums of -log p by PyTorch, eagerly; the other backends have the same three methods."""

    def __init__(self, loop: KerasLoop) -> None:
        import torch

        self.loop, self.torch = loop, torch

    def gradients(self, inputs: Inputs, count: np.float32) -> tuple[Tensor, list[Tensor]]:
        loss = _loss(self.loop.tuner, inputs, count)
        values = _values(list(self.loop.trained.values()))
        return loss.detach(), list(self.torch.autograd.grad(loss, values, materialize_grads=True))

    def apply(self, gradients: list[Tensor], scale: np.float32) -> None:
        with self.torch.no_grad():
            self.loop.optimizer.apply([g * float(scale) for g in gradients], list(self.loop.trained.values()))

    def evaluate(self, inputs: Inputs) -> Tensor:
        with self.torch.no_grad():
            return sum_nll(self.loop.tuner(inputs), targets_of(inputs), ops)


class _TensorFlow:
    def __init__(self, loop: KerasLoop) -> None:
        import tensorflow as tf

        def gradients(inputs: Inputs, count: Tensor) -> tuple[Tensor, list[Tensor]]:
            with tf.GradientTape() as tape:
                loss = _loss(loop.tuner, inputs, count)
            values = [variable.value for variable in loop.trained.values()]
            found = tape.gradient(loss, values, unconnected_gradients=tf.UnconnectedGradients.ZERO)
            return loss, [tf.convert_to_tensor(gradient) for gradient in found]

        def apply(gradients: list[Tensor], scale: Tensor) -> None:
            loop.optimizer.apply([g * scale for g in gradients], list(loop.trained.values()))

        def evaluate(inputs: Inputs) -> Tensor:
            return sum_nll(loop.tuner(inputs), targets_of(inputs), ops)

        self.gradients, self.apply, self.evaluate = (
            tf.function(function, reduce_retracing=True) for function in (gradients, apply, evaluate)
        )


class _Jax:
    """Variables are arguments and results of compiled functions."""

    def __init__(self, loop: KerasLoop) -> None:
        import jax

        self.loop, self.trained = loop, list(loop.trained.values())
        held = {id(variable) for variable in (*self.trained, *loop.seeds)}
        self.frozen = [v for v in loop.tuner.variables if id(v) not in held]
        self._gradients = jax.jit(jax.value_and_grad(partial(self._scoped, self._loss), has_aux=True))
        self._evaluate = jax.jit(partial(self._scoped, self._sum))
        self._apply = jax.jit(self._update, donate_argnums=(1, 2))

    def gradients(self, inputs: Inputs, count: np.float32) -> tuple[Tensor, list[Tensor]]:
        (loss, seeds), gradients = self._gradients(*self._values(), inputs, count)
        _assign(self.loop.seeds, seeds)
        return loss, gradients

    def apply(self, gradients: list[Tensor], scale: np.float32) -> None:
        variables = self.loop.optimizer.variables
        trained, state = self._apply(gradients, _values(self.trained), _values(variables), scale)
        _assign(self.trained, trained)
        _assign(variables, state)

    def evaluate(self, inputs: Inputs) -> Tensor:
        return self._evaluate(*self._values(), inputs, np.float32(1))[0]

    def _values(self) -> tuple[list[Tensor], ...]:
        return _values(self.trained), _values(self.frozen), _values(self.loop.seeds)

    def _scoped(
        self,
        function: Callable,
        trained: list[Tensor],
        frozen: list[Tensor],
        seeds: list[Tensor],
        inputs: Inputs,
        count: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return a function's result for these values of the variables, and the new values of the seeds."""
        variables = [*self.trained, *self.frozen, *self.loop.seeds]
        mapping = list(zip(variables, [*trained, *frozen, *seeds], strict=True))
        with keras.StatelessScope(state_mapping=mapping) as scope:
            result = function(inputs, count)
        return result, [scope.get_current_value(seed) for seed in self.loop.seeds]

    def _loss(self, inputs: Inputs, count: Tensor) -> Tensor:
        return _loss(self.loop.tuner, inputs, count)

    def _sum(self, inputs: Inputs, count: Tensor) -> Tensor:
        return sum_nll(self.loop.tuner(inputs), targets_of(inputs), ops)

    def _update(self, gradients: list[Tensor], trained: list[Tensor], state: list[Tensor], scale: Tensor) -> tuple:
        return self.loop.optimizer.stateless_apply(state, [g * scale for g in gradients], trained)


def _loss(tuner: Tuner, inputs: Inputs, count: Tensor) -> Tensor:
    return mean_nll(tuner(inputs, training=True), targets_of(inputs), count, ops)


def _inputs(batch: TokenBatch) -> Inputs:
    """Return inputs with the rows that carry loss, and more up to the next eighth of all rows."""
    rows, size = np.flatnonzero(batch.targets >= 0).astype(np.int32), batch.targets.size
    length = min(size, -(-max(len(rows), 1) * _ROWS // size) * -(-size // _ROWS))
    padded = np.zeros(length, np.int32)
    padded[: len(rows)] = rows
    arrays = {**inputs_of(batch), "rows": padded, "count": np.int32(len(rows))}
    return {name: ops.convert_to_tensor(array) for name, array in arrays.items()}


def _recompute(layer: Callable, x: Tensor, *arguments: object) -> tuple[Tensor, None]:
    return keras.remat(lambda x: layer(x, *arguments)[0])(x), None


def _name(variable: keras.Variable) -> str:
    """Return the name that every loop uses for a parameter: canonical, or ``{weight}.a``, ``.b``, ``.magnitude``."""
    module, _, leaf = variable.path.replace("/", ".").rpartition(".")
    return f"{module}.{leaf}" if leaf == "weight" else f"{module}.weight.{leaf.removeprefix('lora_')}"


def _norm(gradients: list[Tensor]) -> Tensor:
    return ops.sqrt(ops.sum(ops.stack([ops.sum(ops.square(gradient)) for gradient in gradients])))


def _numpy(x: Tensor | keras.Variable) -> np.ndarray:
    return ops.convert_to_numpy(ops.stop_gradient(x))


def _values(variables: Sequence[keras.Variable]) -> list[Tensor]:
    return [variable.value for variable in variables]


def _assign(variables: Sequence[keras.Variable], values: Sequence[Tensor]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
