"""Google's Gemma models, from a file to text.

    import gemkit
    m = gemkit.load("demo")
    print(m.generate("The capital of France is", max_tokens=16))

Importing the package imports nothing heavy; each name below is loaded when it is first used.
"""

from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {
    "load": "api.load",
    "Model": "api.model",
    "Chat": "api.chat",
    "Completion": "api.output",
    "Piece": "api.output",
    "Score": "api.output",
    "GemkitError": "errors",
    "UsageError": "errors",
    "GemkitWarning": "errors",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'gemkit' has no attribute {name!r}")
    value = getattr(import_module(f"gemkit.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
