"""A model for the chat's own logic: a token is a character, and the answers are written down beforehand."""

from collections.abc import Iterator
from types import SimpleNamespace

from gemkit.cli.repl.session import Session
from gemkit.text.chat import render

STOP = 106


class Piece(str):
    id = 0


class Tokenizer:
    bos_id, start_of_turn_id, end_of_turn_id = 2, 105, STOP
    template = None

    def encode(self, text: str, bos: bool = True) -> list[int]:
        return [1000 + ord(character) for character in text]


class Model:
    """Answers with the words of `answers`, one a question; records what it was asked with."""

    def __init__(self, answers: list[str], ctx_size: int = 1000, name: str = "Fake 1b", stops: bool = True) -> None:
        self.tokenizer, self.ctx_size, self.threads = Tokenizer(), ctx_size, 2
        self.checkpoint = SimpleNamespace(name=name, instruction_tuned=True, tensors={})
        self.stop_ids, self.has_own_template = frozenset({1, STOP}), False
        self.answers, self.stops, self.asked = list(answers), stops, []

    def render(self, messages: list[dict], add_generation_prompt: bool = True) -> list[int]:
        return render(self.tokenizer, messages, add_generation_prompt)

    def stream(self, ids: list[int], **settings: object) -> Iterator[str]:
        self.asked.append((list(ids), settings))
        room = min(self.ctx_size - len(ids), settings.get("max_tokens") or self.ctx_size)
        return self._pieces(self.answers.pop(0), room)

    def _pieces(self, text: str, room: int) -> Iterator[str]:
        end = Piece("")
        end.id = STOP
        yield from [*map(Piece, text), *([end] if self.stops else [])][:room]

    def last_prompt(self) -> str:
        return "".join(chr(i - 1000) for i in self.asked[-1][0] if i >= 1000)


def session(*answers: str, **options: object) -> Session:
    return Session(Model(list(answers), **options))


def say(session: Session, text: str | None, count: int | None = None) -> str:
    """One turn, stopped after `count` pieces; returns the answer."""
    answer = session.ask(text)
    for number, _ in enumerate(answer, 1):
        if number == count:
            break
    session.keep(answer)
    return answer.text
