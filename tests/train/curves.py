"""Data, starting adapter and measure of the loss curves that every framework must draw alike."""

from __future__ import annotations

import numpy as np
from parity.cases import CASES, Case

from gemkit.data.batch import TokenBatch
from gemkit.train.adapter import new_parts
from gemkit.train.loop import Loop
from gemkit.train.options import TrainOptions
from gemkit.weights.lora import LoraConfig, LoraPart

STEPS = 20
FALL = 0.3  # nats that the loss falls by in these steps, or the comparison shows nothing
LR = {"lora": 2e-2, "full": 3e-3}


def options_of(method: str, **changes) -> TrainOptions:
    return TrainOptions(method=method, lr=LR[method], weight_decay=0.01, steps=STEPS, **changes)


def batches(case: Case, shift: int = 0) -> list[TokenBatch]:
    """Two batches of two rows, 24 tokens each, half of which carry loss. shift: moves the targets by some tokens."""
    found = []
    for seed in range(2):
        tokens = np.random.default_rng(seed).integers(4, case.config.vocab_size, (2, 24)).astype(np.int32)
        tokens[:, 0] = case.config.bos_token_id
        targets = np.full_like(tokens, -1)
        targets[:, 11:-1] = tokens[:, 12:]
        positions = np.tile(np.arange(24, dtype=np.int32), (2, 1))
        found.append(TokenBatch(tokens, np.roll(targets, shift, 1), positions, np.ones_like(tokens)))
    return found


def parts_of(case: Case, dora: bool = False) -> dict[str, LoraPart]:
    params = case.params()
    config = LoraConfig(4, 8.0, dora=dora)
    return new_parts(config, case.config, 0, lambda name: np.linalg.norm(params[name], axis=1))


def curve(loop: Loop, case_name: str, shift: int = 0, accumulate: bool = False) -> np.ndarray:
    """Return the loss of each of `STEPS` steps over the batches in turn, or over both together."""
    data = batches(CASES[case_name], shift)
    groups = [data] * STEPS if accumulate else [[data[step % 2]] for step in range(STEPS)]
    return np.array([loop.step(group, loop.options.lr).loss for group in groups])


def shortened(batch: TokenBatch, length: int) -> TokenBatch:
    """Return the first tokens of each row."""
    return TokenBatch(*(array[:, :length] for array in (batch.tokens, batch.targets, batch.positions, batch.segments)))
