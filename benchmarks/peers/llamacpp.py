"""Worker: llama.cpp through llama-cpp-python's C functions, greedy; the protocol is in ../engines.py."""

import ctypes
import json
import resource
import sys
import time
from pathlib import Path

import llama_cpp as llama
import numpy as np


def peak_megabytes() -> float:
    """Peak resident memory of this process."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    llama.llama_backend_init()
    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    params = llama.llama_model_default_params()  # maps the file into memory
    params.use_extra_bufts = setup.get("repack", True)
    model = llama.llama_model_load_from_file(setup["model"].encode(), params)
    if not model:
        raise SystemExit("llama.cpp does not load the model")
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = 1024
    params.n_ubatch = setup["ubatch"]
    params.n_threads = params.n_threads_batch = setup["threads"]
    params.flash_attn_type = int(setup["flash"])
    context = llama.llama_init_from_model(model, params)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    features = llama.llama_print_system_info().decode().strip(" |")
    print(json.dumps({"version": f"llama-cpp-python {llama.__version__} ({features})"}), flush=True)

    def step(tokens: list[int]) -> int:
        array = (ctypes.c_int32 * len(tokens))(*tokens)  # the batch only points at it
        if llama.llama_decode(context, llama.llama_batch_get_one(array, len(tokens))):
            raise SystemExit("llama_decode failed")
        # The arg-max straight from the logits: llama.cpp's own sampler first copies the vocabulary
        logits = llama.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())

    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "memory":
            answer = {"megabytes": peak_megabytes()}
        else:
            llama.llama_memory_clear(llama.llama_get_memory(context), True)
            began = time.perf_counter()
            tokens = [step(request["ids"])]
            if request["do"] == "decode":
                began = time.perf_counter()
                for _ in range(request["tokens"]):
                    tokens.append(step(tokens[-1:]))
            answer = {"seconds": time.perf_counter() - began, "ids": tokens}
        print(json.dumps(answer), flush=True)


main()
