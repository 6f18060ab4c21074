"""Rules about the weights: complete, with the right shapes and plausible values."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

import numpy as np

from gemkit.arch.tensors import EMBEDDING, HEAD
from gemkit.errors import listed
from gemkit.tools.check import norms
from gemkit.tools.check.finding import ERROR, WARNING, Hit, rule
from gemkit.tools.check.subject import GGUF, HF, Subject, TensorView
from gemkit.weights.gguf.names import IGNORED, from_canonical
from gemkit.weights.hf.tensors import image_part
from gemkit.weights.quant import BLOCKS, GGMLType

# Follow from the configuration
_DERIVED = (".rotary_emb.inv_freq", "embed_tokens.embed_scale", ".self_attn.masked_bias")
_MAX_HALF = 65504.0
_NEAR_MAX_HALF = 60000.0
_MOST = 8  # places named one by one


def _label(s: Subject, key: str) -> str:
    """Return a canonical name as the file would call it."""
    row = from_canonical(key, s.config.post_norms) if s.kind == GGUF and s.config else None
    return row.gguf if row else key


def _wanted(s: Subject) -> dict[str, tuple[int, ...]]:
    """Return the shapes that the configuration requires; none if they cannot be compared."""
    if not s.tensors or not s.tensors_known or s.is_quantised:
        return {}
    return {key: spec.shape for key, spec in s.manifest.items()}


@rule(
    "tensor-missing",
    ERROR,
    "Tensors that the configuration requires are missing.",
    why="strict loaders stop; others fill them with random numbers and say so only in a log line",
    remedy="get all shards, or convert again from the complete model",
    causes=("unloadable",),
)
def tensor_missing(s: Subject) -> Iterator[Hit]:
    missing = [_label(s, key) for key in _wanted(s) if key not in s.by_key]
    # Index, shards and prefixes have rules of their own
    if missing and not s.absent_shards and not any(_LORA.search(view.name) for view in s.tensors):
        yield s.path.name, f"{len(missing)} missing: {listed(missing)}"


@rule(
    "tensor-extra",
    WARNING,
    "There are tensors that the configuration has no place for.",
    why="strict loaders stop, others ignore them: if they matter, the model is another than the configuration says",
    remedy="compare num_hidden_layers and model_type with the weights, and drop what is left over",
)
def tensor_extra(s: Subject) -> Iterator[Hit]:
    wanted = _wanted(s)
    extra = [
        view.name
        for view in s.tensors
        if wanted
        and view.key not in wanted
        and view.key != HEAD
        and view.name not in IGNORED
        and not view.name.endswith(_DERIVED)
        and not image_part(view.name)
        and not _LORA.search(view.name)
    ]
    if extra:
        yield s.path.name, f"{len(extra)} unknown: {listed(extra)}"


@rule(
    "tensor-shape",
    ERROR,
    "A tensor has another shape than the configuration says.",
    why="no program can load it, or it is read crosswise",
    remedy="correct the configuration (heads, head_dim, widths, vocab_size), or convert again",
    causes=("unloadable",),
)
def tensor_shape(s: Subject) -> Iterator[Hit]:
    groups: dict[tuple[str, tuple, tuple], list[TensorView]] = {}
    for key, shape in _wanted(s).items():
        view = s.by_key.get(key)
        if view is not None and tuple(view.shape) != shape:
            groups.setdefault((re.sub(r"\d+", "*", view.name), tuple(view.shape), shape), []).append(view)
    for (_, found, shape), views in groups.items():
        more = f" (and in {len(views) - 1} more layers)" if len(views) > 1 else ""
        yield views[0].where, f"{list(found)} instead of {list(shape)}{more}"


_LORA = re.compile(r"\.lora_[AB]\.|\.base_layer\.|\.modules_to_save\.")
_WRAPPED = re.compile(r"^(base_model\.model|module|_orig_mod)\.")


@rule(
    "lora-names",
    ERROR,
    "A LoRA adapter is in the weights, not merged (lora_A, lora_B, base_layer).",
    why="loaders find none of the names they look for, or run the model without what it was tuned to",
    remedy="merge the adapter (merge_and_unload in PEFT) and save the merged model",
    causes=("unloadable",),
)
def lora_names(s: Subject) -> Iterator[Hit]:
    names = [view.name for view in s.tensors if _LORA.search(view.name)]
    if names:
        yield s.tensors[0].file, f"{len(names)} of {len(s.tensors)} tensors: {listed(names, 2)}"


@rule(
    "wrapped-names",
    WARNING,
    "The weights have the names that a trainer gives them while it wraps the model (base_model.model., module.).",
    why="transformers and gemkit read through the prefix; other programs find none of the names they look for",
    remedy="save the model itself, not its wrapper (merge_and_unload, accelerator.unwrap_model), with save_pretrained",
)
def wrapped_names(s: Subject) -> Iterator[Hit]:
    names = [view.name for view in s.tensors if _WRAPPED.match(view.name) and not _LORA.search(view.name)]
    if names and not any(_LORA.search(view.name) for view in s.tensors):
        yield s.tensors[0].file, f"{len(names)} of {len(s.tensors)} tensors: {listed(names, 2)}"


@rule(
    "not-finite",
    ERROR,
    "A tensor has NaN or infinite numbers.",
    why="one of them spreads through a layer, and every answer becomes NaN or nothing",
    remedy="convert again from the source in bfloat16 or float32 (float16 overflows), or take an earlier checkpoint",
)
def not_finite(s: Subject) -> Iterator[Hit]:
    for view in s.tensors:
        bad = s.scanned(view).not_finite
        if bad:
            yield view.where, f"{bad:,} of the numbers read"


@rule(
    "all-zero",
    ERROR,
    "A matrix is zero throughout.",
    why="the part of the layer does nothing; this is what a broken download or a failed merge leaves behind",
    remedy="get the file again, or repeat the conversion or merge",
)
def all_zero(s: Subject) -> Iterator[Hit]:
    for view in s.tensors:
        if view.key and len(view.shape) > 1 and view.is_readable:
            found = s.scanned(view)
            if found.largest == 0 and not found.not_finite:
                yield view.where, "only zeros"


@rule(
    "layer-twice",
    WARNING,
    "Two layers have the same weights.",
    why="a published Gemma has no equal layers: a shard was copied, or layers were stacked without saying so",
    remedy="compare with the base model; get the shards again",
)
def layer_twice(s: Subject) -> Iterator[Hit]:
    for part in ("self_attn.q_proj", "mlp.down_proj"):
        seen: dict[bytes, TensorView] = {}
        for view in s.tensors:
            if view.key and view.key.endswith(f".{part}.weight") and view.is_readable and s.scanned(view).largest:
                rows = None if s.deep or view.size <= 1 << 20 else slice(0, 64)
                digest = hashlib.sha256(np.ascontiguousarray(view.raw(rows)).data).digest()
                if (first := seen.setdefault(digest, view)) is not view:
                    yield view.where, f"equal to {first.name}"


@rule(
    "head-copy",
    WARNING,
    "The output matrix is stored again though it equals the embedding.",
    why="Gemma uses one matrix for both: the copy costs up to a third of the file and of the memory",
    remedy="drop lm_head.weight (GGUF: output.weight) and set tie_word_embeddings to true",
)
def head_copy(s: Subject) -> Iterator[Hit]:
    if (view := s.by_key.get(HEAD)) is not None and _same(view, s.by_key.get(EMBEDDING)):
        yield view.where, "equal to the embedding"


@rule(
    "head-different",
    ERROR,
    "There is an output matrix that differs from the embedding.",
    why="in every published Gemma they are one matrix; a merge that changed one of the two leaves this behind, and "
    "programs that tie them ignore the other",
    remedy="merge again into the tied matrix, or, if it was trained so, set tie_word_embeddings to false and expect "
    "programs to drop it",
)
def head_different(s: Subject) -> Iterator[Hit]:
    view, embedding = s.by_key.get(HEAD), s.by_key.get(EMBEDDING)
    if view is not None and embedding is not None and _same(view, embedding) is False:
        tied = "tied" if s.config is not None and s.config.tie_word_embeddings and s.kind == HF else "untied"
        yield view.where, f"it differs from the embedding; the configuration calls them {tied}"


def _same(a: TensorView, b: TensorView | None) -> bool | None:
    """Return whether two matrices agree up to rounding to their types; None if that cannot be said."""
    if b is None or not a.is_readable or not b.is_readable:
        return None
    if a.shape != b.shape:
        return False
    rows = np.unique(np.linspace(0, a.shape[0] - 1, min(a.shape[0], 512)).astype(np.int64))
    left, right = a.numbers(rows).astype(np.float64), b.numbers(rows).astype(np.float64)
    if a.form == b.form:
        return bool(np.array_equal(left, right, equal_nan=True))
    scale = np.linalg.norm(right)
    return bool(np.linalg.norm(left - right) <= 0.15 * scale) if np.isfinite(scale) else None


@rule(
    "embedding-bits",
    WARNING,
    "The embedding is stored with fewer than 8 bits.",
    why="it is also the output matrix: its error goes straight into the probabilities, and texts begin to repeat",
    remedy="quantise again with the embedding at Q8_0 (llama-quantize --token-embedding-type q8_0)",
)
def embedding_bits(s: Subject) -> Iterator[Hit]:
    view = s.by_key.get(EMBEDDING)
    if view is None or s.kind != GGUF:
        return
    bits = 8 * BLOCKS[view.form].bytes / BLOCKS[view.form].elements if view.form is not None else None
    if (bits is not None and bits < 8) or (bits is None and re.match(r"I?Q[1-6]|TQ|MXFP4|NVFP4", view.type)):
        yield view.where, f"it is {view.type}" + (f", {bits:.1f} bits a number" if bits else "")


@rule(
    "half-range",
    WARNING,
    "A float16 tensor comes near the largest float16, 65,504.",
    why="the numbers were cut off or are about to be: the next conversion or scaling turns them into infinity",
    remedy="convert again from the bfloat16 source and keep bfloat16 or float32",
)
def half_range(s: Subject) -> Iterator[Hit]:
    for view in s.tensors:
        if view.form == GGMLType.F16 and view.is_readable and (most := s.scanned(view).largest) >= _NEAR_MAX_HALF:
            yield view.where, f"up to {min(most, _MAX_HALF):,.0f}"


@rule(
    "norm-offset",
    ERROR,
    "Norm weights are stored with the one added twice, or not at all (GGUF holds 1 + w; safetensors hold w).",
    why="every norm multiplies by the wrong factor: the output is noise, with nothing in the log",
    remedy="convert again with one program, from weights that still hold w",
)
def norm_offset(s: Subject) -> Iterator[Hit]:
    yield from norms.certain(s)


@rule(
    "norm-offset-likely",
    WARNING,
    "Norm weights look as if the one had been added twice, or not at all.",
    why="every norm would multiply by the wrong factor: the output is noise, with nothing in the log",
    remedy="compare a norm with the source's: GGUF holds 1 + w, safetensors hold w; convert again if it is off by one",
)
def norm_offset_likely(s: Subject) -> Iterator[Hit]:
    if not any(True for _ in norms.certain(s)):
        yield from norms.likely(s)


@rule(
    "type-unread",
    ERROR,
    "Tensors are of a type that gemkit does not read; their numbers were not inspected.",
    why="gemkit cannot run this file; other programs may",
    remedy="for gemkit, take BF16, Q8_0, Q6_K, Q5_K, Q4_K or Q4_0",
    causes=("unloadable",),
)
def type_unread(s: Subject) -> Iterator[Hit]:
    types: dict[str, int] = {}
    # In a model that loads, it is an unused tensor
    for view in s.tensors if s.checkpoint is None else ():
        if view.form is None and not image_part(view.name):
            types[view.type] = types.get(view.type, 0) + 1
    for kind, count in types.items():
        yield s.path.name, f"{count} tensors are {kind}"
