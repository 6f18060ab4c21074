"""The arrays of the official Flax checkpoints and the canonical tensors that are in them: one row each, read both ways.

    embedder/input_embedding      [V, D]
    layer_i/pre_attention_norm    scale [D], the w of 1 + w, as all norms
    layer_i/attn/q_einsum         w [N, D, H]
    layer_i/attn/kv_einsum        w [2, K, D, H]: keys, values
    layer_i/attn/qkv_einsum       w [3, N, D, H] in place of both where every query head has its own keys (K = N)
    layer_i/attn/attn_vec_einsum  w [N, H, D]
    layer_i/attn/_query_norm      scale [H], Gemma 3; _key_norm likewise
    layer_i/mlp/gating_einsum     [2, D, F], gate and up; in most of Gemma 2 and in Gemma 3 [2, F, D]
    layer_i/mlp/linear            [F, D]
    layer_i/pre_ffw_norm          scale [D]; post_attention_norm and post_ffw_norm: Gemma 2 and 3
    final_norm                    scale [D]

Released files have flat keys with a prefix, ``transformer/layer_0/mlp/linear`` and in it ``w``; what the library saves
itself is nested and has no ``w`` below ``mlp``. `plain` makes the same name of both.
Source: modules.py, transformer.py and params.py of github.com/google-deepmind/gemma, later gm/nn/_modules.py,
gm/nn/_gemma.py and gm/ckpts/_compat.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gemkit.arch.config import ModelConfig
from gemkit.arch.presets import preset

# The official tables have rows behind the vocabulary's end, for even shards; Hugging Face's files do not.
PADDED_ROWS = {256_000: 256_128}

_PREFIXES = ("params/", "transformer/")
_MLP = ("mlp/gating_einsum", "mlp/linear")
_IMAGE = re.compile(r"(SigLiPFromPatches_0|vision_encoder)/|embedder/(mm_[a-z_]+)/")
_LAYER = re.compile(r"layer_(0|[1-9][0-9]{0,5})/(.+)")


class Row(NamedTuple):
    """One array of the file.

    flax: its name; `{}` is the layer's index. axes: a letter for each axis of one part.
    parts: the canonical tensors, stacked on a first axis if there are several.
    canonical: the axes of a part in the canonical tensor, where "NH D" is a matrix [N*H, D].
    """

    flax: str
    axes: str
    parts: tuple[str, ...]
    canonical: str

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the array's shape. sizes: of each letter."""
        lead = (len(self.parts),) if len(self.parts) > 1 else ()
        return (*lead, *(sizes[letter] for letter in self.axes))

    def take(self, array: np.ndarray, part: int) -> np.ndarray:
        """Return a canonical tensor out of the array; a view where it can be."""
        array = array[part] if len(self.parts) > 1 else array
        groups = self.canonical.split()
        size = dict(zip(self.axes, array.shape, strict=True))
        moved = array.transpose([self.axes.index(letter) for group in groups for letter in group])
        return moved.reshape([int(np.prod([size[letter] for letter in group])) for group in groups])

    def join(self, tensors: Sequence[np.ndarray], sizes: Mapping[str, int]) -> np.ndarray:
        """Return the array of the canonical tensors: the inverse of `take`."""
        order = self.canonical.replace(" ", "")
        shape = [sizes[letter] for letter in order]
        back = [order.index(letter) for letter in self.axes]
        arrays = [np.asarray(tensor).reshape(shape).transpose(back) for tensor in tensors]
        return np.stack(arrays) if len(arrays) > 1 else np.ascontiguousarray(arrays[0])


_TOP = (
    Row("embedder/input_embedding", "VD", ("model.embed_tokens.weight",), "V D"),
    Row("final_norm/scale", "D", ("model.norm.weight",), "D"),
)
_Q, _K, _V = (f"self_attn.{x}_proj.weight" for x in "qkv")
_QKV = (Row("attn/qkv_einsum/w", "NDH", (_Q, _K, _V), "NH D"),)
_Q_KV = (
    Row("attn/q_einsum/w", "NDH", (_Q,), "NH D"),
    Row("attn/kv_einsum/w", "KDH", (_K, _V), "KH D"),
)
_BLOCK = (
    Row("pre_attention_norm/scale", "D", ("input_layernorm.weight",), "D"),
    Row("attn/attn_vec_einsum/w", "NHD", ("self_attn.o_proj.weight",), "D NH"),
    Row("mlp/linear", "FD", ("mlp.down_proj.weight",), "D F"),
)
_GATE = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
_QK_NORM = (
    Row("attn/_query_norm/scale", "H", ("self_attn.q_norm.weight",), "H"),
    Row("attn/_key_norm/scale", "H", ("self_attn.k_norm.weight",), "H"),
)
# Without norms behind the blocks, Hugging Face calls the norm before the feed-forward "post attention".
_TWO_NORMS = (Row("pre_ffw_norm/scale", "D", ("post_attention_layernorm.weight",), "D"),)
_FOUR_NORMS = (
    Row("post_attention_norm/scale", "D", ("post_attention_layernorm.weight",), "D"),
    Row("pre_ffw_norm/scale", "D", ("pre_feedforward_layernorm.weight",), "D"),
    Row("post_ffw_norm/scale", "D", ("post_feedforward_layernorm.weight",), "D"),
)


def rows(config: ModelConfig, *, joined: bool, transposed: bool) -> dict[str, Row]:
    """Return all rows of a model with the layers filled in, by the array's name.

    joined: queries, keys and values are one array. transposed: the gating matrices are [F, D].
    """
    block = (
        *_BLOCK,
        *(_QKV if joined else _Q_KV),
        Row("mlp/gating_einsum", "FD" if transposed else "DF", _GATE, "F D"),
        *(_QK_NORM if config.qk_norm else ()),
        *(_FOUR_NORMS if config.post_norms else _TWO_NORMS),
    )
    found = {row.flax: row for row in _TOP}
    for i in range(config.num_hidden_layers):
        for row in block:
            name = f"layer_{i}/{row.flax}"
            found[name] = Row(name, row.axes, tuple(f"model.layers.{i}.{part}" for part in row.parts), row.canonical)
    return found


def sizes(config: ModelConfig) -> dict[str, int]:
    """Return the size of each letter."""
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "N": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "H": config.head_dim,
    }


def is_joined(config: ModelConfig) -> bool:
    """Return whether the official classes keep queries, keys and values in one array."""
    return config.num_key_value_heads == config.num_attention_heads


def is_transposed(config: ModelConfig) -> bool:
    """Return whether the model's official class has gating matrices as [F, D]: not Gemma 1, nor Gemma 2 2B."""
    if config.model_type == "gemma2":
        small = preset("gemma-2-2b").config
        return (config.hidden_size, config.intermediate_size) != (small.hidden_size, small.intermediate_size)
    return config.model_type != "gemma"


def plain(name: str) -> str:
    """Strip the prefixes of released files. Example: "transformer/final_norm/scale" is "final_norm/scale"."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    found = _LAYER.fullmatch(name)
    return name.removesuffix("/w") if found and found[2].removesuffix("/w") in _MLP else name


def released(name: str) -> tuple[str, str]:
    """Return the two keys of an array in a released file. Example: ("transformer/layer_0/mlp/linear", "w")."""
    if name.endswith(_MLP):
        return f"transformer/{name}", "w"
    folder, _, leaf = name.rpartition("/")
    return f"transformer/{folder}", leaf


def layer_of(name: str) -> int | None:
    """Return the layer of an array, None for one outside."""
    found = _LAYER.fullmatch(name)
    return int(found[1]) if found else None


def image_part(name: str) -> str | None:
    """Return an array's image module, e.g. "vision_encoder" or "mm_input_projection"; None for text."""
    found = _IMAGE.match(name)
    return found and (found[1] or found[2])
