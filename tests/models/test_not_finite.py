"""One number of the weights is not finite: the same error, whatever is asked, in every backend. Budget: 40 s."""

import importlib
import os
from types import SimpleNamespace

import numpy as np
import pytest
from engine.vocabulary import tokenizer
from parity.cases import CASES

from gemkit.api.model import Model
from gemkit.engine.interface import NOT_NUMBERS
from gemkit.errors import GemkitError
from gemkit.weights.checkpoint import Checkpoint

CASE = CASES["untied_embedding"]
LAYER = "model.layers.0."
ODD = 200  # an id that most prompts lack
KEYS = f"{LAYER}self_attn.k_proj.weight", (3, 5)
VALUES = f"{LAYER}self_attn.v_proj.weight", (3, 5)
GATE = f"{LAYER}mlp.gate_proj.weight", (3, 5)
NORM = "model.norm.weight", (3,)
EMBEDDING = "model.embed_tokens.weight", (ODD, 3)
HEAD = "lm_head.weight", (ODD, 3)
# A tensor whose numbers the hidden states do not see
FINITE_HIDDEN = (HEAD,)


def damaged(backend: str, where: tuple[str, tuple[int, ...]], value: float) -> Model:
    params = {name: array.copy() for name, array in CASE.params().items()}
    params[where[0]][where[1]] = value
    tensors = Checkpoint.from_params(CASE.config, params).tensors
    module = importlib.import_module(f"gemkit.models.{backend}")
    load = module.NativeRunner if backend == "native" else module.load_runner
    runner = load(CASE.config, tensors, threads=1)
    return Model(SimpleNamespace(name="tiny", instruction_tuned=None), runner, tokenizer())


CALLS = {
    "greedy": lambda m, ids: m.generate(ids, max_tokens=2, temperature=0),
    "drawn": lambda m, ids: m.generate(ids, max_tokens=2, top_k=0, top_p=1),
    "penalty": lambda m, ids: m.generate(ids, max_tokens=2, repetition_penalty=1.2),
    "logprobs": lambda m, ids: m.generate(ids, max_tokens=2, logprobs=2),
    "batch": lambda m, ids: m.generate([[2, 5, 6], ids], max_tokens=2),
    "stream": lambda m, ids: list(m.stream(ids, max_tokens=2)),
    "score": lambda m, ids: m.score(ids),
    "scores": lambda m, ids: m.score([[2, 5, 6], ids]),
    "embed": lambda m, ids: m.engine.mean_hidden([[2, 5, 6], ids], [1, 1]),
}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [KEYS, VALUES, GATE, NORM, EMBEDDING, HEAD], ids=lambda where: where[0])
def test_native(where, value):
    check("native", where, value)


@pytest.mark.parametrize("backend", ["torch", "jax", "keras"])
@pytest.mark.parametrize(("where", "value"), [(VALUES, np.nan), (HEAD, -np.inf)])
def test_frameworks(backend, where, value, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", os.environ.get("KERAS_BACKEND", "jax"))
    check(backend, where, value)


def check(backend: str, where: tuple[str, tuple[int, ...]], value: float) -> None:
    with damaged(backend, where, value) as m:
        for name, call in CALLS.items():
            if name == "embed" and where in FINITE_HIDDEN:
                assert np.isfinite(call(m, [2, ODD, 7, 9])).all()
                continue
            with pytest.raises(GemkitError) as error:
                call(m, [2, ODD, 7, 9])
            assert str(error.value) == NOT_NUMBERS, name
        assert not m.engine.scheduler and m.engine.allocator.used(0) == 0


def test_a_text_without_the_damaged_token_is_as_before():
    """After the error of one text, and with what it left in the cache."""
    with damaged("native", EMBEDDING, np.nan) as m, damaged("native", EMBEDDING, 0.0) as sound:
        for _ in range(2):
            with pytest.raises(GemkitError):
                m.score([[2, 5, 6, 8], [2, ODD, 7, 9]])
            answer = m.generate([2, 5, 6], max_tokens=8, seed=1, logprobs=1, logit_bias={ODD: -99})
            assert (
                answer.logprobs
                == sound.generate([2, 5, 6], max_tokens=8, seed=1, logprobs=1, logit_bias={ODD: -99}).logprobs
            )
            assert (m.score([2, 5, 6, 8]).logprobs == sound.score([2, 5, 6, 8]).logprobs).all()
