"""Random strings that tokenizers disagree on when something is wrong."""

import random

CONTROL_LITERALS = (
    "<bos> <eos> <pad> <unk> <mask> <start_of_turn> <end_of_turn> <start_of_image> <end_of_image> "
    "<image_soft_token> <|fim_prefix|> <|fim_suffix|> <|file_separator|>"
).split()
_WORDS = "the of and Gemma hello naïve Straße don't def return x_1 http://a.b/c?d=e 3.14159 2024 1e-7 ISN'T".split()
_TAGS = "<table> </table> <h1> </blockquote> <b> </b> <i> <ul> <li> <br/> <a href='x'> [multimodal] <unused7>".split()
_SCRIPTS = ["привет", "你好世界", "こんにちは", "안녕", "שלום", "مرحبا", "नमस्ते", "ไทย", "ελληνικά", "Ł", "ñ", "e\u0301"]
_EMOJI = ["😀", "👩‍👩‍👧", "🏳️‍🌈", "👍🏽", "🇫🇷", "\ufeff", "\u200b", "\u00a0", "\u3000", "ﬁ", "①", "Ⅷ"]
_RARE = ["\x00", "\x01", "\x7f", "\u0378", "\U00013000", "\U0001f9ff", "\ue000", "\uffff", "\U0010ffff", "𒀀", "\u2028"]


def _part(rng: random.Random) -> str:
    kind = rng.randrange(13)
    if kind < 3:
        return rng.choice(_WORDS) + rng.choice(["", " ", " ", ", ", ". "])
    if kind == 3:
        return " " * rng.choice([1, 2, 3, 4, 7, 15, 16, 30, 31, 32, 33, 40, 63, 100])
    if kind == 4:
        return rng.choice("\n\t") * rng.choice([1, 2, 3, 5, 16, 30, 31, 32, 33, 64, 70])
    if kind == 5:
        return "".join(rng.choice("0123456789.,-") for _ in range(rng.randrange(1, 12)))
    if kind == 6:
        return rng.choice(_TAGS)
    if kind == 7:
        return rng.choice(CONTROL_LITERALS)
    if kind == 8:
        return rng.choice(_EMOJI)
    if kind == 9:
        return rng.choice(_RARE)
    if kind == 10:
        return rng.choice(_SCRIPTS)
    if kind == 11:
        ranges = [(1, 0x7F), (0xA0, 0x24F), (0x370, 0xFFF), (0x2000, 0x2BFF), (0x3040, 0xD7FF), (0x1F300, 0x1FAFF)]
        low, high = rng.choice([*ranges, (0x10000, 0x10FFFF)])
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randrange(1, 6)))
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz ETAOIN'\r\n{}();=<>/|") for _ in range(rng.randrange(1, 20)))


def strings(count: int, seed: int) -> list[str]:
    """Strings of 0 to 12 random parts, without U+2581: there `tokenizers` itself depends on the added tokens."""
    rng = random.Random(seed)
    made = ("".join(_part(rng) for _ in range(rng.randrange(13))) for _ in range(count))
    return [text.replace("\N{LOWER ONE EIGHTH BLOCK}", "") for text in made]
