"""The command line's face is frozen: a changed option is a decision, written here and in the changelog. Budget: 1 s."""

import re

import click
from click.testing import CliRunner

from gemkit.api.options import GenerateOptions, LoadOptions
from gemkit.cli import ALIASES, VERBS, cli
from gemkit.cli.command import GROUPS

LOAD = [
    "-t/--threads",
    "-c/--ctx-size",
    "--dtype",
    "--backend",
    "--device",
    "--adapter-path",
    "--offline",
    "--activations",
    "--json",
]
TUNING = [
    "--data",
    "--validation",
    "--template",
    "--mask-prompt",
    "--max-seq-len",
    "--on-long",
    "--on-bad-row",
    "--packing",
    "-o/--output-dir",
    "--resume",
    "--dry-run",
    "--config",
    "--epochs",
    "--max-steps",
    "--lr",
    "--schedule",
    "--warmup",
    "--batch-size",
    "--grad-accum",
    "--weight-decay",
    "--clip",
    "-s/--seed",
    "--eval-every",
    "--save-every",
    "--sample-prompt",
    "--sample-every",
    "--dtype",
    "--backend",
    "--device",
    "--recompute",
    "--offline",
    "--json",
]
FLAGS = {
    "generate": [
        "[MODEL]",
        "words",
        "-p/--prompt",
        "-f/--file",
        "--system-prompt",
        "--suffix",
        "--raw",
        "--chat-template",
        "--special",
        "-n/--max-tokens",
        "--temp/--temperature",
        "--top-k",
        "--top-p",
        "--min-p",
        "--repetition-penalty",
        "--presence-penalty",
        "--frequency-penalty",
        "--logit-bias",
        "-s/--seed",
        "--stop",
        "--logprobs",
        "--receipt",
        "-v/--verbose",
        *LOAD,
    ],
    "replay": ["file", "--model", "-t/--threads", "--batch", "--json"],
    "chat": [
        "[MODEL]",
        "--system-prompt",
        "--chat-template",
        "-n/--max-tokens",
        "--temp/--temperature",
        "--top-k",
        "--top-p",
        "--min-p",
        "--repetition-penalty",
        "-s/--seed",
        "--continue",
        "--context-shift",
        "--no-history",
        "--plain",
        "--quiet",
        *LOAD[:-1],
    ],
    "score": ["[MODEL]", "words", "--text", "-f/--file", "--window", "--special", *LOAD],
    "embed": ["[MODEL]", "words", "-f/--file", "--special", "-o/--output", *LOAD],
    "tokenize": [
        "[MODEL]",
        "words",
        "-f/--file",
        "--special",
        "--chat",
        "--no-bos",
        "--ids",
        "--count",
        "--offline",
        "--json",
    ],
    "show": ["[MODEL]", *LOAD],
    "bench": ["[MODEL]", "-p/--prompt-tokens", "-n/--max-tokens", "-r/--reps", *LOAD],
    "check": ["MODEL", "--deep", "--strict", "--json"],
    "doctor": ["[MODEL]", "--measure", "--json"],
    "sft": ["MODEL", *TUNING],
    "lora": [
        "MODEL",
        "--lora-rank",
        "--lora-alpha",
        "--lora-target",
        "--lora-dropout",
        "--rslora",
        "--dora",
        "--quantize",
        "--adapter-path",
        *TUNING,
    ],
    "convert": ["MODEL", "target", "--to", "--dtype", "--verify", "--text-file", "--offline", "--json"],
    "merge": ["MODEL", "adapters", "target", "--dtype", "--requantize", "--text-file", "--offline", "--json"],
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
    "cache": ["action", "--all", "--older-than", "--max-size", "--json"],
}


def flags(command: click.Command) -> list[str]:
    return [p.make_metavar(click.Context(command)) if p.opts == ["model"] else "/".join(p.opts) for p in command.params]


def test_the_verbs_are_frozen():
    assert list(FLAGS) == list(VERBS)
    assert ALIASES == {"run": "generate", "finetune": "sft", "fuse": "merge"}
    assert flags(cli) == ["--version", "--debug"]


def test_the_flags_of_every_verb_are_frozen():
    found = {verb: flags(cli.get_command(click.Context(cli), verb)) for verb in VERBS}
    assert found == FLAGS


def test_every_option_and_verb_has_help():
    for verb in VERBS:
        command = cli.get_command(click.Context(cli), verb)
        assert command.help
        assert not [p.name for p in command.params if isinstance(p, click.Option) and not p.help]


def test_every_command_answers_to_h():
    for arguments in ([], *([verb] for verb in VERBS), ["run"]):
        done = CliRunner().invoke(cli, [*arguments, "-h"])
        assert done.exit_code == 0 and done.output.startswith("Usage: ") and "-h, --help" in done.output


def test_the_help_lists_the_alias_and_groups_many_options():
    output = CliRunner().invoke(cli, ["--help"]).output
    assert "  generate, run  Write text." in output
    assert "  merge, fuse    Merge adapters into a model's weights." in output
    sections = re.findall(r"^(\w+):$", CliRunner().invoke(cli, ["generate", "-h"]).output, re.MULTILINE)
    assert sections == ["Prompt", "Sampling", "Output", "Model", "Other"]
    assert re.findall(r"^(\w+):$", CliRunner().invoke(cli, ["ls", "-h"]).output, re.MULTILINE) == ["Options"]
    names = [name for group in GROUPS.values() for name in group]
    assert len(names) == len(set(names))


def test_an_alias_is_the_same_command():
    context = click.Context(cli)
    assert cli.get_command(context, "run") is cli.get_command(context, "generate")
    assert cli.get_command(context, "nothing") is None


def test_the_defaults_are_those_of_the_python_api():
    both = [cli.get_command(click.Context(cli), verb) for verb in ("generate", "chat")]
    defaults, chat = (
        {p.name: p.get_default(click.Context(verb)) for p in verb.params if isinstance(p, click.Option)}
        for verb in both
    )
    assert chat == {name: defaults.get(name, value) for name, value in chat.items()}
    for name in ("max_tokens", "temperature", "top_k", "top_p"):
        assert defaults[name] == getattr(GenerateOptions(), name)
    for name in ("activations", "backend", "dtype"):
        assert defaults[name] == getattr(LoadOptions(), name)
