"""Worker: gemkit through its public API; the protocol is in engines.py."""

import json
import sys
import time

import gemkit
from gemkit import _native
from gemkit.engine.engine import Engine
from gemkit.engine.sampling import Sampling
from gemkit.host import peak_memory

SAMPLED = {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
WAYS = {"greedy": {"temperature": 0.0}, "sampled": SAMPLED}
GREEDY = Sampling(temperature=0.0, logprobs=None)


def stream(model: gemkit.Model, ids: list[int], wanted: int, options: dict) -> tuple[list[int], list[float]]:
    """The tokens, and the times of the start and of each."""
    tokens, times = [], [time.perf_counter()]
    for piece in model.stream(ids, max_tokens=wanted, ignore_eos=True, seed=len(ids), **options):
        times.append(time.perf_counter())
        tokens.append(piece.id)
    if len(tokens) != wanted:
        raise SystemExit(f"{len(tokens)} of {wanted} tokens came")
    return tokens, times


def side_by_side(engine: Engine, prompts: list[list[int]], tokens: int) -> float:
    """Seconds of so many steps in which every sequence gets a token; a few more tokens are asked for, since the first
    prompts that are read go on while the last ones are."""
    room = tokens + 2 + sum(map(len, prompts)) // engine.scheduler.max_tokens + len(prompts)
    requests = [engine.add(ids, GREEDY, max_tokens=room, ignore_eos=True) for ids in prompts]
    try:
        while not all(request.tokens for request in requests):
            engine.step()
        began = time.perf_counter()
        for _ in range(tokens):
            if len(engine.step()) != len(requests):
                raise SystemExit("a step did not advance every sequence")
        return time.perf_counter() - began
    finally:
        for request in requests:
            engine.cancel(request)


def facts(model: gemkit.Model, text: str) -> dict:
    config, runner = model.config, model.engine.runner
    info = runner.info
    return {
        "version": f"gemkit {gemkit.__version__}, {info.path} kernels",
        "vocabulary": config.vocab_size,
        "bos": config.bos_token_id,
        "token_bytes": info.token_bytes,
        "body": config.parameter_counts().non_embedding,
        "head": config.vocab_size * config.hidden_size,
        # Window (0: none) and bytes of a position of all its layers
        "cache": [[g.window or 0, runner.page_bytes(n) / runner.page_size] for n, g in enumerate(runner.groups)],
        "prompt": model.tokenizer.encode(text),
    }


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    model = gemkit.load(setup["model"], threads=setup["threads"])
    model.settle()  # the packed copy of the weights is complete
    engine = model.engine
    if setup["sequences"] > engine.scheduler.max_sequences:
        engine = Engine(engine.runner, model.tokenizer, max_sequences=setup["sequences"])
    print(json.dumps(facts(model, setup["text"])), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        kind = request["do"]
        if kind == "memory":
            answer = {"megabytes": peak_memory() / 2**20}
        elif kind == "limits":
            threads = setup["threads"]
            answer = {"bandwidth": _native.measure_bandwidth(threads), "int8": _native.measure_int8_peak(threads)}
        elif kind == "batch":
            answer = {"seconds": side_by_side(engine, request["prompts"], request["tokens"])}
        elif kind == "prefill":
            tokens, times = stream(model, request["ids"], 1, WAYS["greedy"])
            answer = {"seconds": times[1] - times[0], "ids": tokens}
        else:
            answer = {"seconds": [], "ids": None, "first": []}
            for way in request["ways"]:
                tokens, times = stream(model, request["ids"], 1 + request["tokens"], WAYS[way])
                # Decoding starts after the prompt's own token
                answer["seconds"].append(times[-1] - times[1])
                answer["first"].append(times[1] - times[0])
                answer["ids"] = answer["ids"] or tokens
        print(json.dumps(answer), flush=True)


main()
