"""Google's Gemma models, from a file to text.

    import gemkit
    m = gemkit.load("demo")
    print(m.generate("The capital of France is", max_tokens=16))

Importing the package imports nothing heavy; each name below is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemkit.api.chat import Chat as Chat
    from gemkit.api.load import load as load
    from gemkit.api.model import Model as Model
    from gemkit.api.options import GenerateOptions as GenerateOptions
    from gemkit.api.options import LoadOptions as LoadOptions
    from gemkit.api.output import Completion as Completion
    from gemkit.api.output import Piece as Piece
    from gemkit.api.output import Score as Score
    from gemkit.api.output import Usage as Usage
    from gemkit.api.stream import Stream as Stream
    from gemkit.errors import GemkitError as GemkitError
    from gemkit.errors import GemkitWarning as GemkitWarning
    from gemkit.errors import UsageError as UsageError

__version__ = "0.1.0"

_EXPORTS = {
    "load": "api.load",
    "LoadOptions": "api.options",
    "Model": "api.model",
    "GenerateOptions": "api.options",
    "Completion": "api.output",
    "Usage": "api.output",
    "Stream": "api.stream",
    "Piece": "api.output",
    "Chat": "api.chat",
    "Score": "api.output",
    "GemkitError": "errors",
    "UsageError": "errors",
    "GemkitWarning": "errors",
}

if not TYPE_CHECKING:
    __all__ = ["__version__", *_EXPORTS]

    def __getattr__(name: str) -> object:
        if name not in _EXPORTS:
            raise AttributeError(f"module 'gemkit' has no attribute {name!r}")
        value = getattr(import_module(f"gemkit.{_EXPORTS[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
