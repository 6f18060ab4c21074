"""A conversation that outgrows the context: which of its oldest messages are left out."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]


def visible(messages: Sequence[Message], dropped: int) -> list[Message]:
    """Return the messages without the oldest `dropped`; a system message at the start stays and is not counted."""
    system = _system(messages)
    return [*messages[:system], *messages[system + dropped :]]


def shift(
    messages: Sequence[Message],
    dropped: int,
    count: Callable[[list[Message]], int],
    context: int,
    max_tokens: int | None = None,
) -> int:
    """Return how many of the oldest messages to leave out: `dropped` as before while there is space for an answer.

    count: tokens of a prompt. The space is `max_tokens`, at most a quarter of the context. Where it is missing, the
    rest is to take half of the context: whatever follows a change has to be read again, so that it should be rare.
    """
    space = max(1, min(context // 4, max_tokens or context))
    if count(visible(messages, dropped)) <= context - space:
        return dropped
    return drop_oldest(messages, count, context // 2)


def drop_oldest(messages: Sequence[Message], count: Callable[[list[Message]], int], limit: int) -> int:
    """Return how many of the oldest messages to leave out so that the rest takes at most `limit` tokens.

    count: tokens of a list of messages. The rest begins with a user's message; the last of those always stays, so that
    the result may still be over the limit.
    """
    start = _system(messages)
    choices = [at - start for at in range(start, len(messages)) if messages[at]["role"] == "user"]
    if not choices:
        return 0
    # Fewer messages never take more tokens.
    found = bisect_left(choices, True, key=lambda dropped: count(visible(messages, dropped)) <= limit)
    return choices[min(found, len(choices) - 1)]


def _system(messages: Sequence[Message]) -> int:
    return 1 if messages and messages[0]["role"] in ("system", "developer") else 0
