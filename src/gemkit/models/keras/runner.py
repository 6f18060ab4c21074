"""The engine's `Runner` on Keras, from a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping

import keras

from gemkit.arch.config import ModelConfig
from gemkit.errors import UsageError
from gemkit.host import usable_cpus
from gemkit.models.frameworks.info import FrameworkInfo
from gemkit.models.keras.load import load_decoder
from gemkit.models.keras.steps import Steps, memory, width
from gemkit.weights.checkpoint import Tensor


class KerasRunner(FrameworkInfo, Steps):
    """Runs a model with Keras, on the backend that ``KERAS_BACKEND`` names.

    config, weights: as in a `Checkpoint`; memory holds the model and one tensor more while it loads.
    dtype: a dtype policy of Keras, "auto" for the one that it is set to. device: not in Keras's hands; None or the
    place where the backend puts arrays anyway. threads: the backend's own.
    Raises UsageError for a device or dtype that cannot be had, GemkitError if memory is short.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        *,
        device: str | None = None,
        dtype: str = "auto",
        threads: int | None = None,
        max_tokens_per_step: int = 512,
    ) -> None:
        place = _place()
        if device not in (None, place):
            raise UsageError(
                f"device is {device!r}; Keras runs on {place} here: set CUDA_VISIBLE_DEVICES or JAX_PLATFORMS instead"
            )
        policy = keras.config.dtype_policy().name if dtype == "auto" else dtype
        super().__init__(memory(load_decoder, config, weights, policy), max_tokens_per_step)
        self.dtype = self.activations = policy
        self.path = f"keras {keras.backend.backend()} {place}"
        self.threads = usable_cpus()

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""
        return sum(_bytes(variable) for variable in self.decoder.tensors().values())

    @property
    def token_bytes(self) -> int:
        """Bytes of weights that one token reads: an untied embedding gives a row alone."""
        if self.config.tie_word_embeddings:
            return self.weight_bytes
        return self.weight_bytes - _bytes(self.decoder.model.embed_tokens.weight)


def _bytes(variable: keras.Variable) -> int:
    return math.prod(variable.shape) * width(variable.dtype)


def _place() -> str:
    """Where the backend puts arrays: "cpu", "gpu", "cuda" or "tpu"."""
    match keras.backend.backend():
        case "jax":
            import jax

            return jax.devices()[0].platform
        case "torch":
            from keras.src.backend.torch.core import get_device

            return get_device().partition(":")[0]
        case _:
            return "gpu" if keras.distribution.list_devices("gpu") else "cpu"
