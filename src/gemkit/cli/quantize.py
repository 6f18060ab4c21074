"""`gemkit quantize MODEL TARGET --type TYPE`: a GGUF file in a narrower type, and what that costs."""

import dataclasses
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemkit.cli.command import Verb
from gemkit.cli.common import (
    interrupted,
    json_option,
    megabytes,
    model_argument,
    print_json,
    read_text,
    table,
    target_file,
)
from gemkit.cli.paths import check_new
from gemkit.errors import GemkitError, UsageError

if TYPE_CHECKING:
    from gemkit.tools.quantize import Damage, Quantized

# The names of `gemkit.tools.quantize`, which is imported when it is needed; a test compares them.
NAMES = ("f32", "bf16", "f16", "q8_0", "q6_k", "q5_k_m", "q5_k", "q5_1", "q5_0", "q4_k_m", "q4_k", "q4_1", "q4_0")
EMBEDDINGS = tuple(name for name in NAMES if not name.endswith("_m"))

WORST = 5  # tensors that the report names


@click.command("quantize", cls=Verb, short_help="Write a model in a narrower type, and measure the loss.")
@model_argument
@click.argument("target", metavar="TARGET", type=click.Path(path_type=Path), callback=target_file)
@click.option(
    "--type",
    "kind",
    type=click.Choice(NAMES, case_sensitive=False),
    metavar="TYPE",
    required=True,
    help=f"Type of the matrices: {', '.join(NAMES)}. Those with _m keep some matrices in q6_k.",
)
@click.option(
    "--embedding-type",
    "embedding",
    type=click.Choice(EMBEDDINGS, case_sensitive=False),
    metavar="TYPE",
    help="Type of the embedding, which is also the output matrix (default: TYPE, but not below q8_0).",
)
@click.option(
    "--text-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The text to measure on (UTF-8)."
)
@click.option("--no-measure", is_flag=True, help="Do not measure the loss.")
@click.option("--offline", is_flag=True, help="Use downloaded files only; make no request to a hub.")
@json_option
def command(
    model: str,
    target: Path,
    kind: str,
    embedding: str | None,
    text_file: Path | None,
    no_measure: bool,
    offline: bool,
    as_json: bool,
) -> None:
    """Write MODEL to the GGUF file TARGET, which must not exist, with its matrices in a narrower type.

    MODEL is anything that gemkit reads; start from the original weights, not from a quantised file. Norms stay float32.
    Then both are run on a text, to tell what the smaller file costs: the perplexity before and after, how far the
    predictions moved, and which tensors lost most. The text should have 1,000 tokens or more; 4,096 are used.

    TARGET gets its name when it was read back and measured. It is kept without a measurement if memory is too short for
    one or if you interrupt it, which the last line says.
    """
    if text_file is not None and no_measure:
        raise UsageError("--text-file is the text to measure on: leave it or --no-measure out")
    text = read_text(str(text_file)) if text_file is not None else None
    if text is not None and not text.strip():
        raise UsageError(f"{text_file} is empty: nothing to measure on")
    check_new(target)
    from gemkit.api.load import find

    source = find(model, offline, original=True)
    from gemkit.tools import quantize, sample

    shown = not as_json and sys.stderr.isatty()
    if not no_measure:
        quantize.check_measurable(source)
    measure = None if no_measure else Measure(source, target, sample.TEXT if text is None else text, shown)
    try:
        with Line("quantizing", "M numbers", 1e6, shown) as line:
            done = quantize.quantize(source, target, kind, embedding, progress=line.show, check=measure)
    except KeyboardInterrupt:
        interrupted(f"nothing is left of {target}")
    if measure and measure.interrupted:
        interrupted(f"{target} is complete, but its damage was not measured")
    if measure and measure.shortage:
        raise GemkitError(f"{target} is complete, but its damage was not measured: {measure.shortage}")
    damage = measure and measure.damage
    if as_json:
        print_json(record(kind, done, damage))
        return
    click.echo(_summary(done))
    if damage is not None:
        click.echo("\n" + _report(damage))
    if done.errors:
        click.echo("\n" + _worst(done))
    if damage is not None:
        for note in _notes(kind, embedding, damage):
            click.echo("\n" + note)


class Measure:
    """Measures the damage before the file gets its name. A fault of the file is raised; others are kept for later.

    damage: what was found, or None. shortage: why memory was too short. interrupted: by the user.
    """

    def __init__(self, source: Path, target: Path, text: str, shown: bool) -> None:
        self._source, self._target, self._text, self._shown = source, target, text, shown
        self.damage: Damage | None = None
        self.shortage = ""
        self.interrupted = False

    def __call__(self, result: Path) -> None:
        from gemkit.tools.quantize import is_memory_shortage, measure

        try:
            with Line("measuring", "tokens", 1, self._shown) as line:
                self.damage = measure(self._source, result, self._text, line.show)
        except KeyboardInterrupt:
            self.interrupted = True
        except (GemkitError, MemoryError) as error:
            cause = str(error).replace(str(result), "the result") or "not enough memory"
            if not is_memory_shortage(error):
                raise GemkitError(f"{self._target} is not kept, since it could not be measured: {cause}") from None
            self.shortage = cause


def record(kind: str, done: "Quantized", damage: "Damage | None") -> dict[str, object]:
    """Return the object of --json."""
    fields: dict[str, object] = dataclasses.asdict(done) | {"path": str(done.path), "type": kind}
    if damage is not None:
        found = damage.compared
        fields["damage"] = {
            "tokens": found.tokens,
            "activations": damage.activations,
            "weight_bytes": damage.bytes,
            "perplexity": found.perplexity,
            "rise": damage.rise,
            "kl": found.kl,
            "agreement": found.agreement,
        }
    return fields


def _summary(done: "Quantized") -> str:
    types = ", ".join(f"{count} {name}" for name, count in sorted(done.types.items(), key=lambda pair: -pair[1]))
    return f"{done.path}\n{megabytes(done.bytes)}; tensors: {types}"


def _report(damage: "Damage") -> str:
    found = damage.compared
    weights = [megabytes(size) for size in damage.bytes]
    bytes_each = [f"{size / damage.parameters:.2f}" for size in damage.bytes]
    rows = [
        ("weights", *weights, _percent(damage.bytes[1] / damage.bytes[0] - 1)),
        ("bytes a parameter", *bytes_each, ""),
        *quality(damage),
    ]
    return table(rows, (f"on {found.tokens:,} tokens", "before", "after", "change"))


def quality(damage: "Damage") -> list[tuple[str, str, str, str]]:
    """Return the rows of a report about the predictions: title, before, after, change."""
    found = damage.compared
    return [
        ("perplexity", *(f"{value:,.3f}" for value in found.perplexity), _percent(damage.rise)),
        ("divergence, nats a token", "", f"{found.kl:.2g}", ""),
        ("top-1 agreement", "", f"{100 * found.agreement:.1f} %", ""),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %"


def _worst(done: "Quantized") -> str:
    rows = [(name, f"{100 * error:.1f} %") for name, error in list(done.errors.items())[:WORST]]
    return table(rows, ("tensors that lost most", "relative error"))


def _notes(kind: str, embedding: str | None, damage: "Damage") -> list[str]:
    """Return notes on the figures."""
    from gemkit.tools.quantize import FEW_TOKENS, MUCH

    notes = []
    if damage.compared.tokens < FEW_TOKENS:
        notes.append(f"With fewer than {FEW_TOKENS:,} tokens a change of perplexity says little: give a longer text.")
    if damage.activations == "int8":
        notes.append("Measured with int8 activations, since memory is short: small differences are not seen.")
    if damage.rise > MUCH:
        notes.append(f"Perplexity rises by {100 * damage.rise:.1f} %, which can be felt. {_remedy(kind, embedding)}")
    return notes


def _remedy(kind: str, embedding: str | None) -> str:
    if embedding is not None and NAMES.index(embedding) > NAMES.index("q8_0"):
        return "Leave --embedding-type out: the output matrix then keeps 8 bits."
    wider = [name for name in ("q8_0", "q6_k", "q5_k_m", "q4_k_m") if NAMES.index(name) < NAMES.index(kind)]
    if not wider:
        return "Keep the source."
    return f"Take a wider type: --type {wider[-1]}" + (f", or {wider[-2]}." if len(wider) > 1 else ".")


class Line:
    """A line of progress on a terminal, from the second second on; gone at the end."""

    def __init__(self, title: str, unit: str, scale: float, shown: bool) -> None:
        self._title, self._unit, self._scale, self._shown = title, unit, scale, shown
        self._started = time.monotonic()
        self._next, self._width = self._started + 1, 0

    def show(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self._shown or now < self._next:
            return
        rate = done / (now - self._started)
        left = round((total - done) / max(rate, 1e-9))
        speed = f"{rate / self._scale:,.0f} {self._unit}/s"
        self._write(f"{self._title}: {100 * done // max(total, 1)} %, {speed}, {left // 60}:{left % 60:02} left")
        self._next = now + 0.1

    def _write(self, text: str) -> None:
        text = text[: shutil.get_terminal_size().columns - 1]
        click.echo("\r" + text.ljust(self._width), nl=False, err=True)
        self._width = len(text)

    def __enter__(self) -> "Line":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._width:
            self._write("")
            click.echo("\r", nl=False, err=True)
