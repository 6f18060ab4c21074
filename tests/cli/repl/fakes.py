"""A model for the chat's own logic: a token is a character, and the answers are written down beforehand."""

from collections.abc import Iterator
from types import SimpleNamespace

from gemkit.api.options import GenerateOptions
from gemkit.api.output import Completion, Usage
from gemkit.cli.repl.session import Session
from gemkit.text.chat import render

STOP = 106


class Stream:
    """The pieces of a text, each with an id, and the completion of those that were read."""

    def __init__(self, pieces: list[tuple[str, int]], prompt_tokens: int) -> None:
        self._pieces, self._read, self._prompt_tokens = iter(pieces), [], prompt_tokens
        self._reason = "cancelled"

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            text, token = next(self._pieces)
        except StopIteration:
            self._reason = "stop" if self._read and self._read[-1][1] == STOP else "length"
            raise
        self._read.append((text, token))
        return text

    def close(self) -> None:
        pass

    @property
    def completion(self) -> Completion:
        completion = Completion("".join(text for text, _ in self._read))
        completion.ids = [token for _, token in self._read]
        completion.finish_reason = self._reason
        completion.usage = Usage(self._prompt_tokens, len(self._read), 0.1, 10.0)
        return completion


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

    def stream(self, ids: list[int], options: GenerateOptions) -> Stream:
        self.asked.append((list(ids), options))
        most = min(self.ctx_size - len(ids), options.max_tokens)
        pieces = [*((character, 0) for character in self.answers.pop(0)), *([("", STOP)] if self.stops else [])]
        return Stream(pieces[:most], len(ids))

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
    return answer.close().text
