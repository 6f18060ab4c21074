"""Tiny models for comparing implementations: one per architectural trait and one per Gemma generation.

Every backend runs every case against ``gemkit.arch.reference``. A case is only worth something if the logits notice its
trait, so each one carries ``off``, the same model without it; ``test_reference.py`` proves that the difference shows.

Sizes suit every backend: widths are multiples of 32, sequences are longer than four windows.
"""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass

import numpy as np

from gemkit.arch.config import STOP_TOKEN_IDS, LayerSpec, ModelConfig, layer_pattern
from gemkit.arch.tensors import manifest


@dataclass(frozen=True)
class Case:
    """name: "trait" or "generation"; off: the configuration without the trait (None for a whole generation);
    length: tokens to run, in a case with windows more than four of them."""

    name: str
    config: ModelConfig
    off: ModelConfig | None
    length: int = 72
    seed: int = 0

    def params(self) -> dict[str, np.ndarray]:
        return random_params(self.config, self.seed)

    def tokens(self) -> np.ndarray:
        return tokens(self.config, self.length, self.seed)


def random_params(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 parameters by name with norms far from neutral, uneven attention and logits of several units.

    Each array depends on the seed, its name and its shape alone: two configurations share what they have in common.
    """
    params = {}
    for name, spec in manifest(config).items():
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = generator.standard_normal(spec.shape)
        if len(spec.shape) == 1:
            values *= 0.3
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            values *= 0.3
        else:
            # Gain of 1.6 per projection: attention scores of a few units, sublayers as loud as the embedding.
            values *= 1.6 / np.sqrt(spec.shape[1])
        params[name] = values.astype(np.float32)
    return params


def tokens(config: ModelConfig, length: int, seed: int = 0) -> np.ndarray:
    """int64 [length]: <bos>, then random ids."""
    ids = np.random.default_rng([seed, 1]).integers(0, config.vocab_size, length)
    ids[0] = config.bos_token_id
    return ids


def _tiny(model_type: str, *, layers: tuple[LayerSpec, ...], **changes) -> ModelConfig:
    """A small model of a generation: D 96, F 128, four query heads on two key-value heads of width 32."""
    base = {
        "model_type": model_type,
        "vocab_size": 512,
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_hidden_layers": len(layers),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 32.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "qk_norm": model_type == "gemma3_text",
        "post_norms": model_type != "gemma",
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "stop_token_ids": STOP_TOKEN_IDS[model_type],
        "layers": layers,
    }
    base.update(changes)
    return ModelConfig(**base)


_replace = dataclasses.replace
_FULL_2 = layer_pattern(2, rope_theta=10_000.0)
_WINDOW_4 = layer_pattern(4, period=2, sliding_window=16, rope_theta=10_000.0)
_GEMMA3_4 = layer_pattern(4, period=3, sliding_window=12, rope_theta=1e6, rope_factor=8.0, local_rope_theta=10_000.0)


def _without_window(layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
    return tuple(_replace(layer, sliding_window=None) for layer in layers)


def _cases() -> list[Case]:
    gemma1 = _tiny("gemma", layers=_FULL_2)
    gemma2 = _tiny("gemma2", layers=_FULL_2)
    gemma2_local = _tiny("gemma2", layers=_WINDOW_4)
    gemma3 = _tiny("gemma3_text", layers=_FULL_2)
    gemma3_local = _tiny("gemma3_text", layers=_GEMMA3_4)
    one_base = tuple(_replace(layer, rope_theta=10_000.0) for layer in _GEMMA3_4)
    no_factor = tuple(_replace(layer, rope_factor=1.0) for layer in _GEMMA3_4)
    wide_heads = _tiny(
        "gemma", layers=_FULL_2, hidden_size=64, num_attention_heads=2, head_dim=64, query_pre_attn_scalar=64.0
    )
    untied = _replace(gemma1, tie_word_embeddings=False)
    return [
        # One trait each.
        Case("one_kv_head", _replace(gemma1, num_key_value_heads=1), gemma1),
        Case("head_dim", wide_heads, _replace(wide_heads, head_dim=32, query_pre_attn_scalar=32.0)),
        Case("query_scale", _replace(gemma2, query_pre_attn_scalar=6.0), gemma2),
        Case("attention_softcap", _replace(gemma2, attn_logit_softcapping=2.0), gemma2),
        Case("final_softcap", _replace(gemma2, final_logit_softcapping=15.0), gemma2),
        Case("window", gemma2_local, _replace(gemma2_local, layers=_without_window(_WINDOW_4))),
        Case("first_layer_local", gemma2_local, _replace(gemma2_local, layers=_WINDOW_4[::-1])),
        Case("qk_norm", gemma3, _replace(gemma3, qk_norm=False)),
        Case("post_norms", gemma2, _replace(gemma2, post_norms=False)),
        Case("two_rope_bases", gemma3_local, _replace(gemma3_local, layers=one_base), seed=1),
        Case("rope_factor", gemma3_local, _replace(gemma3_local, layers=no_factor), seed=2),
        Case("tied_embedding", gemma1, untied),
        Case("untied_embedding", untied, gemma1),
        Case("norm_eps", _replace(gemma3, rms_norm_eps=0.1), gemma3),
        # One generation each.
        Case("gemma1_2b", _tiny("gemma", layers=_FULL_2, num_key_value_heads=1), None, seed=3),
        Case("gemma1_7b", _tiny("gemma", layers=_FULL_2, num_key_value_heads=4), None, seed=4),
        Case(
            "gemma2",
            _tiny(
                "gemma2",
                layers=_WINDOW_4,
                query_pre_attn_scalar=24.0,
                attn_logit_softcapping=50.0,
                final_logit_softcapping=30.0,
            ),
            None,
            seed=5,
        ),
        Case("gemma3", _tiny("gemma3_text", layers=_GEMMA3_4, num_key_value_heads=1), None, seed=6),
        Case("gemma3_27b", _tiny("gemma3_text", layers=_GEMMA3_4, query_pre_attn_scalar=24.0), None, seed=7),
    ]


CASES: dict[str, Case] = {case.name: case for case in _cases()}
