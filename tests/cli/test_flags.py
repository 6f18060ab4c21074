"""The command line's face is frozen: a changed option is a decision, written here and in the changelog. Budget: 1 s."""

import inspect

import click

from gemkit.api import Model
from gemkit.cli import ALIASES, VERBS, cli
from gemkit.loading import load

LOAD = [
    "--threads",
    "--ctx-size",
    "--dtype",
    "--backend",
    "--device",
    "--adapter-path",
    "--offline",
    "--activations",
    "--json",
]
FLAGS = {
    "generate": [
        "MODEL",
        "--prompt",
        "--system-prompt",
        "--suffix",
        "--raw",
        "--max-tokens",
        "--temp/--temperature",
        "--top-k",
        "--top-p",
        "--min-p",
        "--repetition-penalty",
        "--presence-penalty",
        "--frequency-penalty",
        "--logit-bias",
        "--seed",
        "--stop",
        "--logprobs",
        "--receipt",
        "--verbose",
        *LOAD,
    ],
    "replay": ["file", "--model", "--threads", "--batch", "--json"],
    "chat": [
        "MODEL",
        "--system-prompt",
        "--max-tokens",
        "--temp/--temperature",
        "--top-k",
        "--top-p",
        "--min-p",
        "--repetition-penalty",
        "--seed",
        "--plain",
        "--quiet",
        *LOAD[:-1],
    ],
    "score": ["MODEL", "--text", "--file", "--window", *LOAD],
    "show": ["MODEL", *LOAD],
    "bench": ["MODEL", "--prompt-tokens", "--max-tokens", "--reps", *LOAD],
    "check": ["MODEL", "--deep", "--strict", "--json"],
    "doctor": ["[MODEL]", "--measure", "--json"],
    "convert": ["MODEL", "target", "--to", "--dtype", "--verify", "--text-file", "--offline", "--json"],
    "quantize": [
        "MODEL",
        "target",
        "--type",
        "--embedding-type",
        "--text-file",
        "--no-measure",
        "--offline",
        "--json",
    ],
    "download": ["name", "--revision", "--offline", "--json"],
    "ls": ["--json"],
    "rm": ["name", "--yes"],
}


def flags(command: click.Command) -> list[str]:
    return [p.make_metavar(click.Context(command)) if p.opts == ["model"] else "/".join(p.opts) for p in command.params]


def test_the_verbs_are_frozen():
    assert list(FLAGS) == list(VERBS)
    assert ALIASES == {"run": "generate"}
    assert flags(cli) == ["--version", "--debug"]


def test_the_flags_of_every_verb_are_frozen():
    found = {verb: flags(cli.get_command(click.Context(cli), verb)) for verb in VERBS}
    assert found == FLAGS


def test_every_option_and_verb_has_help():
    for verb in VERBS:
        command = cli.get_command(click.Context(cli), verb)
        assert command.help
        assert not [p.name for p in command.params if isinstance(p, click.Option) and not p.help]


def test_an_alias_is_the_same_command():
    context = click.Context(cli)
    assert cli.get_command(context, "run") is cli.get_command(context, "generate")
    assert cli.get_command(context, "nothing") is None


def test_the_defaults_are_those_of_the_python_api():
    generate = cli.get_command(click.Context(cli), "generate")
    context = click.Context(generate)
    defaults = {p.name: p.get_default(context) for p in generate.params if isinstance(p, click.Option)}
    signature = inspect.signature(Model.generate).parameters
    assert {name: defaults[name] for name in ("temperature", "top_k", "top_p")} == {
        name: signature[name].default for name in ("temperature", "top_k", "top_p")
    }
    assert defaults["activations"] == inspect.signature(load).parameters["activations"].default
