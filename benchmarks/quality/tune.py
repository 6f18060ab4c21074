"""Tunes the demo a little, all weights at once, to see what the head's screen makes of weights that moved.

    python benchmarks/quality/tune.py --text chat.txt german.txt --output build/tuned.gguf     # needs the extra `torch`
    gemkit quantize build/tuned.gguf build/tuned-q4_k_m.gguf --type q4_k_m
    python benchmarks/quality/screen.py --model build/tuned-q4_k_m.gguf --text …

Plain AdamW at a constant rate, one piece of the texts a step: not how a model is tuned well, only far enough from
where it was. Prints the loss, which must go down, and how far the embedding moved. On one thread a step takes seconds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from gemkit.api.load import find
from gemkit.arch.tensors import manifest
from gemkit.models.torch import Decoder, load_decoder
from gemkit.text.tokenizer import Tokenizer
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.open import open_checkpoint


def pieces(tokenizer: Tokenizer, texts: list[Path], length: int) -> list[list[int]]:
    """Runs of ids with BOS in front, from all texts in turn."""
    rows = []
    for path in texts:
        ids = tokenizer.encode(path.read_text(encoding="utf-8"))[1:]
        rows.append([ids[at : at + length] for at in range(0, len(ids) - length, length)])
    shortest = min(map(len, rows))
    return [[tokenizer.bos_id, *row[i]] for i in range(shortest) for row in rows]


def tune(decoder: Decoder, rows: list[list[int]], steps: int, rate: float) -> list[float]:
    """The loss of each step, in nats a token, before its change."""
    decoder.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=rate, weight_decay=0.0)
    losses = []
    for step in range(steps):
        began = time.perf_counter()
        ids = torch.tensor([rows[step % len(rows)]])
        loss = F.cross_entropy(decoder(ids[:, :-1])[0], ids[0, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step + 1} of {steps}: loss {losses[-1]:.3f}, {time.perf_counter() - began:.1f} s", flush=True)
    return losses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True, help="a GGUF file in float32")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=256, help="in a step")
    parser.add_argument("--rate", type=float, default=5e-5)
    options = parser.parse_args()
    if options.output.exists():
        raise SystemExit(f"{options.output} exists: give another name, or delete it first")
    with open_checkpoint(find(options.model)) as stored:
        decoder = load_decoder(stored.config, stored.tensors)
        rows = pieces(Tokenizer.from_vocabulary(stored.vocabulary), options.text, options.tokens)
        if not rows:
            raise SystemExit("the texts are too short")
        before = decoder.model.embed_tokens.weight.detach().clone()
        losses = tune(decoder, rows, options.steps, options.rate)
        first, last = (np.mean(part) for part in (losses[: len(losses) // 4 or 1], losses[-(len(losses) // 4 or 1) :]))
        moved = (decoder.model.embed_tokens.weight.detach() - before).norm() / before.norm()
        print(f"loss of the first quarter {first:.3f}, of the last {last:.3f}; the embedding moved by {moved:.2%}")
        params = {name: decoder.get_parameter(name).detach().numpy() for name in manifest(stored.config)}
        tuned = Checkpoint.from_params(
            stored.config,
            params,
            vocabulary=stored.vocabulary,
            name="tuned",
            instruction_tuned=stored.instruction_tuned,
        )
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(options.output, tuned)
    return 0 if last < first else 1


if __name__ == "__main__":
    raise SystemExit(main())
