"""Hugging Face transformers as the outside witness: builds its models from our configurations and parameters."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from torch.overrides import TorchFunctionMode

from gemkit.arch.config import ModelConfig
from gemkit.arch.hf_config import to_hf
from gemkit.arch.reference import inverse_frequencies

_CLASSES = {
    "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    "gemma3_text": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
}


def config_class(model_type: str) -> type:
    return _CLASSES[model_type][0]


def new_model(config: ModelConfig) -> torch.nn.Module:
    """The transformers model of a configuration with eager attention, freshly initialised."""
    configuration, model_class = _CLASSES[config.model_type]
    hf_config = configuration(**to_hf(config))
    hf_config._attn_implementation = "eager"
    return model_class(hf_config).eval()


def build(config: ModelConfig, params: dict[str, np.ndarray], dtype: torch.dtype) -> torch.nn.Module:
    """`new_model` with every parameter of ours in it and no other."""
    model = new_model(config)
    state = {name: torch.from_numpy(value) for name, value in params.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model.to(dtype)


def logits(model: torch.nn.Module, tokens: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
    """Logits [T, V] of one sequence, as the model computes them in its own types."""
    position_ids = None if positions is None else torch.from_numpy(np.asarray(positions, np.int64))[None]
    with torch.no_grad():
        out = model(torch.from_numpy(np.asarray(tokens, np.int64))[None], position_ids=position_ids, use_cache=False)
    return out.logits[0].numpy()


def rope_buffers(model: torch.nn.Module) -> dict[bool, torch.Tensor]:
    """The rotary frequencies that transformers computed: {layer slides: buffer [H/2]}."""
    rotary = model.model.rotary_emb
    if hasattr(rotary, "inv_freq"):
        return {True: rotary.inv_freq, False: rotary.inv_freq}
    found = {True: "sliding_attention_inv_freq", False: "full_attention_inv_freq"}
    return {slides: getattr(rotary, name) for slides, name in found.items() if hasattr(rotary, name)}


class Float64Throughout(TorchFunctionMode):
    """Runs a float64 transformers model without its detours through float32.

    transformers casts to float32 in the norms and the softmax, and rounds cosine and sine to it. Here a float64 tensor
    is not narrowed, and cosine and sine of the (float32) rotary angle are computed in float64. Nothing else changes:
    `detours` counts what was lifted, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.detours = {"float": 0, "softmax": 0, "cos": 0, "sin": 0}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        x = args[0] if args else None
        if isinstance(x, torch.Tensor):
            if func is torch.Tensor.float and x.dtype == torch.float64:
                self.detours["float"] += 1
                return x
            if func is torch.nn.functional.softmax and x.dtype == torch.float64:
                self.detours["softmax"] += 1
                kwargs["dtype"] = torch.float64
            if func in (torch.Tensor.cos, torch.Tensor.sin) and x.dtype == torch.float32:
                self.detours[func.__name__] += 1
                args = (x.double(),)
        return func(*args, **kwargs)


def exact_buffers(model: torch.nn.Module, config: ModelConfig) -> None:
    """Replaces two tables made in float32: the embedding scale by sqrt(D), the rotary frequencies by ours."""
    model.model.embed_tokens.embed_scale.fill_(config.hidden_size**0.5)
    for slides, buffer in rope_buffers(model).items():
        for layer in config.layers:
            if len(rope_buffers(model)) == 1 or slides == (layer.sliding_window is not None):
                buffer.copy_(torch.from_numpy(inverse_frequencies(config.head_dim, layer)))
