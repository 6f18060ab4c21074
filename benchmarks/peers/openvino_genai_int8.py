"""Worker: OpenVINO GenAI's pipeline with 8-bit weights; the protocol is in ../cpu/engines.py."""

import json
import sys
import time

import numpy as np
import openvino
import openvino_genai
from memory import peak_megabytes


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    pipeline = openvino_genai.LLMPipeline(setup["model"], "CPU", INFERENCE_NUM_THREADS=setup["threads"])
    print(json.dumps({"version": f"openvino-genai {openvino_genai.__version__}"}), flush=True)

    def generate(ids: list[int], wanted: int, way: str) -> tuple[list[int], list[float]]:
        """The tokens, and the times of the start and of each."""
        tokens, times = [], []

        class Streamer(openvino_genai.StreamerBase):
            def write(self, token: object) -> object:
                for one in [token] if isinstance(token, int) else token:
                    tokens.append(one)
                    times.append(time.perf_counter())
                return openvino_genai.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = wanted
        config.ignore_eos, config.do_sample = True, way == "sampled"
        if way == "sampled":
            config.temperature, config.top_k, config.top_p = 1.0, 64, 0.95
        prompt = np.array([ids], np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(prompt), openvino.Tensor(np.ones_like(prompt)))
        began = time.perf_counter()
        pipeline.generate(inputs, config, Streamer())
        if len(tokens) != wanted:
            raise SystemExit(f"{len(tokens)} of {wanted} tokens came")
        return tokens, [began, *times]

    for line in sys.stdin:
        request = json.loads(line)
        kind = request["do"]
        if kind == "memory":
            answer = {"megabytes": peak_megabytes()}
        else:
            wanted = 1 + request.get("tokens", 0)
            runs = [generate(request["ids"], wanted, way) for way in request.get("ways", ["greedy"])]
            first = runs[0][1][1] - runs[0][1][0]
            decode = [times[-1] - times[1] for _, times in runs]
            answer = {"seconds": first if kind == "prefill" else decode, "ids": runs[0][0]}
        print(json.dumps(answer), flush=True)


main()
