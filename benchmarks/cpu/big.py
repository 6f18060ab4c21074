"""One forward pass of a large model with random weights in bfloat16 on the CPU: how long, and the most memory it took.

PYTHONPATH=src python benchmarks/cpu/big.py                              # the shape of Gemma 2B, in PyTorch
PYTHONPATH=src python benchmarks/cpu/big.py --model gemma-7b --tokens 4  # Linux and macOS
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import torch

from gemkit.arch.presets import preset
from gemkit.arch.tensors import manifest
from gemkit.models.torch.load import empty_decoder, put


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="gemma-2b", help="a preset")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--limit", type=float, default=24.0, help="GiB; exit code 1 above")
    options = parser.parse_args(arguments)
    config = preset(options.model).config
    began = time.perf_counter()
    decoder = empty_decoder(config)
    for name, spec in manifest(config).items():
        dtype = torch.float32 if spec.dtype_floor == "float32" else torch.bfloat16
        put(decoder, name, torch.empty(spec.shape, dtype=dtype).normal_(std=0.02))
    ready = time.perf_counter()
    ids = torch.randint(0, config.vocab_size, (1, options.tokens))
    with torch.inference_mode():
        logits = decoder.eval()(ids)
    done = time.perf_counter()
    assert torch.isfinite(logits).all() and logits.shape == (1, options.tokens, config.vocab_size)
    count, peak = sum(p.numel() for p in decoder.parameters()), peak_bytes() / 2**30
    print(
        f"{options.model}: {count:,} parameters, made in {ready - began:.0f} s, {options.tokens} tokens in "
        f"{done - ready:.1f} s, peak memory {peak:.2f} GiB"
    )
    return int(peak > options.limit)


if __name__ == "__main__":
    raise SystemExit(main())
