"""Gemma in JAX: `Decoder` is the model as pure functions, `JaxRunner` runs it for the engine."""

from gemkit.models.jax.attention import LayerCache, Where
from gemkit.models.jax.decoder import Decoder
from gemkit.models.jax.load import abstract_decoder, load_decoder, load_runner
from gemkit.models.jax.runner import JaxRunner

__all__ = ["Decoder", "JaxRunner", "LayerCache", "Where", "abstract_decoder", "load_decoder", "load_runner"]
