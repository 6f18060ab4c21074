"""Foreign tensor names: one row per GGUF tensor, read both ways.

GGUF norms hold 1 + w, the multiplier; the canonical (Hugging Face) tensor is w. Query and key rows are not permuted.
"""

from __future__ import annotations

from typing import NamedTuple

from gemkit.arch.config import ModelConfig


class Row(NamedTuple):
    """gguf: its name, "{i}" for the layer. canonical: Hugging Face's. add_one: the file holds 1 + the canonical value."""

    gguf: str
    canonical: str
    add_one: bool = False


_MODEL = (
    Row("token_embd.weight", "model.embed_tokens.weight"),
    Row("output_norm.weight", "model.norm.weight", True),
    Row("output.weight", "lm_head.weight"),
)
_LAYER = (
    Row("blk.{i}.attn_norm.weight", "model.layers.{i}.input_layernorm.weight", True),
    Row("blk.{i}.attn_q.weight", "model.layers.{i}.self_attn.q_proj.weight"),
    Row("blk.{i}.attn_k.weight", "model.layers.{i}.self_attn.k_proj.weight"),
    Row("blk.{i}.attn_v.weight", "model.layers.{i}.self_attn.v_proj.weight"),
    Row("blk.{i}.attn_output.weight", "model.layers.{i}.self_attn.o_proj.weight"),
    Row("blk.{i}.ffn_gate.weight", "model.layers.{i}.mlp.gate_proj.weight"),
    Row("blk.{i}.ffn_up.weight", "model.layers.{i}.mlp.up_proj.weight"),
    Row("blk.{i}.ffn_down.weight", "model.layers.{i}.mlp.down_proj.weight"),
)
# Hugging Face's post_attention_layernorm comes before the feed-forward block in Gemma 1 and before the residual in 2 and 3.
_TWO_NORMS = (Row("blk.{i}.ffn_norm.weight", "model.layers.{i}.post_attention_layernorm.weight", True),)
_FOUR_NORMS = (
    Row("blk.{i}.post_attention_norm.weight", "model.layers.{i}.post_attention_layernorm.weight", True),
    Row("blk.{i}.ffn_norm.weight", "model.layers.{i}.pre_feedforward_layernorm.weight", True),
    Row("blk.{i}.post_ffw_norm.weight", "model.layers.{i}.post_feedforward_layernorm.weight", True),
)
_QK_NORMS = (
    Row("blk.{i}.attn_q_norm.weight", "model.layers.{i}.self_attn.q_norm.weight", True),
    Row("blk.{i}.attn_k_norm.weight", "model.layers.{i}.self_attn.k_norm.weight", True),
)

# Precomputed by some converters and not needed: the angles follow from the configuration.
IGNORED = frozenset({"rope_freqs.weight"})


def gguf_rows(config: ModelConfig) -> list[Row]:
    """Every tensor a GGUF file of this model can hold, layers filled in; "output.weight" only if the head is untied."""
    layer = _LAYER + (_FOUR_NORMS if config.post_norms else _TWO_NORMS) + (_QK_NORMS if config.qk_norm else ())
    rows = [row for row in _MODEL if not (config.tie_word_embeddings and row.canonical == "lm_head.weight")]
    for i in range(config.num_hidden_layers):
        rows += [Row(row.gguf.format(i=i), row.canonical.format(i=i), row.add_one) for row in layer]
    return rows
