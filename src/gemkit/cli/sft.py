"""`gemkit sft MODEL --data PATH`: all weights of a model tuned on rows of text."""

import click

from gemkit.cli.command import Verb
from gemkit.cli.common import model_argument
from gemkit.cli.tuning import run, tuning_options


@click.command("sft", cls=Verb, short_help="Tune all weights of a model on your data.")
@model_argument
@tuning_options
def command(model: str, **params: object) -> None:
    """Tune all weights of MODEL, and write a Hugging Face folder that everything loads.

    The rows of --data have messages, prompt and completion, instruction, input and output, or text. Look at them with
    --dry-run first: it shows samples with the tokens that carry loss marked, and a plan of memory and time.

    The folder gets metrics.csv, TensorBoard events, a plot of the loss and checkpoints/; a run that was stopped or
    killed goes on with --resume, to the same bits. Quantised weights are trained as floats.
    """
    run("full", model, params)
