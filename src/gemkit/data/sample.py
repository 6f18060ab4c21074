"""A row as a sample: its tokens, and the tokens that carry loss.

    format                      tokens                                        loss on
    messages, chat              <bos>, the turns of the model's chat template the assistant's text and <end_of_turn>
    prompt, completion, chat    the same, as a user's turn and an answer      the same
    prompt, completion, none    <bos>, prompt, completion, <eos>              the completion and <eos>
    text                        <bos>, text, <eos>                            all after <bos>

The line break after <end_of_turn> carries no loss: a model stops before it. Texts become tokens by `Tokenizer.encode`,
so that none of them makes a control token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemkit.data.rows import Conversation, Row, RowError, Text
from gemkit.errors import GemkitError, UsageError
from gemkit.text.chat import render, turn, turns
from gemkit.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sample:
    """A row after templating and tokenizing.

    tokens: int32 [T], one BOS first. loss: bool [T]; where True, tokens[t] is a target, predicted from tokens[:t].
    loss[0] is False.
    """

    tokens: np.ndarray
    loss: np.ndarray


class LongRow(RowError):
    """A row with more tokens than the limit."""


class SampleBuilder:
    """Makes samples of rows.

    max_length: of a sample, in tokens. template: "chat", or "none" for pairs without turns. mask_prompt: no loss on
    prompts; False puts loss on all tokens but BOS. truncate: cut longer rows at the end; False raises LongRow.
    truncated: number of rows that were cut so far.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_length: int,
        template: str = "chat",
        mask_prompt: bool = True,
        truncate: bool = True,
    ) -> None:
        own = tokenizer.template is not None and tokenizer.template.is_own
        if template == "chat" and not own and tokenizer.start_of_turn_id is None:
            raise UsageError("this vocabulary has no turn tokens: give prompt and completion with template='none'")
        self.truncated = 0
        self._tokenizer, self._own = tokenizer, own
        self._max_length, self._template = max_length, template
        self._mask_prompt, self._truncate = mask_prompt, truncate
        self._opening = tokenizer.encode("model\n", bos=False)
        self._after = len(tokenizer.encode("\n", bos=False))

    def build(self, row: Row) -> Sample:
        """Return the sample of a row.

        Raises RowError for a row that the chat template refuses and for one without loss within the limit, LongRow, and
        UsageError for a conversation without a chat template.
        """
        ids, loss = self._ids(row)
        if len(ids) > self._max_length:
            if not self._truncate:
                raise LongRow(row.where, f"longer than {self._max_length:,} tokens", f"it has {len(ids):,}")
            ids, loss = ids[: self._max_length], loss[: self._max_length]
            if not any(loss):
                reason = f"no token with loss within {self._max_length:,} tokens"
                raise RowError(row.where, reason, "the prompt fills them: raise max_length")
            self.truncated += 1
        tokens, mask = np.array(ids, np.int32), np.array(loss, np.bool_)
        if not self._mask_prompt:
            mask[1:] = True
        return Sample(tokens, mask)

    def _ids(self, row: Row) -> tuple[list[int], list[bool]]:
        """Return the ids of a row, and for each if it carries loss."""
        t, content = self._tokenizer, row.content
        if isinstance(content, Text):
            ids = t.encode(content.text)
            return [*ids, t.eos_id], [False] + [True] * len(ids)
        if self._template == "chat":
            if isinstance(content, Conversation):
                messages: Sequence[Mapping[str, Any]] = content.messages
            else:
                messages = [
                    {"role": "user", "content": content.prompt},
                    {"role": "assistant", "content": content.completion},
                ]
            return self._own_turns(messages, row.where) if self._own else self._gemma_turns(messages)
        if isinstance(content, Conversation):
            raise UsageError(f"{row.where}: messages need the chat template: leave out template='none'")
        # Apart from each other, as a model reads a prompt and then goes on
        prompt, completion = t.encode(content.prompt), t.encode(content.completion, bos=False)
        return [*prompt, *completion, t.eos_id], [False] * len(prompt) + [True] * (len(completion) + 1)

    def _gemma_turns(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[bool]]:
        ids, loss = [self._tokenizer.bos_id], [False]
        for role, text in turns(messages):
            part = turn(self._tokenizer, role, text)
            ids += part
            if role == "model" and text:
                # The first piece of the answer may hold the line break before it
                start = 1 + _common(part[1:], self._opening)
                stop = len(part) - self._after
                loss += [start <= at < stop for at in range(len(part))]
            else:
                loss += [False] * len(part)
        return ids, loss

    def _own_turns(self, messages: Sequence[Mapping[str, Any]], where: str) -> tuple[list[int], list[bool]]:
        """Find the answers in a conversation that the model's own template renders, by rendering its beginnings."""
        t = self._tokenizer
        try:
            ids = render(t, messages, add_generation_prompt=False)
            loss = [False] * len(ids)
            for number, message in enumerate(messages):
                if message["role"] not in ("assistant", "model"):
                    continue
                if number and messages[number - 1]["role"] in ("assistant", "model"):
                    raise RowError(where, "two messages of the assistant in a row", "join them")
                prompt = render(t, messages[:number])
                whole = render(t, messages[: number + 1], add_generation_prompt=False)
                start, stop = _common(ids, prompt), _common(ids, whole)
                # A piece may hold the end of the prompt and the beginning of the answer
                if start < len(prompt) - 1 or stop < len(whole) - 1:
                    raise RowError(
                        where,
                        "the chat template renders the beginning of a conversation otherwise than in the whole",
                        "split it into rows with one answer each, or choose Google's turns",
                    )
                while stop > start and not t.decode([ids[stop - 1]], skip_control=False).strip():
                    stop -= 1
                loss[start:stop] = [True] * (stop - start)
        except RowError:
            raise
        except GemkitError as error:
            raise RowError(where, "the chat template refuses the row", str(error)) from None
        return ids, loss


def _common(ids: Sequence[int], others: Sequence[int]) -> int:
    """Return the length of the common beginning."""
    return next((at for at, (one, other) in enumerate(zip(ids, others)) if one != other), min(len(ids), len(others)))
