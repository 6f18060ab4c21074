"""Worker: llama.cpp through llama-cpp-python's low-level functions, greedy by its own sampler; see run.py."""

import ctypes
import json
import sys
import time

import llama_cpp as llama


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    llama.llama_backend_init()
    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    model = llama.llama_model_load_from_file(setup["model"].encode(), llama.llama_model_default_params())
    params = llama.llama_context_default_params()
    params.n_ctx = 2048
    params.n_batch = params.n_ubatch = setup["ubatch"]
    params.n_threads = params.n_threads_batch = setup["threads"]
    params.flash_attn_type = 1 if setup["flash"] else 0
    context = llama.llama_init_from_model(model, params)
    sampler = llama.llama_sampler_init_greedy()
    ids = setup["ids"]
    print(json.dumps({"version": f"llama.cpp of llama-cpp-python {llama.__version__}"}), flush=True)

    def decode(tokens: list[int]) -> None:
        for i in range(0, len(tokens), setup["ubatch"]):
            part = tokens[i : i + setup["ubatch"]]
            array = (ctypes.c_int32 * len(part))(*part)  # the batch only points at it
            if llama.llama_decode(context, llama.llama_batch_get_one(array, len(part))):
                raise SystemExit("llama_decode failed")
        llama.llama_synchronize(context)

    for line in sys.stdin:
        request = json.loads(line)
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        if request["do"] == "prefill":
            began = time.perf_counter()
            decode(ids[: request["tokens"]])
        else:
            decode(ids[: request["depth"]])
            token = llama.llama_sampler_sample(sampler, context, -1)
            began = time.perf_counter()
            for _ in range(request["tokens"]):
                decode([token])
                token = llama.llama_sampler_sample(sampler, context, -1)
        print(json.dumps({"rate": request["tokens"] / (time.perf_counter() - began)}), flush=True)


main()
