"""`gemkit lora MODEL --data PATH`: a low-rank adapter for a model, tuned on rows of text."""

from pathlib import Path

import click
from click.core import ParameterSource

from gemkit.cli.command import Verb
from gemkit.cli.common import model_argument
from gemkit.cli.tuning import run, tuning_options
from gemkit.errors import UsageError

_NEW = ("rank", "alpha", "target", "dropout", "rslora", "dora")


@click.command("lora", cls=Verb, short_help="Tune an adapter (LoRA, QLoRA, DoRA) on your data.")
@model_argument
@click.option("--lora-rank", "rank", type=int, default=8, show_default=True, metavar="N", help="Rank of the adapter.")
@click.option("--lora-alpha", "alpha", type=float, metavar="X", help="Its scale times the rank (default: twice that).")
@click.option(
    "--lora-target",
    "target",
    multiple=True,
    metavar="NAMES",
    help="Projections that it changes, such as q_proj,v_proj; may be repeated (default: all seven).",
)
@click.option(
    "--lora-dropout",
    "dropout",
    type=float,
    default=0.0,
    show_default=True,
    metavar="X",
    help="Share of the adapter's inputs that training drops.",
)
@click.option("--rslora", is_flag=True, help="Scale by the square root of the rank.")
@click.option("--dora", is_flag=True, help="Train the lengths of the matrices' rows too (DoRA).")
@click.option(
    "--quantize",
    type=click.Choice(["int8", "int4"]),
    help="Keep the frozen model in few bits (QLoRA).",
)
@click.option(
    "--adapter-path",
    "adapter",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="An adapter (PEFT) to go on from, with its own rank, scale and targets.",
)
@tuning_options
@click.pass_context
def command(
    context: click.Context,
    model: str,
    rank: int,
    alpha: float | None,
    target: tuple[str, ...],
    dropout: float,
    rslora: bool,
    dora: bool,
    quantize: str | None,
    adapter: Path | None,
    **params: object,
) -> None:
    """Tune a LoRA adapter for MODEL, whose own weights stay as they are, and write it in PEFT's layout.

    The rows of --data have messages, prompt and completion, instruction, input and output, or text. Look at them with
    --dry-run first: it shows samples with the tokens that carry loss marked, and a plan of memory and time.

    The folder gets metrics.csv, TensorBoard events, a plot of the loss and checkpoints/; a run that was stopped or
    killed goes on with --resume, to the same bits. Load the adapter with --adapter-path, merge it with gemkit merge.
    """
    if adapter is not None:
        if given := [name for name in _NEW if context.get_parameter_source(name) is not ParameterSource.DEFAULT]:
            option = next(param.opts[-1] for param in context.command.params if param.name == given[0])
            raise UsageError(f"{option} is of a new adapter, and --adapter-path goes on from one: leave one out")
        run("lora", model, params, start=adapter, quantize=quantize)
        return
    from gemkit.weights.lora import LoraConfig

    targets = tuple(name.strip() for names in target for name in names.split(",") if name.strip())
    settings = LoraConfig(rank, 2.0 * rank if alpha is None else alpha, dropout, targets, rslora, dora)
    run("lora", model, params, lora=settings, quantize=quantize)
