"""Command-line options of generation: a field of `GenerateOptions` each, with its default."""

from collections.abc import Callable

import click

from gemkit.api.options import GenerateOptions

# By field: type and help.
_OPTIONS = {
    "max_tokens": (int, "Maximum number of tokens in an answer."),
    "temperature": (float, "Temperature; 0 takes the most probable token."),
    "top_k": (int, "Sample from the N most probable tokens; 0 disables it."),
    "top_p": (float, "Sample from the most probable tokens with this total probability."),
    "min_p": (float, "Exclude tokens below this fraction of the highest probability."),
    "repetition_penalty": (float, "Above 1, penalise tokens that the text already has."),
    "presence_penalty": (float, "Subtracted from the logit of every token generated before."),
    "frequency_penalty": (float, "Subtracted once for each time the token was generated."),
    "seed": (int, "The same seed gives the same text."),
}
NAMES = tuple(_OPTIONS)
_SHORT = {"max_tokens": ("-n",), "temperature": ("--temp",), "seed": ("-s",)}
_DEFAULTS_SHOWN = ("max_tokens", "temperature", "top_k", "top_p")


def sampling_options(*names: str) -> Callable:
    """Return a decorator that adds the options of these fields, in this order."""

    def add(command: Callable) -> Callable:
        for name in reversed(names):
            kind, help = _OPTIONS[name]
            flags = (*_SHORT.get(name, ()), f"--{name.replace('_', '-')}")
            default = getattr(GenerateOptions, name) if name in _DEFAULTS_SHOWN else None
            shown = {"metavar": "N" if kind is int else "X", "show_default": True, "help": help}
            command = click.option(*flags, name, type=kind, default=default, **shown)(command)
        return command

    return add
