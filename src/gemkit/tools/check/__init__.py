"""`check`: what is wrong with a Gemma's files, before anyone loads them.

A path is read leniently, by `gguf`, `folder`, `google` or `keras`, into a `Subject`, and opened as `gemkit.load` opens
it: what does not load is an error here. Then every rule looks at it. The rules are in `files`, `loading`, `config`,
`agreement`, `tensors`, `tokens`, `tokenizers` and `template`, each a small function with its reason and remedy.
"""

from __future__ import annotations

import os
from pathlib import Path

from gemkit.errors import GemkitError, UsageError
from gemkit.tools.check import (
    agreement,
    config,
    files,
    folder,
    gguf,
    google,
    keras,
    loading,
    template,
    tensors,
    tokenizers,
    tokens,
)
from gemkit.tools.check.finding import LEVELS, Finding, Rule
from gemkit.tools.check.subject import Subject
from gemkit.weights import folder as names_of
from gemkit.weights.google.orbax import find_orbax
from gemkit.weights.google.torch_ckpt import is_torch_checkpoint
from gemkit.weights.open import is_renamed_gguf, one_gguf, open_checkpoint

__all__ = ["RULES", "Finding", "Rule", "check", "judge", "read", "scope"]

_MODULES = (files, loading, config, agreement, tensors, tokens, tokenizers, template)
# Every rule of these modules, in the order of its definition
RULES = tuple(rule for module in _MODULES for rule in vars(module).values() if isinstance(rule, Rule))


def check(path: str | os.PathLike[str], deep: bool = False) -> list[Finding]:
    """Return all findings about a model's files, errors first.

    path: any file or folder that `gemkit.load` takes, or a KerasHub preset's folder. deep: read every tensor to its
    end; without it, some rows of the large ones. Raises UsageError if no file could be a model; a broken model
    is a finding.
    Example: ``check("gemma-3-1b-it")`` is an empty list if all is well.
    """
    return judge(read(Path(path), deep))


def judge(subject: Subject) -> list[Finding]:
    """Apply the rules to a subject; return findings, errors first, without consequences of other findings."""
    if any(where == subject.config_file for where, _ in subject.broken):
        # Without configuration and tensors the other rules cannot be applied
        return [*files.lfs_pointer.findings(subject), *files.unreadable.findings(subject)]
    if other := config.other_family.findings(subject):
        return other
    found = [finding for rule in RULES for finding in rule.findings(subject)]
    fired = {finding.rule for finding in found}
    explained = {consequence for rule in RULES if rule.id in fired for consequence in rule.causes}
    found = [finding for finding in found if finding.rule not in explained]
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def scope(subject: Subject) -> dict[str, object]:
    """Return the scope of the check for JSON: an empty list of findings is only as good as its scope."""
    config, preset = subject.config, subject.preset
    return {
        "format": subject.kind,
        "loads": subject.checkpoint is not None,
        "family": subject.family,
        "published_as": preset.name if preset else None,
        "parameters": config.parameter_count() if config else None,
        "tensors": len(subject.tensors),
        "tensors_inspected": sum(view.is_readable for view in subject.tensors),
        "pieces": subject.tokens.size if subject.tokens else None,
        "chat_template": subject.template is not None,
    }


def read(path: Path, deep: bool = False) -> Subject:
    """Read what there is at a path; see `check`."""
    if path.is_dir():
        return _read_folder(path, deep)
    if not path.is_file():
        raise UsageError(f"{path} is no file or folder: give the path of a model")
    if is_renamed_gguf(path):
        return _read_gguf(path, deep)
    if path.name == names_of.CONFIG or path.name.endswith((".safetensors", ".safetensors.index.json")):
        if names_of.is_adapter_file(path.name):
            raise _nothing(path)
        return _read_folder(path.parent, deep)
    if path.suffix != ".gguf" and is_torch_checkpoint(path):
        return _read_google(path, deep)
    return _read_gguf(path, deep)


def _read_folder(path: Path, deep: bool) -> Subject:
    """Read a folder by the rule of `gemkit.weights.folder`, or a KerasHub preset, which gemkit does not load."""
    subject = Subject(path, "hf", folder=path, files=folder.files_of(path), deep=deep)
    subject.pointers = folder.pointers_of(path, subject.files)
    names = [name for name in subject.files if "/" not in name]
    raw = folder.read_json(subject, names_of.CONFIG)
    if raw is not None and keras.is_preset(raw):
        keras.read(subject, raw)
        return subject
    if not names_of.is_hugging_face(names):
        if ggufs := names_of.ggufs_of(names):
            try:
                return _read_gguf(path / one_gguf(path, ggufs), deep, path, subject.files)
            except GemkitError as error:
                raise UsageError(str(error)) from None
        if not names_of.safetensors_of(names) and (find_orbax(path) or is_torch_checkpoint(path)):
            return _read_google(path, deep, path, subject.files)
        if names_of.CONFIG not in names:
            raise _nothing(path)
    folder.read(subject, raw)
    loading.load(subject, path)
    return subject


def _read_gguf(path: Path, deep: bool, around: Path | None = None, names: list[str] | None = None) -> Subject:
    """Read a GGUF file. around, names: the folder that was given, if any, and its files."""
    subject = Subject(path, "gguf", deep=deep, pointers=folder.pointers_of(path.parent, [path.name]))
    gguf.read(path, subject)
    loading.load(subject, path)
    subject.folder, subject.files = around, names or []
    return subject


def _read_google(path: Path, deep: bool, around: Path | None = None, names: list[str] | None = None) -> Subject:
    subject = Subject(path, "google", deep=deep)
    loading.load(subject, path)
    google.read(subject)
    subject.folder, subject.files = around, names or []
    return subject


def _nothing(path: Path) -> UsageError:
    """Return the loader's error for a path without a model."""
    try:
        open_checkpoint(path).close()
    except GemkitError as error:
        return UsageError(str(error))
    return UsageError(f"{path} holds no model")
