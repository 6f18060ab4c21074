"""A fresh process to its first token, by the shortest way: first_llama_cpp.py MODEL THREADS IDS…"""

import ctypes
import sys

import llama_cpp as llama

llama.llama_backend_init()
model = llama.llama_model_load_from_file(sys.argv[1].encode(), llama.llama_model_default_params())
params = llama.llama_context_default_params()
params.n_ctx = 512
params.n_threads = params.n_threads_batch = int(sys.argv[2])
context = llama.llama_init_from_model(model, params)
ids = [int(i) for i in sys.argv[3:]]
array = (ctypes.c_int32 * len(ids))(*ids)
if llama.llama_decode(context, llama.llama_batch_get_one(array, len(ids))):
    raise SystemExit("llama_decode failed")
token = llama.llama_sampler_sample(llama.llama_sampler_init_greedy(), context, -1)
piece = ctypes.create_string_buffer(64)
size = llama.llama_token_to_piece(llama.llama_model_get_vocab(model), token, piece, 64, 0, True)
print(repr(piece.raw[:size].decode(errors="replace")))
