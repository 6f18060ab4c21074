"""Random strings of real prose and code, of a vocabulary's own pieces, and of what is rare."""

import gzip
import itertools
import json
import random

from testdata import data_file

DATA = data_file()
CONTROL = (
    "<bos> <eos> <pad> <unk> <mask> <2mass> [@BOS@] [multimodal] <unused0> <unused98> <unused99> <start_of_turn> "
    "<end_of_turn> <start_of_image> <end_of_image> <image_soft_token> <|fim_prefix|> <|fim_middle|> <|file_separator|>"
).split()
TAGS = (
    "<table> </table> <tr> <h1> </h6> <b> </b> <i> <code> </code> <sup> [toxicity=0] <a> <div> </iframe> <0x41>".split()
)
SCRIPTS = "привет 你好世界 こんにちは 안녕하세요 שלום مرحبا नमस्ते สวัสดี γειά Ťažký naïve Straße e\u0301 ﬁ Ⅷ ½".split()
SYMBOLS = [
    "😀",
    "👩‍👩‍👧",
    "🏳️‍🌈",
    "👍🏽",
    "🇫🇷",
    "\ufeff",
    "\u200b",
    "\u00a0",
    "\u3000",
    "\u2028",
    "\r\n",
    "\x85",
    "’",
    "…",
    "½",
]
RARE = ["\0", "\x01", "\x7f", "\u0378", "\U00013000", "\ue000", "\ufffd", "\uffff", "\U0010ffff", "𒀀", "\ud7ff"]
PLANES = [(0, 0x7F), (0x80, 0x24F), (0x370, 0x1FFF), (0x2000, 0x2BFF), (0x3040, 0xD7FF), (0x10000, 0x10FFFF)]


def _prose() -> str:
    with gzip.open(DATA / "humaneval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        code = "".join(json.loads(line)["prompt"] for line in itertools.islice(lines, 60))
    return (DATA / "text_wikitext2" / "valid.txt").read_text(encoding="utf-8")[:200_000] + code


def strings(count: int, seed: int, pieces: list[str], control: bool = True, block: bool = False) -> list[str]:
    """Strings of 0 to 10 parts: prose, code, pieces of the vocabulary, scripts, runs of white space, rare characters.

    control: with control tokens written out. block: with U+2581, the sign for a space.
    """
    rng = random.Random(seed)
    prose = _prose() if control else _prose().replace("<unk>", "unknown")  # written out all over WikiText

    def cut() -> str:
        start = rng.randrange(len(prose))
        return prose[start : start + rng.randrange(120)]

    makers = [
        cut,
        cut,
        lambda: "".join(rng.choices(pieces, k=rng.randrange(1, 6))),
        lambda: "".join(rng.choices(pieces, k=rng.randrange(1, 6))),
        lambda: rng.choice(" \n\t") * rng.choice([1, 1, 2, 3, 4, 8, 15, 16, 17, 30, 31, 32, 33, 47, 64, 95]),
        lambda: "".join(rng.choices(" \n\t\r", k=rng.randrange(1, 12))),
        lambda: rng.choice(TAGS),
        lambda: rng.choice(SCRIPTS) + rng.choice(["", " "]),
        lambda: rng.choice(SYMBOLS),
        lambda: rng.choice(RARE),
        lambda: "".join(rng.choices("0123456789.,-%$", k=rng.randrange(1, 12))),
        lambda: "".join(rng.choices("abcdefgh ETAOIN'\"{}();=<>/|_[]", k=rng.randrange(1, 20))),
        lambda: "".join(chr(rng.randint(*rng.choice(PLANES))) for _ in range(rng.randrange(1, 5))),
    ]
    if control:
        makers += [lambda: rng.choice(CONTROL), lambda: rng.choice(["<", ""]) + rng.choice(CONTROL)[rng.randrange(3) :]]
    if block:
        makers += [lambda: "▁" * rng.randrange(1, 5), lambda: "▁ ▁"]
    made = ("".join(rng.choice(makers)() for _ in range(rng.randrange(11))) for _ in range(count))
    return list(made) if block else [text.replace("▁", "_") for text in made]
