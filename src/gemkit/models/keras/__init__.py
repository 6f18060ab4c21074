"""Gemma in Keras 3, the same on JAX, PyTorch and TensorFlow: `Decoder` is a `keras.Model` that also generates."""

from gemkit.models.keras.attention import LayerCache, Where
from gemkit.models.keras.decoder import Decoder
from gemkit.models.keras.load import load_decoder, load_runner
from gemkit.models.keras.runner import KerasRunner

__all__ = ["Decoder", "KerasRunner", "LayerCache", "Where", "load_decoder", "load_runner"]
