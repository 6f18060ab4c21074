"""llama.cpp as a peer: the library inside xllamacpp, through its C interface; its server for chat templates.

That package's own doors report probabilities of generated tokens only.
"""

import contextlib
import ctypes
import json
import os
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import xllamacpp


class _Parameters(ctypes.Structure):
    """A parameter struct of llama.cpp, larger than any of them: only its first fields are touched."""

    _fields_ = [("words", ctypes.c_uint32 * 256)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def library() -> ctypes.CDLL:
    (path,) = Path(xllamacpp.__path__[0]).glob("xllamacpp*.*d*" if os.name == "nt" else "xllamacpp*.so")
    return ctypes.CDLL(str(path))


def logits(path: Path, ids: np.ndarray | list[int], vocabulary: int, step: int = 128) -> Iterator[np.ndarray]:
    """The logits of a text with 2 threads, float32 [n, V] of `step` tokens at a time."""
    pointer, loaded = ctypes.c_void_p, library()

    def function(name: str, result, *arguments):
        found = getattr(loaded, name)
        found.restype, found.argtypes = result, arguments
        return found

    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, pointer)(lambda *_: None)
    function("llama_log_set", None, type(silent), pointer)(silent, None)
    function("llama_backend_init", None)()
    parameters = function("llama_context_default_params", _Parameters)()
    assert list(parameters.words[:3]) == [512, 2048, 512], "the first fields are no longer n_ctx, n_batch and n_ubatch"
    parameters.words[0], parameters.words[1], parameters.words[2] = len(ids) + step, step, step
    defaults = function("llama_model_default_params", _Parameters)()
    model = function("llama_model_load_from_file", pointer, ctypes.c_char_p, _Parameters)(os.fsencode(path), defaults)
    assert model
    context = function("llama_init_from_model", pointer, pointer, _Parameters)(model, parameters)
    assert context and function("llama_n_ctx", ctypes.c_uint32, pointer)(context) >= len(ids)
    function("llama_set_n_threads", None, pointer, ctypes.c_int32, ctypes.c_int32)(context, 2, 2)
    batch = function("llama_batch_init", _Batch, *[ctypes.c_int32] * 3)(step, 0, 1)
    decode = function("llama_decode", ctypes.c_int32, pointer, _Batch)
    get_logits = function("llama_get_logits", ctypes.POINTER(ctypes.c_float), pointer)
    for first in range(0, len(ids), step):
        batch.n_tokens = min(step, len(ids) - first)
        for i in range(batch.n_tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = int(ids[first + i]), first + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert decode(context, batch) == 0
        yield np.ctypeslib.as_array(get_logits(context), (batch.n_tokens, vocabulary)).copy()
    function("llama_free", None, pointer)(context)
    function("llama_model_free", None, pointer)(model)


class Model:
    """A loaded model: what its tokenizer does. rows: pieces of its vocabulary."""

    def __init__(self, loaded: ctypes.CDLL, model: int) -> None:
        self._loaded, self._model = loaded, model
        loaded.llama_model_get_vocab.restype = ctypes.c_void_p
        self._vocabulary = ctypes.c_void_p(loaded.llama_model_get_vocab(ctypes.c_void_p(model)))
        self.rows: int = loaded.llama_vocab_n_tokens(self._vocabulary)

    def tokenize(self, text: str) -> list[int]:
        data, ids = text.encode(), (ctypes.c_int32 * 4096)()
        flags = ctypes.c_bool(False), ctypes.c_bool(False)
        count = self._loaded.llama_tokenize(self._vocabulary, data, len(data), ids, len(ids), *flags)
        assert count >= 0
        return list(ids[:count])

    def ends(self) -> set[int]:
        """The ids after which llama.cpp ends generation."""
        self._loaded.llama_vocab_is_eog.restype = ctypes.c_bool
        return {token for token in range(self.rows) if self._loaded.llama_vocab_is_eog(self._vocabulary, token)}


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Model | None]:
    """Loads a model; None if llama.cpp refuses it."""
    loaded, pointer = library(), ctypes.c_void_p
    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, pointer)(lambda *_: None)
    loaded.llama_log_set(silent, None)
    loaded.llama_backend_init()
    loaded.llama_model_default_params.restype = _Parameters
    loaded.llama_model_load_from_file.restype = pointer
    loaded.llama_model_load_from_file.argtypes = ctypes.c_char_p, _Parameters
    model = loaded.llama_model_load_from_file(os.fsencode(path), loaded.llama_model_default_params())
    yield Model(loaded, model) if model else None
    if model:
        loaded.llama_model_free(pointer(model))


@contextlib.contextmanager
def templates(template: str, path: Path | None = None) -> Iterator[Callable[[list[dict]], str]]:
    """Serves a model, by default the demo, and gives a function from messages to what its chat template makes of them.

    The text lacks the BOS, which llama.cpp's tokenizer adds.
    """
    from gemkit.hub.demo import demo_path

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path or demo_path())
    parameters.n_ctx, parameters.cpuparams.n_threads, parameters.warmup = 256, 1, False
    parameters.use_jinja, parameters.chat_template = True, template
    server = xllamacpp.Server(parameters)
    address = f"{server.listening_address}/apply-template"

    def apply(messages: list[dict], **options: object) -> str:
        body = json.dumps({"messages": messages, **options}).encode()
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["prompt"]

    try:
        yield apply
    finally:
        del server
