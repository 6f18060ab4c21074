"""Rules and findings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemkit.tools.check.subject import Subject

ERROR, WARNING, NOTE = LEVELS = ("error", "warning", "note")

# Location (a file, and a key or tensor in it), and the value found.
Hit = tuple[str, str]


@dataclass(frozen=True)
class Finding:
    """One fault. what: in general; where: file and key or tensor; found: the value; why: the consequence."""

    rule: str
    level: str
    what: str
    where: str
    found: str
    why: str
    remedy: str


@dataclass(frozen=True)
class Rule:
    """A check for one kind of fault.

    what, why, remedy: for the reader. look: finds the locations. causes: rules that fire as a consequence of it;
    their findings are left out where it is found.
    """

    id: str
    level: str
    what: str
    why: str
    remedy: str
    look: Callable[[Subject], Iterable[Hit]]
    causes: tuple[str, ...] = ()

    def findings(self, subject: Subject) -> list[Finding]:
        """Return all places of this fault, each once."""
        hits = dict.fromkeys((shown(where), shown(found)) for where, found in self.look(subject))
        return [Finding(self.id, self.level, self.what, where, found, self.why, self.remedy) for where, found in hits]


def rule(
    id: str, level: str, what: str, *, why: str, remedy: str, causes: tuple[str, ...] = ()
) -> Callable[[Callable], Rule]:
    """Turn a function of a `Subject` that yields hits into a `Rule`."""
    return lambda look: Rule(id, level, what, why, remedy, look, causes)


def shown(text: str) -> str:
    """Return text that may come from a hostile file: on one line, printable, not long."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:2000])
    return text if len(text) <= 400 else f"{text[:380]}..."


def fault_of(path: Path, fault: object) -> str:
    """Return a reader's error message without the path before it and the remedy after it."""
    text = str(fault).removeprefix(str(path)).lstrip(": ")
    return text.removesuffix("; the file is damaged: get it again").removesuffix("; get the file again")
