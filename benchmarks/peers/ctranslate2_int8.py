"""Worker: CTranslate2's generator in int8; the protocol is in ../cpu/engines.py."""

import json
import sys
import time
from pathlib import Path

import ctranslate2
from memory import peak_megabytes

WAYS = {"greedy": {"sampling_topk": 1}, "sampled": {"sampling_topk": 64, "sampling_topp": 0.95}}


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    generator = ctranslate2.Generator(
        setup["model"], device="cpu", compute_type="int8", intra_threads=setup["threads"], inter_threads=1
    )
    vocabulary = json.loads(Path(setup["model"], "vocabulary.json").read_text(encoding="utf-8"))
    print(json.dumps({"version": f"CTranslate2 {ctranslate2.__version__}, {generator.compute_type}"}), flush=True)

    def generate(prompts: list[list[int]], tokens: int, way: str) -> tuple[list[int], float, float]:
        """The first answer, the seconds until every sequence has its first token, and those after it."""
        times = []

        def note(step: object) -> bool:
            times.append(time.perf_counter())
            return False

        began = time.perf_counter()
        found = generator.generate_batch(
            [[vocabulary[i] for i in ids] for ids in prompts],
            max_length=tokens,
            min_length=tokens,
            include_prompt_in_result=False,
            end_token="<pad>",
            callback=note,
            **WAYS[way],
        )
        ids = found[0].sequences_ids[0]
        if len(ids) != tokens or len(times) != tokens * len(prompts):
            raise SystemExit(f"{len(ids)} of {tokens} tokens came")
        return ids, times[len(prompts) - 1] - began, times[-1] - times[len(prompts) - 1]

    for line in sys.stdin:
        request = json.loads(line)
        kind = request["do"]
        if kind == "memory":
            answer = {"megabytes": peak_megabytes()}
        elif kind == "batch":
            answer = {"seconds": generate(request["prompts"], request["tokens"] + 1, "greedy")[2]}
        elif kind == "prefill":
            ids, seconds, _ = generate([request["ids"]], 1, "greedy")
            answer = {"seconds": seconds, "ids": ids}
        else:
            runs = [generate([request["ids"]], request["tokens"] + 1, way) for way in request["ways"]]
            answer = {"seconds": [run[2] for run in runs], "ids": runs[0][0]}
        print(json.dumps(answer), flush=True)


main()
