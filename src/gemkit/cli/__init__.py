"""The command `gemkit`: imports a verb's file when it is used, and turns errors into one line and an exit code.

0 done, 1 failure, 2 wrong usage, 130 interrupted. `--debug` or GEMKIT_DEBUG=1 shows the traceback instead.
"""

import sys

import click

from gemkit import __version__
from gemkit.cli.command import Verbs
from gemkit.cli.streams import whole_text

VERBS = ("generate", "replay", "chat", "score", "embed", "tokenize", "show", "bench", "check", "doctor")
VERBS += ("sft", "lora", "convert", "merge", "quantize", "download", "ls", "rm", "cache")
ALIASES = {"run": "generate", "finetune": "sft", "fuse": "merge"}


@click.group(cls=Verbs, verbs=VERBS, aliases=ALIASES, epilog="'gemkit VERB -h' lists a verb's options.")
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, envvar="GEMKIT_DEBUG", help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Run Google's Gemma models on this machine's CPU."""


def main(args: list[str] | None = None) -> None:
    """Run the command with `args` (default: the process's own) and exit."""
    try:
        with whole_text():
            code = cli.main(args, prog_name="gemkit", standalone_mode=False) or 0
        sys.exit(code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
    except click.Abort:
        click.echo("gemkit: interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        hint = f" (see '{error.ctx.command_path} --help')" if getattr(error, "ctx", None) else ""
        message = " ".join(error.format_message().split())
        if isinstance(error, click.BadParameter):
            message = message.replace("is not a valid integer range", "is not a valid integer")
        click.echo(f"gemkit: {message}{hint}", err=True)
        sys.exit(error.exit_code)
    sys.exit(2)
