"""`gemkit generate MODEL TEXT`: write text, piece by piece."""

import dataclasses
import os
import sys
import time
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
    print_json,
    special_option,
    split_text,
    target_file,
    warn_of_control,
)
from gemkit.cli.hints import hint_faster
from gemkit.cli.paths import check_writable
from gemkit.cli.prompt import Prompt, input_kind
from gemkit.cli.sampling import NAMES, sampling_options
from gemkit.cli.template import set_template, template_option
from gemkit.errors import UsageError
from gemkit.host import peak_memory

if TYPE_CHECKING:
    from gemkit.api.model import Model
    from gemkit.api.output import Completion, Usage
    from gemkit.api.stream import Stream
    from gemkit.text.tokenizer import Tokenizer


class _Bias(click.ParamType):
    name = "ID=VALUE"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        token, _, bias = str(value).partition("=")
        try:
            return int(token), float(bias)
        except ValueError:
            self.fail(f"{value!r} is not ID=VALUE, such as 106=-5.", param, ctx)


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
@sampling_options(*(name for name in NAMES if name != "seed"))
@click.option("--logit-bias", type=_Bias(), multiple=True, help="Added to a token's logit; may be repeated.")
@sampling_options("seed")
@click.option("--stop", multiple=True, type=Text(), help="Stop before this text; may be repeated.")
@click.option(
    "--logprobs",
    type=int,
    metavar="N",
    help="With --json: each token's log-probability and the N most probable tokens.",
)
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
    from gemkit.api.options import GenerateOptions, LoadOptions

    started = time.perf_counter()
    loading = Loading(model, LoadOptions(**load))
    import_numpy()

    settings = given(max_tokens=max_tokens, logprobs=logprobs, **sampling) | {"stop": stop}
    GenerateOptions(**settings)  # wrong values are found before the weights are read
    with loading.model() as loaded:
        load_seconds = time.perf_counter() - started
        if not as_json:
            hint_faster(model, loaded, load)
        if system_is_default and not loaded.checkpoint.instruction_tuned:
            system_prompt = None
        ids = _prompt_ids(loaded, parts.text(), system_prompt, suffix, raw, special, template)
        if receipt is not None:
            settings.setdefault("seed", int.from_bytes(os.urandom(4), "little"))
        if as_json:
            completion = loaded.generate(ids, **settings)
            print_json(_record(completion, loaded.tokenizer, logprobs is not None))
        else:
            completion = _print_stream(loaded.stream(ids, **settings))
        if receipt is not None:
            from gemkit.tools.receipt import write_receipt

            write_receipt(receipt, model, loaded, load, ids, settings, completion.ids)
        if verbose:
            weights = _weights(loaded, load)
    if verbose:
        click.echo(f"{weights}\n{_rates(completion.usage, load_seconds)}", err=True)


def _print_stream(stream: "Stream") -> "Completion":
    """Print the pieces as they come; return the whole."""
    for piece in stream:
        sys.stdout.write(piece)
        sys.stdout.flush()
    click.echo()
    return stream.completion


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
    return (
        f"prompt {usage.prompt_tokens} tokens, {usage.prefill_rate:.1f} tok/s; "
        f"generated {usage.completion_tokens} tokens, {usage.decode_rate:.1f} tok/s; "
        f"first token after {usage.first_token_seconds:.3f} s, load {load_seconds:.2f} s; "
        f"peak memory {megabytes(peak_memory())}"
    )
