"""`gemkit bench MODEL`: how fast this machine runs a model, and how near that is to what the machine can do."""

import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import click

from gemkit.cli.command import Verb
from gemkit.cli.common import (
    default_model_argument,
    json_option,
    load_options,
    megabytes,
    print_json,
    table,
)
from gemkit.cli.hints import hint_faster
from gemkit.errors import GemkitError, UsageError
from gemkit.host import peak_memory

if TYPE_CHECKING:
    from gemkit.api.model import Model


@click.command("bench", cls=Verb, short_help="Measure speed, and compare it with the machine's limits.")
@default_model_argument
@click.option(
    "-p",
    "--prompt-tokens",
    type=click.IntRange(1),
    metavar="N",
    default=512,
    show_default=True,
    help="Length of the prompt.",
)
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(2),
    metavar="N",
    default=64,
    show_default=True,
    help="Number of tokens to generate.",
)
@click.option(
    "-r",
    "--reps",
    type=click.IntRange(1),
    metavar="N",
    default=5,
    show_default=True,
    help="Repetitions; medians are printed.",
)
@load_options
@json_option
def command(
    model: str,
    prompt_tokens: int,
    max_tokens: int,
    reps: int,
    load: dict,
    as_json: bool,
) -> None:
    """Measure prefill and decode rates, time to the first token and memory of MODEL.

    Decode is set against this machine's read bandwidth and prefill against its int8 peak, both measured on the spot.
    """
    import gemkit
    from gemkit import _native

    with gemkit.load(model, **load) as loaded:
        if prompt_tokens + max_tokens > loaded.ctx_size:
            raise UsageError(f"{prompt_tokens} + {max_tokens} tokens do not fit in a context of {loaded.ctx_size}")
        if not as_json:
            hint_faster(model, loaded, load)
        loaded.settle()
        runs = [_run(loaded, prompt_tokens, max_tokens, repetition) for repetition in range(reps + 1)][1:]
        memory = peak_memory()
        prefill, decode = (statistics.median(rates) for rates in zip(*runs))
        info = loaded.engine.runner.info
        bandwidth = _native.measure_bandwidth(info.threads)
        peak = _native.measure_int8_peak(info.threads)
        _, body = loaded.config.parameter_counts()
    record = {
        "model": model,
        "kernels": info.path,
        "activations": info.activations,
        "threads": info.threads,
        "prompt_tokens": prompt_tokens,
        "generated_tokens": max_tokens,
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
        "first_token_seconds": statistics.median(_first_token(model, load) for _ in range(min(reps, 3))),
        "peak_memory_bytes": memory,
        "read_bandwidth_gb_per_second": bandwidth,
        "decode_share_of_bandwidth": decode * info.token_bytes / 1e9 / bandwidth,
        "int8_peak_gops": peak,
        "prefill_share_of_int8_peak": 2 * body * prefill / 1e9 / peak,
    }
    if as_json:
        print_json(record)
        return
    click.echo(
        f"{model}, {info.threads} threads, {info.path} kernels, {info.activations} activations, median of {reps}"
    )
    of_peak = f"{record['prefill_share_of_int8_peak']:.0%} of {peak:,.0f} GOPS int8"
    of_bandwidth = f"{record['decode_share_of_bandwidth']:.0%} of {bandwidth:,.1f} GB/s read"
    rows = [
        (f"prefill, {prompt_tokens} tokens", f"{prefill:,.1f} tok/s", of_peak),
        (f"decode, {max_tokens} tokens", f"{decode:,.1f} tok/s", of_bandwidth),
        ("first token, new process", f"{record['first_token_seconds']:.2f} s", ""),
        ("peak memory", megabytes(memory), ""),
    ]
    click.echo(table(rows, ("measure", "value", "share of this machine")))


def _run(model: "Model", prompt_tokens: int, max_tokens: int, repetition: int) -> tuple[float, float]:
    """Run one uncached prompt and its continuation: prefill and decode rate, tokens per second."""
    ids = _prompt(model, prompt_tokens, repetition)
    answer = model.generate(ids, max_tokens=max_tokens, temperature=0, ignore_eos=True)
    if len(answer.ids) != max_tokens:
        raise GemkitError(f"{len(answer.ids)} of {max_tokens} tokens came: the context may be too small for this test")
    return answer.usage.prefill_rate, answer.usage.decode_rate


def _prompt(model: "Model", count: int, repetition: int) -> list[int]:
    """Return `count` ids, different ones in each repetition, so that no cached prefix helps."""
    vocab = model.config.vocab_size
    body = [1000 + (7919 * i + 104729 * repetition) % (vocab - 2000) for i in range(1, count)]
    return [model.config.bos_token_id, *body]


def _first_token(model: str, load: dict) -> float:
    """Return seconds from the start of a new process to the end of its first token."""
    options = ["--prompt", "Hello", "--raw", "--max-tokens", "1", "--temp", "0"]
    for name, value in load.items():
        flag = {"adapter": "--adapter-path"}.get(name, f"--{name.replace('_', '-')}")
        options += [flag] if value is True else [flag, str(value)] if value is not False else []
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "gemkit", "generate", model, *options], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started
