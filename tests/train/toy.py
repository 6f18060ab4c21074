"""Toy run for tests: a bigram model in NumPy with real AdamW, dropout and ragged batches; also a program to be killed.

``python toy.py FOLDER OPTIONS [KILL_AT]``: trains with the options (JSON), resumes where there is something, and kills
itself before the KILL_AT-th file operation of the run.
"""

import json
import os
import signal
import sys
from importlib import import_module
from pathlib import Path

import numpy as np

from gemkit.data.batch import Batches, TokenBatch
from gemkit.data.sample import Sample
from gemkit.train.loop import StepMetrics
from gemkit.train.objectives.sft import mean_nll, sum_nll

V = 12


def rows(count: int, seed: int = 0) -> list[Sample]:
    """Sequences of a Markov chain, of several lengths; the first two tokens are a prompt."""
    rng = np.random.default_rng(seed)
    chain = np.random.default_rng(99).dirichlet(np.full(V, 0.2), V)
    found = []
    for _ in range(count):
        row = [int(rng.integers(V))]
        for _ in range(int(rng.integers(3, 20))):
            row.append(int(rng.choice(V, p=chain[row[-1]])))
        found.append(Sample(np.array(row, np.int32), np.arange(len(row)) >= 2))
    return found


def batches(samples: list[Sample], size: int, seed: int = 0, shuffle: bool = True) -> Batches:
    return Batches(samples, size, 32, packing=False, seed=seed, shuffle=shuffle)


def validation() -> list[TokenBatch]:
    return [*batches(rows(8, seed=1), 8).once(), *batches(rows(5, seed=2), 5).once()]


class ToyLoop:
    """Logits of the next token: a row of w [V, V]. ballast: more float32 values that only fill the checkpoint."""

    def __init__(self, seed: int = 0, dropout: float = 0.1, ballast: int = 0) -> None:
        self.w = np.zeros((V, V), np.float32)
        self.m, self.v = np.zeros_like(self.w), np.zeros_like(self.w)
        self.t = 0
        self.rng, self.dropout = np.random.default_rng(seed), dropout
        self.ballast = np.zeros(ballast, np.float32)

    def logprobs(self, tokens_R: np.ndarray, w: np.ndarray) -> np.ndarray:
        logits = w[tokens_R]
        logits = logits - logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def gradient(self, batches, w: np.ndarray) -> tuple[float, np.ndarray]:
        count = sum(int((b.targets >= 0).sum()) for b in batches)
        loss, gradient = 0.0, np.zeros_like(w)
        for one in batches:
            tokens, targets = one.tokens.ravel(), one.targets.ravel()
            logprobs = self.logprobs(tokens, w)
            loss += float(mean_nll(logprobs[np.arange(len(targets)), targets], targets, count, np))
            delta = np.exp(logprobs) - np.eye(V, dtype=np.float32)[targets]
            np.add.at(gradient, tokens, np.where(targets[:, None] >= 0, delta, 0) / np.float32(count))
        return loss, gradient

    def step(self, batches, lr: float) -> StepMetrics:
        keep = (self.rng.random(self.w.shape) >= self.dropout).astype(np.float32)
        loss, gradient = self.gradient(batches, self.w * keep)
        gradient *= keep
        norm = float(np.sqrt((gradient**2).sum()))
        count = sum(int((b.targets >= 0).sum()) for b in batches)
        if not (np.isfinite(loss) and np.isfinite(norm)):
            return StepMetrics(loss, 0, count, norm, "w")
        gradient *= np.float32(min(1.0, 1.0 / max(norm, 1e-12)))
        self.t += 1
        self.m = np.float32(0.9) * self.m + np.float32(0.1) * gradient
        self.v = np.float32(0.999) * self.v + np.float32(0.001) * gradient**2
        mean, square = self.m / np.float32(1 - 0.9**self.t), self.v / np.float32(1 - 0.999**self.t)
        self.w = self.w - np.float32(lr) * (mean / (np.sqrt(square) + np.float32(1e-8)) + np.float32(0.01) * self.w)
        self.ballast += np.float32(1)
        return StepMetrics(loss, sum(b.tokens.size for b in batches), count, norm)

    def evaluate(self, one: TokenBatch) -> tuple[float, int]:
        tokens, targets = one.tokens.ravel(), one.targets.ravel()
        logprobs = self.logprobs(tokens, self.w)[np.arange(len(targets)), targets]
        return float(sum_nll(logprobs, targets, np)), int((targets >= 0).sum())

    def state(self) -> dict[str, np.ndarray]:
        random = np.frombuffer(json.dumps(self.rng.bit_generator.state).encode(), np.uint8)
        own = {"w": self.w, "adam.m": self.m, "adam.v": self.v, "adam.t": np.array(self.t), "random": random}
        return own | {"ballast": self.ballast}

    def restore(self, arrays) -> None:
        self.w, self.m, self.v = (np.array(arrays[name]) for name in ("w", "adam.m", "adam.v"))
        self.t, self.ballast = int(arrays["adam.t"]), np.array(arrays["ballast"])
        self.rng.bit_generator.state = json.loads(arrays["random"].tobytes())

    def parameters(self) -> dict[str, np.ndarray]:
        return {"w": self.w}


def train(folder: Path, options, *, ballast: int = 0, loop=None, **keywords):
    """Train the toy; returns the loop and the result."""
    from gemkit.train.run import run

    loop = ToyLoop(options.seed, ballast=ballast) if loop is None else loop
    data = batches(rows(40), options.batch_size, options.seed)
    return loop, run(loop, data, validation(), options, folder, identity={"data set": "toy"}, **keywords)


def kill_before(number: int, folder: str) -> None:
    """Kill this process before the n-th operation on a file below a folder."""
    left = number

    def count(*paths: object) -> None:
        nonlocal left
        if any(folder in os.fsdecode(path) for path in paths if isinstance(path, str | bytes | os.PathLike)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(lambda event, args: count(*args) if event in _OPERATIONS else None)


_OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}


def main(folder: str, options: str, kill_at: str = "0") -> None:
    from gemkit.train.options import TrainOptions

    settings = json.loads(options)
    ballast = settings.pop("ballast", 0)
    sys.modules["matplotlib"] = None  # no curves
    print("ready", flush=True)
    if int(kill_at):
        kill_before(int(kill_at), folder)
    train(Path(folder), TrainOptions(**settings), ballast=ballast, resume=True)


if __name__ == "__main__":
    import_module("gemkit.train.run")  # before "ready"
    main(*sys.argv[1:])
