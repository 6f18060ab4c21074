"""Compares what a program printed with what a page shows."""

import re
from itertools import zip_longest

_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
# What differs from run to run and from machine to machine: rates, times, memory in use.
_MEASURED = re.compile(r"[\d.,]+ ?(tok/s|tokens? per second|GB/s|TOPS|GFLOPS|ms|µs|s|min)\b|peak memory.*")
_TOLERANCE = 0.02  # instruction sets round differently


def difference(shown: str, printed: str) -> str | None:
    """The first line in which they differ, in a sentence; None if they agree.

    In what the page shows, "…" stands for anything in a line, and alone for any number of lines. Spaces count as one,
    rates and times are not compared, other numbers to 2%.
    """
    want, have = ([_plain(line) for line in text.strip("\n").splitlines()] for text in (shown, printed))
    at = 0
    for number, line in enumerate(want):
        if line in ("…", "..."):
            rest = want[number + 1 :]
            if not rest:
                return None
            later = [i for i in range(at, len(have)) if _same(rest[0], have[i])]
            if not later:
                return f"shown {rest[0]!r}, which was not printed"
            at = later[0]
            continue
        if at >= len(have):
            return f"shown {line!r}, where the output ended"
        if not _same(line, have[at]):
            return f"shown {line!r}, printed {have[at]!r}"
        at += 1
    return None if at >= len(have) else f"printed {have[at]!r} too"


def _plain(line: str) -> str:
    return " ".join(_MEASURED.sub(r"# \1", line).split())


def _same(want: str, have: str) -> bool:
    # A part between two "…" must come as it is shown, so its numbers are compared exactly
    if "…" in want:
        return re.fullmatch(".*".join(map(re.escape, want.split("…"))), have) is not None
    if _NUMBER.sub("0", want) != _NUMBER.sub("0", have):
        return False
    pairs = zip_longest(_NUMBER.findall(want), _NUMBER.findall(have))
    return all(_near(a, b) for a, b in pairs)


def _near(a: str, b: str) -> bool:
    x, y = (float(text.replace(",", "")) for text in (a, b))
    last = 10.0 ** -len(a.partition(".")[2]) if "e" not in a else 0
    return abs(x - y) <= max(_TOLERANCE * max(abs(x), abs(y)), 1.5 * last if "." in a else 0)
