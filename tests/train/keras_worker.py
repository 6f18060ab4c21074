"""Runs the checks of the Keras loop on the backend that KERAS_BACKEND names, and prints what it found as JSON.

Usage: python keras_worker.py FOLDER. Models and logs are left in the folder.
"""

import csv
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1]))
if os.environ["KERAS_BACKEND"] == "torch":
    import torch

    torch.set_num_threads(1)  # tiny models: threads would wait for each other longer than they work

import keras
import numpy as np
from parity.cases import CASES
from train.curves import batches, curve, options_of, parts_of, shortened

from gemkit.models.keras import load_decoder
from gemkit.train.loop_keras import AdamW, KerasLoop, Tuner, adapt, feed, inputs_of, row_norms
from gemkit.weights.checkpoint import Checkpoint

BACKEND = keras.backend.backend()
FOLDER = Path(sys.argv[1]) / BACKEND


def decoder_of(name: str, method: str, dropout: float = 0.0):
    case = CASES[name]
    decoder = load_decoder(case.config, Checkpoint.from_params(case.config, case.params()).tensors)
    if method != "full":
        adapt(decoder, parts_of(case, method == "dora"), dropout)
    return decoder


def loop_of(name: str, method: str, dropout: float = 0.0) -> KerasLoop:
    return KerasLoop(decoder_of(name, method, dropout), options_of("full" if method == "full" else "lora"))


def curves() -> dict:
    """Losses of full tuning step by step and of LoRA with accumulation; the names of what is trained."""
    full, lora = loop_of("gemma2", "full"), loop_of("gemma3", "lora")
    found = {"full": curve(full, "gemma2").tolist(), "lora": curve(lora, "gemma3", accumulate=True).tolist()}
    return {**found, "names": [sorted(full.parameters()), sorted(lora.parameters())]}


def evaluation() -> list[list]:
    """Results for batches of several lengths, which TensorFlow takes with one graph in the end; dropout is off."""
    loop, data = loop_of("qk_norm", "lora", dropout=0.5), batches(CASES["qk_norm"])
    return [loop.evaluate(shortened(data[0], length)) for length in (24, 16, 20, 18)]


def resume() -> list[str]:
    """Names of the arrays that differ after a run that stopped and one that did not; DoRA with dropout."""
    through, second = (loop_of("qk_norm", "dora", 0.1) for _ in range(2))
    data = batches(CASES["qk_norm"])
    for step in range(4):
        if step == 2:
            state = through.state()
        through.step([data[step % 2]], 1e-2)
    assert any("random" in name for name in state)
    second.step([data[0]], 1e-2)
    second.restore(state)
    for step in range(2, 4):
        second.step([data[step % 2]], 1e-2)
    one, two = through.state(), second.state()
    assert not any(np.array_equal(one[name], state[name]) for name in one if "learning_rate" not in name)
    return [name for name in one if not np.array_equal(one[name], two[name])]


def not_finite() -> list:
    """The loss, the tensor that is named, the names of the arrays that changed."""
    loop = loop_of("qk_norm", "lora")
    broken = loop.decoder.tensors()["model.layers.1.mlp.up_proj.weight"]
    value = keras.ops.convert_to_numpy(keras.ops.stop_gradient(broken.value)).copy()
    value[0, 0] = np.inf
    broken.assign(value)
    before = loop.state()
    metrics = loop.step(batches(CASES["qk_norm"])[:1], 1e-2)
    after = loop.state()
    return [str(metrics.loss), metrics.non_finite, [n for n in before if not np.array_equal(before[n], after[n])]]


def norms() -> float:
    name = "model.layers.0.mlp.up_proj.weight"
    expected = np.linalg.norm(CASES["qk_norm"].params()[name], axis=1)
    return float(np.abs(row_norms(decoder_of("qk_norm", "full"), name) / expected - 1).max())


def logits(tuner: Tuner) -> np.ndarray:
    return keras.ops.convert_to_numpy(keras.ops.stop_gradient(tuner.decoder(CASES["qk_norm"].tokens()[None])))


def fit() -> dict:
    """Losses before, by epoch and in the callbacks' files; the model that loads again."""
    FOLDER.mkdir()
    tuner, data = Tuner(decoder_of("qk_norm", "lora")), batches(CASES["qk_norm"])
    tuner.compile(AdamW(2e-2, weight_decay=0.01))
    inputs = {key: np.concatenate([inputs_of(batch)[key] for batch in data]) for key in inputs_of(data[0])}
    callbacks = [
        keras.callbacks.ModelCheckpoint(FOLDER / "{epoch:02d}.keras"),
        keras.callbacks.CSVLogger(FOLDER / "log.csv"),
    ]
    if BACKEND == "tensorflow":  # the callback of Keras needs it on every backend
        callbacks.append(keras.callbacks.TensorBoard(FOLDER / "events"))
    first = tuner.evaluate(feed(data), steps=2, verbose=0)
    losses = tuner.fit(inputs, batch_size=2, epochs=6, shuffle=False, verbose=0, callbacks=callbacks).history["loss"]
    loaded = keras.saving.load_model(FOLDER / "06.keras")
    assert isinstance(loaded, Tuner) and int(loaded.optimizer.iterations) == int(tuner.optimizer.iterations) == 12
    names = [[v.path for v in model.trainable_variables] for model in (tuner, loaded)]
    assert len(names[0]) == 2 * len(parts_of(CASES["qk_norm"])) and names[0] == names[1]
    return {
        "first": first,
        "losses": losses,
        "logged": [float(row["loss"]) for row in csv.DictReader((FOLDER / "log.csv").open())],
        "events": sum(path.stat().st_size for path in FOLDER.glob("events/**/*tfevents*")),
        "difference": float(np.abs(logits(tuner) - logits(loaded)).max()),
    }


def main() -> None:
    found, seconds = {}, {}
    for check in (curves, evaluation, resume, not_finite, norms, fit):
        start = time.perf_counter()
        found[check.__name__] = check()
        seconds[check.__name__] = round(time.perf_counter() - start, 1)
        print(check.__name__, seconds[check.__name__], file=sys.stderr)
    print(json.dumps({**found, "seconds": seconds}))


if __name__ == "__main__":
    main()
