"""Runs every check of the Keras decoder on the backend that KERAS_BACKEND names, and prints what it found as JSON.

Usage: python worker.py FOLDER. Models and gradients are left in the folder; models that other backends left are loaded.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[2]))
if os.environ["KERAS_BACKEND"] == "torch":
    import torch

    torch.set_num_threads(1)  # tiny models: threads would wait for each other longer than they work

import keras
import numpy as np
from parity.cases import CASES, random_params
from parity.tolerances import relative_error

from gemkit.arch.config import ModelConfig
from gemkit.arch.presets import preset
from gemkit.arch.tensors import manifest
from gemkit.engine.sampling import Sampling, sample
from gemkit.errors import GemkitError
from gemkit.models.keras import Decoder, generate, load_decoder
from gemkit.models.keras.attention import Where, attend_fused, attend_plain, visible
from gemkit.weights.checkpoint import Checkpoint

FOLDER = Path(sys.argv[1])
COMPILED = keras.backend.backend() == "jax"  # TensorFlow would compile for longer than it runs
GENERATIONS = ("gemma1_2b", "gemma2", "gemma3")
Loss = keras.losses.SparseCategoricalCrossentropy


def decoder_of(name: str, dtype: str = "float32") -> Decoder:
    case = CASES[name]
    return load_decoder(case.config, Checkpoint.from_params(case.config, case.params()).tensors, dtype)


def first_layers(name: str, count: int = 1) -> ModelConfig:
    config = CASES[name].config
    return dataclasses.replace(config, num_hidden_layers=count, layers=config.layers[:count])


def logits(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    return keras.ops.convert_to_numpy(keras.ops.stop_gradient(decoder(np.asarray(tokens)[None])))[0]


def attention() -> float:
    """The fused form against the plain one."""
    draw = np.random.default_rng(0).standard_normal
    (B, T, S, N, K, H), to = (2, 5, 33, 4, 2, 16), keras.ops.convert_to_tensor
    q, k, v = (to(draw(shape).astype(np.float32)) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))
    seen = visible(Where(to(np.arange(20, 20 + T)[None])), Where(to(np.arange(S)[None])), 6)
    forms = [f(q, k, v, keras.ops.broadcast_to(seen, (B, T, S)), scale=0.3) for f in (attend_fused, attend_plain)]
    return relative_error(*map(keras.ops.convert_to_numpy, forms))


def names() -> bool:
    """Check that names, order, shapes and paths are the manifest's, and norms float32 in a bfloat16 model."""
    for name in (*GENERATIONS, "untied_embedding"):
        config = CASES[name].config
        decoder = Decoder(config, initializer_range=0.0)
        found = {key: tuple(v.shape) for key, v in decoder.tensors().items()}
        assert found == {key: spec.shape for key, spec in manifest(config).items()}
        assert [v.path.replace("/", ".") for v in decoder.tensors().values()] == list(found)
        assert decoder.count_params() == config.parameter_count() and len(decoder.trainable_variables) == len(found)
        for key, v in Decoder(config, initializer_range=0.0, dtype="bfloat16").tensors().items():
            kind = "float32" if len(v.shape) == 1 else "bfloat16"
            assert keras.backend.standardize_dtype(v.dtype) == kind, key
    return True


def counts() -> dict[str, int]:
    """Parameters of published models, whose variables have shapes and no values."""
    found = {}
    for name in ("gemma-2b", "gemma-7b", "gemma-3-270m"):
        with keras.StatelessScope(initialize_variables=False):
            found[name] = Decoder(preset(name).config).count_params()
    return found  # the last check: Keras would give these variables their values one day


def fit() -> dict[str, list[float]]:
    """The loss of the first and the last epoch, by dtype policy."""
    found, config = {}, first_layers("qk_norm")
    tensors = Checkpoint.from_params(config, random_params(config)).tensors
    ids = np.tile(np.arange(16, dtype=np.int32), (4, 2))
    for policy in ("float32", "mixed_bfloat16"):
        decoder = load_decoder(config, tensors, policy)
        decoder.compile(optimizer=keras.optimizers.Adam(1e-2), loss=Loss(from_logits=True))
        history = decoder.fit(ids[:, :-1], ids[:, 1:], batch_size=2, epochs=4, verbose=0).history["loss"]
        found[policy] = [history[0], history[-1]]
    return found


def gradients() -> None:
    """Leaves the gradients of the next-token loss: one step of plain gradient descent, so large that it shows them."""
    for name in ("attention_softcap", "qk_norm"):
        decoder, ids, rate = decoder_of(name), CASES[name].tokens()[None], 2.0**14
        before = {key: keras.ops.convert_to_numpy(v.value).copy() for key, v in decoder.tensors().items()}
        decoder.compile(optimizer=keras.optimizers.SGD(rate), loss=Loss(from_logits=True), jit_compile=COMPILED)
        decoder.train_on_batch(ids[:, :-1], ids[:, 1:])
        after = {key: keras.ops.convert_to_numpy(v.value) for key, v in decoder.tensors().items()}
        np.savez(
            FOLDER / f"gradients_{name}_{keras.backend.backend()}.npz",
            **{key: (before[key] - after[key]) / rate for key in before},
        )


def saved() -> dict[str, float]:
    """Difference of the logits of a loaded model, by the backend that saved it."""
    case, found = CASES["gemma2"], {}
    decoder = decoder_of("gemma2")
    decoder.save(FOLDER / f"{keras.backend.backend()}.keras")
    expected = logits(decoder, case.tokens())
    for path in FOLDER.glob("*.keras"):
        loaded = keras.saving.load_model(path)
        assert loaded.config == case.config and loaded.dtype_policy == decoder.dtype_policy
        found[path.stem] = float(np.abs(logits(loaded, case.tokens()) - expected).max())
    return found


def generation() -> dict:
    """Cached generation against one pass over prompt and answer, greedy and sampled; ragged against alone; chunks."""
    found = {}
    drawn = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 7, "stop_ids": ()}
    whole = {"temperature": 1.3, "seed": 2**63, "stop_ids": ()}
    for name, how in {"gemma3": [whole], "gemma2": [{"stop_ids": ()}, drawn]}.items():
        # Windows and full attention; a tied embedding would repeat its last token for ever
        config = dataclasses.replace(first_layers(name, 3 if name == "gemma3" else 2), tie_word_embeddings=False)
        case = dataclasses.replace(CASES[name], config=config)
        decoder = load_decoder(config, Checkpoint.from_params(config, case.params()).tensors)
        prompt = case.tokens()[:30]
        for options in how:
            answer = decoder.generate(prompt, 30, **options)
            text = np.concatenate([prompt, answer, np.zeros(case.length - 60, np.int64)])
            rows = logits(decoder, text)[29:59]
            sampling = Sampling(**{key: value for key, value in options.items() if key != "stop_ids"})
            want = [sample(row, sampling, n, np.empty(0), 0)[0] for n, row in enumerate(rows)]
            found[f"{name} {options.get('temperature', 0)}"] = [answer, want]
    ragged = [prompt[:17], prompt, prompt[:1]]
    together = decoder.generate(ragged, 30, **drawn)
    alone = decoder.generate(ragged[0], 30, **drawn)
    found["ragged"] = [together[:2], [alone, answer]]
    stop = answer[5]
    found["stop"] = [decoder.generate(prompt, 30, **{**drawn, "stop_ids": [stop]}), answer[: answer.index(stop) + 1]]
    generate.CHUNK = 16
    found["chunks"] = [decoder.generate(ragged, 30, **drawn), together]
    generate.CHUNK = 512
    return found


def compilations() -> list[int]:
    """After an answer, one of the same sizes, one with more pages, one with a larger prompt too."""
    decoder, found = Decoder(first_layers("gemma1_2b")), []
    for prompt, answer in ((20, 5), (30, 2), (17, 60), (40, 60)):
        decoder.generate([2] * prompt, answer, stop_ids=())
        found.append(decoder.compilations)
    return found


def depth() -> list[float]:
    """Seconds for a token at depth 10 and at depth 1000, each in a cache of its own size: the fastest of many.

    The two take turns, so that other work on the machine slows both.
    """
    sizes = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 2048}
    decoder, found = Decoder(dataclasses.replace(first_layers("gemma1_2b"), **sizes)), {10: [], 1000: []}
    steps = decoder._generator.runner
    run = steps.step
    for length in (10, 1000) * 4:
        times = []

        def timed(*args, times=times, **options):
            start = time.perf_counter()
            result = run(*args, **options)
            times.append(time.perf_counter() - start)
            return result

        steps.step = timed
        decoder.generate([2] * length, 20, stop_ids=())
        found[length] += times[-15:]
    steps.step = run
    return [min(times) for times in found.values()]


def refusals() -> list[str]:
    """Error messages, in the order of the test."""
    config = CASES["gemma3"].config
    tensors = dict(Checkpoint.from_params(config, CASES["gemma3"].params()).tensors)
    name, decoder = "model.layers.1.mlp.up_proj.weight", decoder_of("gemma3")
    wrong = tensors[name]
    turned = type(wrong)(wrong.type, wrong.shape[::-1], wrong.data)
    attempts = [
        lambda: load_decoder(config, {key: value for key, value in tensors.items() if key != name}),
        lambda: load_decoder(config, {**tensors, name: turned}),
        lambda: load_decoder(config, tensors, "float16"),
        lambda: load_decoder(config, tensors, "int3"),
        lambda: decoder.generate([2, 512], 3),
        lambda: decoder.generate([[2], []], 3),
        lambda: decoder.generate([2] * 4096, 3),
        lambda: decoder.generate([2], 0),
        lambda: decoder.generate([2], 3, temperature=-1),
        lambda: decoder.generate(None, 3),
        lambda: decoder.generate([2], "x"),
        lambda: decoder.generate([2], 3, stop_ids=5),
    ]
    messages = []
    for attempt in attempts:
        try:
            attempt()
            messages.append("accepted")
        except GemkitError as error:
            messages.append(str(error))
    return messages


def main() -> None:
    checks = (attention, names, fit, gradients, saved, generation, compilations, depth, refusals)
    found, seconds = {}, {}
    for check in (*checks, counts):
        start = time.perf_counter()
        found[check.__name__] = check()
        seconds[check.__name__] = round(time.perf_counter() - start, 1)
        print(check.__name__, seconds[check.__name__], file=sys.stderr)
    print(json.dumps({**found, "seconds": seconds}))


if __name__ == "__main__":
    main()
