"""One engine on one model: worker.py ENGINE PATH THREADS < ids (JSON) > perplexity and rates (JSON).

ENGINE: gemkit or llama.cpp, with a GGUF file; ctranslate2 or transformers, with a folder. It runs under the
interpreter that has the engine; only gemkit's needs gemkit. Perplexity: of all ids but the first, in windows of 512
that each begin with that first one, the most that CTranslate2 scores of a model with such a window.
prefill: tokens per second of a prompt of 512; decode: of 32 tokens after one, greedy; medians of three runs.
"""

import ctypes
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

WINDOW, PROMPT, TOKENS, RUNS, CHUNK = 512, 512, 32, 3, 256
Engine = tuple[Callable, Callable]


def gemkit_engine(path: str, threads: int) -> Engine:
    import gemkit

    model = gemkit.load(path, threads=threads)
    model.settle()

    def score(ids: list[int]) -> float:
        return -float(model.score(ids).logprobs.sum(dtype=np.float64))

    def generate(ids: list[int], count: int) -> float:
        times = [time.perf_counter()]
        for _ in model.stream(ids, max_tokens=1 + count, temperature=0, ignore_eos=True):
            times.append(time.perf_counter())
        return times[-1] - times[1 if count else 0]

    return score, generate


def llama_engine(path: str, threads: int) -> Engine:
    import llama_cpp as llama

    llama.llama_backend_init()
    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    if not model:
        raise SystemExit("llama.cpp does not load the model")
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 1024, PROMPT, PROMPT
    params.n_threads = params.n_threads_batch = threads
    context = llama.llama_init_from_model(model, params)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    memory = llama.llama_get_memory(context)

    def score(ids: list[int]) -> float:
        llama.llama_memory_clear(memory, True)
        total = 0.0
        for at in range(0, len(ids), CHUNK):
            part = ids[at : at + CHUNK]
            batch = llama.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i], batch.logits[i] = token, at + i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            if llama.llama_decode(context, batch):
                raise SystemExit("llama_decode failed")
            logits = np.ctypeslib.as_array(llama.llama_get_logits(context), (len(part), vocabulary))
            total += surprise(logits, ids[at + 1 : at + 1 + CHUNK])
            llama.llama_batch_free(batch)
        return total

    def step(tokens: list[int]) -> int:
        array = (ctypes.c_int32 * len(tokens))(*tokens)  # the batch only points at it
        if llama.llama_decode(context, llama.llama_batch_get_one(array, len(tokens))):
            raise SystemExit("llama_decode failed")
        return int(np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (vocabulary,)).argmax())

    def generate(ids: list[int], count: int) -> float:
        llama.llama_memory_clear(memory, True)
        began = time.perf_counter()
        token = step(ids)
        if count:
            began = time.perf_counter()
        for _ in range(count):
            token = step([token])
        return time.perf_counter() - began

    return score, generate


def ctranslate2_engine(path: str, threads: int) -> Engine:
    import ctranslate2

    model = ctranslate2.Generator(path, device="cpu", intra_threads=threads)
    words = json.loads(Path(path, "vocabulary.json").read_text(encoding="utf-8"))

    def score(ids: list[int]) -> float:
        return -float(np.sum(model.score_batch([[words[i] for i in ids]])[0].log_probs))

    def run(ids: list[int], count: int) -> float:
        began = time.perf_counter()
        model.generate_batch(
            [[words[i] for i in ids]],
            max_length=count,
            min_length=count,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return time.perf_counter() - began

    def generate(ids: list[int], count: int) -> float:
        return run(ids, 1 + count) - (run(ids, 1) if count else 0.0)

    return score, generate


def transformers_engine(path: str, threads: int) -> Engine:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    @torch.inference_mode()
    def score(ids: list[int]) -> float:
        hidden, total = model.model(torch.tensor([ids])).last_hidden_state[0], 0.0
        for at in range(0, len(ids), CHUNK):
            logits = model.lm_head(hidden[at : at + CHUNK])
            if cap := getattr(model.config, "final_logit_softcapping", None):
                logits = cap * torch.tanh(logits / cap)
            total += surprise(logits.numpy(), ids[at + 1 : at + 1 + CHUNK])
        return total

    @torch.inference_mode()
    def generate(ids: list[int], count: int) -> float:
        began = time.perf_counter()
        out = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        if count:
            began = time.perf_counter()
        for _ in range(count):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return time.perf_counter() - began

    return score, generate


def surprise(logits: np.ndarray, targets: list[int]) -> float:
    """The sum of -log p of each target under its row of logits; rows without a target count nothing."""
    total = 0.0
    for row, target in zip(logits, targets, strict=False):
        values = row.astype(np.float64)
        most = values.max()
        total += most + math.log(np.exp(values - most).sum()) - values[target]
    return total


ENGINES = {
    "gemkit": gemkit_engine,
    "llama.cpp": llama_engine,
    "ctranslate2": ctranslate2_engine,
    "transformers": transformers_engine,
}


def main() -> None:
    name, path, threads = sys.argv[1:]
    ids = json.loads(sys.stdin.read())
    score, generate = ENGINES[name](path, int(threads))
    prompt = ids[: min(PROMPT, len(ids))]
    generate(prompt, 0), generate(ids[:1], TOKENS)  # warm
    prefill = len(prompt) / statistics.median(generate(prompt, 0) for _ in range(RUNS))
    decode = TOKENS / statistics.median(generate(ids[:1], TOKENS) for _ in range(RUNS))
    # Of what score returns: the sum of -log p of all ids of a window but the first
    windows = [[ids[0], *ids[at : at + WINDOW - 1]] for at in range(1, len(ids), WINDOW - 1)]
    mean = sum(score(window) for window in windows if len(window) > 1) / (len(ids) - 1)
    print(json.dumps({"prefill": prefill, "decode": decode, "perplexity": math.exp(mean)}))


if __name__ == "__main__":
    main()
