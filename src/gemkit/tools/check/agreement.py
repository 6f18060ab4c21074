"""Rules about settings that are stated more than once, in two keys or two files: programs read one or the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from gemkit.errors import listed
from gemkit.text.special import CORE
from gemkit.tools.check.config import expected_slides, slides
from gemkit.tools.check.finding import ERROR, NOTE, WARNING, Hit, rule
from gemkit.tools.check.subject import GGUF, HF, Subject

_FULL, _SLIDING = "full_attention", "sliding_attention"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CLASSES = {
    "gemma": ("GemmaForCausalLM",),
    "gemma2": ("Gemma2ForCausalLM",),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
}
_IMAGES = {
    "image_token_index": "<image_soft_token>",
    "image_token_id": "<image_soft_token>",
    "boi_token_index": "<start_of_image>",
    "eoi_token_index": "<end_of_image>",
}
# Stated again around the text model of a multimodal Gemma 3
_OUTER = ("vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings", "sliding_window", "head_dim")


def _object(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _is_published_pattern(s: Subject) -> bool:
    return slides(s.config.layers) == expected_slides(s)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _differ(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and not math.isclose(a, b, rel_tol=1e-6)


@rule(
    "rope-contradiction",
    ERROR,
    "Keys of the rotary embedding contradict each other.",
    why="transformers 4 reads rope_theta, rope_local_base_freq and rope_scaling, transformers 5 rope_parameters: the "
    "same file is two models",
    remedy="write the same values under both names, or leave the older keys out",
)
def rope_contradiction(s: Subject) -> Iterator[Hit]:
    if s.kind == GGUF:
        yield from _gguf_rope(s)
    elif s.kind == HF:
        yield from _hf_rope(s)


def _hf_rope(s: Subject) -> Iterator[Hit]:
    raw = s.raw
    parameters = _object(raw.get("rope_parameters"))
    full = _object(parameters.get(_FULL)) if s.family == "gemma3_text" else parameters
    sliding = _object(parameters.get(_SLIDING))
    pairs = [
        ("rope_theta", raw.get("rope_theta"), f"rope_parameters.{_FULL}.rope_theta", full.get("rope_theta")),
        (
            "rope_local_base_freq",
            raw.get("rope_local_base_freq"),
            f"rope_parameters.{_SLIDING}.rope_theta",
            sliding.get("rope_theta"),
        ),
    ]
    if s.family != "gemma3_text":
        pairs = [("rope_theta", raw.get("rope_theta"), "rope_parameters.rope_theta", full.get("rope_theta"))]
    for old, a, new, b in pairs:
        if _differ(_number(a), _number(b)):
            yield f"config.json: {old}", f"it is {_number(a):g}, and {new} {_number(b):g}"
    if "rope_scaling" in raw and full:
        old_factor, new_factor = _factor(_object(raw["rope_scaling"])), _factor(full)
        if _differ(old_factor, new_factor):
            yield "config.json: rope_scaling", f"its factor is {old_factor:g}, that of rope_parameters {new_factor:g}"
    scaling = _object(raw.get("rope_scaling"))
    kinds = {str(scaling[key]) for key in ("type", "rope_type") if scaling.get(key) is not None}
    if len(kinds) > 1:
        yield "config.json: rope_scaling", f"its type is {listed(sorted(kinds))}"


def _factor(parameters: Mapping[str, object]) -> float | None:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    return 1.0 if kind == "default" else _number(parameters.get("factor"))


def _gguf_rope(s: Subject) -> Iterator[Hit]:
    name = s.raw.get("general.architecture")
    value = {
        key: s.raw.get(f"{name}.{key}") for key in ("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear")
    }
    factor, old = _number(value["rope.scaling.factor"]), _number(value["rope.scale_linear"])
    if _differ(factor, old):
        yield f"{s.config_file}: {name}.rope.scaling.factor", f"it is {factor:g}, and rope.scale_linear {old:g}"
    if value["rope.scaling.type"] == "none" and factor not in (None, 0.0, 1.0):
        yield f"{s.config_file}: {name}.rope.scaling.type", f"it is none, and the factor {factor:g}"
    turned, width = (
        _number(s.raw.get(f"{name}.rope.dimension_count")),
        _number(s.raw.get(f"{name}.attention.key_length")),
    )
    if _differ(turned, width):
        yield f"{s.config_file}: {name}.rope.dimension_count", f"it is {turned:g}, and attention.key_length {width:g}"


@rule(
    "config-contradiction",
    ERROR,
    "Two places of the configuration say different things.",
    why="programs read one or the other: the same files are two models",
    remedy="correct the one that does not fit the weights, or take it out",
)
def config_contradiction(s: Subject) -> Iterator[Hit]:
    if s.kind == GGUF:
        rows, said = s.config and s.config.vocab_size, s.raw.get(f"{s.raw.get('general.architecture')}.vocab_size")
        if rows and type(said) is int and said != rows:
            yield f"{s.config_file}: vocab_size", f"it is {said:,}, the embedding has {rows:,} rows"
        return
    if s.kind != HF:
        return
    raw = s.raw
    classes = raw.get("architectures")
    classes = [name for name in classes if isinstance(name, str)] if isinstance(classes, list) else []
    wrong = [name for name in classes if name.startswith("Gemma") and name.endswith(("LM", "Generation"))]
    wrong = [name for name in wrong if name not in _CLASSES.get(s.family, (name,))]
    if wrong:
        yield "config.json: architectures", f"it is {listed(wrong)}, and model_type {s.family}"
    types, period = raw.get("layer_types"), raw.get("sliding_window_pattern", raw.get("_sliding_window_pattern"))
    if isinstance(types, list) and type(period) is int and period > 0:
        expected = [_SLIDING if (i + 1) % period else _FULL for i in range(len(types))]
        # Of types that are wrong themselves, the rule about the pattern tells
        if types != expected and s.config is not None and _is_published_pattern(s):
            yield "config.json: sliding_window_pattern", f"it is {period}, and layer_types has another pattern"
    new, old = (str(raw.get(key)).removeprefix("torch.") for key in ("dtype", "torch_dtype"))
    if new != old and "None" not in (new, old):
        yield "config.json: dtype", f"it is {new}, and torch_dtype {old}"
    for key in _OUTER:
        inner = s.inner.get(key)
        if inner is not None and s.outer.get(key) is not None and inner != s.outer[key]:
            yield f"config.json: {key}", f"it is {s.outer[key]!r}, and {inner!r} in text_config"
    for key, piece in _IMAGES.items():
        said, found = s.outer.get(key), s.tokens.ids.get(piece) if s.tokens else None
        if type(said) is int and found is not None and said != found:
            yield f"config.json: {key}", f"it is {said}, {piece} is {found} in {s.tokens.where}"


@rule(
    "stop-contradiction",
    WARNING,
    "One file names a stop id that generation_config.json lacks.",
    why="programs that read generation_config.json alone, as transformers does, run past that token",
    remedy="put all stop ids into eos_token_id in generation_config.json",
)
def stop_contradiction(s: Subject) -> Iterator[Hit]:
    where = "generation_config.json: eos_token_id"
    ids = s.said_eos.get(where)
    if s.kind != HF or not ids:
        return
    said = s.raw.get("eos_token_id")
    said = said if isinstance(said, list) else [said]
    # Where Gemma's own two are lacking, rules of their own say so
    lost = [token for token in said if type(token) is int and token not in (*ids, s.end_of_turn, CORE["eos"][1])]
    if lost:
        yield where, f"it is {listed(ids)}, config.json names {listed(lost)} too"
    piece = (s.tokenizer_config or {}).get("eos_token")
    piece = piece.get("content") if isinstance(piece, Mapping) else piece
    token = s.tokens.ids.get(piece) if s.tokens and isinstance(piece, str) else None
    if token is not None and token not in (*ids, s.end_of_turn):
        yield where, f"it is {listed(ids)}, tokenizer_config.json ends with {piece} ({token})"


@rule(
    "pad-id",
    WARNING,
    "The id that pads a batch is not that of <pad> (0).",
    why="trainers take padding out of the loss: a model padded with a stop id never learns to stop",
    remedy="set pad_token_id to 0 in config.json and generation_config.json",
)
def pad_id(s: Subject) -> Iterator[Hit]:
    wanted = CORE["pad"][1]
    for where, value in s.said_pad.items():
        if value != wanted:
            yield where, f"it is {value}"


@rule(
    "dtype-claim",
    NOTE,
    "The configuration names another type than the weights are stored in.",
    why="programs convert at load: wider costs memory and says nothing new, narrower rounds",
    remedy='set dtype (or torch_dtype) to the type of the weights, "bfloat16" as published',
)
def dtype_claim(s: Subject) -> Iterator[Hit]:
    said = s.raw.get("dtype") or s.raw.get("torch_dtype")
    if s.kind != HF or not isinstance(said, str) or s.is_quantised:
        return
    sizes: dict[str, int] = {}
    for view in s.tensors:
        if view.key and len(view.shape) > 1:
            sizes[view.type] = sizes.get(view.type, 0) + view.size
    stored = _DTYPES.get(max(sizes, key=sizes.get)) if sizes else None
    # float16 has a rule of its own
    if stored and said.removeprefix("torch.") in set(_DTYPES.values()) - {stored, "float16"}:
        yield "config.json: dtype", f"it is {said}, the matrices are {stored}"
