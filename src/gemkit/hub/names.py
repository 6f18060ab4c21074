"""Names of models, and the files of a repository that a name selects. No file or network access.

`demo`; a short name of a published model (`gemma-3-1b-it`); `hf:org/name[@revision][:file, glob or quantisation]`, also
without `hf:`; `kaggle:owner/model/framework/variation[/version]`.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from gemkit.errors import GemkitError, UsageError, listed
from gemkit.weights.folder import (
    CONFIG,
    INDEX,
    SINGLE,
    TOKENIZER_SETTINGS,
    TOKENIZERS,
    ggufs_of,
    is_shard,
    part_names,
    pickles_of,
    stem,
    unsplit,
)

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_HF = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9][\w./-]*))?(?::(?P<selector>[^:@\s]+))?")
_KAGGLE = re.compile(rf"(?P<handle>{_PART}/{_PART}/{_PART}/{_PART})(?:/(?P<version>[1-9][0-9]{{0,8}}))?")

# Small files, all at the top of a repository; besides them only the weights are fetched.
_SMALL = frozenset(
    {
        CONFIG,
        "generation_config.json",
        *TOKENIZERS,
        *TOKENIZER_SETTINGS,
        "chat_template.jinja",
        "chat_template.json",
    }
)
# Files that only folders of Flax arrays have
_FLAX = frozenset({"_METADATA", "manifest.ocdbt", "checkpoint"})
_QUANT = re.compile(r"(?:^|[-._])((?:I?Q|TQ|MXFP)\d\w*|BF16|FP?16|FP?32)$", re.IGNORECASE)


@dataclass(frozen=True)
class HfName:
    """A model on Hugging Face. revision: a branch, tag or commit; None is `main`. selector: which GGUF file."""

    repo: str
    revision: str | None = None
    selector: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf:{self.repo}{revision}" + (f":{self.selector}" if self.selector else "")


@dataclass(frozen=True)
class KaggleName:
    """A model on Kaggle. handle: owner/model/framework/variation. version: None is the newest."""

    handle: str
    version: int | None = None

    def __str__(self) -> str:
        return f"kaggle:{self.handle}" + (f"/{self.version}" if self.version else "")


Name = HfName | KaggleName


def parse(name: str) -> tuple[Name, ...]:
    """Return where a model of that name is published, the first choice first.

    Raises UsageError for a malformed name and GemkitError, with the nearest names, for an unknown one.
    Example: ``parse("gemma-2-2b-it")`` is ``(HfName("google/gemma-2-2b-it"), KaggleName(…))``.
    """
    text = name.strip()
    if text.lower().startswith("kaggle:"):
        match = _KAGGLE.fullmatch(text[7:])
        if not match or ".." in text:
            raise UsageError(f"{name!r} is not a Kaggle name: give kaggle:owner/model/framework/variation[/version]")
        version = match["version"]
        return (KaggleName(match["handle"], int(version) if version else None),)
    prefixed = text.lower().startswith("hf:")
    if prefixed or "/" in text:
        match = _HF.fullmatch(text[3:] if prefixed else text)
        if not match or ".." in text:
            what = "a Hugging Face name" if prefixed else "a file, a folder or the name of a model"
            raise UsageError(f"{name!r} is not {what}: give hf:org/name, hf:org/name@revision or hf:org/name:file")
        return (HfName(match["repo"], match["revision"], match["selector"]),)
    return _short(text)


def quick(name: str) -> HfName | None:
    """Return Google's 4-bit file of a model, if `name` is a short one and there is such a file.

    Example: ``quick("gemma-3-1b-it")`` is ``HfName("google/gemma-3-1b-it-qat-q4_0-gguf")``.
    """
    from gemkit.arch.presets import PRESETS

    preset = PRESETS.get(name.strip().lower())
    return HfName(preset.qat_id) if preset is not None and preset.qat_id is not None else None


def original_of(repo: str) -> str | None:
    """Return the repository with the original weights, if `repo` has Google's 4-bit file of them."""
    from gemkit.arch.presets import PRESETS

    return next((preset.hub_id for preset in PRESETS.values() if preset.qat_id == repo), None)


def with_revision(name: str, revision: str) -> str:
    """Return the name with a revision of Hugging Face, or a version of Kaggle, put in."""
    first = parse(name)[0]
    if isinstance(first, HfName):
        changed: Name = replace(first, revision=revision)
    else:
        changed = replace(first, version=int(revision) if revision.isdecimal() else None)
        if not changed.version:
            raise UsageError(f"--revision is {revision!r}; Kaggle's versions are numbers")
    if (first.revision if isinstance(first, HfName) else first.version) is not None:
        raise UsageError(f"{name!r} names a revision already: leave out --revision")
    return str(parse(str(changed))[0])


def _short(text: str) -> tuple[Name, ...]:
    from gemkit.arch.presets import PRESETS

    key = text.lower()
    if key in PRESETS:
        other = kaggle_handle(PRESETS[key].hub_id)
        return (HfName(PRESETS[key].hub_id), *([KaggleName(other)] if other else []))
    near = difflib.get_close_matches(key, [*PRESETS, "demo"], n=3, cutoff=0.6)
    remedy = (
        f"did you mean {', '.join(near)}?"
        if near
        else "give a file, a folder, hf:org/name or a name like gemma-3-1b-it"
    )
    raise GemkitError(f"there is no model {text!r}; {remedy}")


def kaggle_handle(repo: str) -> str | None:
    """Return Kaggle's name for a model that Google publishes on both hubs, or None where it is not known."""
    match = re.fullmatch(r"google/(gemma(?:-[23])?)-(\d.*)", repo)
    if not match or "-qat-" in repo:
        return None
    family, rest = match.groups()
    return f"google/{family}/transformers/" + (rest if family == "gemma" else f"{family}-{rest}")


def select(files: Iterable[str], selector: str | None, label: str) -> list[str]:
    """Return the files of a repository that gemkit needs: a Hugging Face model's, one GGUF file, or Google's own.

    A repository with both means its safetensors, unless a selector picks a GGUF. Of a split GGUF file, all parts are
    returned. label: the name, for messages.
    Raises GemkitError, or UsageError where a selector is missing or matches no file or several.
    """
    files = sorted(files)
    top = [name for name in files if "/" not in name]
    ggufs = ggufs_of(files)
    if selector is not None:
        return _gguf(ggufs, selector, label)
    weights = [name for name in top if name == SINGLE]
    weights = weights or ([name for name in top if is_shard(name)] if INDEX in top else [])
    if weights and CONFIG in top:
        index = [INDEX] if SINGLE not in weights else []
        return [*(name for name in top if name in _SMALL), *index, *weights]
    if ggufs:
        return _gguf(ggufs, None, label)
    if found := official(files):
        return found
    pickles = pickles_of(files)
    has = f" (only pickles such as {pickles[0]}, which may run code)" if pickles else ""
    raise GemkitError(f"{label} has no weights that gemkit reads{has}: look for a version in safetensors or GGUF")


def official(files: Iterable[str]) -> list[str]:
    """Return the files of one of Google's own checkpoints: a ``.ckpt`` and the files next to it, or a whole Flax tree.

    A checkpoint needs a tokenizer. gemkit reads both without running code from them.
    """
    files = sorted(files)
    if not any(name.rsplit("/", 1)[-1] == "tokenizer.model" for name in files):
        return []
    checkpoints = [name for name in files if "/" not in name and name.endswith(".ckpt")]
    if len(checkpoints) == 1:
        return [name for name in files if name in ("config.json", "tokenizer.model", checkpoints[0])]
    is_flax = any(name.rsplit("/", 1)[-1] in _FLAX for name in files)
    return files if is_flax and not checkpoints else []


def quantisation(name: str) -> str | None:
    """Return the block format in a GGUF file's name: `Q4_K_M` for `gemma-2b-it.Q4_K_M.gguf`."""
    match = _QUANT.search(stem(name))
    return match[1] if match else None


def _gguf(ggufs: list[str], selector: str | None, label: str) -> list[str]:
    """Return the GGUF file that a selector means, or all parts of it."""
    found = ggufs
    if selector is not None:
        key = selector.lower()
        found = (
            [name for name in ggufs if name == selector]
            or [name for name in ggufs if fnmatch.fnmatchcase(name.lower(), key)]
            or [name for name in ggufs if (quantisation(unsplit(name)) or "").lower() == key]
        )
    base = label.removesuffix(f":{selector}") if selector else label
    if not found:
        known = f"it has {_listed(ggufs)}" if ggufs else "it has no GGUF file"
        raise UsageError(f"{base} has no GGUF file {selector!r}: {known}")
    models = sorted({unsplit(name) for name in found})
    if len(models) > 1:
        raise UsageError(f"{label} means {len(models)} GGUF files; add :file or :quantisation: {_listed(models)}")
    parts = list(part_names(found[0]))
    if missing := [part for part in parts if part not in ggufs]:
        raise GemkitError(f"{label} lacks {listed(missing)} of its {len(parts)} parts: choose another file")
    return parts


def _listed(names: list[str]) -> str:
    """Return the quantisations if they are unique to the files, else the files."""
    quants = [quantisation(name) for name in names]
    if None not in quants and len(set(quants)) == len(quants):
        return ", ".join(str(quant) for quant in quants)
    return ", ".join(names)


def is_safe(name: str) -> bool:
    """Return whether a file's name from a hub stays inside the target folder."""
    parts = name.split("/")
    return not any(part in ("", ".", "..") for part in parts) and not re.search(r"[\\:\x00-\x1f]", name)
