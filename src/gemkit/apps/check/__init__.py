"""`check`: what is wrong with a Gemma's files, before anyone loads them.

A path is read leniently, by `gguf`, `folder` or `keras`, into a `Subject`; then every rule looks at it. The rules are
in `tokens`, `config`, `tensors` and `files`, each a small function with the reason and the remedy beside it.
"""

from __future__ import annotations

import os
from pathlib import Path

from gemkit.apps.check import config, files, folder, gguf, keras, tensors, tokens
from gemkit.apps.check.finding import LEVELS, Finding, Rule
from gemkit.apps.check.subject import Subject
from gemkit.errors import GemkitError, UsageError
from gemkit.weights.files import one_gguf
from gemkit.weights.folder import ggufs_of, is_hugging_face

__all__ = ["RULES", "Finding", "Rule", "check", "judge", "read", "scope"]

RULES: tuple[Rule, ...] = (*files.RULES, *config.RULES, *tensors.RULES, *tokens.RULES)


def check(path: str | os.PathLike[str], deep: bool = False) -> list[Finding]:
    """Everything that is found wrong with a model's files, errors first.

    path: a GGUF file, a Hugging Face folder, or a KerasHub preset's folder. deep: read every tensor to its end; without
    it, some rows of the large ones. Raises UsageError if there is nothing that could be a model; a broken model is a
    finding.
    Example: ``check("gemma-3-1b-it")`` is an empty list if all is well.
    """
    return judge(read(Path(path), deep))


def judge(subject: Subject) -> list[Finding]:
    """What the rules find in what was read, errors first; consequences of another finding are left out."""
    if any(where == subject.facts for where, _ in subject.broken):
        return files.unreadable.findings(subject)  # of a model whose facts are lost, nothing else can be said
    if other := config.other_family.findings(subject):
        return other
    found = [finding for rule in RULES for finding in rule.findings(subject)]
    fired = {finding.rule for finding in found}
    explained = {consequence for rule in RULES if rule.id in fired for consequence in rule.causes}
    found = [finding for finding in found if finding.rule not in explained]
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def scope(subject: Subject) -> dict[str, object]:
    """What was looked at, ready for JSON: a list without findings is worth as much as this."""
    config, preset = subject.config, subject.preset
    return {
        "format": subject.kind,
        "family": subject.family,
        "published_as": preset.name if preset else None,
        "parameters": config.parameter_count() if config else None,
        "tensors": len(subject.tensors),
        "tensors_inspected": sum(view.is_readable for view in subject.tensors),
        "pieces": subject.tokens.size if subject.tokens else None,
        "chat_template": subject.template is not None,
    }


def read(path: Path, deep: bool = False) -> Subject:
    """Reads what there is at a path; see `check`."""
    if path.is_dir():
        return _read_folder(path, deep)
    if not path.is_file():
        raise UsageError(f"{path} is no file or folder: give the path of a model")
    if path.name == "config.json" or path.name.endswith((".safetensors", ".safetensors.index.json")):
        return _read_folder(path.parent, deep)
    subject = Subject(path, "gguf", deep=deep)
    gguf.read(path, subject)
    return subject


def _read_folder(path: Path, deep: bool) -> Subject:
    subject = Subject(path, "hf", folder=path, files=folder.files_of(path), deep=deep)
    top = [name for name in subject.files if "/" not in name]
    models = [] if is_hugging_face(top) else ggufs_of(top)
    if models:
        try:
            name = one_gguf(path, models)
        except GemkitError as error:
            raise UsageError(str(error)) from None
        subject.folder = None
        gguf.read(path / name, subject)
        subject.folder = path
        return subject
    if "config.json" not in subject.files:
        if any(map(folder.is_adapter, subject.files)):
            raise UsageError(f"{path} holds a LoRA adapter: give the model that it was trained for, or merge it first")
        if any(name.endswith(".safetensors") for name in subject.files):
            raise UsageError(f"{path} has weights and no config.json: get it from where they come from")
        raise UsageError(f"{path} holds no model: give a GGUF file, or a folder with config.json and weights")
    raw = folder.read_json(subject, "config.json")
    if raw is not None and keras.is_preset(raw):
        keras.read(subject, raw)
    else:
        folder.read(subject, raw)
    return subject
