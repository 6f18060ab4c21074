"""Worker: llama.cpp through llama-cpp-python's C functions; the protocol is in ../cpu/engines.py."""

import ctypes
import json
import sys
import time

import llama_cpp as llama
import numpy as np
from memory import peak_megabytes


class Context:
    """A model with its context."""

    def __init__(self, setup: dict) -> None:
        params = llama.llama_model_default_params()  # maps the file into memory
        params.use_extra_bufts = setup.get("repack", True)
        self.model = llama.llama_model_load_from_file(setup["model"].encode(), params)
        if not self.model:
            raise SystemExit("llama.cpp does not load the model")
        params = llama.llama_context_default_params()
        sequences = setup["sequences"]
        params.n_ctx = -(-setup["context"] // 256) * 256 * sequences
        params.n_batch = self.most = 2048
        params.n_seq_max = sequences
        params.n_ubatch = setup["ubatch"]
        params.n_threads = params.n_threads_batch = setup["threads"]
        params.flash_attn_type = int(setup["flash"])
        params.kv_unified = setup.get("unified", False)
        # As in its own programs: local layers keep their window, but for many sequences that is said to be slower
        params.swa_full = sequences > 1
        self.context = llama.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit("llama.cpp makes no context")
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.sampler = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        for link in (
            llama.llama_sampler_init_top_k(64),
            llama.llama_sampler_init_top_p(0.95, 1),
            llama.llama_sampler_init_temp(1.0),
            llama.llama_sampler_init_dist(1),
        ):
            llama.llama_sampler_chain_add(self.sampler, link)

    def clear(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)

    def read(self, tokens: list[int]) -> None:
        """Adds tokens to the one sequence."""
        for at in range(0, len(tokens), self.most):
            part = tokens[at : at + self.most]
            array = (ctypes.c_int32 * len(part))(*part)  # the batch only points at it
            if llama.llama_decode(self.context, llama.llama_batch_get_one(array, len(part))):
                raise SystemExit("llama_decode failed")

    def argmax(self, row: int = -1) -> int:
        # The arg-max straight from the logits: llama.cpp's own sampler first copies the vocabulary
        logits = llama.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def draw(self) -> int:
        return llama.llama_sampler_sample(self.sampler, self.context, -1)

    def decode(self, ids: list[int], tokens: int, ways: list[str]) -> dict:
        """The ways follow one another in the same context: the prompt is read once."""
        self.clear()
        self.read(ids)
        first, seconds, greedy = self.argmax(), [], []
        for way in ways:
            choose, token, chosen = self.argmax if way == "greedy" else self.draw, first, []
            began = time.perf_counter()
            for _ in range(tokens):
                self.read([token])
                token = choose()
                chosen.append(token)
            seconds.append(time.perf_counter() - began)
            greedy = greedy or [first, *chosen]
        return {"seconds": seconds, "ids": greedy}

    def batch(self, prompts: list[list[int]], tokens: int) -> dict:
        self.clear()
        room = max(self.most, len(prompts))
        batch = llama.llama_batch_init(room, 0, 1)

        def run(rows: list[tuple[int, int, int, bool]]) -> None:
            """(token, position, sequence, whether logits are wanted)."""
            batch.n_tokens = len(rows)
            for i, (token, position, sequence, wanted) in enumerate(rows):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            if llama.llama_decode(self.context, batch):
                raise SystemExit("llama_decode failed")

        current = []
        for sequence, ids in enumerate(prompts):
            run([(token, i, sequence, i == len(ids) - 1) for i, token in enumerate(ids)])
            current.append(self.argmax(len(ids) - 1))
        began = time.perf_counter()
        for step in range(tokens):
            run([(token, len(prompts[s]) + step, s, True) for s, token in enumerate(current)])
            current = [self.argmax(s) for s in range(len(prompts))]
        seconds = time.perf_counter() - began
        llama.llama_batch_free(batch)
        return {"seconds": seconds}


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    llama.llama_backend_init()
    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    context = Context(setup)
    features = llama.llama_print_system_info().decode().strip(" |")
    print(json.dumps({"version": f"llama-cpp-python {llama.__version__} ({features})"}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        kind = request["do"]
        if kind == "memory":
            answer = {"megabytes": peak_megabytes()}
        elif kind == "batch":
            answer = context.batch(request["prompts"], request["tokens"])
        elif kind == "prefill":
            context.clear()
            began = time.perf_counter()
            context.read(request["ids"])
            answer = {"ids": [context.argmax()], "seconds": time.perf_counter() - began}
        else:
            answer = context.decode(request["ids"], request["tokens"], request["ways"])
        print(json.dumps(answer), flush=True)


main()
