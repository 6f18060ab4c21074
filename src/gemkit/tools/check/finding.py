"""What a rule is and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemkit.tools.check.subject import Subject

ERROR, WARNING, NOTE = LEVELS = ("error", "warning", "note")

# Where it is (a file, and a key or tensor in it), and what was found there.
Hit = tuple[str, str]


@dataclass(frozen=True)
class Finding:
    """One fault. what: in general; where: file and key or tensor; found: what is there; why: whom it hurts."""

    rule: str
    level: str
    what: str
    where: str
    found: str
    why: str
    remedy: str


@dataclass(frozen=True)
class Rule:
    """What to look for.

    what, why, remedy: for the reader. look: finds the places. causes: rules that fire as a consequence of this fault;
    where it is found they say nothing new, and are left out.
    """

    id: str
    level: str
    what: str
    why: str
    remedy: str
    look: Callable[[Subject], Iterable[Hit]]
    causes: tuple[str, ...] = ()

    def findings(self, subject: Subject) -> list[Finding]:
        """All places of this fault, each once."""
        hits = dict.fromkeys((shown(where), shown(found)) for where, found in self.look(subject))
        return [Finding(self.id, self.level, self.what, where, found, self.why, self.remedy) for where, found in hits]


def rule(
    id: str, level: str, what: str, *, why: str, remedy: str, causes: tuple[str, ...] = ()
) -> Callable[[Callable], Rule]:
    """Turns a function of a `Subject` that yields hits into a `Rule`."""
    return lambda look: Rule(id, level, what, why, remedy, look, causes)


def shown(text: str) -> str:
    """Text that may come from a hostile file: on one line, printable, not long."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:2000])
    return text if len(text) <= 400 else f"{text[:380]}..."


def fault_of(path: Path, fault: object) -> str:
    """What a reader says of a file, without the path in front of it and the advice behind it."""
    text = str(fault).removeprefix(str(path)).lstrip(": ")
    return text.removesuffix("; the file is damaged: get it again").removesuffix("; get the file again")
