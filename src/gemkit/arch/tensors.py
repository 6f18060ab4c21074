"""The manifest: every parameter of a model, by its Hugging Face checkpoint name, with shape and rules.

Matrices are [out, in], as ``torch.nn.Linear`` stores them. Letters: V vocabulary, D model width, F ffn width,
N query heads, K key-value heads, H head width; ``NH`` is N*H.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemkit.arch.config import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Standard deviation of freshly initialised matrices (``initializer_range`` of the published configurations).
_INIT_STD = 0.02


@dataclass(frozen=True)
class TensorSpec:
    """One parameter.

    letters: the name of each axis, e.g. ("NH", "D").
    init: standard deviation of its initial normal distribution; 0.0 means zeros (norms are stored as w, used as 1 + w).
    dtype_floor: the narrowest float type to compute with it in: "float32" for norms, "bfloat16" for matrices.
    lora: adapters attach to it.  quantise: it may be stored in a block format.
    shard: the axis split over devices in tensor parallelism (rows of q, k, v by whole heads), None: replicated.
    """

    name: str
    shape: tuple[int, ...]
    letters: tuple[str, ...]
    init: float
    dtype_floor: str
    lora: bool
    quantise: bool
    shard: int | None


# suffix, letters, shard; the seven projections of a layer
_PROJECTIONS = (
    ("self_attn.q_proj", ("NH", "D"), 0),
    ("self_attn.k_proj", ("KH", "D"), 0),
    ("self_attn.v_proj", ("KH", "D"), 0),
    ("self_attn.o_proj", ("D", "NH"), 1),
    ("mlp.gate_proj", ("F", "D"), 0),
    ("mlp.up_proj", ("F", "D"), 0),
    ("mlp.down_proj", ("D", "F"), 1),
)


def manifest(config: ModelConfig) -> dict[str, TensorSpec]:
    """Return all parameters of ``config`` in the order of the forward pass, keyed by name.

    Example: ``manifest(config)["model.embed_tokens.weight"].shape == (config.vocab_size, config.hidden_size)``.
    """
    size = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "H": config.head_dim,
        "NH": config.num_attention_heads * config.head_dim,
        "KH": config.num_key_value_heads * config.head_dim,
    }
    specs: dict[str, TensorSpec] = {}

    def matrix(name: str, letters: tuple[str, ...], shard: int, lora: bool) -> None:
        shape = tuple(size[letter] for letter in letters)
        specs[name] = TensorSpec(name, shape, letters, _INIT_STD, "bfloat16", lora, True, shard)

    def norm(name: str, letter: str = "D") -> None:
        specs[name] = TensorSpec(name, (size[letter],), (letter,), 0.0, "float32", False, False, None)

    matrix("model.embed_tokens.weight", ("V", "D"), 0, lora=False)
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        norm(prefix + "input_layernorm.weight")
        for suffix, letters, shard in _PROJECTIONS:
            matrix(f"{prefix}{suffix}.weight", letters, shard, lora=True)
        if config.qk_norm:
            norm(prefix + "self_attn.q_norm.weight", "H")
            norm(prefix + "self_attn.k_norm.weight", "H")
        norm(prefix + "post_attention_layernorm.weight")
        if config.post_norms:
            norm(prefix + "pre_feedforward_layernorm.weight")
            norm(prefix + "post_feedforward_layernorm.weight")
    norm("model.norm.weight")
    if not config.tie_word_embeddings:
        matrix("lm_head.weight", ("V", "D"), 0, lora=False)
    return specs
