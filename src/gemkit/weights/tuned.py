"""Detection of instruction-tuned models, which expect chat turns, from their files.

gemkit writes a chat template into tuned models that came without one, and a mark into pretrained ones: names change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemkit.weights.checkpoint import Checkpoint

GGUF_KEY = "gemkit.instruction_tuned"
CONFIG_KEY = "gemkit_instruction_tuned"  # in config.json, where transformers leaves it as it is

_UNTUNED = {"base", "pt", "pretrained"}
_TUNED = {"it", "instruct", "chat"}


def instruction_tuned(mark: object, template: str | None, *names: str) -> bool | None:
    """Return True or False, or None if it is unknown.

    mark: the file's own statement, a bool, which decides; anything else is none. Next, a chat template means True;
    then names decide, with words such as "it" or "pt". Names without such words mean False.
    """
    if isinstance(mark, bool):
        return mark
    if template:
        return True
    return bool(by_name(*names)) if any(names) else None


def by_name(*names: str) -> bool | None:
    """Return True for names with "it" and the like, False for those with "pt" and the like, None for all others.

    Of a path, the last part counts.
    """
    words = {word for name in names for word in re.findall(r"[a-z]+", name.rpartition("/")[2].lower())}
    if words & _UNTUNED:
        return False
    return True if words & _TUNED else None


def mark(pairs: Mapping[str, object], key: str, template: str | None) -> object:
    """Return the mark in a file's metadata; none next to a template, which came later, with a fine-tuning."""
    return None if template else pairs.get(key)


def template_to_write(checkpoint: Checkpoint) -> str | None:
    """Return the model's chat template; for a tuned model without one, the template of Gemma's turns."""
    if checkpoint.chat_template or not checkpoint.instruction_tuned:
        return checkpoint.chat_template
    from gemkit.text.template import DEFAULT_TEMPLATE

    return DEFAULT_TEMPLATE


def needs_mark(checkpoint: Checkpoint, *names: str) -> bool:
    """Return whether a pretrained model must be marked as such, as its names suggest otherwise or do not last."""
    if checkpoint.instruction_tuned is not False or checkpoint.chat_template:
        return False
    return not names or by_name(*names) is True


def end_in_template(checkpoint: Checkpoint) -> int | None:
    """Return the id of the token that the chat template calls eos_token; None if it calls none so.

    It is one of the stop ids, and the one that a converted model must state as its eos_token.
    """
    if "eos_token" not in (checkpoint.chat_template or ""):
        return None
    found = checkpoint.metadata.get("tokenizer.ggml.eos_token_id")
    name = checkpoint.special_tokens.get("eos_token")
    if name is not None and checkpoint.vocabulary is not None:
        pieces = checkpoint.vocabulary.pieces
        found = pieces.index(name.encode()) if name.encode() in pieces else None
    return found if found in checkpoint.config.stop_token_ids else None
