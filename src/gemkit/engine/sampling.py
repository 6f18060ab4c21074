"""Sampling: the settings of one request, and the choice of the next token in NumPy.

Runners choose tokens on their own; `sample` is the definition they are tested against. V is the vocabulary's size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np

from gemkit.errors import UsageError, brief, whole_number

MAX_LOGPROBS = 20


@dataclass(frozen=True)
class Sampling:
    """Settings of one request, checked on construction (UsageError), applied in this order.

    repetition_penalty: logits of all ids so far, prompt included, are divided by it if positive, else multiplied.
    presence_penalty: subtracted from the logit of every generated id.
    frequency_penalty: subtracted once for each time an id was generated.
    logit_bias: pairs (id, value), or a mapping; added to the logits.
    temperature: 0 takes the largest logit, the lowest id among equals; otherwise logits are divided by it.
    top_k: keep the k largest; 0 is off.
    top_p: keep the fewest, largest first, that make up this share of what is left; 1 is off.
    min_p: keep those with at least this share of the largest probability; 0 is off.
    seed: 0 to 2^64 - 1; a request's n-th token depends on the seed, n and the logits alone.
    logprobs: number of most probable tokens to report with each token, its own log-probability in any case. None
        reports nothing, which lets a runner leave out most of the vocabulary; the tokens are the same.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    logprobs: int | None = 0

    def __post_init__(self) -> None:
        number, whole = self._number, self._whole
        number("temperature", 0, 1e6, "0 is greedy, 1 leaves the probabilities as they are")
        whole("top_k", 0, 2**31 - 1, "0 turns it off")
        number("top_p", 0, 1, "1 turns it off", above=True)
        number("min_p", 0, 1, "0 turns it off")
        number("repetition_penalty", 0.01, 100, "1 turns it off")
        number("presence_penalty", -1000, 1000, "0 turns it off")
        number("frequency_penalty", -1000, 1000, "0 turns it off")
        whole("seed", 0, 2**64 - 1, "leave it out for a random one")
        if self.logprobs is not None:
            whole("logprobs", 0, MAX_LOGPROBS, "0 reports the chosen token only")
        object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))

    @property
    def has_penalty(self) -> bool:
        """True if the choice depends on earlier ids."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise UsageError if a biased id is not in the vocabulary."""
        for token, _ in self.logit_bias:
            if token >= vocab_size:
                raise UsageError(f"logit_bias names token {token}; ids of this model go from 0 to {vocab_size - 1}")

    def _number(self, name: str, low: float, high: float, off: str, above: bool = False) -> None:
        value = getattr(self, name)
        # A NaN fails every comparison.
        if not _is_real(value) or not (low < value if above else low <= value) or not value <= high:
            bounds = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
            raise UsageError(f"{name} is {brief(value)}; give a number {bounds} ({off})")
        object.__setattr__(self, name, float(value))

    def _whole(self, name: str, low: int, high: int, off: str) -> None:
        value = whole_number(getattr(self, name))
        if value is None or not low <= value <= high:
            given = brief(getattr(self, name))
            raise UsageError(f"{name} is {given}; give a whole number from {low} to {high} ({off})")
        object.__setattr__(self, name, value)


SAMPLING = np.dtype(
    [
        ("row", np.int64),  # index of the sequence in the step
        ("draws", np.int64),
        ("counter", np.int64),
        ("prompt_length", np.int64),
        ("history_start", np.int64),  # history_start <= i < history_end of the step's histories, one after the other
        ("history_end", np.int64),
        ("bias_start", np.int64),  # likewise of the biases
        ("bias_end", np.int64),
        ("top_k", np.int64),
        ("logprobs", np.int64),  # -1: None
        ("seed", np.uint64),
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("repetition_penalty", np.float64),
        ("presence_penalty", np.float64),
        ("frequency_penalty", np.float64),
    ]
)
"""One record per sequence that draws: `Sampling` without its biases, after the sequence's data of this step.

All fields have 8 bytes, so that there is no padding. A step changes the fields up to `history_end` alone.
"""

_SCALARS = SAMPLING.names[8:]


def sampling_records(settings: Sequence[Sampling]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `SAMPLING` records [n], the fields of a step 0, and all biases: ids int32 and values float32."""
    records = np.zeros(len(settings), SAMPLING)
    bias = []
    for record, sampling in zip(records, settings):
        record["bias_start"] = len(bias)
        bias += sampling.logit_bias
        record["bias_end"] = len(bias)
        for name in _SCALARS:
            record[name] = -1 if (value := getattr(sampling, name)) is None else value
    return records, np.array([i for i, _ in bias], np.int32), np.array([v for _, v in bias], np.float32)


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _pairs(bias: object) -> tuple[tuple[int, float], ...]:
    """Return biases as pairs in the order of their ids; raises UsageError for any that is not one."""
    pairs = []
    try:
        items = list(bias.items()) if isinstance(bias, Mapping) else [(token, value) for token, value in bias]
    except (TypeError, ValueError):
        raise UsageError(
            f"logit_bias is {brief(bias)}; give a dictionary of token ids and numbers, such as {{5: -2.0}}"
        ) from None
    for key, value in items:
        token = whole_number(key)
        if token is None or not 0 <= token < 2**31:
            raise UsageError(f"logit_bias names token {brief(key)}; give ids, which are whole numbers from 0")
        if not _is_real(value) or not abs(value) <= 1e6:
            raise UsageError(f"logit_bias adds {brief(value)} to token {token}; give a number from -1e6 to 1e6")
        pairs.append((token, float(value)))
    if len({token for token, _ in pairs}) < len(pairs):
        raise UsageError("logit_bias names a token twice; give each id once")
    return tuple(sorted(pairs))


def uniform(seed: int, counter: int) -> float:
    """Return the counter-th random number of a seed, in [0, 1): splitmix64 (Steele, Lea & Flood 2014), top 53 bits."""
    mask = 2**64 - 1
    z = (seed + 0x9E3779B97F4A7C15 * (counter + 1)) & mask
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    return (z >> 11) * 2.0**-53


def adjust(logits: np.ndarray, sampling: Sampling, history: np.ndarray, prompt_length: int) -> np.ndarray:
    """Return a copy of the logits, float32 [V], after penalties and bias, in float32 arithmetic."""
    logits = np.array(logits, np.float32)
    if sampling.has_penalty:
        seen = np.unique(history)
        value, penalty = logits[seen], np.float32(sampling.repetition_penalty)
        if penalty != 1:
            logits[seen] = np.where(value > 0, value / penalty, value * penalty)
        generated, counts = np.unique(history[prompt_length:], return_counts=True)
        logits[generated] -= np.float32(sampling.presence_penalty)
        logits[generated] -= np.float32(sampling.frequency_penalty) * counts.astype(np.float32)
    for token, value in sampling.logit_bias:
        logits[token] += np.float32(value)
    return logits


def kept(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Filter adjusted logits [V]; return ids, most probable first, and their weights in float64.

    A weight is exp((l - max l) / temperature), so that the largest is 1. The temperature must be above 0.
    """
    ids = np.argsort(-logits, kind="stable")
    if sampling.top_k:
        ids = ids[: sampling.top_k]
    values = logits[ids].astype(np.float64)
    with np.errstate(over="ignore"):
        weights = np.exp((values - values[0]) / sampling.temperature)
    if sampling.top_p < 1:
        sums = np.cumsum(weights)
        count = int(np.searchsorted(sums, sampling.top_p * sums[-1])) + 1
        ids, weights = ids[:count], weights[:count]
    if sampling.min_p > 0:
        count = int(np.count_nonzero(weights >= sampling.min_p))
        ids, weights = ids[:count], weights[:count]
    return ids, weights


def draw(logits: np.ndarray, sampling: Sampling, counter: int) -> int:
    """Return the place of the token that is chosen from adjusted logits [V].

    counter: how many tokens the request has generated, which is the number of the random number that is used.
    """
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    ids, weights = kept(logits, sampling)
    sums = np.cumsum(weights)
    return int(ids[np.searchsorted(sums, uniform(sampling.seed, counter) * sums[-1], side="right")])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return natural log-probabilities, float64 [V]."""
    shifted = logits.astype(np.float64) - np.float64(logits.max())
    return shifted - math.log(np.exp(shifted).sum())


def sample(
    logits: np.ndarray, sampling: Sampling, counter: int, history: np.ndarray, prompt_length: int
) -> tuple[int, float, np.ndarray, np.ndarray]:
    """Choose the next token; return it, its log-probability, and the most probable ids with theirs.

    logits: float32 [V]. counter: how many tokens the request has generated. history: all its ids, int32, of which the
    first ``prompt_length`` are the prompt; not read unless there is a penalty. The log-probabilities are those of the
    logits as given, before penalties, bias and temperature.
    """
    token = draw(adjust(logits, sampling, history, prompt_length), sampling, counter)
    logprobs = log_softmax(logits)
    top = np.argsort(-logits, kind="stable")[: sampling.logprobs or 0].astype(np.int32)
    return token, float(logprobs[token]), top, logprobs[top].astype(np.float32)
