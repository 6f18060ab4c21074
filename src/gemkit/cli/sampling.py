"""Command-line options of generation: a field of `GenerateOptions` each, with its default."""

from collections.abc import Callable

import click

from gemkit.api.options import GenerateOptions

# By field: flags, type, metavar, help.
_OPTIONS = {
    "max_tokens": (("-n", "--max-tokens"), int, "N", "Maximum number of tokens in an answer."),
    "temperature": (("--temp", "--temperature"), float, "X", "Temperature; 0 takes the most probable token."),
    "top_k": (("--top-k",), int, "N", "Sample from the N most probable tokens; 0 disables it."),
    "top_p": (("--top-p",), float, "X", "Sample from the most probable tokens with this total probability."),
    "min_p": (("--min-p",), float, "X", "Exclude tokens below this fraction of the highest probability."),
    "repetition_penalty": (
        ("--repetition-penalty",),
        float,
        "X",
        "Above 1, penalise tokens that the text already has.",
    ),
    "presence_penalty": (
        ("--presence-penalty",),
        float,
        "X",
        "Subtracted from the logit of every token generated before.",
    ),
    "frequency_penalty": (
        ("--frequency-penalty",),
        float,
        "X",
        "Subtracted once for each time the token was generated.",
    ),
    "seed": (("-s", "--seed"), int, "N", "The same seed gives the same text."),
}
_DEFAULTS_SHOWN = ("max_tokens", "temperature", "top_k", "top_p")


def sampling_options(*names: str) -> Callable:
    """Return a decorator that adds the options of these fields, in this order."""

    def add(command: Callable) -> Callable:
        for name in reversed(names):
            flags, kind, metavar, help = _OPTIONS[name]
            default = getattr(GenerateOptions, name) if name in _DEFAULTS_SHOWN else None
            option = click.option(
                *flags, name, type=kind, metavar=metavar, default=default, show_default=True, help=help
            )
            command = option(command)
        return command

    return add
