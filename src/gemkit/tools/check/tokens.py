"""Rules about the tokenizer and the ids that begin and end a text."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gemkit.arch.config import STOP_TOKEN_IDS
from gemkit.errors import listed
from gemkit.text.special import CORE, END_OF_TURN, START_OF_TURN, is_control_piece
from gemkit.tools.check.finding import ERROR, WARNING, Hit, rule
from gemkit.tools.check.subject import GGUF, HF, Subject
from gemkit.tools.check.template import closer

# Rows that published files have beyond their pieces: 64 in Gemma 3, 128 in Flax and some exports of Gemma 1
_SPARE_ROWS = 128
# Published text models have this piece in the tokenizer and no row for it.
_IMAGE = "<image_soft_token>"


def _eos(s: Subject) -> int:
    return s.tokens.ids.get("<eos>", CORE["eos"][1]) if s.tokens else CORE["eos"][1]


@rule(
    "stop-turn",
    ERROR,
    "An instruction-tuned model's stop ids lack <end_of_turn> (106 in Gemma 3, 107 in Gemma 1 and 2).",
    why="it ends its answers with that token: generation runs on, talking to itself, until the length limit",
    remedy="set eos_token_id in generation_config.json to [1, 106] (Gemma 1 and 2: [1, 107])",
    causes=("stop-text",),
)
def stop_turn(s: Subject) -> Iterator[Hit]:
    if s.kind != HF or not s.answers or s.end_of_turn is None or closer(s) not in (None, END_OF_TURN):
        return
    if not s.said_eos and not s.broken:
        yield "config.json: eos_token_id", "it is missing, and there is no generation_config.json"
    for where, ids in s.said_eos.items():
        if s.end_of_turn not in ids:
            yield where, f"it is {listed(ids)}, without {s.end_of_turn}" if ids else "it is missing"


@rule(
    "stop-turn-gguf",
    WARNING,
    "An instruction-tuned GGUF file names <end_of_turn> neither as its end of text nor as its end of turn.",
    why="programs that do not search the vocabulary for that piece let the answers run on",
    remedy="set tokenizer.ggml.eot_token_id to 106 (Gemma 1 and 2: 107) when converting",
)
def stop_turn_gguf(s: Subject) -> Iterator[Hit]:
    ids = [i for row in s.said_eos.values() for i in row]
    if closer(s) not in (None, END_OF_TURN):
        return
    if s.kind == GGUF and s.answers and s.end_of_turn is not None and s.end_of_turn not in ids:
        yield f"{s.config_file}: tokenizer.ggml.eot_token_id", f"the end ids are {listed(ids) or 'missing'}"


@rule(
    "stop-text",
    WARNING,
    "The stop ids lack <eos> (1).",
    why="a model that ends the whole text, as pretrained ones do, runs on",
    remedy="put 1 into eos_token_id in generation_config.json, next to the end of turn",
)
def stop_text(s: Subject) -> Iterator[Hit]:
    for where, ids in s.said_eos.items():
        if s.kind == HF and _eos(s) not in ids:
            yield where, f"it is {listed(ids)}, without {_eos(s)}" if ids else "it is missing"


@rule(
    "stop-wrong",
    ERROR,
    "A stop id is no end: it is an ordinary piece, the start of a turn, or outside the vocabulary.",
    why="answers break off at that piece, or never end; 106 ends a turn in Gemma 3 and starts one in Gemma 1 and 2",
    remedy="set the ids to 1 and <end_of_turn> (106 in Gemma 3, 107 in Gemma 1 and 2)",
)
def stop_wrong(s: Subject) -> Iterator[Hit]:
    for where, ids in s.said_eos.items():
        for token in ids:
            if fault := _no_end(s, token):
                yield where, f"{token} is {fault}"


def _no_end(s: Subject, token: object) -> str:
    if type(token) is not int:
        return "no whole number"
    if s.tokens is None:
        others = {ends[1] for family, ends in STOP_TOKEN_IDS.items() if family != s.family} - {s.end_of_turn}
        return "the end of turn of another generation" if s.family and token in others else ""
    piece = s.tokens.pieces.get(token)
    if piece is None:
        return "outside the vocabulary" if not 0 <= token < s.tokens.size else ""
    if piece in (START_OF_TURN, "<bos>", "<pad>", "<unk>"):
        return piece
    known = is_control_piece(piece.encode("utf-8", "replace")) or piece in s.tokens.control
    # A token of one's own may be listed as an ordinary one; white space and the like are none
    known = known or (piece in s.tokens.ordinary and re.fullmatch(r"<.+>|\[.+\]", piece) is not None)
    return "" if known else f"the ordinary piece {piece!r}"


@rule(
    "bos-off",
    ERROR,
    "The files say that no <bos> is put in front of a text.",
    why="Gemma was trained with it on every text; without it, perplexity rises by orders of magnitude",
    remedy="set add_bos_token to true (KerasHub: add_start_token), and keep <bos> in tokenizer.json's post_processor",
)
def bos_off(s: Subject) -> Iterator[Hit]:
    if s.add_bos is False:
        yield s.where_bos, "no <bos> is added"


@rule(
    "bos-unsaid",
    WARNING,
    "A GGUF file does not say that a <bos> is put in front of a text.",
    why="each program then takes a default of its own, and without <bos> a Gemma's output is poor",
    remedy="set tokenizer.ggml.add_bos_token to true when converting",
)
def bos_unsaid(s: Subject) -> Iterator[Hit]:
    if s.kind == GGUF and s.add_bos is None and s.tokens is not None:
        yield s.where_bos, "it is missing"


@rule(
    "bos-id",
    ERROR,
    "The id that begins a text is not that of <bos>, or is missing.",
    why="every text then starts with a token that the model never saw there",
    remedy='set bos_token_id to 2 and bos_token to "<bos>"',
)
def bos_id(s: Subject) -> Iterator[Hit]:
    wanted = s.tokens.ids.get("<bos>", CORE["bos"][1]) if s.tokens else CORE["bos"][1]
    for where, value in s.said_bos.items():
        if value != wanted:
            yield where, f"it is {value}, <bos> is {wanted}"
    if s.kind == GGUF and s.tokens is not None and not s.said_bos:
        yield f"{s.config_file}: tokenizer.ggml.bos_token_id", "it is missing"


@rule(
    "tokenizer-missing",
    ERROR,
    "There is no tokenizer.",
    why="text cannot be turned into tokens, and another model's tokenizer gives nonsense",
    remedy="copy tokenizer.model or tokenizer.json from the base model (KerasHub: assets/tokenizer/vocabulary.spm)",
    causes=("unloadable",),
)
def tokenizer_missing(s: Subject) -> Iterator[Hit]:
    if s.tokens is None and not any("tokenizer" in where for where, _ in s.broken):
        expected = {GGUF: "tokenizer.ggml.tokens", HF: "tokenizer.json or tokenizer.model"}
        yield s.path.name, f"no {expected.get(s.kind, 'assets/tokenizer/vocabulary.spm')}"


@rule(
    "special-ids",
    ERROR,
    "A control token is not where every Gemma has it (<pad> 0, <eos> 1, <bos> 2, <unk> 3, the turn tokens in a row).",
    why="programs and weights disagree about what these ids mean",
    remedy="take the tokenizer of the base model unchanged",
    causes=("unloadable", "tokenizer-differs", "stop-turn", "stop-turn-gguf", "stop-text", "stop-wrong"),
)
def special_ids(s: Subject) -> Iterator[Hit]:
    if s.tokens is None:
        return
    ids = s.tokens.ids
    for piece, wanted in CORE.values():
        if ids.get(piece) != wanted:
            yield s.tokens.where, f"{piece} is {'missing' if piece not in ids else f'at {ids[piece]}'}, not at {wanted}"
    start, end = ids.get(START_OF_TURN), ids.get(END_OF_TURN)
    wanted = STOP_TOKEN_IDS.get(s.family, (None, end))[1]
    if start is None and end is None and closer(s):
        return  # tuned to other turns, which the template defines
    if end is None or start is None or end != start + 1 or end != wanted:
        yield s.tokens.where, f"{START_OF_TURN} is at {start} and {END_OF_TURN} at {end}, which should be {wanted}"


@rule(
    "control-type",
    ERROR,
    "A control token is not marked as one.",
    why="a user's text can then contain it: it can end turns and forge others",
    remedy='mark it CONTROL in tokenizer.ggml.token_type, or "special": true in tokenizer.json',
)
def control_type(s: Subject) -> Iterator[Hit]:
    if s.tokens is not None:
        pieces = [piece for piece, _ in CORE.values()] + [START_OF_TURN, END_OF_TURN]
        wrong = [piece for piece in pieces if piece in s.tokens.ordinary]
        if wrong:
            yield s.tokens.where, f"{listed(wrong, 6)} would be made from text"


@rule(
    "tokenizer-config",
    WARNING,
    "tokenizer_config.json is missing, or names other special tokens than Gemma's.",
    why="programs stop at, pad with or begin with the wrong token",
    remedy='set bos_token "<bos>", eos_token "<eos>", pad_token "<pad>", unk_token "<unk>", as the base model has them',
)
def tokenizer_config(s: Subject) -> Iterator[Hit]:
    if s.kind != HF or s.tokens is None:
        return
    if s.tokenizer_config is None:
        if "tokenizer_config.json" not in s.files:
            yield "tokenizer_config.json", "it is missing"
        return
    # Tuned models are published with either end as eos_token
    allowed = {"bos": ("<bos>",), "eos": ("<eos>", END_OF_TURN), "pad": ("<pad>",), "unk": ("<unk>",)}
    for name, pieces in allowed.items():
        value = s.tokenizer_config.get(f"{name}_token")
        value = value.get("content") if isinstance(value, dict) else value
        if value not in pieces:
            yield f"tokenizer_config.json: {name}_token", f"it is {value!r}, not {pieces[0]}"


@rule(
    "tokens-past-rows",
    ERROR,
    "The tokenizer has ids for which the embedding has no row.",
    why="a text with such a token ends in an index error, or reads foreign memory",
    remedy="resize the embedding (model.resize_token_embeddings) and save again, or take out the added tokens",
    causes=("unloadable",),
)
def tokens_past_rows(s: Subject) -> Iterator[Hit]:
    if s.tokens is None or s.config is None:
        return
    rows = s.config.vocab_size
    past = sorted((i, piece) for piece, i in s.tokens.ids.items() if i >= rows and piece != _IMAGE)
    if past:
        yield s.tokens.where, f"{listed(f'{piece} ({i})' for i, piece in past)} with {rows:,} rows"


@rule(
    "rows-past-tokens",
    WARNING,
    f"The embedding has many more rows than the tokenizer has pieces (over {_SPARE_ROWS}).",
    why="the model can choose ids that stand for no text; the tokenizer may be another model's",
    remedy="take the tokenizer that the model was trained with",
)
def rows_past_tokens(s: Subject) -> Iterator[Hit]:
    if s.tokens is not None and s.config is not None and s.config.vocab_size - s.tokens.size > _SPARE_ROWS:
        yield s.tokens.where, f"{s.tokens.size:,} pieces, {s.config.vocab_size:,} rows"
