"""The default way to run a layer: a function that training replaces, to recompute activations or place stages."""

from collections.abc import Callable
from typing import Any


def call(layer: Callable, *arguments: Any) -> Any:
    """Call a layer. In place of `operator.call`, which torch.compile cannot trace."""
    return layer(*arguments)
