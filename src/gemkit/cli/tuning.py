"""Options and run of the verbs that tune: `gemkit sft` and `gemkit lora`."""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemkit.cli.common import json_option, print_json
from gemkit.cli.config import flat_file
from gemkit.errors import UsageError
from gemkit.train.options import DTYPES, SCHEDULES, TrainOptions

if TYPE_CHECKING:
    from gemkit.train.run import Result
    from gemkit.train.tune import Tuning

BACKENDS = ("torch", "jax", "keras")

# Parameters by the fields of the options that they set
TRAIN = {
    "max_steps": "steps",
    "epochs": "epochs",
    "lr": "lr",
    "batch_size": "batch_size",
    "grad_accum": "grad_accum",
    "max_seq_len": "max_length",
    "packing": "packing",
    "schedule": "schedule",
    "warmup": "warmup",
    "weight_decay": "weight_decay",
    "clip": "clip",
    "train_seed": "seed",
    "train_dtype": "dtype",
    "eval_every": "eval_every",
    "save_every": "save_every",
    "sample_every": "sample_every",
    "sample_prompts": "sample_prompts",
}
DATA = {
    "max_seq_len": "max_length",
    "validation": "validation",
    "turns": "template",
    "mask_prompt": "mask_prompt",
    "on_long": "on_long",
    "on_bad_row": "on_bad_row",
}

_AFTER = {name: getattr(TrainOptions(), name) for name in TRAIN.values()}

OPTIONS = (
    click.option(
        "--data",
        required=True,
        metavar="PATH",
        type=click.Path(),
        help="Rows: a JSON, JSONL, CSV or Parquet file, or a folder with train.jsonl or a saved data set.",
    ),
    click.option(
        "--validation", type=float, metavar="SHARE", help="Share of the rows kept for validation (default: 0.05)."
    ),
    click.option(
        "--template",
        "turns",
        type=click.Choice(["chat", "none"]),
        help="Turns of the chat template, or none, for prompt and completion as they are (default: chat).",
    ),
    click.option(
        "--mask-prompt/--no-mask-prompt", default=None, help="Loss on answers alone (default), or on all tokens."
    ),
    click.option(
        "--max-seq-len",
        type=int,
        metavar="N",
        help=f"Longest row in tokens (default: {_AFTER['max_length']}).",
    ),
    click.option(
        "--on-long",
        type=click.Choice(["truncate", "skip", "fail"]),
        help="Longer rows are cut at their end, left out or refused (default: truncate).",
    ),
    click.option(
        "--on-bad-row",
        type=click.Choice(["fail", "skip"]),
        help="A row that cannot be used ends the run, or is left out and counted (default: fail).",
    ),
    click.option(
        "--packing/--no-packing", default=None, help="Several samples in a row (default), or one, by similar lengths."
    ),
    click.option(
        "-o",
        "--output-dir",
        metavar="FOLDER",
        type=click.Path(path_type=Path),
        help="Folder of the run and its result (default: the model's name with the verb's).",
    ),
    click.option("--resume", "resume_run", is_flag=True, help="Go on from the newest checkpoint in the folder."),
    click.option(
        "--dry-run", is_flag=True, help="Show samples, statistics and a plan of memory and time, without training."
    ),
    click.option(
        "--config",
        metavar="FILE",
        type=click.Path(),
        is_eager=True,
        expose_value=False,
        callback=flat_file,
        help="A TOML file with these options' names as keys; the command line comes first.",
    ),
    click.option("--epochs", type=float, metavar="X", help="Passes over the data, also a fraction (default: 1)."),
    click.option("--max-steps", type=int, metavar="N", help="Optimiser steps, in place of --epochs."),
    click.option("--lr", type=float, metavar="X", help="Highest learning rate (default: 2e-4; 2e-5 for all weights)."),
    click.option(
        "--schedule",
        type=click.Choice(SCHEDULES),
        help=f"Course of the learning rate (default: {_AFTER['schedule']}).",
    ),
    click.option(
        "--warmup",
        type=float,
        metavar="X",
        help=f"Steps in which the rate rises, or their share below 1 (default: {_AFTER['warmup']}).",
    ),
    click.option("--batch-size", type=int, metavar="N", help=f"Rows of a batch (default: {_AFTER['batch_size']})."),
    click.option("--grad-accum", type=int, metavar="N", help=f"Batches of a step (default: {_AFTER['grad_accum']})."),
    click.option(
        "--weight-decay", type=float, metavar="X", help=f"AdamW's, of matrices (default: {_AFTER['weight_decay']:g})."
    ),
    click.option(
        "--clip", type=float, metavar="X", help=f"Largest norm of the gradient (default: {_AFTER['clip']:g}; 0 is off)."
    ),
    click.option(
        "-s", "--seed", "train_seed", type=int, metavar="N", help="Seed of order, dropout and adapter (default: 0)."
    ),
    click.option(
        "--eval-every",
        type=int,
        metavar="N",
        help=f"Steps between validations (default: {_AFTER['eval_every']}; 0: only at the beginning and the end).",
    ),
    click.option(
        "--save-every",
        type=int,
        metavar="N",
        help=f"Steps between checkpoints (default: {_AFTER['save_every']}; 0: only at the end).",
    ),
    click.option(
        "--sample-prompt",
        "sample_prompts",
        multiple=True,
        metavar="TEXT",
        help="A prompt that the model in training answers; may be repeated.",
    ),
    click.option(
        "--sample-every", type=int, metavar="N", help="Steps between those answers (default: only at the end)."
    ),
    click.option(
        "--dtype",
        "train_dtype",
        type=click.Choice(DTYPES),
        help="Type of activations and frozen weights; trained ones are float32 (default: auto).",
    ),
    click.option(
        "--backend", type=click.Choice(BACKENDS), default=BACKENDS[0], show_default=True, help="Framework; an extra."
    ),
    click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)."),
    click.option(
        "--recompute",
        type=click.Choice(["cheap", "layers", "none"]),
        default="cheap",
        show_default=True,
        help="Activations computed again in the backward pass: layers takes the smallest memory, none the largest.",
    ),
    click.option("--offline", is_flag=True, help="Use downloaded files only; make no request to a hub."),
)


def tuning_options(command: Callable) -> Callable:
    """Add the options that both verbs have."""
    command = json_option(command)
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def run(method: str, model: str, params: Mapping[str, object], **adapter: object) -> None:
    """Tune a model as the command line says. adapter: fields of `gemkit.train.tune.Request` about the adapter."""
    chosen = _chosen(params, TRAIN)
    options = TrainOptions(method=method, **chosen | ({"clip": None} if chosen.get("clip") == 0 else {}))
    if "" in map(str.strip, options.sample_prompts):
        raise UsageError("--sample-prompt is blank: give a text")
    folder = params["output_dir"] or Path(f"{_short(model)}-{'lora' if method == 'lora' else 'sft'}")
    from gemkit.data.prepare import DataOptions
    from gemkit.train.log import RunLog
    from gemkit.train.tune import Request, Tuning

    request = Request(
        model,
        params["data"],
        folder,
        options,
        DataOptions(**_chosen(params, DATA)),
        backend=params["backend"],
        device=params["device"],
        recompute=params["recompute"],
        offline=params["offline"],
        **adapter,
    )
    tuning = Tuning(request)
    if params["dry_run"]:
        _show(tuning)
        return
    _tell(tuning)
    result = tuning.train(resume=params["resume_run"], log=RunLog(folder, every=options.log_every))
    if params["as_json"]:
        print_json({"path": str(folder), "method": method} | vars(result))
    else:
        click.echo(f"{folder}\n{_summary(result)}\n{_next(model, folder, method, tuning)}")


def _chosen(params: Mapping[str, object], names: Mapping[str, str]) -> dict[str, object]:
    """Return the fields of options that were given."""
    return {name: params[param] for param, name in names.items() if params[param] not in (None, ())}


def _short(model: str) -> str:
    """Return the name of a model's folder or file, for the folder of the run."""
    name = re.split(r"[/\\:]", model.rstrip("/\\"))[-1]
    return name.removesuffix(".gguf") or "model"


def _show(tuning: "Tuning") -> None:
    from gemkit.data.report import takes_colour
    from gemkit.host import free_memory

    click.echo(tuning.report(takes_colour(sys.stdout)), nl=False, color=True)
    if tuning.request.device in (None, "cpu"):
        tuning.plan().check(free_memory())


def _tell(tuning: "Tuning") -> None:
    """Print rows that were left out or cut; training shows everything else."""
    from gemkit.data.report import skipped

    found = tuning.prepared
    if found.skipped:
        click.echo(skipped(found), err=True)
    if found.truncated:
        limit = found.options.max_length
        click.echo(f"{found.truncated:,} rows are longer than {limit:,} tokens (--max-seq-len) and were cut", err=True)


def _summary(result: "Result") -> str:
    parts = [] if result.loss is None else [f"loss {result.loss:.4f}"]
    if result.validation_loss is not None:
        before = result.first_validation_loss
        first = "" if before is None else f" (before the first step: {before:.4f})"
        parts.append(f"validation loss {result.validation_loss:.4f}{first}")
    return ", ".join(parts)


def _next(model: str, folder: Path, method: str, tuning: "Tuning") -> str:
    verb = "chat" if tuning.teaches_turns else "generate"
    what = f"{model} --adapter-path {folder}" if method == "lora" else str(folder)
    return f"try it: gemkit {verb} {what}"
