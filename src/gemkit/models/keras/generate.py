"""Generation with a Keras decoder, for a prompt or a batch of them.

Every sequence has the pages of its prompt and answer from the start, and all sequences stay in the batch: so a prompt
runs in one shape (or in chunks of `CHUNK`), every later token in another, and the backend compiles each once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress

import numpy as np

from gemkit.engine.interface import build_batch
from gemkit.engine.sampling import Sampling
from gemkit.errors import UsageError, brief, whole_number
from gemkit.models.frameworks.batch import bucket
from gemkit.models.keras.runner import Cached, KerasRunner

CHUNK = 512  # the most tokens of a prompt in one step


class Generator:
    """A decoder's runner, kept between answers because its steps are compiled."""

    def __init__(self, decoder: Cached) -> None:
        self._decoder = decoder
        self._runner: KerasRunner | None = None

    @property
    def runner(self) -> KerasRunner:
        if self._runner is None:
            self._runner = KerasRunner(self._decoder)
        return self._runner

    def generate(
        self,
        ids: Sequence[int] | Sequence[Sequence[int]],
        max_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
    ) -> list[int] | list[list[int]]:
        """Return the new tokens of a prompt, or of each of a list of prompts; a stop token is the last.

        ids: BOS included. temperature, top_k, top_p, seed: as in `gemkit.engine.sampling.Sampling`, whose tokens these
        are; a prompt's do not depend on the others. stop_ids: the model's if None.
        Raises UsageError for a bad value, and for a prompt that fills the model's context.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, logprobs=None)
        if not isinstance(ids, Sequence | np.ndarray) or isinstance(ids, str | bytes):
            raise UsageError(f"ids are {brief(ids)}; give a list of token ids, or a list of such lists")
        one = len(ids) > 0 and np.ndim(ids[0]) == 0
        prompts = [self._checked(prompt) for prompt in ([ids] if one else ids)]
        most = whole_number(max_tokens)
        if most is None or most < 1:
            raise UsageError(f"max_tokens is {brief(max_tokens)}; give a whole number from 1")
        given = self._decoder.config.stop_token_ids if stop_ids is None else stop_ids
        stop = set(map(whole_number, given)) if isinstance(given, Iterable) else {None}
        if None in stop:
            raise UsageError(f"stop_ids are {brief(stop_ids)}; give a list of token ids")
        try:
            found = self._generate(prompts, most, sampling, stop) if prompts else []
        finally:
            self.runner.clear()
        return found[0] if one else found

    def _checked(self, prompt: Sequence[int]) -> np.ndarray:
        c = self._decoder.config
        array = np.asarray(prompt)
        if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
            raise UsageError("a prompt is a row of one or more token ids")
        if array.min() < 0 or array.max() >= c.vocab_size:
            raise UsageError(f"the prompt has ids that the model lacks; they go from 0 to {c.vocab_size - 1}")
        if len(array) >= c.max_position_embeddings:
            raise UsageError(
                f"the prompt has {len(array)} tokens and the context holds {c.max_position_embeddings}, "
                "the answer included: shorten it"
            )
        return array.astype(np.int32)

    def _generate(
        self, prompts: list[np.ndarray], max_tokens: int, sampling: Sampling, stop: set[int]
    ) -> list[list[int]]:
        runner = self.runner
        limits = [min(max_tokens, self._decoder.config.max_position_embeddings - len(prompt)) for prompt in prompts]
        pages = [-(-(len(prompt) + limit) // runner.page_size) for prompt, limit in zip(prompts, limits)]
        table = np.full((len(prompts), max(pages)), -1, np.int32)
        for b, count in enumerate(pages):
            table[b, :count] = sum(pages[:b]) + np.arange(count)
        runner.reserve([sum(pages)] * len(runner.groups))
        found: list[list[int]] = [[] for _ in prompts]

        def run(which: list[int], parts: list[np.ndarray], firsts: list[int], draws: list[bool], T: int) -> None:
            batch = build_batch(
                parts,
                firsts,
                (table[which],) * len(runner.groups),
                draws=draws,
                sampling=(sampling,) * len(which),
                counters=[len(found[b]) for b in which],
            )
            result = runner.step(batch, at_least=(bucket(len(prompts)), T, 1 + max(pages)))
            for b, token in zip(compress(which, draws), result.tokens, strict=True):
                found[b].append(int(token))

        longest = max(map(len, prompts))
        T = min(bucket(longest), CHUNK)
        for start in range(0, longest, T):
            which = [b for b, prompt in enumerate(prompts) if start < len(prompt)]
            parts = [prompts[b][start : start + T] for b in which]
            run(which, parts, [start] * len(which), [len(prompts[b]) <= start + T for b in which], T)
        everyone = list(range(len(prompts)))
        while any(open := [answer[-1] not in stop and len(answer) < limit for answer, limit in zip(found, limits)]):
            # A finished sequence writes its last token again, at the same position
            tokens = [np.array(answer[-1:], np.int32) for answer in found]
            firsts = [len(prompt) + len(answer) - 1 for prompt, answer in zip(prompts, found)]
            run(everyone, tokens, firsts, open, 1)
        return found
