"""A name → local files: a path, the demo model, Hugging Face, Kaggle. Every verb finds its model through `resolve`."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from gemkit.errors import GemkitError, GemkitWarning, UsageError
from gemkit.hub import hf_cache, huggingface, kaggle
from gemkit.hub.errors import import_error
from gemkit.hub.listing import Entry, installed
from gemkit.hub.names import HfName, KaggleName, Name, parse, quick
from gemkit.hub.progress import Progress, on_terminal

DEMO = "demo"
_SUFFIXES = (".gguf", ".safetensors", ".json", ".ckpt")


def resolve(
    name: str | os.PathLike[str],
    *,
    offline: bool = False,
    download: bool = True,
    progress: Callable[[Progress], None] | None = None,
    refresh: bool = False,
    original: bool = False,
) -> Path:
    """Return a model's GGUF file or folder, and downloads it first if it is a hub's and not here whole.

    name: a path; "demo"; a published model's short name; `hf:org/name[@revision][:file or quantisation]`, also without
    `hf:`; `kaggle:owner/model/framework/variation[/version]`. offline: never ask a hub, nor with HF_HUB_OFFLINE=1.
    download: False raises rather than fetches. progress: called about ten times a second; by default a line on the
    terminal. refresh: ask whether the hub has a newer one; without it, what is here whole is used with no question.
    original: a short name means the weights as trained; without it, Google's 4-bit GGUF file where there is one, and
    the original if only that is here.
    Raises GemkitError with the remedy. Example: ``resolve("demo").suffix`` is ``".gguf"``.
    """
    if name == DEMO:
        from gemkit.hub.demo import demo_path

        return demo_path()
    if (path := _local(name)) is not None:
        return path
    text = os.fspath(name)
    names, fast = parse(text), quick(text)
    wanted = names if fast is None or original else (fast, *names)
    found = next((path for one in wanted if (path := _find(one))), None)
    offline = offline or huggingface.is_offline()
    if found is not None and (offline or not refresh or not download):
        return found
    if offline or not download:
        raise _not_here(text, wanted, offline and download, None if fast is None or not original else _find(fast))
    if wanted[0] == fast and _find(fast) is None:
        _say(f"{text} is fetched as Google's 4-bit file, {fast}; its original weights are {names[0]}")
    try:
        return _download(wanted[0], text, progress, 1 if found else None)
    except UsageError:
        raise
    except GemkitError as error:
        if found is None:
            raise
        warnings.warn(f"{error}; the copy in {found} is used", GemkitWarning, stacklevel=2)
        return found


def named(name: str) -> list[Entry]:
    """Return the downloaded models that a name means, whole or not: all revisions and files unless it names one.

    Raises GemkitError if there is none.
    """
    entries = installed()
    found = [entry for entry in entries if entry.name == name]
    if not found and name != DEMO:
        if _local(name) is not None:
            raise UsageError(f"{name} is a path, not a name of 'gemkit ls': delete it yourself")
        meant = (*parse(name), *((fast,) if (fast := quick(name)) else ()))
        found = [entry for entry in entries if any(_means(one, entry) for one in meant)]
    if not found:
        raise GemkitError(f"{name} is not downloaded: 'gemkit ls' lists what is")
    return found


def remove(entries: Iterable[Entry]) -> set[Path]:
    """Delete downloaded models; files shared with other revisions are kept. Return the paths of these models."""
    removed: set[Path] = set()
    for entry in entries:
        paths = {entry.path, *entry.path.rglob("*")} if entry.path.is_dir() else {entry.path}
        paths |= {path.resolve() for path in paths}
        try:
            entry.remove()
        except OSError as error:
            raise GemkitError(f"{error.filename or entry.path} cannot be deleted ({error.strerror or error})") from None
        removed |= paths
    return removed


def _local(name: str | os.PathLike[str]) -> Path | None:
    """Return the path, if the name is one; raises GemkitError if it can only be one and does not exist."""
    text = os.fspath(name)
    if not text or "\0" in text:
        raise UsageError("the model's name is empty: give a file, a folder or a name like gemma-3-1b-it")
    path = Path(text).expanduser() if text.startswith("~") else Path(text)
    with contextlib.suppress(OSError):  # a name too long for the disk
        if path.exists():
            return path
    if text.lower().startswith(("hf:", "kaggle:")):
        return None
    by_form = not isinstance(name, str) or text.startswith((".", "~")) or path.is_absolute() or "\\" in text
    if by_form or text.lower().endswith(_SUFFIXES):
        raise GemkitError(f"there is no file or folder {text}: check the path")
    if "/" in text and (len(path.parts) != 2 or path.parent.is_dir()):
        raise GemkitError(f"there is no file or folder {text}; a model on Hugging Face is hf:org/name")
    return None


def _find(name: Name) -> Path | None:
    try:
        return hf_cache.find(name) if isinstance(name, HfName) else kaggle.find(name)
    except OSError as error:
        folder = error.filename or "the hub's cache"
        variable = "HF_HOME" if isinstance(name, HfName) else "KAGGLEHUB_CACHE"
        raise GemkitError(
            f"{folder} cannot be read ({error.strerror or error}): make it yours again (chown), or set {variable} to "
            "another folder"
        ) from None


def _download(name: Name, text: str, progress: Callable[[Progress], None] | None, attempts: int | None) -> Path:
    show = None
    if progress is None:
        progress = show = on_terminal(text)
    options = {} if attempts is None else {"attempts": attempts}
    try:
        if isinstance(name, HfName):
            return huggingface.download(name, progress, **options)
        return kaggle.download(name, progress, **options)
    except ImportError as error:
        raise import_error(error) from None
    finally:
        if show is not None:
            show(None)


def _say(text: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"gemkit: {text}\n")


def _not_here(text: str, names: Iterable[Name], offline: bool, other: Path | None = None) -> GemkitError:
    """Return the error for a missing model. other: Google's 4-bit file of the model, if that is downloaded instead."""
    entries = installed()
    partly = any(
        any(_means(name, entry) for entry in entries)
        or (isinstance(name, HfName) and name.revision and hf_cache.has_snapshot(name.repo, name.revision))
        for name in names
    )
    state = "is not whole, since its download broke off" if partly else "is not downloaded"
    how = ", and the network is switched off (--offline or HF_HUB_OFFLINE)" if offline else ""
    run = "switch it on and run" if offline else "run"
    if other is not None:
        first = next(iter(names))
        return GemkitError(
            f"{text} is here only as Google's 4-bit file, and the original is asked for{how}: {run} 'gemkit download "
            f"{first}', or leave out what asks for it (--dtype, --backend, an adapter)"
        )
    return GemkitError(f"{text} {state}{how}: {run} 'gemkit download {text}'")


def _means(name: Name, entry: Entry) -> bool:
    """Return whether a name refers to a downloaded model."""
    if isinstance(name, KaggleName):
        return entry.handle == name.handle and name.version in (None, entry.version)
    if entry.repo != name.repo:
        return False
    if name.revision is not None and not (
        entry.revision == name.revision or (entry.commit or "").startswith(name.revision)
    ):
        return False
    return name.selector is None or hf_cache.find(name) == entry.path
