"""The classes of the commands: options in groups, `-h`, suggestions for mistyped verbs, aliases."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

import click
from click.core import ParameterSource

from gemkit.cli import config, sampling
from gemkit.cli.common import failure
from gemkit.errors import UsageError

# The help's sections and the parameters in them; those of no section are in the last one.
GROUPS = {
    "Prompt": ("prompt", "files", "system_prompt", "suffix", "raw", "template", "special"),
    "Conversation": ("resume", "context_shift", "no_history"),
    "Sampling": (*sampling.NAMES, "logit_bias", "stop"),
    "Data": ("data", "validation", "turns", "mask_prompt", "max_seq_len", "on_long", "on_bad_row", "packing"),
    "Run": ("output_dir", "resume_run", "dry_run", "config"),
    "Adapter": ("rank", "alpha", "target", "dropout", "rslora", "dora", "quantize"),
    "Training": (
        *("epochs", "max_steps", "lr", "schedule", "warmup", "batch_size", "grad_accum", "weight_decay", "clip"),
        *("train_seed", "eval_every", "save_every", "sample_prompts", "sample_every", "train_dtype", "recompute"),
    ),
    "Output": ("logprobs", "receipt", "verbose", "plain", "quiet", "as_json"),
    "Model": config.LOAD,
}
_REST = "Other"
# A shorter list of options is easier to read without headings.
_FEW = 12
HELP_NAMES = ["-h", "--help"]
# Names of verbs in other programs.
_ELSEWHERE = {
    "list": "ls",
    "pull": "download",
    "get": "download",
    "fetch": "download",
    "remove": "rm",
    "delete": "rm",
    "info": "show",
    "inspect": "show",
    "complete": "generate",
    "infer": "generate",
    "perplexity": "score",
    "benchmark": "bench",
    "lint": "check",
    "embedding": "embed",
    "embeddings": "embed",
    "encode": "tokenize",
}


class Verb(click.Command):
    """A command with defaults of its options from the environment and the configuration file, where it runs a model.

    Its help lists the options in groups, if there are many.
    """

    def __init__(self, *args: object, **attributes: object) -> None:
        super().__init__(*args, **attributes)
        for param in self.params:
            if param.name in config.SETTABLE.get(self.name, ()) and param.envvar is None:
                param.envvar = config.variable(param)

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: object
    ) -> click.Context:
        """Parse the arguments over the defaults; raises UsageError for a configuration file that is wrong."""
        if not extra.get("resilient_parsing"):
            try:
                extra["default_map"] = config.defaults(self.name, self.params)
            except UsageError:
                if not set(HELP_NAMES) & set(args):
                    raise
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.NoSuchOption as error:
            if not error.possibilities and "words" in {param.name for param in self.params}:
                error.message += " A text that begins with a dash goes after --."
            raise
        except click.BadParameter as error:
            name = error.param.name if error.param is not None else None
            if error.ctx is not None and error.ctx.get_parameter_source(name) is ParameterSource.ENVIRONMENT:
                error.message += f" It was set by {error.param.envvar}."
            raise

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        """Return the names of the help option, in whichever context."""
        return HELP_NAMES

    def sections(self, ctx: click.Context) -> dict[str, list[click.Option]]:
        """Return the options by their headings; a short list of options has one heading."""
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        if len(options) <= _FEW:
            return {"Options": options}
        group_of = {name: group for group, names in GROUPS.items() for name in names}
        found = {
            group: [option for option in options if group_of.get(option.name, _REST) == group]
            for group in (*GROUPS, _REST)
        }
        return {group: some for group, some in found.items() if some}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, each section under its heading."""
        for group, options in self.sections(ctx).items():
            with formatter.section(group):
                formatter.write_dl([record for option in options if (record := option.get_help_record(ctx))])


class Verbs(click.Group):
    """The verbs, each imported from its file when it is used; an alias is another name of one."""

    def __init__(self, verbs: Iterable[str], aliases: dict[str, str], **options: object) -> None:
        super().__init__(**options)
        self.verbs, self.aliases = tuple(verbs), aliases

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        """Return the names of the help option, in whichever context."""
        return HELP_NAMES

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs, an alias after its verb."""
        return [name for verb in self.verbs for name in self._names(verb)]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Return the verb's command, None for an unknown name."""
        verb = self.aliases.get(name, name)
        return import_module(f"gemkit.cli.{verb}").command if verb in self.verbs else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb; raises UsageError with the nearest one."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if not isinstance(error, click.exceptions.NoSuchCommand):
                raise
            raise click.UsageError(self._unknown(args[0]), ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the verbs, those with two names on one line."""
        with formatter.section("Commands"):
            rows = [(", ".join(self._names(verb)), self.get_command(ctx, verb).short_help) for verb in self.verbs]
            formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> object:
        """Run the verb; every error becomes one line, unless `--debug` is given."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit, BrokenPipeError):
            raise
        except Exception as error:
            raise error if ctx.params["debug"] else failure(error) from error

    def _names(self, verb: str) -> list[str]:
        return [verb, *(alias for alias, target in self.aliases.items() if target == verb)]

    def _unknown(self, name: str) -> str:
        """Return the message for a word that is no verb: the nearest one, or how a model is given."""
        if name == "help":
            return "no verb 'help': 'gemkit -h' lists the verbs, 'gemkit VERB -h' the options of one"
        from difflib import get_close_matches

        verbs = [*self.verbs, *self.aliases]
        near = _ELSEWHERE.get(name.lower()) or next(iter(get_close_matches(name.lower(), verbs, 1)), None)
        if near in verbs:
            return f"no verb {name!r:.60}; did you mean {near!r}?"
        from gemkit.arch.presets import PRESETS

        if name in (*PRESETS, "demo") or Path(name).exists():
            return f"no verb {name!r}: a model comes after it, as in 'gemkit generate {name}' or 'gemkit chat {name}'"
        return f"no verb {name!r:.60}: choose from {', '.join(verbs)}"
