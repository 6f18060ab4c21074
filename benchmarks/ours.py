"""Worker: gemkit through its public API, greedy; the protocol is in engines.py."""

import json
import sys
import time

import gemkit
from gemkit import _native
from gemkit.cli.common import peak_memory


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    model = gemkit.load(setup["model"], threads=setup["threads"])
    model.settle()  # the packed copy of the weights is complete
    runner = model.engine.runner
    about = {
        "version": f"gemkit {gemkit.__version__}, {runner.path} kernels",
        "vocabulary": model.config.vocab_size,
        "bos": model.config.bos_token_id,
        "token_bytes": runner.token_bytes,
        "body": model.config.parameter_counts().non_embedding,
        "prompt": model.tokenizer.encode(setup["text"]),
    }
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "memory":
            answer = {"megabytes": peak_memory() / 2**20}
        elif request["do"] == "limits":
            threads = setup["threads"]
            answer = {"bandwidth": _native.measure_bandwidth(threads), "int8": _native.measure_int8_peak(threads)}
        else:
            wanted = 1 + request.get("tokens", 0)
            tokens, times = [], [time.perf_counter()]
            for piece in model.stream(request["ids"], max_tokens=wanted, temperature=0, ignore_eos=True):
                times.append(time.perf_counter())
                tokens.append(piece.id)
            if len(tokens) != wanted:
                raise SystemExit(f"{len(tokens)} of {wanted} tokens came")
            # Decoding starts when the prompt's own token is there
            answer = {"seconds": times[-1] - times[1 if request["do"] == "decode" else 0], "ids": tokens}
        print(json.dumps(answer), flush=True)


main()
