"""A conversation as token ids, in Gemma's turns:

    <bos><start_of_turn>user
    What is a piece?<end_of_turn>
    <start_of_turn>model
    A part of a word.<end_of_turn>
    <start_of_turn>model

Source: the chat templates that Google publishes with the instruction-tuned models. Gemma has no system turn; its
template puts the system's text in front of the first user's, with a blank line between. The control tokens come in as
ids, so that no content can forge a turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gemkit.errors import GemkitError
from gemkit.text.tokenizer import Tokenizer

Message = Mapping[str, Any]

_ROLES = {"user": "user", "system": "system", "developer": "system", "assistant": "model", "model": "model"}
_BETWEEN = "\n\n"


def render(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
    """Return the ids of a conversation, after one BOS: by the chat template of the tokenizer's model, if it has one.

    Without one, or where it renders Google's turns, they are as in `gemma_turns`.
    """
    template = tokenizer.template
    if template is not None and template.is_own:
        return template.render(messages, add_generation_prompt)
    return gemma_turns(tokenizer, messages, add_generation_prompt)


def gemma_turns(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
    """Return the ids of a conversation in Google's turns, after one BOS.

    messages: {"role": …, "content": …}; the role is user, model (or assistant), system (or developer); the content is a
    string or a list of {"type": "text", "text": …}. add_generation_prompt: open the model's next turn; where the last
    message is the model's, leave its turn open instead, to be continued, without white space at its end.
    Raises GemkitError for an empty conversation, one that the model begins, an unknown role, content that is no text,
    and a vocabulary without turns.
    """
    start = tokenizer.start_of_turn_id
    if start is None:
        raise GemkitError("this vocabulary has no turn tokens: give the prompt as plain text")
    ids, rows = [tokenizer.bos_id], turns(messages)
    if add_generation_prompt and rows[-1][0] == "model":
        last = rows.pop()[1]
    else:
        last = ""
    for role, text in rows:
        ids += turn(tokenizer, role, text)
    if add_generation_prompt:
        ids += [start, *tokenizer.encode(f"model\n{last}", bos=False)]
    return ids


def turn(tokenizer: Tokenizer, role: str, text: str) -> list[int]:
    """Return the ids of one of `turns`, from <start_of_turn> to the line break after <end_of_turn>."""
    start, end = tokenizer.start_of_turn_id, tokenizer.end_of_turn_id
    assert start is not None and end is not None, "callers check that the vocabulary has turns"
    return [start, *tokenizer.encode(f"{role}\n{text}", bos=False), end, *tokenizer.encode("\n", bos=False)]


def turns(messages: Iterable[Message]) -> list[tuple[str, str]]:
    """Return (role, text) for each turn, role "user" or "model", users first and in alternation.

    System text goes in front of the next user's, messages of one role in a row become one turn, both with a blank line
    between. White space around a message is dropped, around system text kept, as the published template does.
    Raises GemkitError as `gemma_turns` does.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise GemkitError("messages is no list: give a list of {'role': …, 'content': …}")
    out: list[tuple[str, list[str]]] = []
    pending: list[str] = []  # system text that waits for a user
    for number, message in enumerate(messages):
        role, text = _read(number, message)
        if role == "system":
            pending.append(text)
            continue
        if role == "model" and pending:
            _append(out, "user", _BETWEEN.join(pending).strip())
            pending = []
        if role == "model" and not out:
            raise GemkitError("the conversation begins with the model: put a user's message first")
        _append(out, role, _BETWEEN.join([*pending, text.strip()]))
        pending = []
    if pending:
        _append(out, "user", _BETWEEN.join(pending).strip())
    if not out:
        raise GemkitError("the conversation is empty: give at least one user's message")
    return [(role, _BETWEEN.join(texts)) for role, texts in out]


def _append(out: list[tuple[str, list[str]]], role: str, text: str) -> None:
    if out and out[-1][0] == role:
        out[-1][1].append(text)
    else:
        out.append((role, [text]))


def _read(number: int, message: Message) -> tuple[str, str]:
    """Return role ("user", "model" or "system") and text of a message."""
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise GemkitError(f"message {number} is {message!r:.80}: give {{'role': …, 'content': …}}")
    role = _ROLES.get(message["role"]) if isinstance(message["role"], str) else None
    if role is None:
        raise GemkitError(f"message {number} has the role {message['role']!r:.80}: choose user, assistant or system")
    content = message["content"]
    if isinstance(content, str):
        return role, content
    if not isinstance(content, (list, tuple)):
        raise GemkitError(f"message {number} has {type(content).__name__} for content: give a string")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise GemkitError(f"message {number} has a part that is no text: give {{'type': 'text', 'text': …}}")
        texts.append(text if role == "system" else text.strip())
    return role, "".join(texts)
