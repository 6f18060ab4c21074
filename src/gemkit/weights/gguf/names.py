"""Tensor names: the ones in a GGUF file and the canonical ones (Hugging Face), one row for each kind.

GGUF stores a norm as the multiplier 1 + w; the canonical parameter is w (`add_one`).
Source: ``gguf-py/gguf/tensor_mapping.py`` of llama.cpp.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Some conversions add the rotary frequencies as a tensor; they follow from the metadata.
IGNORED = frozenset({"rope_freqs.weight"})

# Ollama keeps the image tower and the projector in the file of the language model, under llama.cpp's mmproj names.
_GGUF_IMAGE = ("v.", "mm.")


class Name(NamedTuple):
    """One kind of tensor. `{}` is the layer's index. add_one: the file holds 1 + w."""

    gguf: str
    canonical: str
    add_one: bool = False


_COMMON = (
    Name("token_embd.weight", "model.embed_tokens.weight"),
    Name("output_norm.weight", "model.norm.weight", True),
    Name("output.weight", "lm_head.weight"),
    Name("blk.{}.attn_norm.weight", "model.layers.{}.input_layernorm.weight", True),
    Name("blk.{}.attn_q.weight", "model.layers.{}.self_attn.q_proj.weight"),
    Name("blk.{}.attn_k.weight", "model.layers.{}.self_attn.k_proj.weight"),
    Name("blk.{}.attn_v.weight", "model.layers.{}.self_attn.v_proj.weight"),
    Name("blk.{}.attn_output.weight", "model.layers.{}.self_attn.o_proj.weight"),
    Name("blk.{}.attn_q_norm.weight", "model.layers.{}.self_attn.q_norm.weight", True),
    Name("blk.{}.attn_k_norm.weight", "model.layers.{}.self_attn.k_norm.weight", True),
    Name("blk.{}.ffn_gate.weight", "model.layers.{}.mlp.gate_proj.weight"),
    Name("blk.{}.ffn_up.weight", "model.layers.{}.mlp.up_proj.weight"),
    Name("blk.{}.ffn_down.weight", "model.layers.{}.mlp.down_proj.weight"),
)
# Without norms behind the blocks (Gemma 1), Hugging Face calls the norm before the feed-forward "post attention".
_TWO_NORMS = (Name("blk.{}.ffn_norm.weight", "model.layers.{}.post_attention_layernorm.weight", True),)
_FOUR_NORMS = (
    Name("blk.{}.post_attention_norm.weight", "model.layers.{}.post_attention_layernorm.weight", True),
    Name("blk.{}.ffn_norm.weight", "model.layers.{}.pre_feedforward_layernorm.weight", True),
    Name("blk.{}.post_ffw_norm.weight", "model.layers.{}.post_feedforward_layernorm.weight", True),
)

_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9][0-9]{0,8})(?=\.)")


def rows(post_norms: bool) -> tuple[Name, ...]:
    """Return the table for models with (Gemma 2, 3) or without (Gemma 1) norms behind attention and feed-forward."""
    return _COMMON + (_FOUR_NORMS if post_norms else _TWO_NORMS)


_BY_GGUF = {flag: {row.gguf: row for row in rows(flag)} for flag in (False, True)}
_BY_CANONICAL = {flag: {row.canonical: row for row in rows(flag)} for flag in (False, True)}


def from_gguf(name: str, post_norms: bool) -> Name | None:
    """Return the row of a GGUF name with the layer filled in, or None if it is unknown.

    Example: ``from_gguf("blk.3.attn_q.weight", True).canonical`` is "model.layers.3.self_attn.q_proj.weight".
    """
    return _find(name, _BY_GGUF[post_norms])


def gguf_image_part(name: str) -> str | None:
    """Return "v" or "mm" if a tensor of a GGUF file belongs to the image tower or its projector."""
    return name.partition(".")[0] if name.startswith(_GGUF_IMAGE) else None


def from_canonical(name: str, post_norms: bool) -> Name | None:
    """Return the row of a canonical name with the layer filled in, or None if it is unknown."""
    return _find(name, _BY_CANONICAL[post_norms])


def _find(name: str, table: dict[str, Name]) -> Name | None:
    number = _NUMBER.search(name)
    if number is None:
        return table.get(name) if "{" not in name else None
    row = table.get(name[: number.start()] + "{}" + name[number.end() :])
    return row and Name(row.gguf.format(number[0]), row.canonical.format(number[0]), row.add_one)
