"""The engines that run.py compares: gemkit on torch and JAX, and transformers, each with random weights of its own.

An engine runs a piece of work and returns seconds: of a prefill, or the median of a decode step.
"""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch

from gemkit.arch.config import ModelConfig
from gemkit.arch.hf_config import to_hf
from gemkit.arch.tensors import manifest
from gemkit.engine.interface import Batch, Runner, build_batch
from gemkit.engine.sampling import Sampling

GREEDY = Sampling(logprobs=None)
STD = 0.02


@dataclass(frozen=True)
class Work:
    """kind: "prefill" of `depth` tokens, or "decode" of `batch` sequences after `depth` tokens each."""

    kind: str
    batch: int
    depth: int

    def __str__(self) -> str:
        return f"prefill {self.depth}" if self.kind == "prefill" else f"decode batch {self.batch}"


def make_batch(runner: Runner, ids: np.ndarray, first: int, pages: int) -> Batch:
    """The step of ids [B, T] at positions first, …; every sequence has `pages` pages of its own in each group."""
    B, T = ids.shape
    columns = (first + T - 1) // runner.page_size + 1
    tables = []
    for group in runner.groups:
        table = np.arange(columns, dtype=np.int32) + np.arange(B, dtype=np.int32)[:, None] * pages
        if group.window is not None:
            table[:, : max(0, first - group.window + 1) // runner.page_size] = -1
        tables.append(table)
    return build_batch(ids.astype(np.int32), [first] * B, tuple(tables), draws=[1] * B, sampling=(GREEDY,) * B)


class Ours:
    """A runner as the engine drives it, the choice of tokens included. What the cache holds changes no time."""

    def __init__(self, name: str, runner: Runner, token_bytes: int) -> None:
        self.name, self.runner, self.token_bytes = name, runner, token_bytes
        self.draw = np.random.default_rng(0)

    def run(self, work: Work, tokens: int) -> float:
        runner, vocabulary = self.runner, self.runner.config.vocab_size
        pages = (work.depth + tokens) // runner.page_size + 1
        runner.reserve([work.batch * pages] * len(runner.groups))
        if work.kind == "prefill":
            ids = self.draw.integers(0, vocabulary, (1, work.depth))
            return self._seconds(make_batch(runner, ids, 0, pages))[0]
        ids, times = self.draw.integers(0, vocabulary, (work.batch, 1)), []
        for place in range(work.depth, work.depth + tokens):
            seconds, found = self._seconds(make_batch(runner, ids, place, pages))
            ids = found[:, None]
            times.append(seconds)
        return statistics.median(times)

    def _seconds(self, batch: Batch) -> tuple[float, np.ndarray]:
        began = time.perf_counter()
        found = self.runner.step(batch).tokens
        return time.perf_counter() - began, found

    def close(self) -> None:
        del self.runner


def torch_runner(config: ModelConfig, dtype: str, device: str) -> Ours:
    from gemkit.models.torch.linear import quantise
    from gemkit.models.torch.load import BITS, bits_of, empty_decoder, put
    from gemkit.models.torch.runner import TorchRunner

    decoder = empty_decoder(config)
    for name, spec in manifest(config).items():
        value = torch.randn(spec.shape, dtype=torch.bfloat16, device=device) * STD
        if dtype in BITS and spec.quantise:
            put(decoder, name, quantise(value, bits_of(spec, BITS[dtype])))
        else:
            put(decoder, name, value.float() if len(spec.shape) == 1 else value)
    decoder.model.embed_tokens.dtype = torch.bfloat16
    runner = TorchRunner(decoder.eval())
    return Ours("torch", runner, runner.info.token_bytes)


def jax_runner(config: ModelConfig, dtype: str, device: str) -> Ours:
    from functools import partial

    import jax
    import jax.numpy as jnp

    from gemkit.models.jax.decoder import Decoder
    from gemkit.models.jax.linear import quantise
    from gemkit.models.jax.load import BITS, bits_of
    from gemkit.models.jax.runner import JaxRunner

    @partial(jax.jit, static_argnums=(1, 2, 3))
    def random(key, shape, kind, bits):
        value = jax.random.normal(key, shape, jnp.bfloat16).astype(kind) * STD
        return value if bits is None else quantise(value, bits)

    params, place = {}, jax.devices(device.split(":")[0])[0]
    with jax.default_device(place):
        for number, (name, spec) in enumerate(manifest(config).items()):
            bits = bits_of(spec, BITS[dtype]) if dtype in BITS and spec.quantise else None
            kind = jnp.float32 if len(spec.shape) == 1 else jnp.bfloat16
            params[name] = random(jax.random.key(number), spec.shape, kind, bits)
    params = jax.device_put(params, place)
    runner = JaxRunner(Decoder(config, params, jnp.bfloat16))
    return Ours("jax", runner, runner.info.token_bytes)


class Clock:
    """A streamer that notes when each token is on the host."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, ids: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Transformers:
    """`generate` of transformers; with a static cache it compiles the decode step itself, on CUDA."""

    def __init__(self, name: str, config: ModelConfig, device: str, static: bool) -> None:
        import transformers

        self.name, self.static = name, static
        data = to_hf(config)
        described = transformers.AutoConfig.for_model(data.pop("model_type"), **data)
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(described, dtype=torch.bfloat16)
        self.model = model.to(device=device, dtype=torch.bfloat16).eval()
        self.model.generation_config.eos_token_id = None
        self.token_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())

    def run(self, work: Work, tokens: int) -> float:
        ids = torch.randint(3, self.model.config.vocab_size, (work.batch, work.depth), device=self.model.device)
        clock = Clock()
        count = 2 if work.kind == "prefill" else tokens + 1
        options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        options |= {"cache_implementation": "static"} if self.static else {"disable_compile": True}
        with torch.inference_mode():
            began = time.perf_counter()
            self.model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **options)
        answers = clock.times[1:]  # first comes the prompt
        if work.kind == "prefill":
            return answers[0] - began
        return statistics.median(b - a for a, b in itertools.pairwise(answers))

    def close(self) -> None:
        del self.model


ENGINES = {
    "torch": torch_runner,
    "jax": jax_runner,
    "transformers eager": lambda config, dtype, device: Transformers("transformers eager", config, device, False),
    "transformers compiled": lambda config, dtype, device: Transformers("transformers compiled", config, device, True),
}
