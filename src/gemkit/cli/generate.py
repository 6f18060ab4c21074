"""`gemkit generate MODEL TEXT`: write text, piece by piece."""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemkit.cli import config
from gemkit.cli.command import Verb
from gemkit.cli.common import (
    Text,
    default_model_argument,
    files_option,
    given,
    import_numpy,
    json_option,
    load_options,
    megabytes,
    peak_memory,
    print_json,
    special_option,
    split_text,
    target_file,
    warn_of_control,
)
from gemkit.cli.hints import hint_faster
from gemkit.cli.paths import check_writable
from gemkit.cli.prompt import Prompt, input_kind
from gemkit.cli.template import set_template, template_option
from gemkit.errors import UsageError

if TYPE_CHECKING:
    from gemkit.api.model import Model
    from gemkit.api.output import Completion, Piece, Usage
    from gemkit.text.tokenizer import Tokenizer


class _Bias(click.ParamType):
    name = "ID=VALUE"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        token, _, bias = str(value).partition("=")
        try:
            return int(token), float(bias)
        except ValueError:
            self.fail(f"{value!r} is not ID=VALUE, such as 106=-5.", param, ctx)


def _real(*names: str, default: float | None = None, help: str) -> Callable:
    return click.option(*names, type=float, metavar="X", default=default, show_default=True, help=help)


def _whole(*names: str, default: int | None = None, help: str) -> Callable:
    return click.option(*names, type=int, metavar="N", default=default, show_default=True, help=help)


@click.command("generate", cls=Verb, short_help="Write text.")
@default_model_argument
@click.argument("words", metavar="[PROMPT]", nargs=-1, type=Text())
@click.option("-p", "--prompt", type=Text(), help="The prompt, if it is no argument; - reads standard input.")
@files_option("A UTF-8 file to put after the prompt, or in its place; may be repeated.")
@click.option("--system-prompt", type=Text(), help="Instructions put before the prompt (instruction-tuned models).")
@click.option("--suffix", type=Text(), help="Fill the gap between the prompt and this text (CodeGemma).")
@click.option("--raw", is_flag=True, help="Give the prompt as it is, without the chat template.")
@template_option
@special_option("The prompt is rendered: read control tokens such as <start_of_turn> in it. Implies --raw.")
@_whole("-n", "--max-tokens", default=256, help="Maximum number of tokens to generate.")
@_real("--temp", "--temperature", "temperature", default=1.0, help="Temperature; 0 takes the most probable token.")
@_whole("--top-k", default=64, help="Sample from the N most probable tokens; 0 disables it.")
@_real("--top-p", default=0.95, help="Sample from the most probable tokens with this total probability.")
@_real("--min-p", help="Exclude tokens below this fraction of the highest probability.")
@_real("--repetition-penalty", help="Above 1, penalise tokens that the text already has.")
@_real("--presence-penalty", help="Subtracted from the logit of every token generated before.")
@_real("--frequency-penalty", help="Subtracted once for each time the token was generated.")
@click.option("--logit-bias", type=_Bias(), multiple=True, help="Added to a token's logit; may be repeated.")
@_whole("-s", "--seed", help="The same seed gives the same text.")
@click.option("--stop", multiple=True, type=Text(), help="Stop before this text; may be repeated.")
@_whole("--logprobs", help="With --json: each token's log-probability and the N most probable tokens.")
@click.option(
    "--receipt",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=target_file,
    help="Write a receipt, with which `gemkit replay` makes the same text again.",
)
@click.option(
    "-v", "--verbose", is_flag=True, help="Print rates, time to the first token and memory to standard error."
)
@load_options
@json_option
def command(
    model: str,
    words: tuple[str, ...],
    prompt: str | None,
    files: tuple[str, ...],
    system_prompt: str | None,
    suffix: str | None,
    raw: bool,
    template: str | None,
    special: bool,
    max_tokens: int,
    stop: tuple[str, ...],
    receipt: Path | None,
    verbose: bool,
    load: dict,
    as_json: bool,
    logprobs: int | None,
    **sampling: object,
) -> None:
    """Write text with MODEL: a GGUF file, a Hugging Face folder, a name such as gemma-3-1b-it, or `demo`.

    An instruction-tuned model gets the prompt as a user's turn, a pretrained one continues it. The prompt is the
    text after MODEL, then the files, then standard input, with a blank line between two. With a default model
    (GEMKIT_MODEL), MODEL may be left out.
    """
    context = click.get_current_context()
    system_is_default = not config.is_given(context, "system_prompt")
    if raw and not config.is_given(context, "raw"):
        raw = suffix is None and (system_prompt is None or system_is_default)
    if system_is_default and (raw or special or suffix is not None):
        system_prompt = None
    if logprobs is not None and not as_json:
        raise UsageError("--logprobs needs --json: text alone has no place for them")
    if (raw or special) and system_prompt is not None:
        left_out = "--raw leaves" if raw else "--special leaves"
        raise UsageError(f"--system-prompt is part of the chat template, which {left_out} out: drop one of them")
    if suffix is not None and (raw or system_prompt is not None):
        raise UsageError("--suffix fills a gap in a text, which has no chat template: drop --raw and --system-prompt")
    if template is not None and (raw or special or suffix is not None):
        raise UsageError("--chat-template is for conversations, which --raw, --special and --suffix leave out: drop it")
    if max_tokens < 1:
        raise UsageError(f"--max-tokens is {max_tokens}; give a whole number from 1")
    if receipt is not None and load.get("backend", "native") != "native":
        raise UsageError("--receipt is for the native backend, whose tokens are the same on every machine: drop one")
    if receipt is not None:
        check_writable(receipt)

    alone = prompt is None and not files and input_kind() != "data"
    model, words = split_text(context, model, words, alone)
    parts = Prompt(words, prompt, files)

    from gemkit.api.load import Loading

    started = time.perf_counter()
    loading = Loading(model, **load)
    import_numpy()
    from gemkit.engine.sampling import Sampling

    settings = given(logprobs=logprobs, **sampling)
    Sampling(**settings)  # wrong values are found before the weights are read
    with loading.model() as loaded:
        load_seconds = time.perf_counter() - started
        if not as_json:
            hint_faster(model, loaded, load)
        if system_is_default and not loaded.checkpoint.instruction_tuned:
            system_prompt = None
        ids = _prompt_ids(loaded, parts.text(), system_prompt, suffix, raw, special, template)
        settings.update(max_tokens=max_tokens, stop=stop)
        if receipt is not None:
            settings.setdefault("seed", int.from_bytes(os.urandom(4), "little"))
        if as_json:
            completion = loaded.generate(ids, **settings)
            usage = completion.usage
            written = completion.ids
            print_json(_record(completion, loaded.tokenizer, logprobs is not None))
        else:
            usage, written = _print_stream(loaded.stream(ids, **settings), len(ids))
        if receipt is not None:
            from gemkit.tools.receipt import write_receipt

            write_receipt(receipt, model, loaded, load, ids, settings, written)
        if verbose:
            weights = _weights(loaded, load)
    if verbose:
        click.echo(f"{weights}\n{_rates(usage, load_seconds)}", err=True)


def _print_stream(pieces: "Iterator[Piece]", prompt_tokens: int) -> "tuple[Usage, list[int]]":
    """Print the pieces as they come; return what they took, and their tokens."""
    from gemkit.api.output import Usage

    started = time.perf_counter()
    times, ids = [], []
    for piece in pieces:
        times.append(time.perf_counter())
        ids.append(piece.id)
        sys.stdout.write(piece)
        sys.stdout.flush()
    click.echo()
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
    return Usage(prompt_tokens, len(times), times[0] - started, rate), ids


def _prompt_ids(
    model: "Model",
    text: str,
    system_prompt: str | None,
    suffix: str | None,
    raw: bool,
    special: bool,
    template: str | None = None,
) -> list[int]:
    """Return the prompt's ids, as a user's turn if the model was trained for turns."""
    tokenizer = model.tokenizer
    turn = suffix is None and not (raw or special)
    turn = turn and (model.checkpoint.instruction_tuned or template is not None)
    if not special and not turn:
        warn_of_control(tokenizer, f"{text} {suffix or ''}")
    if suffix is not None:
        from gemkit.text import fim

        return fim.render(tokenizer, text, suffix, special)
    if not turn:
        if system_prompt is not None:
            raise UsageError("--system-prompt needs an instruction-tuned model: put the instructions into --prompt")
        return tokenizer.encode(text, parse_special=special)
    # A message may well speak of control tokens; one that begins with them was rendered before
    start = text.lstrip()[:64]
    if start.startswith(tuple(tokenizer.find_control(start))):
        warn_of_control(tokenizer, text)

    note = set_template(model, template)
    system = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
    ids = model.render([*system, {"role": "user", "content": text}])
    if note:
        click.echo(f"gemkit: {note}", err=True)
    return ids


def _record(completion: "Completion", tokenizer: "Tokenizer", with_logprobs: bool) -> dict:
    from gemkit.cli.tokens import token_record, token_records

    record = {
        "text": completion.text,
        "ids": completion.ids,
        "tokens": token_records(tokenizer, completion.ids),
        "finish_reason": completion.finish_reason,
        "usage": dataclasses.asdict(completion.usage),
    }
    if with_logprobs:
        record["logprobs"] = [
            {
                **token_record(tokenizer, token),
                "logprob": logprob,
                "top": [{**token_record(tokenizer, other), "logprob": value} for other, value in top],
            }
            for token, logprob, top in zip(completion.ids, completion.logprobs, completion.top_logprobs)
        ]
    return record


def _weights(model: "Model", load: dict) -> str:
    """Describe the weights: as stored or converted in the native engine, as held in memory in the others."""
    if load.get("backend", "native") == "native":
        from gemkit.weights.dtype import describe

        return describe(model.checkpoint)
    info = model.engine.runner.info
    size = info.weight_bytes / model.config.parameter_count()
    return f"weights: {size:.2f} bytes a parameter, activations {info.activations} ({info.path})"


def _rates(usage: "Usage", load_seconds: float) -> str:
    prefill = usage.prompt_tokens / usage.first_token_seconds
    return (
        f"prompt {usage.prompt_tokens} tokens, {prefill:.1f} tok/s; "
        f"generated {usage.completion_tokens} tokens, {usage.decode_rate:.1f} tok/s; "
        f"first token after {usage.first_token_seconds:.3f} s, load {load_seconds:.2f} s; "
        f"peak memory {megabytes(peak_memory())}"
    )
