"""`gemkit embed MODEL TEXT...`: a vector for each text."""

import io
import sys
from pathlib import Path

import click

from gemkit.cli.command import Verb
from gemkit.cli.common import (
    Text,
    default_model_argument,
    files_option,
    import_numpy,
    json_option,
    load_options,
    print_json,
    read_text,
    special_option,
    split_text,
    target_file,
)
from gemkit.cli.paths import check_text_file
from gemkit.cli.prompt import STDIN, input_kind
from gemkit.errors import UsageError

# Texts that run together; the vectors do not depend on it, the memory does.
BATCH = 64


@click.command("embed", cls=Verb, short_help="Print a vector for each text.")
@default_model_argument
@click.argument("words", metavar="[TEXT]...", nargs=-1, type=Text())
@files_option("A UTF-8 file with a text in each line; may be repeated.")
@special_option("Read control tokens such as <start_of_turn> in the texts.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=target_file,
    help="Write a NumPy file (.npy, float32 [texts, width]) instead.",
)
@load_options
@json_option
def command(
    model: str,
    words: tuple[str, ...],
    files: tuple[str, ...],
    special: bool,
    output: Path | None,
    load: dict,
    as_json: bool,
) -> None:
    """Print a vector of length 1 for each text: the arguments, the lines of files, or the lines that are piped in.

    It is the mean of MODEL's final hidden states. One JSON list a line, in the order of the texts; with --json one
    object. Gemma was not trained for this: similar texts are near, that is all.
    """
    if output is not None and (as_json or output.suffix != ".npy"):
        raise UsageError("--output writes a NumPy file: give a name that ends in .npy, and no --json")
    model, words = split_text(click.get_current_context(), model, words, not files and input_kind() != "data")
    texts = _texts(words, files)

    from gemkit.api.load import Loading
    from gemkit.api.options import LoadOptions

    loading = Loading(model, LoadOptions(**load))
    import_numpy()
    import numpy as np

    with loading.model() as loaded:
        parts = [
            loaded.embed(texts[start : start + BATCH], parse_special=special) for start in range(0, len(texts), BATCH)
        ]
        name = loaded.checkpoint.name
    vectors = np.concatenate(parts)
    if output is not None:
        from gemkit.cache import atomic_write

        file = io.BytesIO()
        np.save(file, vectors)
        atomic_write(output, file.getvalue(), private=False)
        count = f"{len(texts):,} vector{'' if len(texts) == 1 else 's'}"
        click.echo(f"{count} of {vectors.shape[1]:,} numbers in {output}", err=True)
    elif as_json:
        rows = [{"text": text, "vector": vector.tolist()} for text, vector in zip(texts, vectors)]
        print_json({"model": name, "width": vectors.shape[1], "embeddings": rows})
    else:
        for vector in vectors:
            print_json(vector.tolist())


def _texts(words: tuple[str, ...], files: tuple[str, ...]) -> list[str]:
    """Return the texts in order; raises UsageError for a blank one, with its place, and if there is none."""
    texts = []
    for number, word in enumerate(words, 1):
        lines = _lines(STDIN) if word == STDIN else [(f"text {number}", word)]
        texts += lines
    for path in files:
        texts += _lines(path)
    if not words and not files:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError(
                'a text is missing: gemkit embed MODEL "TEXT", --file FILE or a pipe, with a text in each line'
            )
        texts = _lines(STDIN)
    if not texts:
        raise UsageError("there is no text: standard input and the files are empty")
    for place, text in texts:
        if not text.strip():
            raise UsageError(f"{place} is blank: there is nothing to embed")
    return [text for _, text in texts]


def _lines(path: str) -> list[tuple[str, str]]:
    check_text_file(path)
    name = "standard input" if path == STDIN else path
    # Not splitlines, which also breaks at characters that belong to a text.
    lines = read_text(path).replace("\r\n", "\n").removesuffix("\n").split("\n")
    return [(f"line {number} of {name}", line) for number, line in enumerate(lines, 1)] if lines != [""] else []
