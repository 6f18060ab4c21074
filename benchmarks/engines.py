"""The engines that are compared, each in processes of its own, and how they are asked.

A worker reads one JSON object a line and answers each with one:

    {"model": path, "threads": n, "text": prompt, flags…}     -> {"version": text, facts…}
    {"do": "prefill", "ids": [prompt]}                        -> {"seconds": s, "ids": [next]}
    {"do": "decode", "ids": [prompt], "tokens": n}            -> {"seconds": s of n tokens, "ids": [n + 1 tokens]}
    {"do": "memory"}                                          -> {"megabytes": peak resident memory so far}
    {"do": "limits"}  (gemkit alone)                          -> {"bandwidth": GB/s, "int8": 10^9 operations/s}
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Sixteen tokens with <bos>.
PROMPT = "The harbour was quiet that morning, and the boats lay still in the cool"


def gemkit_first(python: str, model: str, threads: int, ids: list[int]) -> list[str]:
    """The command that a user types; it also tokenises the prompt, which the peers are given as ids."""
    options = ["--prompt", PROMPT, "--raw", "--max-tokens", "1", "--temp", "0", "--threads", str(threads)]
    return [python, "-m", "gemkit", "generate", model, *options]


def llamacpp_first(way: str) -> Callable[[str, str, int, list[int]], list[str]]:
    """See peers/llamacpp_first.py for the ways."""
    script = str(HERE / "peers" / "llamacpp_first.py")
    return lambda python, model, threads, ids: [python, script, way, model, str(threads), *map(str, ids)]


@dataclass(frozen=True)
class Engine:
    """name; worker: its script; flags: settings to choose the best of, for prefill and for decode apart; first: the
    ways to the first token of a fresh process, as functions (python, model, threads, ids) -> command."""

    name: str
    worker: Path
    first: dict[str, Callable[[str, str, int, list[int]], list[str]]]
    flags: tuple[dict, ...] = ({},)
    python: str = field(default=sys.executable)


OURS = Engine("gemkit", HERE / "ours.py", {"gemkit generate": gemkit_first})


def llamacpp(python: str) -> Engine:
    flags = [{"ubatch": u, "flash": f} for u, f in itertools.product((128, 256, 512), (False, True))]
    return Engine(
        "llama.cpp",
        HERE / "peers" / "llamacpp.py",
        {way: llamacpp_first(way) for way in ("minimal", "mapped", "class")},
        # Weights in the file's own layout, once: repacking them helps on most machines
        (*flags, {"ubatch": 512, "flash": True, "repack": False}),
        python,
    )


class Worker:
    """An engine in a process that lives for many requests."""

    def __init__(self, engine: Engine, model: str, threads: int, flags: dict):
        self.engine, self.flags = engine, flags
        self.process = subprocess.Popen(
            [engine.python, str(engine.worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self.ask(model=model, threads=threads, text=PROMPT, **flags)

    def ask(self, **request: object) -> dict:
        """Raises SystemExit if the worker is gone; its reason is on standard error."""
        time.sleep(0.02)  # the other engine's threads spin for a moment after its answer
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit(f"bench: the worker of {self.engine.name} ended with exit code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def first_token(command: list[str], cold_cache: bool = False) -> float:
    """Seconds from starting a process to the first byte that it prints.

    cold_cache: gemkit gets an empty cache folder, as on the first use of a model.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
        environment = os.environ | ({"GEMKIT_CACHE": folder} if cold_cache else {})
        time.sleep(0.02)
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment)
        byte = os.read(process.stdout.fileno(), 1)
        seconds = time.perf_counter() - began
        process.communicate()
        errors.seek(0)
        last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
    if process.returncode or not byte:
        raise SystemExit(f"bench: {' '.join(command[:4])} … ended with exit code {process.returncode}: {last}")
    return seconds
