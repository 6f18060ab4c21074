"""`gemkit score MODEL --text TEXT`: how likely a text is."""

import math
import time

import click

from gemkit.cli.command import Verb
from gemkit.cli.common import (
    Text,
    default_model_argument,
    json_option,
    load_options,
    print_json,
    read_text,
    special_option,
    split_text,
    warn_of_control,
)
from gemkit.cli.hints import hint_faster
from gemkit.cli.paths import check_text_file
from gemkit.cli.prompt import STDIN, Prompt
from gemkit.errors import UsageError


@click.command("score", cls=Verb, short_help="Print how likely a text is.")
@default_model_argument
@click.argument("words", metavar="[TEXT]", nargs=-1, type=Text())
@click.option("--text", type=Text(), help="The text.")
@click.option("-f", "--file", "path", type=click.Path(allow_dash=True), help="A UTF-8 file with the text.")
@click.option(
    "--window", type=click.IntRange(1), metavar="N", help="Tokens to score together (default: the whole context)."
)
@special_option("Read control tokens such as <start_of_turn> in the text.")
@load_options
@json_option
def command(
    model: str,
    words: tuple[str, ...],
    text: str | None,
    path: str | None,
    special: bool,
    window: int | None,
    load: dict,
    as_json: bool,
) -> None:
    """Print the perplexity that MODEL gives a text: exp of the mean negative log-probability per token.

    The text is what comes after MODEL, or --text, or a file, or else what is piped in.
    A text longer than a window is cut into windows; each begins again after a BOS token. A perplexity too large for a
    number is printed as exp(...), and null in JSON.
    """
    model, words = split_text(click.get_current_context(), model, words, text is None and path is None)
    if bool(words) + (text is not None) + (path is not None) > 1:
        raise UsageError("the text is given twice: as an argument, with --text or --file; leave one out")
    if path is not None:
        check_text_file(path)
        text = read_text(path)
    elif text is None:
        text = " ".join(words) if words and words != (STDIN,) else Prompt(words, None, ()).text()

    import gemkit
    import gemkit.api.output

    with gemkit.load(model, **load) as loaded:
        if not as_json:
            hint_faster(model, loaded, load)
        started = time.perf_counter()
        if not special:
            warn_of_control(loaded.tokenizer, text)
        bos, *ids = loaded.tokenizer.encode(text, parse_special=special)
        if not ids:
            raise UsageError("the text is empty: nothing to score")
        window = min(window or loaded.ctx_size - 1, loaded.ctx_size - 1)
        total = 0.0
        for start in range(0, len(ids), window):
            total += float(sum(loaded.score([bos, *ids[start : start + window]]).logprobs))
        seconds = time.perf_counter() - started
    perplexity = gemkit.api.output.perplexity(total / len(ids))
    if as_json:
        record = {"perplexity": perplexity, "logprob": total, "tokens": len(ids), "window": window}
        print_json({**record, "seconds": seconds})
    else:
        windows = math.ceil(len(ids) / window)
        shown = f"{perplexity:.4f}" if math.isfinite(perplexity) else f"exp({-total / len(ids):,.1f})"
        click.echo(f"perplexity {shown}")
        click.echo(f"{len(ids):,} tokens in {windows:,} window{'s' * (windows > 1)}, {seconds:.2f} s")
