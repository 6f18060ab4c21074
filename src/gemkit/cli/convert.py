"""gemkit convert: write a model in another format, and verify that the weights did not change."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemkit.cli.command import Verb
from gemkit.cli.common import interrupted, json_option, model_argument, print_json, read_text, table, target_file
from gemkit.cli.paths import check_new
from gemkit.errors import GemkitError, UsageError

if TYPE_CHECKING:
    from gemkit.tools.convert import Comparison


@click.command(cls=Verb, short_help="Write a model in another format.")
@model_argument
@click.argument("target", metavar="TARGET", type=click.Path(path_type=Path), callback=target_file)
@click.option(
    "--to",
    type=click.Choice(["hf", "gguf", "orbax"]),
    required=True,
    help="A Hugging Face folder, a GGUF file, or a folder as Google's Flax releases.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16", "int8"]),
    default="auto",
    show_default=True,
    help="Type of the matrices; auto keeps the stored type. int8 (Q8_0) is for GGUF; Flax takes float32 or bfloat16.",
)
@click.option("--verify", "check", is_flag=True, help="Load the result and compare it with the original.")
@click.option(
    "--text-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The text to compare on (UTF-8)."
)
@click.option("--offline", is_flag=True, help="Use downloaded files only; make no request to a hub.")
@json_option
def command(
    model: str, target: Path, to: str, dtype: str, check: bool, text_file: Path | None, offline: bool, as_json: bool
) -> None:
    """Write MODEL to TARGET, which must not exist.

    MODEL may also be one of Google's own checkpoints: a Flax/Orbax folder or a PyTorch .ckpt file.

    Tensors, tokenizer, chat template and stop ids are written; a result that is incomplete or cannot be read back is
    removed. Quantised weights become float32 in a Hugging Face or Flax folder, which is exact. With --verify the
    result is loaded and compared: if ids differ, or if a lossless conversion rounded weights, the result is removed
    and the exit code is 1.
    """
    if text_file is not None and not check:
        raise UsageError("--text-file is the text for --verify: give that too")
    check_new(target)
    from gemkit.api.load import find
    from gemkit.tools import convert

    convert.check_request(to, dtype)
    source = find(model, offline, original=True)

    bar = Bar(not as_json and sys.stderr.isatty())
    text = read_text(str(text_file)) if text_file else convert.SAMPLE
    proof = _Proof(source, target, text, dtype == "auto", bar) if check else None
    try:
        convert.convert(source, target, to, dtype, bar.show, proof)
    except KeyboardInterrupt:
        bar.end()
        interrupted(f"nothing is left of {target}")
    except _DifferentError as error:
        if as_json:
            print_json({"path": None, "format": to, "verify": dataclasses.asdict(error.found)})
        else:
            click.echo(_report(error.found))
        raise
    finally:
        bar.end()
    if as_json:
        record: dict[str, object] = {"path": str(target), "format": to}
        print_json(record | ({"verify": dataclasses.asdict(proof.found)} if proof else {}))
    else:
        click.echo(str(target))
        if proof:
            click.echo(_report(proof.found))


class _DifferentError(GemkitError):
    """The result is another model than the source."""

    def __init__(self, message: str, found: "Comparison") -> None:
        super().__init__(message)
        self.found = found


class _Proof:
    """Compares the result with the source before it gets its name; found: the comparison."""

    found: "Comparison"

    def __init__(self, source: Path, target: Path, text: str, exact: bool, bar: "Bar") -> None:
        self._source, self._target, self._text, self._exact, self._bar = source, target, text, exact, bar

    def __call__(self, result: Path) -> None:
        from gemkit.tools.convert import verify

        self._bar.end()
        try:
            self.found = verify(self._source, result, self._text)
        except (GemkitError, MemoryError) as error:
            cause = str(error).replace(str(result), "the result") or "not enough memory"
            raise GemkitError(f"{self._target} is not kept, since it could not be compared: {cause}") from None
        if not self.found.same_ids:
            raise _DifferentError(f"{self._target} is not kept: its tokenizer gives other ids", self.found)
        if self._exact and self.found.tensor is not None:
            raise _DifferentError(f"{self._target} is not kept: {self.found.tensor[0]} differs", self.found)


def _report(found: "Comparison") -> str:
    where = "none, all are equal" if found.tensor is None else f"{found.tensor[0]}, by {found.tensor[1]:.1e}"
    rows = [
        ("tokens compared", f"{found.tokens}"),
        ("ids", "the same" if found.same_ids else "different"),
        ("largest difference of logits, relative", f"{found.logits:.1e}"),
        ("mean divergence, nats a token", f"{found.kl:.1e}"),
        ("top-1 agreement", f"{found.agreement:.2%}"),
        ("perplexity of the text", "{:.4f}, before {:.4f}".format(*reversed(found.perplexity))),
        ("first tensor that differs", where),
    ]
    return table(rows, ("compared with the original", ""))


class Bar:
    """A line of progress on a terminal."""

    def __init__(self, shown: bool) -> None:
        self.shown, self.percent = shown, -1

    def show(self, done: int, total: int) -> None:
        percent = 100 * done // max(total, 1)
        if self.shown and percent != self.percent:
            self.percent = percent
            click.echo(f"\rwriting {percent} % of {total / 1e9:.2f} GB", nl=False, err=True)

    def end(self) -> None:
        if self.shown and self.percent >= 0:
            click.echo(err=True)
        self.percent = -1
