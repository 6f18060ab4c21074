"""The engines that are compared, each in processes of its own, and how they are asked.

A worker reads one JSON object a line and answers each with one:

    {"model": path, "threads": n, "text": prompt, "context": n, "sequences": n, flags…}  -> {"version": text, metadata…}
    {"do": "prefill", "ids": [prompt]}                        -> {"seconds": s, "ids": [next]}
    {"do": "decode", "ids": [prompt], "tokens": n, "ways": [way…]}
                                     -> {"seconds": [s of n tokens for each way], "ids": [the n + 1 greedy tokens]}
    {"do": "batch", "prompts": [[prompt]…], "tokens": n}      -> {"seconds": s of n tokens of each, side by side}
    {"do": "memory"}                                          -> {"megabytes": peak resident memory so far}
    {"do": "limits"}  (gemkit alone)                          -> {"bandwidth": GB/s, "int8": 10^9 operations/s}

A way is "greedy" or "sampled": top-k 64, top-p 0.95, temperature 1.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from works import GREEDY, SAMPLED, Session, Task

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Sixteen tokens with <bos>.
PROMPT = "The harbour was quiet that morning, and the boats lay still in the cool"


def gemkit_first(python: str, model: str, threads: int, ids: list[int]) -> list[str]:
    """The command that a user types; it also tokenises the prompt, which the peers are given as ids."""
    options = ["--prompt", PROMPT, "--raw", "--max-tokens", "1", "--temp", "0", "--threads", str(threads)]
    return [python, "-m", "gemkit", "generate", model, *options]


def llamacpp_first(way: str) -> Callable[[str, str, int, list[int]], list[str]]:
    """See peers/llamacpp_first.py for the ways."""
    script = str(HERE.parent / "peers" / "llamacpp_first.py")
    return lambda python, model, threads, ids: [python, script, way, model, str(threads), *map(str, ids)]


@dataclass(frozen=True, eq=False)
class Engine:
    """name; worker: its script; first: the ways to the first token of a fresh process, as functions (python, model,
    threads, ids) -> command; flags: by the first word of a session's model, or by its kind, settings to choose the best
    of, for each kind of work apart.

    convert: what peers/convert.py calls its files; None: it reads GGUF. Then it runs no other types than the demo's.
    deepest: the longest prompt it is given. ways: of choosing tokens that it is asked for. rest: seconds that its
    threads may spin after an answer. note: for the report.
    """

    name: str
    worker: Path
    first: dict[str, Callable[[str, str, int, list[int]], list[str]]] = field(default_factory=dict)
    flags: dict[str, tuple[dict, ...]] = field(default_factory=dict)
    python: str = sys.executable
    convert: str | None = None
    deepest: int = 1 << 30
    ways: tuple[str, ...] = (GREEDY, SAMPLED)
    batches: bool = True
    rest: float = 0.02
    note: str = ""

    def can(self, session: Session, task: Task) -> bool:
        if task.kind == "first":
            return bool(self.first)
        if self.convert and session.model != "demo":
            return False
        return task.size <= self.deepest and (self.batches or task.kind != "batch")

    def choices(self, session: Session) -> tuple[dict, ...]:
        return self.flags.get(session.kind or session.model.split()[0], ({},))


OURS = Engine("gemkit", HERE / "ours.py", {"gemkit generate": gemkit_first})


def _llamacpp_flags() -> dict[str, tuple[dict, ...]]:
    flags = [{"ubatch": u, "flash": f} for u, f in itertools.product((128, 256, 512), (False, True))]
    few = ({"ubatch": 512, "flash": False}, {"ubatch": 512, "flash": True})
    # Weights in the file's own layout, once: repacking them helps on most machines
    plain = {"ubatch": 512, "flash": True, "repack": False}
    unified = [{**each, "unified": both} for each, both in itertools.product(few, (False, True))]
    return {"demo": (*flags, plain), "Q8_0": (*few, plain), "2B": few, "batch": tuple(unified)}


LLAMACPP = Engine(
    "llama.cpp",
    HERE.parent / "peers" / "llamacpp.py",
    {way: llamacpp_first(way) for way in ("minimal", "mapped", "class")},
    _llamacpp_flags(),
    note="The same files.",
)
CTRANSLATE2 = Engine(
    "CTranslate2",
    HERE.parent / "peers" / "ctranslate2_int8.py",
    convert="ctranslate2",
    deepest=2048,
    note="Its int8 weights, a scale a row, made of the same model.",
)
TRANSFORMERS = Engine(
    "transformers",
    HERE.parent / "peers" / "hf.py",
    convert="hf",
    deepest=512,
    ways=(GREEDY,),
    batches=False,
    note="float32, the weights of the same model.",
)
OPENVINO = Engine(
    "OpenVINO GenAI",
    HERE.parent / "peers" / "openvino_genai_int8.py",
    convert="openvino",
    deepest=2048,
    batches=False,
    note="Its 8-bit weights, a scale a row, made of the same model; its cache is of 8 bits by default.",
)
# By name: the peer, the module that must be installed, the folder of .venv-bench with its environment.
PEERS = {
    "llama.cpp": (LLAMACPP, "llama_cpp", ""),
    "CTranslate2": (CTRANSLATE2, "ctranslate2", ""),
    "transformers": (TRANSFORMERS, "transformers", ""),
    "OpenVINO GenAI": (OPENVINO, "openvino_genai", "openvino"),
}
# Peers that cannot run here, and why.
ABSENT = {
    "onnxruntime-genai": "0.18.0's model builder fails on Gemma 3 with transformers 5 (KeyError: 'rope_type') and "
    "cannot be imported with transformers 4",
}


def installed(names: list[str] | None = None) -> tuple[list[Engine], dict[str, str]]:
    """Return the installed peers, and the reasons for the others. Raises SystemExit if none is."""
    found, missing = [], {}
    for name, (peer, module, folder) in PEERS.items():
        if names and name not in names:
            continue
        python = os.environ.get("GEMKIT_PEER_PYTHON" + (f"_{folder.upper()}" if folder else ""))
        python = python or str(ROOT / ".venv-bench" / folder / "bin" / "python")
        look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        if shutil.which(python) is None:
            missing[name] = f"there is no {python}"
        elif subprocess.run([python, "-c", look]).returncode:
            missing[name] = f"{python} has no {module}"
        else:
            found.append(replace(peer, python=python))
    if not found:
        reason = "; ".join(dict.fromkeys(missing.values()))
        raise SystemExit(f"bench: {reason}: run `make bench`, or set GEMKIT_PEER_PYTHON")
    return found, missing


class Gone(SystemExit):
    """A worker ended."""


class Worker:
    """An engine in a process that lives for many requests."""

    def __init__(self, engine: Engine, model: str, threads: int, flags: dict, context: int = 1024, sequences: int = 1):
        self.engine, self.flags = engine, flags
        self.process = subprocess.Popen(
            [engine.python, str(engine.worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self.ask(model=model, threads=threads, text=PROMPT, context=context, sequences=sequences, **flags)

    def ask(self, **request: object) -> dict:
        """Raises SystemExit if the worker is gone; its reason is on standard error."""
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Gone(f"bench: the worker of {self.engine.name} ended with exit code {self.process.wait()}")
        time.sleep(self.engine.rest)  # its threads spin for a moment after the answer
        return json.loads(line)

    def close(self) -> None:
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
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
