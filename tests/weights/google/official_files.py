"""Tiny models in the layouts of Google's own checkpoints, made without gemkit's tables, and what they compute.

Each layout is written down as its own library multiplies it (Flax's einsums, torch's linear maps); `forward` puts the
steps between them around that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from gemkit.arch import reference
from gemkit.arch.config import ModelConfig
from gemkit.arch.hf_config import to_hf

Array = np.ndarray


class Layer(NamedTuple):
    """One block. qkv: [T, D] to q [T, N, H], k and v [T, K, H]; out: [T, N, H] to [T, D]. norms by place, or None."""

    qkv: Callable[[Array], tuple[Array, Array, Array]]
    out: Callable[[Array], Array]
    mlp: Callable[[Array], Array]
    norms: Mapping[str, Array | None]


def forward(config: ModelConfig, tokens: Array, table: Array, layers: list[Layer], final: Array) -> Array:
    """Logits float64 [T, V]."""
    T, eps = len(tokens), config.rms_norm_eps

    def norm(x: Array, weight: Array | None) -> Array:
        return x if weight is None else reference.norm(x, weight.astype(np.float64), eps)

    positions = np.arange(T)
    distance = positions[:, None] - positions[None]
    x = table[tokens].astype(np.float64) * np.sqrt(config.hidden_size)
    for layer, spec in zip(layers, config.layers, strict=True):
        n = layer.norms
        q, k, v = layer.qkv(norm(x, n["pre_attention"]))
        q = reference.rope(norm(q, n["query"]), positions, spec)
        k = reference.rope(norm(k, n["key"]), positions, spec)
        k, v = (np.repeat(a, config.num_attention_heads // config.num_key_value_heads, axis=1) for a in (k, v))
        scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(config.query_pre_attn_scalar)
        scores = reference.softcap(scores, config.attn_logit_softcapping)
        seen = (distance >= 0) & (distance < (spec.sliding_window or T))
        mixed = np.einsum("nts,snh->tnh", reference.softmax(np.where(seen, scores, -np.inf)), v)
        x = x + norm(layer.out(mixed), n["post_attention"])
        x = x + norm(layer.mlp(norm(x, n["pre_ffw"])), n["post_ffw"])
    return reference.softcap(norm(x, final) @ table.astype(np.float64).T, config.final_logit_softcapping)


def _random(rng: np.random.Generator, *shape: int, inputs: int = 0) -> Array:
    return (rng.standard_normal(shape) * (1.6 / np.sqrt(inputs) if inputs else 0.3)).astype(np.float32)


# --- Flax ------------------------------------------------------------------------------------------------------------


def flax_arrays(config: ModelConfig, *, transposed: bool, seed: int = 0) -> dict[str, Array]:
    """The arrays that the official modules make, by path without "transformer"."""
    c, rng = config, np.random.default_rng(seed)
    D, F, H, N, K = c.hidden_size, c.intermediate_size, c.head_dim, c.num_attention_heads, c.num_key_value_heads
    arrays = {"embedder/input_embedding": _random(rng, c.vocab_size, D), "final_norm/scale": _random(rng, D)}
    for i in range(c.num_hidden_layers):
        at = f"layer_{i}/"
        if K == N:
            arrays[at + "attn/qkv_einsum/w"] = _random(rng, 3, N, D, H, inputs=D)
        else:
            arrays[at + "attn/q_einsum/w"] = _random(rng, N, D, H, inputs=D)
            arrays[at + "attn/kv_einsum/w"] = _random(rng, 2, K, D, H, inputs=D)
        arrays[at + "attn/attn_vec_einsum/w"] = _random(rng, N, H, D, inputs=N * H)
        if c.qk_norm:
            arrays[at + "attn/_query_norm/scale"] = _random(rng, H)
            arrays[at + "attn/_key_norm/scale"] = _random(rng, H)
        arrays[at + "mlp/gating_einsum"] = _random(rng, *((2, F, D) if transposed else (2, D, F)), inputs=D)
        arrays[at + "mlp/linear"] = _random(rng, F, D, inputs=F)
        names = ["pre_attention_norm", "pre_ffw_norm"]
        for name in names + (["post_attention_norm", "post_ffw_norm"] if c.post_norms else []):
            arrays[f"{at}{name}/scale"] = _random(rng, D)
    return arrays


def flax_logits(config: ModelConfig, arrays: Mapping[str, Array], tokens: Array, *, transposed: bool) -> Array:
    def layer(i: int) -> Layer:
        p = {k.removeprefix(f"layer_{i}/"): v.astype(np.float64) for k, v in arrays.items() if f"layer_{i}/" in k}

        def qkv(x: Array) -> tuple[Array, Array, Array]:
            if "attn/qkv_einsum/w" in p:
                return tuple(np.einsum("td,sndh->stnh", x, p["attn/qkv_einsum/w"]))
            k, v = np.einsum("sd,ckdh->cskh", x, p["attn/kv_einsum/w"])
            return np.einsum("td,ndh->tnh", x, p["attn/q_einsum/w"]), k, v

        def mlp(x: Array) -> Array:
            equation = "tf,nhf->tnh" if transposed else "tf,nfh->tnh"
            gate = np.einsum(equation, x, p["mlp/gating_einsum"])
            return (reference.gelu(gate[:, 0]) * gate[:, 1]) @ p["mlp/linear"]

        norms = {
            name: p.get(f"{name}_norm/scale") for name in ("pre_attention", "post_attention", "pre_ffw", "post_ffw")
        }
        norms |= {name: p.get(f"attn/_{name}_norm/scale") for name in ("query", "key")}
        return Layer(qkv, lambda y: np.einsum("tnh,nhd->td", y, p["attn/attn_vec_einsum/w"]), mlp, norms)

    layers = [layer(i) for i in range(config.num_hidden_layers)]
    return forward(config, tokens, arrays["embedder/input_embedding"], layers, arrays["final_norm/scale"])


def flax_flat(arrays: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """As released: {"transformer/layer_0/mlp/linear": {"w": …}}."""
    tree: dict[str, dict[str, Array]] = {}
    for path, array in arrays.items():
        outer, leaf = (path, "w") if "/mlp/" in path else path.rsplit("/", 1)
        tree.setdefault(f"transformer/{outer}", {})[leaf] = array
    return tree


def flax_nested(arrays: Mapping[str, Array]) -> dict[str, object]:
    """As `Module.init` returns it: {"layer_0": {"mlp": {"linear": …}}}."""
    tree: dict[str, object] = {}
    for path, array in arrays.items():
        *folders, leaf = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = array
    return tree


def save_orbax(folder: Path, tree: object, config: ModelConfig | None = None, **options: object) -> Path:
    """Saved by orbax itself; with ``config.json`` if there is a config."""
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as saver:
        saver.save(folder.absolute(), args=ocp.args.PyTreeSave(tree))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(to_hf(config)))
    return folder


# --- gemma_pytorch ---------------------------------------------------------------------------------------------------


def torch_state(config: ModelConfig, *, embedding: str = "embedder", seed: int = 0) -> dict[str, torch.Tensor]:
    """The state dictionary of the official module, its tables too."""
    c, rng = config, np.random.default_rng(seed)
    D, F, H, N, K = c.hidden_size, c.intermediate_size, c.head_dim, c.num_attention_heads, c.num_key_value_heads
    state = {f"{embedding}.weight": _random(rng, c.vocab_size, D)}
    for i in range(c.num_hidden_layers):
        at = f"model.layers.{i}."
        state[at + "self_attn.qkv_proj.weight"] = _random(rng, (N + 2 * K) * H, D, inputs=D)
        state[at + "self_attn.o_proj.weight"] = _random(rng, D, N * H, inputs=N * H)
        if c.qk_norm:
            state[at + "self_attn.query_norm.weight"] = _random(rng, H)
            state[at + "self_attn.key_norm.weight"] = _random(rng, H)
        for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
            state[f"{at}mlp.{name}_proj.weight"] = _random(rng, *shape, inputs=shape[1])
        names = ["input_layernorm", "post_attention_layernorm"]
        for name in names + (["pre_feedforward_layernorm", "post_feedforward_layernorm"] if c.post_norms else []):
            state[f"{at}{name}.weight"] = _random(rng, D)
    state["model.norm.weight"] = _random(rng, D)
    tables = {name: torch.ones(4, 2, dtype=torch.complex64) for name in ("freqs_cis", "local_freqs_cis")}
    return {name: torch.from_numpy(value) for name, value in state.items()} | tables


def torch_logits(config: ModelConfig, state: Mapping[str, torch.Tensor], tokens: Array) -> Array:
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    table = next(value for name, value in state.items() if name in ("embedder.weight", "text_token_embedder.weight"))

    def layer(i: int) -> Layer:
        def weight(name: str) -> torch.Tensor | None:
            found = state.get(f"model.layers.{i}.{name}.weight")
            return None if found is None else found.double()

        def linear(name: str, x: Array) -> torch.Tensor:
            return torch.nn.functional.linear(torch.from_numpy(x), weight(name))

        def qkv(x: Array) -> tuple[Array, Array, Array]:
            q, k, v = linear("self_attn.qkv_proj", x).split([N * H, K * H, K * H], dim=-1)
            return q.view(-1, N, H).numpy(), k.view(-1, K, H).numpy(), v.view(-1, K, H).numpy()

        def mlp(x: Array) -> Array:
            gate = torch.nn.functional.gelu(linear("mlp.gate_proj", x), approximate="tanh")
            return linear("mlp.down_proj", (gate * linear("mlp.up_proj", x)).numpy()).numpy()

        four = config.post_norms
        names = {
            "pre_attention": "input_layernorm",
            "post_attention": "post_attention_layernorm" if four else "",
            "pre_ffw": "pre_feedforward_layernorm" if four else "post_attention_layernorm",
            "post_ffw": "post_feedforward_layernorm",
            "query": "self_attn.query_norm",
            "key": "self_attn.key_norm",
        }
        norms = {place: None if (w := weight(name)) is None else w.numpy() for place, name in names.items()}
        return Layer(qkv, lambda y: linear("self_attn.o_proj", y.reshape(len(y), -1)).numpy(), mlp, norms)

    layers = [layer(i) for i in range(config.num_hidden_layers)]
    return forward(config, tokens, table.numpy(), layers, state["model.norm.weight"].numpy())


def save_torch(path: Path, state: object, config: ModelConfig | None = None) -> Path:
    """A .ckpt as the official one, with ``config.json`` next to it if there is a config."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model_state_dict": state}, path)
    if config is not None:
        (path.parent / "config.json").write_text(json.dumps(to_hf(config)))
    return path
