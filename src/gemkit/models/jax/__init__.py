"""Gemma in JAX: `decoder` is the model as pure functions, `JaxRunner` runs it for the engine."""

from gemkit.models.jax.decoder import LayerCache, forward, hidden, logits
from gemkit.models.jax.load import abstract_params, load_params
from gemkit.models.jax.runner import JaxRunner

__all__ = ["JaxRunner", "LayerCache", "abstract_params", "forward", "hidden", "load_params", "logits"]
