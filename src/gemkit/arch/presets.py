"""The published models, one row each: every model constant in the project is here.

Sources: the ``config.json`` of each model on Hugging Face (``google/<name>``), and google/gemma_pytorch
``gemma/config.py``. Each row is held to its published number of parameters by ``tests/arch/test_presets.py``.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from gemkit.arch.config import STOP_TOKEN_IDS, LayerSpec, ModelConfig, layer_pattern
from gemkit.errors import GemkitError


@dataclass(frozen=True)
class Preset:
    """A published model. hub_id: its name on Hugging Face; instruction_tuned: it expects chat turns.

    qat_id: where Google publishes it as a GGUF file in Q4_0 after quantisation-aware training, if it does.
    """

    name: str
    hub_id: str
    instruction_tuned: bool
    config: ModelConfig
    qat_id: str | None = None


def _model(
    model_type: str,
    layers: tuple[LayerSpec, ...],
    *,
    D: int,
    F: int,
    N: int,
    K: int,
    H: int = 256,
    vocabulary: int = 256_000,
    context: int = 8192,
    query_scalar: int = 256,
    soft_caps: tuple[float | None, float | None] = (None, None),
) -> ModelConfig:
    """Configure a model of any generation. soft_caps: of attention and of the logits."""
    return ModelConfig(
        model_type=model_type,
        vocab_size=vocabulary,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=len(layers),
        num_attention_heads=N,
        num_key_value_heads=K,
        head_dim=H,
        max_position_embeddings=context,
        rms_norm_eps=1e-6,
        query_pre_attn_scalar=query_scalar,
        attn_logit_softcapping=soft_caps[0],
        final_logit_softcapping=soft_caps[1],
        qk_norm=model_type == "gemma3_text",
        post_norms=model_type != "gemma",
        tie_word_embeddings=True,
        bos_token_id=2,
        stop_token_ids=STOP_TOKEN_IDS[model_type],
        layers=layers,
    )


def _gemma1(*, L: int, **sizes: int) -> ModelConfig:
    """Configure Gemma 1, Gemma 1.1 and CodeGemma: full attention in every layer."""
    return _model("gemma", layer_pattern(L, rope_theta=10_000.0), **sizes)


def _gemma2(*, L: int, **sizes: int) -> ModelConfig:
    """Configure Gemma 2 and ShieldGemma: local and full layers alternate, first a local one; soft caps 50 and 30."""
    layers = layer_pattern(L, period=2, sliding_window=4096, rope_theta=10_000.0)
    return _model("gemma2", layers, soft_caps=(50.0, 30.0), **sizes)


def _gemma3(*, L: int, small: bool = False, **sizes: int) -> ModelConfig:
    """Configure Gemma 3: five local layers, one full; two rope bases.

    ``small`` are the text-only 270M and 1B: window 512, 32K context, no rope factor. The others are the text towers of
    the multimodal models: window 1024, 128K context, rope factor 8 on the full layers, 64 more rows of vocabulary.
    """
    layers = layer_pattern(
        L,
        period=6,
        sliding_window=512 if small else 1024,
        rope_theta=1_000_000.0,
        rope_factor=1.0 if small else 8.0,
        local_rope_theta=10_000.0,
    )
    vocabulary, context = (262_144, 32_768) if small else (262_208, 131_072)
    return _model("gemma3_text", layers, vocabulary=vocabulary, context=context, **sizes)


_GEMMA1_2B = _gemma1(D=2048, F=16384, N=8, K=1, L=18)
_GEMMA1_7B = _gemma1(D=3072, F=24576, N=16, K=16, L=28)
_GEMMA2_2B = _gemma2(D=2304, F=9216, N=8, K=4, L=26)
_GEMMA2_9B = _gemma2(D=3584, F=14336, N=16, K=8, L=42)
_GEMMA2_27B = _gemma2(D=4608, F=36864, N=32, K=16, H=128, L=46, query_scalar=144)
_GEMMA3_270M = _gemma3(D=640, F=2048, N=4, K=1, L=18, small=True)
_GEMMA3_1B = _gemma3(D=1152, F=6912, N=4, K=1, L=26, small=True)
_GEMMA3_4B = _gemma3(D=2560, F=10240, N=8, K=4, L=34)
_GEMMA3_12B = _gemma3(D=3840, F=15360, N=16, K=8, L=48)
_GEMMA3_27B = _gemma3(D=5376, F=21504, N=32, K=16, H=128, L=62, query_scalar=168)

_ROWS: tuple[tuple[str, bool, ModelConfig], ...] = (
    # name (on Hugging Face under google/), instruction tuned, configuration
    ("gemma-2b", False, _GEMMA1_2B),
    ("gemma-2b-it", True, _GEMMA1_2B),
    ("gemma-7b", False, _GEMMA1_7B),
    ("gemma-7b-it", True, _GEMMA1_7B),
    ("gemma-1.1-2b-it", True, _GEMMA1_2B),
    ("gemma-1.1-7b-it", True, _GEMMA1_7B),
    ("codegemma-2b", False, _GEMMA1_2B),
    ("codegemma-7b", False, _GEMMA1_7B),
    ("codegemma-7b-it", True, _GEMMA1_7B),
    ("codegemma-1.1-2b", False, _GEMMA1_2B),
    ("codegemma-1.1-7b-it", True, _GEMMA1_7B),
    ("gemma-2-2b", False, _GEMMA2_2B),
    ("gemma-2-2b-it", True, _GEMMA2_2B),
    ("gemma-2-9b", False, _GEMMA2_9B),
    ("gemma-2-9b-it", True, _GEMMA2_9B),
    ("gemma-2-27b", False, _GEMMA2_27B),
    ("gemma-2-27b-it", True, _GEMMA2_27B),
    ("shieldgemma-2b", True, _GEMMA2_2B),
    ("shieldgemma-9b", True, _GEMMA2_9B),
    ("shieldgemma-27b", True, _GEMMA2_27B),
    ("gemma-3-270m", False, _GEMMA3_270M),
    ("gemma-3-270m-it", True, _GEMMA3_270M),
    ("gemma-3-1b-pt", False, _GEMMA3_1B),
    ("gemma-3-1b-it", True, _GEMMA3_1B),
    ("gemma-3-4b-pt", False, _GEMMA3_4B),
    ("gemma-3-4b-it", True, _GEMMA3_4B),
    ("gemma-3-12b-pt", False, _GEMMA3_12B),
    ("gemma-3-12b-it", True, _GEMMA3_12B),
    ("gemma-3-27b-pt", False, _GEMMA3_27B),
    ("gemma-3-27b-it", True, _GEMMA3_27B),
)

_QAT = {f"gemma-3-{size}-{kind}" for size in ("1b", "4b", "12b", "27b") for kind in ("it", "pt")}

PRESETS: dict[str, Preset] = {
    name: Preset(name, f"google/{name}", tuned, config, f"google/{name}-qat-q4_0-gguf" if name in _QAT else None)
    for name, tuned, config in _ROWS
}


def preset(name: str) -> Preset:
    """Return the published model of that name, with or without ``google/``; case does not matter.

    Raises GemkitError with the nearest names. Example: ``preset("gemma-3-270m").config.num_hidden_layers`` is 18.
    """
    key = name.lower().removeprefix("google/")
    if key in PRESETS:
        return PRESETS[key]
    near = difflib.get_close_matches(key, PRESETS, n=3, cutoff=0.5)
    remedy = f"did you mean {', '.join(near)}?" if near else f"known models: {', '.join(PRESETS)}."
    raise GemkitError(f"No published Gemma model is called {name!r}; {remedy}")
