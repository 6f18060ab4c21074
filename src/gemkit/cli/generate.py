"""`gemkit generate MODEL --prompt TEXT`: write text, piece by piece."""

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from gemkit.cli.common import (
    Text,
    given,
    json_option,
    load_options,
    megabytes,
    model_argument,
    peak_memory,
    print_json,
    read_text,
)
from gemkit.errors import UsageError

if TYPE_CHECKING:
    from gemkit.api import Model


class _Bias(click.ParamType):
    name = "ID=VALUE"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        token, _, bias = str(value).partition("=")
        try:
            return int(token), float(bias)
        except ValueError:
            self.fail(f"{value!r} is not ID=VALUE, such as 106=-5.", param, ctx)


def _real(*names: str, help: str) -> Callable:
    return click.option(*names, type=float, metavar="X", help=help)


def _whole(name: str, *, help: str) -> Callable:
    return click.option(name, type=int, metavar="N", help=help)


@click.command("generate")
@model_argument
@click.option("--prompt", required=True, type=Text(), help="The text to go on from; - reads standard input.")
@click.option("--system-prompt", type=Text(), help="Instructions put before the prompt (instruction-tuned models).")
@click.option("--raw", is_flag=True, help="Give the prompt as it is, without the chat template.")
@click.option("--max-tokens", type=click.IntRange(1), metavar="N", help="Stop after so many tokens.")
@_real("--temp", "--temperature", "temperature", help="0 takes the likeliest token.")
@_whole("--top-k", help="Draw from the N likeliest tokens; 0 is off.")
@_real("--top-p", help="Draw from the likeliest tokens that make up this share.")
@_real("--min-p", help="Leave out tokens under this share of the likeliest.")
@_real("--repetition-penalty", help="Above 1 discourages what the text already has.")
@_real("--presence-penalty", help="Taken off the logit of every token generated before.")
@_real("--frequency-penalty", help="Taken off once for each time the token was generated.")
@click.option("--logit-bias", type=_Bias(), multiple=True, help="Added to a token's logit; may be repeated.")
@_whole("--seed", help="The same seed gives the same text.")
@click.option("--stop", multiple=True, type=Text(), help="Stop before this text; may be repeated.")
@_whole("--logprobs", help="With --json: each token's log-probability and the N likeliest.")
@click.option("--verbose", is_flag=True, help="Print rates, time to the first token and memory to standard error.")
@load_options
@json_option
def command(
    model: str,
    prompt: str,
    system_prompt: str | None,
    raw: bool,
    verbose: bool,
    threads: int | None,
    ctx_size: int | None,
    activations: str,
    as_json: bool,
    logprobs: int | None,
    **sampling: object,
) -> None:
    """Write text with MODEL: a GGUF file or `demo`.

    An instruction-tuned model gets the prompt as a user's turn, a pretrained one goes on from it.
    """
    if logprobs is not None and not as_json:
        raise UsageError("--logprobs needs --json: text alone has no place for them")
    if raw and system_prompt is not None:
        raise UsageError("--system-prompt is part of the chat template, which --raw leaves out: drop one of them")
    text = read_text(prompt) if prompt == "-" else prompt

    import gemkit
    from gemkit.engine.sampling import Sampling

    options = given(logprobs=logprobs, **sampling)
    # Wrong values are found before the model is loaded.
    Sampling(**{name: value for name, value in options.items() if name not in ("max_tokens", "stop")})

    started = time.perf_counter()
    with gemkit.load(model, threads=threads, activations=activations, ctx_size=ctx_size) as loaded:
        load_seconds = time.perf_counter() - started
        ids = _prompt_ids(loaded, text, system_prompt, raw)
        started = time.perf_counter()
        pieces, times = [], []
        for piece in loaded.stream(ids, **options):
            times.append(time.perf_counter() - started)
            pieces.append(piece)
            if not as_json:
                sys.stdout.write(piece)
                sys.stdout.flush()
    timings = _timings(len(ids), times, load_seconds)
    if as_json:
        print_json(_record(pieces, timings, logprobs))
    else:
        click.echo()
    if verbose:
        click.echo(_line(timings), err=True)


def _prompt_ids(model: "Model", text: str, system_prompt: str | None, raw: bool) -> list[int]:
    """The prompt's ids, as a user's turn if the model was trained for turns."""
    if raw or not model.checkpoint.instruction_tuned:
        if system_prompt is not None:
            raise UsageError("--system-prompt needs an instruction-tuned model: put the instructions into --prompt")
        return model.tokenizer.encode(text)
    system = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
    from gemkit.text.chat import render

    return render(model.tokenizer, [*system, {"role": "user", "content": text}])


def _timings(prompt_tokens: int, times: list[float], load_seconds: float) -> dict[str, float | int | None]:
    """Counts, seconds and tokens per second; a rate is None where too little was measured."""
    count = len(times)
    return {
        "prompt_tokens": prompt_tokens,
        "generated_tokens": count,
        "load_seconds": load_seconds,
        "first_token_seconds": times[0] if times else None,
        "prefill_tokens_per_second": prompt_tokens / times[0] if times else None,
        "decode_tokens_per_second": (count - 1) / (times[-1] - times[0]) if count > 1 else None,
        "peak_memory_bytes": peak_memory(),
    }


def _line(timings: dict) -> str:
    parts = [f"prompt {timings['prompt_tokens']} tokens, generated {timings['generated_tokens']}"]
    if timings["decode_tokens_per_second"]:
        parts.append(f"{timings['decode_tokens_per_second']:.1f} tok/s")
    if timings["first_token_seconds"] is not None:
        parts.append(
            f"first token {timings['first_token_seconds']:.3f} s after loading in {timings['load_seconds']:.2f} s"
        )
    return ", ".join([*parts, f"peak memory {megabytes(timings['peak_memory_bytes'])}"])
