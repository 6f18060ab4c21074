"""Shell completion of a model's name: published names, downloaded models, files. No network, no weights."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import click
from click.shell_completion import CompletionItem


def models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return names with this prefix, then files and folders; paths are left to the shell."""
    if incomplete.startswith((".", "~", os.sep)):
        return [CompletionItem(incomplete, type="file")]
    names = dict.fromkeys([*_published(), *_downloaded()])
    found = [CompletionItem(name) for name in names if name.lower().startswith(incomplete.lower())]
    found += [CompletionItem(path) for path in _files(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


def downloaded(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the names of `gemkit ls` with this prefix."""
    from gemkit.hub.resolve import installed

    names = dict.fromkeys(entry.name for entry in installed())
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def published(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the short names of published models with this prefix."""
    return [CompletionItem(name) for name in _published() if name.startswith(incomplete.lower())]


def _published() -> list[str]:
    from gemkit.arch.presets import PRESETS

    return ["demo", *PRESETS]


def _downloaded() -> Iterator[str]:
    """Yield repositories in Hugging Face's cache, without the prefix, as bash breaks words at a colon."""
    from gemkit.hub.hf_cache import repo_folders

    for repo, _ in repo_folders():
        if "gemma" in repo.lower():
            yield repo


def _files(incomplete: str) -> Iterator[str]:
    """Yield GGUF files, and folders with a model, that match the word."""
    folder, _, start = incomplete.rpartition("/")
    with contextlib.suppress(OSError):
        for path in sorted(Path(folder or ".").iterdir()):
            if not path.name.startswith(start) or path.name.startswith("."):
                continue
            name = f"{folder}/{path.name}" if folder else path.name
            if path.suffix.lower() == ".gguf" and path.is_file():
                yield name
            elif path.is_dir() and any((path / file).exists() for file in ("config.json", "checkpoint", "_METADATA")):
                yield name
