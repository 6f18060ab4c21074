"""Results of a model: pieces of a stream, completions with their usage, scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gemkit.engine.request import Request, Token

TopLogprobs = tuple[tuple[int, float], ...]


class Piece(str):
    """The text that one token added, possibly empty: a string with attributes.

    id: the token.
    logprob: natural logarithm of its probability; None unless `logprobs` was given.
    top_logprobs: pairs (id, logprob) of the most probable tokens, best first.
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

    prompt_tokens: tokens of the prompt, BOS included.
    completion_tokens: tokens of the answer, the stop token included.
    first_token_seconds: from the request to its first token; 0 if there is none.
    decode_rate: tokens per second after the first one; 0 if there is none.
    """

    prompt_tokens: int
    completion_tokens: int
    first_token_seconds: float
    decode_rate: float

    @property
    def prefill_rate(self) -> float:
        """Tokens of the prompt per second until the first token; 0 before that."""
        return self.prompt_tokens / self.first_token_seconds if self.first_token_seconds > 0 else 0.0


class Completion(str):
    """A generated text: a string with attributes.

    ids: the generated tokens, the model's stop token included if there was one (it adds no text).
    finish_reason: "stop" (stop token or stop string), "length" (max_tokens or the end of the context) or "cancelled".
    logprobs: natural log-probability of each id; None unless `logprobs` was given.
    top_logprobs: per id, pairs (id, logprob) of the most probable tokens, best first.
    usage: tokens and times.
    """

    ids: list[int]
    finish_reason: str
    logprobs: list[float] | None
    top_logprobs: list[TopLogprobs]
    usage: Usage

    @classmethod
    def _of(cls, request: Request, count: int | None = None) -> Completion:
        """Return the completion of a request's first tokens, by default of all."""
        tokens = request.tokens[:count]
        completion = cls("".join([token.text for token in tokens]))
        completion.ids = [token.id for token in tokens]
        whole = len(tokens) == len(request.tokens)
        completion.finish_reason = (request.finish_reason if whole else None) or "cancelled"
        asked = request.sampling.logprobs is not None
        completion.logprobs = [token.logprob for token in tokens] if asked else None
        completion.top_logprobs = [token.top for token in tokens]
        completion.usage = Usage(request.prompt_length, len(tokens), request.first_token_seconds, request.decode_rate)
        return completion

    @property
    def text(self) -> str:
        """The text as a plain string."""
        return str.__str__(self)


@dataclass(frozen=True, eq=False)
class Score:
    """Log-probabilities of the tokens of a text.

    ids: all its tokens, BOS first if the text was a string.
    logprobs: float32 [len(ids) - 1], natural log-probability of ids[1:], each given all before it.
    """

    ids: list[int]
    logprobs: NDArray[np.float32]

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-probability; infinity where that is too large for a float."""
        return perplexity(float(self.logprobs.mean(dtype=np.float64)))


def perplexity(mean: float) -> float:
    """Return exp(-mean) of a mean log-probability; infinity where that is too large for a float."""
    try:
        return math.exp(-mean)
    except OverflowError:
        return math.inf
