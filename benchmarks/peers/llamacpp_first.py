"""A fresh process to its first token: llamacpp_first.py WAY MODEL THREADS IDS…

WAY: "minimal" imports only the C bindings and calls them (no warm-up, file mapped); "mapped" also leaves the weights in
the file's own layout, so that nothing is repacked; "class" is the documented way, ``llama_cpp.Llama``.
"""

import ctypes
import importlib.util
import sys
import types


def by_class(path: str, threads: int, ids: list[int]) -> bytes:
    from llama_cpp import Llama

    model = Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    return model.detokenize([next(model.generate(ids, temp=0.0))])


def by_functions(path: str, threads: int, ids: list[int], repack: bool) -> bytes:
    # The package's __init__ imports much that is not needed here (a fifth of a second)
    package = types.ModuleType("llama_cpp")
    package.__path__ = list(importlib.util.find_spec("llama_cpp").submodule_search_locations)
    sys.modules["llama_cpp"] = package
    import llama_cpp.llama_cpp as llama

    llama.llama_backend_init()
    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    params = llama.llama_model_default_params()
    params.use_extra_bufts = repack
    model = llama.llama_model_load_from_file(path.encode(), params)
    params = llama.llama_context_default_params()
    params.n_ctx = 512
    params.n_threads = params.n_threads_batch = threads
    context = llama.llama_init_from_model(model, params)
    array = (ctypes.c_int32 * len(ids))(*ids)
    if llama.llama_decode(context, llama.llama_batch_get_one(array, len(ids))):
        raise SystemExit("llama_decode failed")
    token = llama.llama_sampler_sample(llama.llama_sampler_init_greedy(), context, -1)
    piece = ctypes.create_string_buffer(64)
    size = llama.llama_token_to_piece(llama.llama_model_get_vocab(model), token, piece, 64, 0, True)
    return piece.raw[:size]


way, path, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
ids = [int(i) for i in sys.argv[4:]]
first = by_class(path, threads, ids) if way == "class" else by_functions(path, threads, ids, way == "minimal")
sys.stdout.buffer.write(first + b"\n")
sys.stdout.flush()
