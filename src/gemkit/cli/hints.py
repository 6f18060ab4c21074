"""One-line notes about the weights of a loaded model: which file a short name meant, and a faster type."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from gemkit.api.model import Model
    from gemkit.weights.checkpoint import Checkpoint

_LARGE = 200_000_000  # bytes of float matrices that a token reads, from which on a narrower type is felt


def hint_faster(name: str, model: "Model", load: dict) -> None:
    """Print to standard error that int8 would be faster, if the weights are large, in float and as they are stored.

    name, load: as they were given to `gemkit.load`. A chosen `--dtype` is taken as meant.
    """
    if text := faster(name, model, load):
        click.echo(f"gemkit: {text}", err=True)


def faster(name: str, model: "Model", load: dict) -> str | None:
    """Return the note of `hint_faster`, None where int8 would not help."""
    if load.get("backend", "native") != "native" or load.get("dtype", "auto") != "auto":
        return None
    if load.get("activations", "int8") != "int8":
        return None
    sizes: dict[str, int] = {}
    for tensor in model.checkpoint.tensors.values():
        if len(tensor.shape) > 1:
            sizes[tensor.type.name] = sizes.get(tensor.type.name, 0) + tensor.nbytes
    floats = {kind: size for kind, size in sizes.items() if kind in ("BF16", "F16", "F32")}
    total = sum(floats.values())
    if total < _LARGE or total < 0.9 * sum(sizes.values()):
        return None
    wide = max(floats, key=floats.__getitem__) == "F32"
    bits, share, rate = (32, "a quarter of", "several times") if wide else (16, "half", "about twice")
    gain = f"--dtype int8 takes {share} the memory and is {rate} as fast"
    return f"{total / 1e9:.1f} GB of weights are in {bits} bits: {gain}{_file(name)}"


def _file(name: str) -> str:
    """Return the clause on Google's 4-bit file, where the name has one that is not here."""
    from gemkit.hub.names import quick

    if Path(name).exists() or quick(name) is None:
        return ""
    return f", 'gemkit download {name}' fetches Google's 4-bit file, which is smaller and faster still"


def variant(checkpoint: "Checkpoint") -> dict[str, object] | None:
    """Return where Google's 4-bit file of a model is from, and how it is used; None for another file."""
    from gemkit.hub.hf_cache import repo_of
    from gemkit.hub.names import original_of
    from gemkit.weights.dtype import Converted

    repo = repo_of(checkpoint.source) if checkpoint.source is not None else None
    original = original_of(repo or "")
    if original is None:
        return None
    head = checkpoint.tensors["model.embed_tokens.weight"]
    narrowed = [head.original.type.name, head.type.name] if isinstance(head, Converted) else None
    return {"repository": repo, "original": original, "embedding": narrowed}


def describe_variant(found: dict[str, object]) -> str:
    """Return the line of `gemkit show` for what `variant` found."""
    narrowed = found["embedding"]
    head = f", its embedding used in {narrowed[1]} instead of {narrowed[0]}" if narrowed else ""
    original = found["original"]
    short = str(original).removeprefix("google/")
    return (
        f"Google's 4-bit file (quantisation-aware training, {found['repository']}){head}\n"
        f"the original weights: {original}, or {short} with --dtype bfloat16"
    )
