"""A GGUF file in the shape of a published model with random weights, for speed alone; the same seed, the same file.

    python benchmarks/cpu/shapes.py gemma-2b Q4_0 FILE [--layers 2] [--vocabulary 4096]

Weights are normal with a deviation of 1/√(columns), drawn once for each type and width and then drawn block by
block: rounding every weight of two thousand million by itself would take minutes. The file is written tensor by tensor;
memory stays below the largest one and half a gigabyte. The embedding, which is the output matrix too, is Q6_K, as
llama.cpp's own tool makes it.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from gemkit.arch.config import ModelConfig
from gemkit.arch.presets import preset
from gemkit.arch.tensors import manifest
from gemkit.text.vocabulary import PieceType, Vocabulary
from gemkit.tools.quantize import plan
from gemkit.weights.checkpoint import Checkpoint, Tensor
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.quant import BLOCKS, GGMLType, nbytes, quantise

_POOL = 1 << 20  # numbers that are drawn and rounded
_AT_ONCE = 1 << 22  # bytes drawn at a time


def _drawn(name: str, kind: GGMLType, shape: tuple[int, ...], pools: dict, seed: int) -> np.ndarray:
    """Return the bytes of a matrix of blocks drawn from a pool, uint8, flat."""
    columns = shape[-1]
    pool = pools.get((kind, columns))
    if pool is None:
        draw = np.random.default_rng([seed, columns, int(kind)])
        values = draw.standard_normal((_POOL // columns + 1, columns), np.float32) * np.float32(columns**-0.5)
        pool = quantise(kind, values).reshape(-1, BLOCKS[kind].bytes)
        pools[kind, columns] = pool
    draw = np.random.default_rng([seed, zlib.crc32(name.encode())])
    out = np.empty((nbytes(kind, shape) // pool.shape[1], pool.shape[1]), np.uint8)
    step = max(1, _AT_ONCE // pool.shape[1])
    for at in range(0, len(out), step):
        part = out[at : at + step]
        np.take(pool, draw.integers(len(pool), size=len(part)), axis=0, out=part)
    return out.reshape(-1)


def vocabulary(size: int) -> Vocabulary:
    """Special pieces, bytes, and words without meaning."""
    control = [b"<pad>", b"<eos>", b"<bos>", b"<unk>"]
    pieces = control + [b"<0x%02X>" % i for i in range(256)] + [bytes([c]) for c in range(33, 127)]
    kinds = [PieceType.CONTROL] * 3 + [PieceType.UNKNOWN] + [PieceType.BYTE] * 256 + [PieceType.NORMAL] * 94
    pieces += ["▁".encode(), *("▁t%d".encode() % i for i in range(size - len(pieces) - 1))]
    kinds += [PieceType.NORMAL] * (size - len(kinds))
    scores = -np.arange(size, dtype=np.float32)
    return Vocabulary(pieces, scores, np.array(kinds, np.int32))


def write(
    path: Path,
    name: str,
    kind: str,
    layers: int | None = None,
    words: int | None = None,
    seed: int = 0,
    config: ModelConfig | None = None,
) -> Path:
    """Writes the file and returns its path. layers, words: fewer than the model has; config: instead of a preset's."""
    config = config or preset(name).config
    count = min(layers or config.num_hidden_layers, config.num_hidden_layers)
    words = words or config.vocab_size
    config = dataclasses.replace(config, num_hidden_layers=count, layers=config.layers[:count], vocab_size=words)
    chosen = plan(types.SimpleNamespace(config=config), kind, "q6_k")
    pools: dict = {}
    tensors: dict[str, Tensor] = {}
    for key, spec in manifest(config).items():
        if chosen[key] == GGMLType.F32:
            draw = np.random.default_rng([seed, zlib.crc32(key.encode())])
            values = (draw.standard_normal(spec.shape) * 0.1).astype("<f4")
            tensors[key] = Tensor(GGMLType.F32, spec.shape, values.reshape(-1).view(np.uint8))
        else:
            tensors[key] = Tensor(chosen[key], spec.shape, partial(_drawn, key, chosen[key], spec.shape, pools, seed))
    checkpoint = Checkpoint(config, tensors, vocabulary=vocabulary(words), name=f"{name} shape, random weights")
    return write_gguf(path, checkpoint, kind.upper())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shape", help="a published model, as gemma-2b")
    parser.add_argument("type", help="as of `gemkit quantize`: Q4_0, Q4_K_M, …")
    parser.add_argument("file", type=Path)
    parser.add_argument("--layers", type=int, help="fewer than it has")
    parser.add_argument("--vocabulary", type=int, help="a smaller one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    write(options.file, options.shape, options.type, options.layers, options.vocabulary, options.seed)
    print(options.file, options.file.stat().st_size)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
