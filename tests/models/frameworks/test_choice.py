"""Choice of tokens from the largest logits or all of them, with masks and several draws a sequence. Budget: 1 s."""

import numpy as np
import pytest

from gemkit.engine.interface import Batch, build_batch
from gemkit.engine.sampling import Sampling, adjust, draw, sample
from gemkit.errors import GemkitError
from gemkit.models.frameworks.choice import TOP, Draws, RowLogits, choose, is_argmax, needs_whole, unpack_top

V = 40


@pytest.mark.parametrize(
    "sampling, whole",
    [
        (Sampling(), False),
        (Sampling(temperature=1.0, top_k=64), False),
        (Sampling(temperature=1.0, top_k=TOP + 1), True),
        (Sampling(temperature=1.0), True),
        (Sampling(repetition_penalty=1.1), True),
        (Sampling(logit_bias=((3, 1.0),)), True),
    ],
)
def test_when_the_largest_logits_are_enough(sampling, whole):
    assert needs_whole(sampling) == whole


def test_only_the_most_probable_token_without_its_probability_is_argmax():
    assert is_argmax(Sampling(logprobs=None)) and not is_argmax(Sampling(logprobs=0))
    assert not is_argmax(Sampling(temperature=1.0, top_k=4, logprobs=None))
    assert not is_argmax(Sampling(repetition_penalty=1.1, logprobs=None))


def rows_of(logits: np.ndarray) -> list[RowLogits]:
    ids = np.argsort(-logits, 1, kind="stable").astype(np.int32)
    sums = np.log(np.exp(logits.astype(np.float64)).sum(1))
    return [RowLogits(i, row[i], float(total), row) for i, row, total in zip(ids, logits, sums)]


def batch_of(sampling: Sampling, masks: tuple = ()) -> Batch:
    """Sequences of 2, 4 and 3 new tokens with 1, 3 and 0 draws."""
    ids = [np.arange(count, dtype=np.int32) + 5 for count in (2, 4, 3)]
    return build_batch(
        ids,
        [0, 3, 0],
        (),
        draws=[1, 3, 0],
        sampling=(sampling,) * 3,
        counters=[4, 7, 0],
        history=tuple(np.concatenate([[1, 2, 3], new]).astype(np.int32) for new in ids),
        prompt_lengths=[2, 3, 2],
        masks=masks,
    )


def test_a_draw_stands_after_its_token():
    draws = Draws.of(batch_of(Sampling()))
    assert draws.sequences.tolist() == [0, 1, 1, 1] and draws.ordinals.tolist() == [0, 0, 1, 2]
    assert draws.tokens.tolist() == [1, 3, 4, 5]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=3, logprobs=2),
        Sampling(temperature=0.7, presence_penalty=3.0, frequency_penalty=1.0, repetition_penalty=1.5, seed=9),
    ],
)
def test_every_draw_has_its_own_random_number_and_history(sampling):
    logits = np.random.default_rng(0).standard_normal((4, V)).astype(np.float32) * 2
    batch = batch_of(sampling)
    result = choose(rows_of(logits), Draws.of(batch))
    for r, (b, counter, length) in enumerate([(0, 4, 5), (1, 7, 5), (1, 8, 6), (1, 9, 7)]):
        wanted = sample(logits[r], sampling, counter, batch.history[b][:length], int(batch.prompt_lengths[b]))
        assert result.tokens[r] == wanted[0]
        assert result.logprobs[r] == pytest.approx(wanted[1], abs=1e-5)
        assert result.top_ids[r].tolist() == wanted[2].tolist()


def test_masks_are_obeyed():
    logits = np.random.default_rng(1).standard_normal((4, V)).astype(np.float32) * 3
    allowed = np.random.default_rng(2).random((4, V)) < 0.2
    allowed[2] = True
    words = [np.packbits(np.append(row, np.zeros(24, bool)), bitorder="little").view(np.uint32) for row in allowed]
    masks = (words[0], words[1], None, words[3])
    for sampling in (Sampling(), Sampling(temperature=2.0, seed=1), Sampling(temperature=2.0, logit_bias=((3, 9.0),))):
        draws = Draws.of(batch_of(sampling, masks))
        result = choose(rows_of(logits), draws)
        for r, token in enumerate(result.tokens):
            values = np.where(allowed[r], adjust(logits[r], sampling, np.empty(0, np.int32), 0), -np.inf)
            counter = int(draws.batch.counters[draws.sequences[r]] + draws.ordinals[r])
            assert token == draw(values, sampling, counter) and allowed[r, token]
        assert [draws.needs_whole(r) for r in (0, 2)] == [True, needs_whole(sampling)] and not draws.are_argmax()
    nothing = (np.zeros(2, np.uint32), None, None, None)
    with pytest.raises(GemkitError, match="allows no token"):
        choose(rows_of(logits), Draws.of(batch_of(Sampling(), nothing)))


def test_equal_logits_come_by_their_ids():
    packed = np.array([[3.0, 3.0, 1.0, 9, 4, 2, 2.5], [2.0, 1.0, 0.0, 1, 5, 6, np.nan]], np.float32)
    ids, top, log_sums = unpack_top(packed[:1])
    assert ids.tolist() == [[4, 9, 2]] and top.tolist() == [[3.0, 3.0, 1.0]]
    assert log_sums[0] == pytest.approx(3 + np.log(2.5))
    with pytest.raises(GemkitError, match="not numbers"):
        unpack_top(packed)
