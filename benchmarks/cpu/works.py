"""Tasks of a run, by model file and number of threads."""

from __future__ import annotations

import random
from dataclasses import dataclass

GREEDY, SAMPLED = "greedy", "sampled"


@dataclass(frozen=True)
class Task:
    """One request that all engines get in turn, in every round.

    kind: "decode", "prefill", "batch", "first" (token of a fresh process) or "memory".
    size: the prompt's tokens, of "batch" those of each sequence. tokens: to decode. ways: how they are chosen.
    sequences: of "batch". group: what `--work` calls it. rounds: no more than these; `warm`: a first one is left out.
    """

    kind: str
    size: int = 1
    tokens: int = 0
    ways: tuple[str, ...] = (GREEDY,)
    sequences: int = 1
    group: str = ""
    rounds: int = 99
    warm: bool = True

    @property
    def depth(self) -> int:
        return 0 if self.size == 1 else self.size

    def names(self) -> dict[str, str]:
        """The row's name by way."""
        if self.kind == "decode":
            name = f"decode {self.tokens} at depth {self.depth}"
            return {way: name + (", sampled" if way == SAMPLED else "") for way in self.ways}
        names = {
            "prefill": f"prefill {self.size}",
            "batch": f"decode {self.tokens}, {self.sequences} at once",
            "first": "first token",
            "memory": "peak memory",
        }
        return {GREEDY: names[self.kind]}


@dataclass(frozen=True)
class Session:
    """Tasks of one model file on one number of threads, with the same processes. context: tokens that fit in these."""

    model: str
    threads: int
    tasks: tuple[Task, ...]
    kind: str = ""

    @property
    def context(self) -> int:
        return max(task.size + len(task.ways) * task.tokens for task in self.tasks) + 64

    @property
    def sequences(self) -> int:
        return max(task.sequences for task in self.tasks)


GROUPS = ("decode", "deep", "prefill", "first", "memory", "q8_0", "2b", "batch")


def sessions(threads: list[int], groups: tuple[str, ...], quick: bool, own_file: bool) -> list[Session]:
    """All that is to be done. own_file: of a file of the user's, of which there are no other types."""
    both = (GREEDY, SAMPLED)
    tokens, short, long, longest = (8, 32, 64, 96) if quick else (64, 512, 2048, 8192)
    found = []
    for count in threads:
        tasks = [
            Task("decode", 1, tokens, both, group="decode"),
            Task("decode", short, tokens, both, group="decode"),
            Task("prefill", short, group="prefill"),
            Task("first", group="first"),
            Task("memory", short, tokens, group="memory", rounds=1, warm=False),
            Task("prefill", long, group="prefill", rounds=2, warm=False),
            Task("decode", long, tokens, both, group="deep", rounds=2 if count > 1 else 1, warm=False),
        ]
        if count == max(threads):
            tasks.append(Task("decode", longest, tokens, both, group="deep", rounds=2, warm=False))
        found.append(Session("demo", count, tuple(tasks)))
    most = max(threads)
    sizes, each, new = ((2, 4), 8, 4) if quick else ((4, 8, 16), 128, 32)
    batches = [Task("batch", each, new, sequences=n, group="batch", warm=False) for n in sizes]
    found.append(Session("demo", most, tuple(batches), "batch"))
    if not own_file:
        tasks = (Task("decode", 1, tokens, both, group="q8_0"), Task("prefill", short, group="q8_0"))
        found.append(Session("Q8_0", most, tasks))
        big = {"group": "2b", "rounds": 2, "warm": False}
        tasks = (Task("decode", 1, 4 if quick else 16, **big), Task("prefill", short, **big))
        found += [Session(f"2B {kind}", most, tasks) for kind in ("Q4_0", "Q4_K_M")]
    kept = []
    for session in found:
        tasks = tuple(task for task in session.tasks if task.group in groups)
        if tasks:
            kept.append(Session(session.model, session.threads, tasks, session.kind))
    return kept


def prompt(about: dict, seed: object, size: int) -> list[int]:
    """Ids that depend on the seed and the size: no two requests of a run share more than <bos>, since some engines keep
    what they have read."""
    draw = random.Random(f"{seed}, {size}")
    low, high = about["vocabulary"] // 4, about["vocabulary"] * 3 // 4
    return [about["bos"], *(draw.randrange(low, high) for _ in range(size - 1))]


def request(task: Task, about: dict, seed: int) -> dict:
    """Return the request to a worker; engines.py has the protocol."""
    if task.kind == "batch":
        ids = [prompt(about, (task.kind, seed, task.sequences, n), task.size) for n in range(task.sequences)]
        return {"do": "batch", "prompts": ids, "tokens": task.tokens}
    ids = prompt(about, (task.kind, seed), task.size)
    if task.kind == "prefill":
        return {"do": "prefill", "ids": ids}
    return {"do": "decode", "ids": ids, "tokens": task.tokens, "ways": list(task.ways)}


def need(task: Task, about: dict) -> dict[str, float]:
    """For one token of a task: bytes read and int8 operations, which bound its rate; empty where nothing is known.

    Of a prompt, whose weights are read once for all of it, the bytes are "traffic", which does not bound.
    """
    if task.kind not in ("decode", "batch", "prefill"):
        return {}
    body, head = 2 * about["body"], 2 * about.get("head", 0)
    if task.kind == "prefill":
        return {"operations": body, "traffic": about["token_bytes"] / task.size}
    middle = task.size + task.tokens // 2
    cache = sum(size * (min(middle, window) if window else middle) for window, size in about.get("cache", []))
    return {"bytes": about["token_bytes"] / task.sequences + cache, "operations": body + head}
