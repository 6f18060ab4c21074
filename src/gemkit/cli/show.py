"""`gemkit show MODEL`: what is in a model file and what running it takes."""

import re
from collections.abc import Iterable
from itertools import groupby
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
from gemkit.cli.hints import describe_variant, variant
from gemkit.host import peak_memory

if TYPE_CHECKING:
    from gemkit.api.model import Model
    from gemkit.arch.config import ModelConfig
    from gemkit.weights.checkpoint import Checkpoint


@click.command("show", cls=Verb, short_help="Print layers, shapes, bytes and a memory plan.")
@default_model_argument
@load_options
@json_option
def command(model: str, load: dict, as_json: bool) -> None:
    """Print the layers, shapes, parameters, bytes by type and memory plan of MODEL."""
    from gemkit.api.load import Loading
    from gemkit.api.options import LoadOptions

    with Loading(model, LoadOptions(**load), keep=False).model() as loaded:
        record = _record(loaded)
    if as_json:
        print_json(record)
    else:
        _print(record)


def _record(model: "Model") -> dict:
    from gemkit.arch.hf_config import to_hf
    from gemkit.tools.memory import plan

    checkpoint, config, info = model.checkpoint, model.config, model.engine.runner.info
    counts = config.parameter_counts()
    tensors = _tensors(checkpoint)
    types: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        types[tensor.type.name] = types.get(tensor.type.name, 0) + tensor.nbytes
    return {
        "name": checkpoint.name,
        "file": str(checkpoint.source),
        "variant": variant(checkpoint),
        "instruction_tuned": checkpoint.instruction_tuned,
        "config": to_hf(config),
        "parameters": {"embedding": counts.embedding, "non_embedding": counts.non_embedding, "total": counts.total},
        "stop_ids": sorted(config.stop_token_ids),
        "layers": _layers(config),
        "tensors": tensors,
        "bytes_by_type": dict(sorted(types.items(), key=lambda item: -item[1])),
        "memory": plan(model, peak_memory()),
        "activations": info.activations,
        "kernels": info.path,
        "threads": info.threads,
    }


def _layers(config: "ModelConfig") -> list[dict]:
    """Group equal layers into runs."""
    runs = []
    for spec, run in groupby(enumerate(config.layers), key=lambda item: item[1]):
        first, *rest = (index for index, _ in run)
        last = rest[-1] if rest else first
        window = spec.sliding_window
        runs.append(
            {
                "layers": f"{first}-{last}" if rest else f"{first}",
                "attention": "full" if window is None else f"window {window}",
                "rope_theta": spec.rope_theta,
                "rope_factor": spec.rope_factor,
            }
        )
    return runs


def _tensors(checkpoint: "Checkpoint") -> list[dict]:
    """Return one row for each tensor name with the layer's number left out, in the order of the model."""
    from gemkit.arch.tensors import manifest

    groups: dict[tuple[str, tuple[int, ...]], list] = {}
    for name in manifest(checkpoint.config):
        tensor = checkpoint.tensors[name]
        groups.setdefault((re.sub(r"\.\d+\.", ".*.", name), tuple(tensor.shape)), []).append(tensor)
    return [
        {
            "name": name,
            "shape": list(shape),
            "count": len(members),
            "types": _counted(tensor.type.name for tensor in members),
            "bytes": sum(tensor.nbytes for tensor in members),
        }
        for (name, shape), members in groups.items()
    ]


def _counted(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts


def _print(record: dict) -> None:
    config, parameters, memory = record["config"], record["parameters"], record["memory"]
    tuned = {True: "instruction-tuned", False: "pretrained", None: "tuning unknown"}[record["instruction_tuned"]]
    click.echo(f"{record['name']} ({config['model_type']}, {tuned})\n{record['file']}")
    if record["variant"]:
        click.echo(describe_variant(record["variant"]))
    click.echo()
    rows = [
        ("parameters", f"{parameters['total']:,}"),
        ("  embedding", f"{parameters['embedding']:,}"),
        ("  other", f"{parameters['non_embedding']:,}"),
        ("layers", config["num_hidden_layers"]),
        ("width", config["hidden_size"]),
        ("feed-forward width", config["intermediate_size"]),
        ("query heads", config["num_attention_heads"]),
        ("key-value heads", config["num_key_value_heads"]),
        ("head width", config["head_dim"]),
        ("vocabulary", f"{config['vocab_size']:,}"),
        ("trained context", f"{config['max_position_embeddings']:,}"),
        ("stop ids", ", ".join(map(str, record["stop_ids"]))),
        ("kernels", record["kernels"]),
        ("threads", record["threads"]),
    ]
    click.echo(table(rows, ("property", "value")) + "\n")
    rows = [
        (run["layers"], run["attention"], f"{run['rope_theta']:g}", f"{run['rope_factor']:g}")
        for run in record["layers"]
    ]
    click.echo(table(rows, ("layers", "attention", "rope base", "rope factor")) + "\n")
    rows = [
        (row["name"], " x ".join(map(str, row["shape"])), row["count"], _types(row["types"]), megabytes(row["bytes"]))
        for row in record["tensors"]
    ]
    click.echo(table(rows, ("tensor", "shape", "count", "types", "size")) + "\n")
    rows = [(name, megabytes(size)) for name, size in record["bytes_by_type"].items()]
    click.echo(table(rows, ("type", "size")) + "\n")
    click.echo(f"memory for one sequence of {memory['ctx_size']:,} tokens")
    rows = [("weights", megabytes(memory["weights"]))]
    if memory["program"]:
        rows.insert(0, ("Python, libraries, vocabulary", megabytes(memory["program"])))
    if memory["screen"]:
        rows.append(("screen of the head", megabytes(memory["screen"])))
    for group in memory["cache"]:
        kind = "full attention" if group["window"] is None else f"window {group['window']}"
        rows.append((f"cache, {group['layers']} layers, {kind}: {group['pages']} pages", megabytes(group["bytes"])))
    rows.append((f"activations, {record['activations']}", megabytes(memory["activations"])))
    if memory["loading"] > memory["running"]:
        rows.append(("more, while the model is loaded", megabytes(memory["loading"] - memory["running"])))
    click.echo(table([*rows, ("total", megabytes(memory["total"]))], ("part", "size")))


def _types(counts: dict[str, int]) -> str:
    return ", ".join(name if len(counts) == 1 else f"{name} x{count}" for name, count in counts.items())
