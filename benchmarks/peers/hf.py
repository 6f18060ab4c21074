"""Worker: transformers in float32 on PyTorch; the protocol is in ../cpu/engines.py."""

import json
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from memory import peak_megabytes


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    torch.set_num_threads(setup["threads"])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(setup["model"], dtype=torch.float32)
    version = f"transformers {transformers.__version__} with torch {torch.__version__}, float32"
    print(json.dumps({"version": version}), flush=True)

    def step(ids: list[int], cache: object) -> tuple[int, object]:
        out = model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax()), out.past_key_values

    for line in sys.stdin:
        request = json.loads(line)
        kind = request["do"]
        if kind == "memory":
            answer = {"megabytes": peak_megabytes()}
        else:
            with torch.inference_mode():
                began = time.perf_counter()
                token, cache = step(request["ids"], None)
                tokens = [token]
                seconds = time.perf_counter() - began
                if kind == "decode":
                    began = time.perf_counter()
                    for _ in range(request["tokens"]):
                        token, cache = step([token], cache)
                        tokens.append(token)
                    seconds = [time.perf_counter() - began]
            answer = {"seconds": seconds, "ids": tokens}
        print(json.dumps(answer), flush=True)


main()
