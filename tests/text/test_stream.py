"""Streams give whole characters and the text of `decode`; stop strings do not depend on the cuts. Budget: 10 s."""

import random

import pytest
from text.fuzz import strings

from gemkit.errors import GemkitError
from gemkit.text.stream import StopMatcher, StreamDecoder


def streamed(tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(i) for i in ids), decoder.flush()]


def test_streams_of_texts_have_whole_characters(gemma):
    t = gemma.tokenizer
    for text in strings(1000, seed=3):
        parts = streamed(t, t.encode(text))
        assert "".join(parts) == text and parts[-1] == "" and "\ufffd" not in "".join(parts)


def test_streams_of_random_ids_are_what_decode_gives(gemma3):
    t, rng = gemma3.tokenizer, random.Random(4)
    low = t.piece_to_id("<0x00>")
    for _ in range(3000):
        kinds = rng.choices(["byte", "high", "any", "control"], [4, 4, 1, 1], k=rng.randrange(30))
        ids = [
            {
                "byte": low + rng.randrange(256),
                "high": low + rng.randrange(0x80, 0x100),
                "any": rng.randrange(t.vocab_size),
                "control": rng.randrange(110),
            }[kind]
            for kind in kinds
        ]
        assert "".join(streamed(t, ids)) == t.decode(ids)


def test_an_incomplete_character_waits_and_the_decoder_starts_anew(gemma3):
    t = gemma3.tokenizer
    euro = [t.piece_to_id(f"<0x{b:02X}>") for b in "€".encode()]
    assert streamed(t, euro) == ["", "", "€", ""]
    decoder = StreamDecoder(t)
    assert [decoder.push(euro[0]), decoder.push(euro[1]), decoder.flush()] == ["", "", "\ufffd"]
    assert [decoder.flush(), *map(decoder.push, euro)] == ["", "", "", "€"]


def first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The rule, letter by letter: the first stop string to be complete ends the text, the longest of several."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end - max(map(len, done))], True
    return text, False


def test_stop_strings_do_not_depend_on_the_cuts():
    rng, stopped = random.Random(5), 0
    for _ in range(20_000):
        text = "".join(rng.choice("ab ") for _ in range(rng.randrange(15)))
        stops = ["".join(rng.choice("ab ") for _ in range(rng.randrange(1, 6))) for _ in range(rng.randrange(1, 4))]
        matcher, shown, rest = StopMatcher(stops), "", text
        while rest:
            size = rng.randrange(len(rest) + 1)
            shown += matcher.push(rest[:size])
            rest = rest[size:]
            assert first_stop(text, stops)[0].startswith(shown)
        shown += matcher.flush()
        assert (shown, matcher.stopped) == first_stop(text, stops), (text, stops)
        assert matcher.flush() == "" and (not matcher.stopped or matcher.push("x") == "")
        stopped += matcher.stopped
    assert 5000 < stopped < 19_000


def test_no_more_is_held_back_than_needed():
    matcher = StopMatcher(["</s>", "\n\n"])
    assert [matcher.push(part) for part in ("ab<", "/x", "\n", "y\n", "\nz")] == ["ab", "</x", "", "\ny", ""]
    assert matcher.stopped


@pytest.mark.parametrize("stops", [[""], ["a", ""], [3]])
def test_a_stop_string_is_a_string_of_at_least_one_character(stops):
    with pytest.raises(GemkitError, match="stop strings"):
        StopMatcher(stops)
