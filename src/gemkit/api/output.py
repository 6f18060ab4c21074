"""Results of a model: pieces of a stream, completions with their usage, scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gemkit.engine.request import Request, Token

TopLogprobs = tuple[tuple[int, float], ...]


class Piece(str):
    """The text that one token added, possibly empty.

    id: the token. logprob: natural logarithm of its probability, None unless logprobs were asked for. top_logprobs:
    pairs (id, logprob), best first.
    """

    id: int
    logprob: float | None
    top_logprobs: TopLogprobs

    @classmethod
    def _of(cls, token: Token) -> Piece:
        piece = cls(token.text)
        piece.id, piece.logprob, piece.top_logprobs = token.id, token.logprob, token.top
        return piece


@dataclass(frozen=True)
class Usage:
    """Tokens and times of one request.

    first_token_seconds: from the request to its first token. decode_rate: tokens per second after that one.
    """

    prompt_tokens: int
    completion_tokens: int
    first_token_seconds: float
    decode_rate: float


class Completion(str):
    """A generated text: a string with its facts.

    ids: the generated tokens, the model's stop token included if there was one (it adds no text).
    finish_reason: "stop" (stop token or stop string), "length" (max_tokens or the context's end) or "cancelled".
    logprobs: natural log-probability of each id; None unless they were asked for. top_logprobs: per id, pairs (id,
    logprob), best first.
    """

    ids: list[int]
    finish_reason: str
    logprobs: list[float] | None
    top_logprobs: list[TopLogprobs]
    usage: Usage

    @classmethod
    def _of(cls, request: Request) -> Completion:
        completion = cls("".join([token.text for token in request.tokens]))
        completion.ids = [token.id for token in request.tokens]
        completion.finish_reason = request.finish_reason or "cancelled"
        asked = request.sampling.logprobs is not None
        completion.logprobs = [token.logprob for token in request.tokens] if asked else None
        completion.top_logprobs = [token.top for token in request.tokens]
        completion.usage = Usage(
            request.prompt_length, len(request.tokens), request.first_token_seconds, request.decode_rate
        )
        return completion

    @property
    def text(self) -> str:
        return str.__str__(self)


@dataclass(frozen=True, eq=False)
class Score:
    """How likely a text is.

    ids: all its tokens, BOS first if the text was a string.
    logprobs: float32 [len(ids) - 1], natural log-probability of ids[1:], each given all before it.
    """

    ids: list[int]
    logprobs: np.ndarray

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability; infinity where that is too large for a float."""
        return perplexity(float(self.logprobs.mean(dtype=np.float64)))


def perplexity(mean: float) -> float:
    """Returns exp(-mean) of a mean log-probability; infinity where that is too large for a float."""
    try:
        return math.exp(-mean)
    except OverflowError:
        return math.inf
