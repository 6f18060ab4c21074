"""Configuration of one Gemma model, with every layer pattern expanded to one record per layer.

Field names are the keys of a Hugging Face ``config.json``. `hf_config.from_hf` and `hf_config.to_hf` read and write
that file's dictionary. Other code never evaluates a layer pattern: it reads ``config.layers[i]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from gemkit.errors import GemkitError

MODEL_TYPES = ("gemma", "gemma2", "gemma3_text")

# <eos> and <end_of_turn>; the two ids after which a turn is over (generation_config.json of the published models).
STOP_TOKEN_IDS = {"gemma": (1, 107), "gemma2": (1, 107), "gemma3_text": (1, 106)}
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
)
GOOGLE_VOCABULARY = 256_000  # every published vocabulary has as many pieces or more


@dataclass(frozen=True)
class LayerSpec:
    """Per-layer settings.

    sliding_window: None for full attention; W lets position i attend j if and only if 0 <= i - j < W.
    rope_theta: base of the rotary frequencies.
    rope_factor: the frequencies are divided by it (linear position scaling).
    """

    sliding_window: int | None
    rope_theta: float
    rope_factor: float = 1.0


class ParameterCounts(NamedTuple):
    """Parameter counts, computed as in Table 2 of the Gemma report: a tied output matrix counts once."""

    embedding: int
    non_embedding: int

    @property
    def total(self) -> int:
        return self.embedding + self.non_embedding


def layer_pattern(
    num_layers: int,
    *,
    rope_theta: float,
    rope_factor: float = 1.0,
    period: int = 1,
    sliding_window: int | None = None,
    local_rope_theta: float | None = None,
) -> tuple[LayerSpec, ...]:
    """Expand a repeating pattern: every ``period``-th layer is full, the ones before it slide.

    With ``period`` 6 the layers 5, 11, 17, … attend to everything; with 2 layer 0 slides (Gemma 2); with 1 none does.
    Sliding layers use ``local_rope_theta`` (the same base if None) and never a ``rope_factor``, unless there is one
    base for all layers, which then share the factor too.
    """
    if period < 1:
        raise GemkitError(f"The layer pattern repeats every {period} layers; give a period of 1 or more.")
    if period > 1 and sliding_window is None:
        raise GemkitError("The layer pattern has sliding layers but no window; give sliding_window.")
    full = LayerSpec(None, rope_theta, rope_factor)
    if local_rope_theta is None:
        local = LayerSpec(sliding_window, rope_theta, rope_factor)
    else:
        local = LayerSpec(sliding_window, local_rope_theta)
    return tuple(local if (i + 1) % period else full for i in range(num_layers))


@dataclass(frozen=True)
class ModelConfig:
    """One model: sizes, switches and one `LayerSpec` per layer. Checked on construction; raises GemkitError.

    model_type: "gemma", "gemma2" or "gemma3_text": which Hugging Face class reads it. The mathematics does not depend
        on it; it depends on the fields below.
    query_pre_attn_scalar: queries are multiplied by its inverse square root (usually head_dim).
    attn_logit_softcapping, final_logit_softcapping: c in c * tanh(x / c), or None.
    qk_norm: queries and keys are normalised per head before the rotation (Gemma 3).
    post_norms: the outputs of attention and of the feed-forward are normalised before they are added to the residual
        (Gemma 2 and 3). Without it ``post_attention_layernorm`` is the norm in front of the feed-forward.
    stop_token_ids: generation ends after any of them.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    query_pre_attn_scalar: float
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    qk_norm: bool
    post_norms: bool
    tie_word_embeddings: bool
    bos_token_id: int
    stop_token_ids: tuple[int, ...]
    layers: tuple[LayerSpec, ...]

    def __post_init__(self) -> None:
        _validate(self)

    def parameter_counts(self) -> ParameterCounts:
        """Embedding and non-embedding parameters of the text model."""
        D, F, H = self.hidden_size, self.intermediate_size, self.head_dim
        N, K, L = self.num_attention_heads, self.num_key_value_heads, self.num_hidden_layers
        attention = D * H * (2 * N + 2 * K)
        norms = D * (4 if self.post_norms else 2) + (2 * H if self.qk_norm else 0)
        tables = 1 if self.tie_word_embeddings else 2
        return ParameterCounts(tables * self.vocab_size * D, L * (attention + 3 * D * F + norms) + D)

    def parameter_count(self) -> int:
        """Return all parameters of the text model."""
        return self.parameter_counts().total


def _validate(c: ModelConfig) -> None:
    """Raise GemkitError for the first field that cannot be right."""

    def need(ok: bool, message: str) -> None:
        if not ok:
            raise GemkitError(f"Model configuration: {message}.")

    need(c.model_type in MODEL_TYPES, f"model_type is {c.model_type!r}; gemkit knows {', '.join(MODEL_TYPES)}")
    for name in SIZES:
        value = getattr(c, name)
        need(_is_int(value) and 0 < value < 2**31, f"{name} is {value!r}; it must be a whole number from 1 to 2^31 - 1")
    need(
        c.num_attention_heads % c.num_key_value_heads == 0,
        f"{c.num_attention_heads} query heads cannot share {c.num_key_value_heads} key-value heads evenly; "
        "make num_attention_heads a multiple of num_key_value_heads",
    )
    need(c.head_dim % 2 == 0, f"head_dim is {c.head_dim}; rotary embeddings need an even number")
    for name in ("rms_norm_eps", "query_pre_attn_scalar"):
        need(is_positive(getattr(c, name)), f"{name} is {getattr(c, name)!r}; it must be a finite number above 0")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = getattr(c, name)
        need(value is None or is_positive(value), f"{name} is {value!r}; it must be None or a finite number above 0")
    for name in ("qk_norm", "post_norms", "tie_word_embeddings"):
        need(isinstance(getattr(c, name), bool), f"{name} is {getattr(c, name)!r}; it must be True or False")
    ids = c.stop_token_ids
    need(isinstance(ids, tuple) and len(ids) > 0, f"stop_token_ids is {ids!r}; give a tuple of one or more token ids")
    for token in (c.bos_token_id, *ids):
        need(
            _is_int(token) and 0 <= token < c.vocab_size,
            f"special token id {token!r} is not in the vocabulary; it must be from 0 to {c.vocab_size - 1}",
        )
    need(len(set(ids)) == len(ids), f"stop_token_ids {ids} repeats an id; list each once")
    need(
        isinstance(c.layers, tuple) and len(c.layers) == c.num_hidden_layers,
        f"layers has {len(c.layers)} records; give one LayerSpec for each of the {c.num_hidden_layers} layers",
    )
    for i, layer in enumerate(c.layers):
        need(isinstance(layer, LayerSpec), f"layers[{i}] is {layer!r}; it must be a LayerSpec")
        window = layer.sliding_window
        need(
            window is None or (_is_int(window) and window > 0),
            f"layer {i}: sliding_window is {window!r}; it must be None or a whole number above 0",
        )
        for name in ("rope_theta", "rope_factor"):
            value = getattr(layer, name)
            need(is_positive(value), f"layer {i}: {name} is {value!r}; it must be a finite number above 0")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_positive(value: object) -> bool:
    """Return whether a value is a finite number above 0; an integer of any length compares without overflow."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1e300
