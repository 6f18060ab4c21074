"""Rules about the configuration: agreement with the published models."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gemkit.arch.config import LayerSpec, ModelConfig
from gemkit.arch.hf_config import left_out
from gemkit.arch.presets import PRESETS
from gemkit.errors import listed
from gemkit.tools.check.finding import ERROR, WARNING, Hit, rule
from gemkit.tools.check.subject import GGUF, HF, Subject

# Settings that all published models of a family share, read from the presets.
_OF_FAMILY: dict[str, list[ModelConfig]] = {}
for _preset in PRESETS.values():
    _OF_FAMILY.setdefault(_preset.config.model_type, []).append(_preset.config)


def _common(family: str, name: str) -> object:
    """Return the value of a field if all models of the family have the same, else `...`."""
    values = {getattr(config, name) for config in _OF_FAMILY.get(family, [])}
    return values.pop() if len(values) == 1 else ...


def slides(layers: tuple[LayerSpec, ...]) -> list[bool]:
    """Return for each layer whether it slides."""
    return [layer.sliding_window is not None for layer in layers]


def expected_slides(s: Subject) -> list[bool]:
    """Return for each layer whether it slides by the family's pattern."""
    longest = max(_OF_FAMILY[s.config.model_type], key=lambda config: config.num_hidden_layers)
    pattern = slides(longest.layers)
    period = pattern.index(False) + 1
    return [bool((i + 1) % period) for i in range(s.config.num_hidden_layers)]


def _lacks_window(s: Subject) -> bool:
    """Return whether a GGUF file lacks the window, without which all its layers appear to be full."""
    key = f"{s.raw.get('general.architecture')}.attention.sliding_window"
    return s.kind == GGUF and s.family != "gemma" and key not in s.raw


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-4)


def _do_not_fit(s: Subject) -> bool:
    shapes = {key: spec.shape for key, spec in s.manifest.items()}
    return any(tuple(view.shape) != shapes.get(key, tuple(view.shape)) for key, view in s.by_key.items())


@rule(
    "other-family",
    ERROR,
    "The model is none of Gemma 1, 2 and 3.",
    why="what is checked here is true of these only",
    remedy="if it is one, set model_type (general.architecture in GGUF) to what its base model has",
)
def other_family(s: Subject) -> Iterator[Hit]:
    key = "general.architecture" if s.kind == GGUF else "model_type"
    if s.family is None:
        yield f"{s.config_file}: {key}", f"it is {s.raw[key]!r}" if key in s.raw else "it is missing"


@rule(
    "config-invalid",
    ERROR,
    "The configuration is incomplete or contradicts itself.",
    why="no program can build the model that it describes",
    remedy="take config.json (or the conversion) of the base model and change only what was tuned",
    causes=(
        "unloadable",
        "tensor-shape",
        "tensor-missing",
        "tensor-extra",
        "layer-count",
        "query-scale",
        "layer-pattern",
    ),
)
def config_invalid(s: Subject) -> Iterator[Hit]:
    if s.config_fault:
        yield s.config_file, s.config_fault
    elif s.kind == HF and (absent := left_out(s.raw)) and _do_not_fit(s):
        yield s.config_file, f"it has no {listed(absent)}; programs take defaults, which do not fit the tensors"


@rule(
    "family",
    ERROR,
    "The tensors are those of another Gemma generation than the configuration names.",
    why="norms are skipped or added in every layer: the output is noise",
    remedy="set model_type (general.architecture in GGUF) to the generation that the tensors are of",
    causes=(
        "unloadable",
        *("tensor-missing", "tensor-extra", "layer-pattern", "rope-base", "rope-factor", "window", "soft-caps"),
        *("query-scale", "special-ids", "stop-turn", "stop-turn-gguf", "stop-wrong", "config-contradiction"),
    ),
)
def family(s: Subject) -> Iterator[Hit]:
    names = " ".join(view.name for view in s.tensors)
    if s.family is None or not s.tensors or not s.tensors_known:
        return
    third = "self_attn.q_norm" in names or "attn_q_norm" in names
    second = "post_feedforward_layernorm" in names or "post_ffw_norm" in names
    seen = "gemma3_text" if third else "gemma2" if second else "gemma"
    if seen != s.family:
        reason = "query norms" if third else "norms behind the feed-forward" if second else "two norms a layer"
        yield s.config_file, f"it says {s.family}; the tensors have {reason}, as {seen} does"


@rule(
    "rms-eps",
    ERROR,
    "The epsilon of the norms is not the published one.",
    why="every norm of every layer is a little off, and more so where activations are small",
    remedy="set rms_norm_eps to 1e-6",
)
def rms_eps(s: Subject) -> Iterator[Hit]:
    if s.config and not _near(s.config.rms_norm_eps, _common(s.config.model_type, "rms_norm_eps")):
        yield s.config_file, f"it is {s.config.rms_norm_eps:g}"


@rule(
    "rope-base",
    ERROR,
    "The rotary bases are not the published ones (10,000; in Gemma 3 1,000,000 on the layers that see everything).",
    why="positions are encoded differently than in training: the text falls apart, at the latest after a few hundred "
    "tokens",
    remedy="set rope_theta 10000 (Gemma 3: rope_theta 1000000 and rope_local_base_freq 10000, or both in "
    "rope_parameters; in GGUF rope.freq_base)",
)
def rope_base(s: Subject) -> Iterator[Hit]:
    if s.config is None or _lacks_window(s):
        return
    layers = _OF_FAMILY[s.config.model_type][0].layers
    wanted = {layer.sliding_window is not None: layer.rope_theta for layer in layers}
    found: dict[tuple[bool, float], list[int]] = {}
    for i, layer in enumerate(s.config.layers):
        slides = layer.sliding_window is not None
        # A layer of the wrong kind is for the rule about the pattern
        theta = wanted.get(slides)
        if theta is not None and not _near(layer.rope_theta, theta):
            found.setdefault((slides, layer.rope_theta), []).append(i)
    for (slides, theta), numbers in found.items():
        kind = "sliding" if slides else "full"
        yield s.config_file, f"{kind} layers {listed(numbers)} have base {theta:g}, published is {wanted[slides]:g}"


@rule(
    "rope-factor",
    ERROR,
    "The rotary scaling is not the published one (8 on the full layers of Gemma 3 4B and larger, none elsewhere).",
    why="five out of six layers agree and one does not: short texts look fine and long ones do not",
    remedy='set rope_scaling to {"rope_type": "linear", "factor": 8.0} for Gemma 3 4B, 12B, 27B, else to null (in GGUF '
    "gemma3.rope.scaling.type and .factor)",
)
def rope_factor(s: Subject) -> Iterator[Hit]:
    if s.config is None:
        return
    if s.preset is not None:
        wanted = {layer.sliding_window is not None: layer.rope_factor for layer in s.preset.config.layers}
    else:
        known = {layer.rope_factor for c in _OF_FAMILY[s.config.model_type] for layer in c.layers}
        if all(layer.rope_factor in known for layer in s.config.layers):
            return
        wanted = {True: 1.0, False: max(known)}
    found: dict[tuple[bool, float], list[int]] = {}
    for i, layer in enumerate(s.config.layers):
        slides = layer.sliding_window is not None
        if not _near(layer.rope_factor, wanted.get(slides, 1.0)):
            found.setdefault((slides, layer.rope_factor), []).append(i)
    for (slides, factor), numbers in found.items():
        kind = "sliding" if slides else "full"
        factor_text = f"{kind} layers {listed(numbers)} have factor {factor:g}, published is {wanted.get(slides, 1):g}"
        yield s.config_file, factor_text


@rule(
    "layer-pattern",
    ERROR,
    "Other layers slide than published (Gemma 2: every other, layer 0 first; Gemma 3: five, then a full one).",
    why="layers look at too much or too little; a text shorter than the window hides it",
    remedy="set layer_types (or sliding_window_pattern: 2 for Gemma 2, 6 for Gemma 3) to the published pattern",
)
def layer_pattern(s: Subject) -> Iterator[Hit]:
    if s.config is None or s.config.model_type == "gemma" or _lacks_window(s):
        return
    found, wanted = slides(s.config.layers), expected_slides(s)
    wrong = [i for i, (a, b) in enumerate(zip(found, wanted)) if a != b]
    if wrong:
        first = "slides" if found[wrong[0]] else "sees everything"
        yield s.config_file, f"layers {listed(wrong)} are of the other kind; layer {wrong[0]} {first}"


@rule(
    "window",
    ERROR,
    "The sliding window is not the published one (Gemma 2: 4096; Gemma 3: 512 for 270M and 1B, else 1024).",
    why="texts longer than the window come out differently than the model was trained for",
    remedy="set sliding_window (in GGUF attention.sliding_window) to the published size",
)
def window(s: Subject) -> Iterator[Hit]:
    if s.config is None:
        return
    if _lacks_window(s):
        yield s.config_file, "it is missing"
        return
    found = {layer.sliding_window for layer in s.config.layers} - {None}
    # A model of one's own may have a window of one's own; no window at all is for the rule about the pattern
    if s.preset is not None and found:
        known = {layer.sliding_window for layer in s.preset.config.layers} - {None}
        if found != known:
            yield s.config_file, f"it is {listed(sorted(found))}, published is {listed(sorted(known))}"


@rule(
    "soft-caps",
    ERROR,
    "The soft-caps are not the published ones: 50 and 30 in Gemma 2, none in Gemma 1 and 3.",
    why="without them Gemma 2's attention and probabilities are too sharp; with them a Gemma 3's too flat",
    remedy="Gemma 2: attn_logit_softcapping 50.0 and final_logit_softcapping 30.0; Gemma 1 and 3: null",
)
def soft_caps(s: Subject) -> Iterator[Hit]:
    if s.config is None:
        return
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        wanted, found = _common(s.config.model_type, key), getattr(s.config, key)
        if (found is None) != (wanted is None) or (found is not None and not _near(found, wanted)):
            yield f"{s.config_file}: {key}", f"it is {found}, published is {wanted}"


@rule(
    "query-scale",
    ERROR,
    "The scale of the queries is not the published one (256; 144 in Gemma 2 27B, 168 in Gemma 3 27B).",
    why="attention is too sharp or too flat in every layer",
    remedy="set query_pre_attn_scalar to the published value",
)
def query_scale(s: Subject) -> Iterator[Hit]:
    if s.config is None or s.family == "gemma":
        return
    found = s.config.query_pre_attn_scalar
    wanted = s.preset.config.query_pre_attn_scalar if s.preset is not None else None
    # For an unpublished model: the head's width, or width / heads, is plausible.
    usual = {s.config.head_dim, s.config.hidden_size // s.config.num_attention_heads} if wanted is None else {wanted}
    if not any(_near(found, value) for value in usual):
        yield s.config_file, f"query_pre_attn_scalar is {found:g}, expected {listed(f'{v:g}' for v in sorted(usual))}"


@rule(
    "context",
    WARNING,
    "The context length is not the published one.",
    why="longer than trained, and the text degrades past that point; shorter, and a part of the model stays unused",
    remedy="set max_position_embeddings (in GGUF context_length) to the published length",
)
def context(s: Subject) -> Iterator[Hit]:
    if s.config is not None and s.preset is not None:
        found, wanted = s.config.max_position_embeddings, s.preset.config.max_position_embeddings
        if found != wanted:
            yield s.config_file, f"it is {found:,}, of {s.preset.name} {wanted:,}"


@rule(
    "half",
    WARNING,
    "The configuration asks for float16 in a Gemma 2 or 3.",
    why="their activations pass 65,504, the largest float16: answers turn into NaN, or come back empty",
    remedy='set dtype (or torch_dtype) to "bfloat16"; on a GPU without bfloat16, use float32',
)
def half(s: Subject) -> Iterator[Hit]:
    if s.kind != HF or s.family not in ("gemma2", "gemma3_text"):
        return
    for key in ("torch_dtype", "dtype"):
        if s.raw.get(key) in ("float16", "torch.float16", "fp16", "half"):
            yield f"config.json: {key}", f"it is {s.raw[key]}"


@rule(
    "gguf-key-length",
    ERROR,
    "A GGUF file does not state the width of a head, and width / heads is not it.",
    why="programs fall back to width / heads, and every attention matrix then has the wrong shape",
    remedy="add attention.key_length and attention.value_length (256; 128 in both 27B models) when converting",
    causes=("unloadable", "engine-limits", "tensor-shape", "query-scale"),
)
def gguf_key_length(s: Subject) -> Iterator[Hit]:
    architecture = s.raw.get("general.architecture")
    query = s.by_key.get("model.layers.0.self_attn.q_proj.weight")
    if s.kind != GGUF or f"{architecture}.attention.key_length" in s.raw or query is None:
        return
    hidden, heads = (s.raw.get(f"{architecture}.{key}") for key in ("embedding_length", "attention.head_count"))
    if type(hidden) is int and type(heads) is int and heads > 0 and query.shape[0] != hidden // heads * heads:
        yield (
            f"{s.config_file}: {architecture}.attention.key_length",
            (f"it is missing; {hidden} / {heads} is {hidden // heads}, the tensors have {query.shape[0] / heads:g}"),
        )
