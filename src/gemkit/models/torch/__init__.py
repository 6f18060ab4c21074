"""Gemma in PyTorch: `Decoder` is the model, `TorchRunner` runs it for the engine."""

from gemkit.models.torch.attention import LayerCache, Where
from gemkit.models.torch.decoder import Decoder
from gemkit.models.torch.load import load_decoder, load_runner
from gemkit.models.torch.runner import TorchRunner

__all__ = ["Decoder", "LayerCache", "TorchRunner", "Where", "load_decoder", "load_runner"]
