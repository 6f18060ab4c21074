"""Hugging Face: models in its cache folder, in the layout of its own library, so that both share them.

Metadata comes through `huggingface_hub`; files are downloaded by `gemkit.hub.fetch`, since that library does not resume
a partial file. Files are stored under a hash: the SHA-256 of a large file, git's of a small one, so each file is
checked against its own name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemkit.cache import staged
from gemkit.errors import GemkitError, UsageError
from gemkit.hub.errors import check_token, explain, is_page, page_error, session
from gemkit.hub.fetch import Unreachable, fetch_all, pause, timeout, unreachable, write_error
from gemkit.hub.hf_cache import repo_folder, whole
from gemkit.hub.item import Item, git_blob, sha256
from gemkit.hub.names import HfName, is_safe, kaggle_handle, original_of, select
from gemkit.hub.progress import Progress

if TYPE_CHECKING:
    import httpx2

_HUB = "https://huggingface.co"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ATTEMPTS = 4
_TRUE = {"1", "ON", "YES", "TRUE"}


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE, or transformers' variable, forbids the network."""
    text = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return text.upper() in _TRUE


def endpoint() -> str:
    """Return the hub's address: HF_ENDPOINT, if a mirror is used."""
    return (os.environ.get("HF_ENDPOINT") or _HUB).rstrip("/")


def download(name: HfName, progress: Callable[[Progress], None], *, attempts: int = _ATTEMPTS) -> Path:
    """Fetch the missing files of a model at its current commit, and return its folder or GGUF file.

    The snapshot is made when all of its files are downloaded. Raises GemkitError; `Unreachable` without a connection.
    """
    client = session(endpoint(), "HF_ENDPOINT")
    check_own_token()
    from huggingface_hub.utils import build_hf_headers

    commit, files = _listing(name, attempts)
    chosen = select(files, name.selector, str(name))
    # Weights last: a snapshot that has them has everything
    wanted = sorted(
        (files[file] or _ask_for(name, file, commit) for file in chosen),
        key=lambda file: (file.is_large, file.size),
    )
    folder = repo_folder(name.repo)
    snapshot = folder / "snapshots" / commit
    headers = build_hf_headers(library_name="gemkit")
    try:
        items = [
            _item(name, file, commit, folder, headers)
            for file in wanted
            if not _is_there(snapshot / file.name, file, folder)
        ]
        if items:
            fetch_all(items, client, partial(_refused, name), progress)
        for file in wanted:
            _point(snapshot / file.name, folder / "blobs" / file.blob)
        if name.revision != commit:
            reference = folder / "refs" / (name.revision or "main")
            if not reference.is_file() or reference.read_text("utf-8") != commit:
                _write_reference(reference, commit)
    except OSError as error:
        raise write_error(error, folder) from None
    except GemkitError:
        _remove_empty(folder)
        raise
    if path := whole(snapshot, name):
        return path
    raise GemkitError(f"{name} is not whole on the hub: it lacks a tokenizer or some of its weights; choose another")


@dataclass(frozen=True)
class _File:
    """A file of a repository. blob: under which name it is stored, its SHA-256 or, if it is small, git's name."""

    name: str
    size: int
    blob: str

    @property
    def is_large(self) -> bool:
        return len(self.blob) == 64


def _listing(name: HfName, attempts: int) -> tuple[str, dict[str, _File | None]]:
    """Return the commit that a name means now, and its files by name; None where the list does not say more."""
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(endpoint=endpoint(), library_name="gemkit")
    for attempt in range(attempts):
        if attempt:
            time.sleep(pause(attempt))
        try:
            info = api.model_info(name.repo, revision=name.revision, files_metadata=True, timeout=timeout())
            return _checked(name, info)
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status not in (408, 429, 500, 502, 503, 504):
                raise explained(name, error) from None
            reason = f"{endpoint()} cannot be reached (it answered {status}): try again later"
        except httpx2.TransportError as error:
            reason, may_pass = explain(error, endpoint())
            if not may_pass:
                raise Unreachable(reason) from None
        except GemkitError:
            raise
        except HFValidationError:
            raise UsageError(f"{name} is not a Hugging Face name: check it") from None
        except httpx2.TooManyRedirects:
            raise page_error(endpoint(), "HF_ENDPOINT") from None
        except json.JSONDecodeError as error:
            if is_page("", error.doc):
                raise page_error(endpoint(), "HF_ENDPOINT") from None
            raise GemkitError(f"{endpoint()} is not a Hugging Face hub ({error}): check HF_ENDPOINT") from None
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, TypeError) as error:
            raise GemkitError(f"{endpoint()} is not a Hugging Face hub ({error}): check HF_ENDPOINT") from None
    raise unreachable(reason, "HF_ENDPOINT")


def _checked(name: HfName, info: Any) -> tuple[str, dict[str, _File | None]]:
    """Validate names and hashes from the hub before they become part of a path."""
    if not _COMMIT.fullmatch(info.sha or ""):
        raise GemkitError(f"{endpoint()} names no commit of {name.repo}: check HF_ENDPOINT")
    files = {}
    for entry in info.siblings or []:
        if is_safe(entry.rfilename):
            tag, size = (entry.lfs.sha256, entry.lfs.size) if entry.lfs else (entry.blob_id, entry.size)
            files[entry.rfilename] = _file(entry.rfilename, tag, size)
    return info.sha, files


def _file(name: str, tag: str | None, size: int | None) -> _File | None:
    """Return the file of an ETag or blob id; None if that is not a checksum."""
    if size is None or size < 0 or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", tag or ""):
        return None
    return _File(name, size, str(tag))


def _ask_for(name: HfName, file: str, commit: str) -> _File:
    """Request one file's metadata, where a repository's list omits it without a token."""
    import httpx2
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    url = hf_hub_url(name.repo, file, revision=commit, endpoint=endpoint())
    try:
        metadata = get_hf_file_metadata(url, timeout=timeout(), library_name="gemkit", retry_on_errors=True)
    except HfHubHTTPError as error:
        raise explained(name, error) from None
    except httpx2.TransportError as error:
        raise unreachable(explain(error, url)[0], "HF_ENDPOINT") from None
    if found := _file(file, metadata.etag, metadata.size):
        return found
    raise GemkitError(f"{endpoint()} tells no checksum of {name.repo}/{file}: check HF_ENDPOINT")


def check_own_token() -> None:
    """Raise GemkitError for a token that cannot be read or sent."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return
    try:
        token = get_token()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise GemkitError(
            f"the token in {constants.HF_TOKEN_PATH} cannot be read ({reason}): run 'hf auth login', or set HF_TOKEN"
        ) from None
    if token:
        check_token(token, _token_origin(), f"{_HUB}/settings/tokens")


def _token_origin() -> str:
    """Return the variable or file that the token is from."""
    from huggingface_hub import constants

    names = [name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)]
    return names[0] if names else f"the token in {constants.HF_TOKEN_PATH}"


def _item(name: HfName, file: _File, commit: str, folder: Path, headers: dict[str, str]) -> Item:
    from huggingface_hub import hf_hub_url

    blobs = folder / "blobs"
    right = bytes.fromhex(file.blob)
    return Item(
        name=f"{name.repo}/{file.name}",
        url=hf_hub_url(name.repo, file.name, revision=commit, endpoint=endpoint()),
        headers=headers,
        size=file.size,
        target=blobs / file.blob,
        partial=blobs / f"{file.blob}.incomplete",
        digest=sha256 if file.is_large else partial(git_blob, file.size),
        expected=lambda headers: right,
    )


def _is_there(pointer: Path, file: _File, folder: Path) -> bool:
    """Return whether a file of the right size is cached; without links the snapshot holds the file itself."""
    blob = folder / "blobs" / file.blob
    return any(path.is_file() and path.stat().st_size == file.size for path in (blob, pointer))


def _point(pointer: Path, blob: Path) -> None:
    """Put a blob into a snapshot: a relative link, or the file itself on a disk that has no links."""
    if not blob.is_file() or (pointer.is_file() and pointer.resolve() == blob.resolve()):
        return
    pointer.parent.mkdir(parents=True, exist_ok=True)
    try:
        with staged(pointer) as temporary:
            temporary.symlink_to(os.path.relpath(blob, pointer.parent))
    except (OSError, NotImplementedError):
        os.replace(blob, pointer)


def _write_reference(path: Path, commit: str) -> None:
    """Write a reference as Hugging Face's library does, readable for other users of the cache."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path) as temporary:
        temporary.write_text(commit, "utf-8")


def _remove_empty(folder: Path) -> None:
    """Remove the empty folders of a refused download."""
    for path in (folder / "blobs", folder):
        with contextlib.suppress(OSError):
            path.rmdir()


def _refused(name: HfName, response: httpx2.Response) -> GemkitError:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import hf_raise_for_status

    try:
        hf_raise_for_status(response)
    except HfHubHTTPError as error:
        return explained(name, error)
    return GemkitError(f"{name}: {response.url.host} answered {response.status_code}: try again later")


def explained(name: HfName, error: Exception) -> GemkitError:
    """Return one line for an error of Hugging Face's: what is wrong and which page or variable mends it."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    from gemkit.arch.presets import PRESETS

    page = f"{endpoint()}/{name.repo}"
    other = kaggle_handle(name.repo)
    instead = f"; or take kaggle:{other} with KAGGLE_USERNAME and KAGGLE_KEY" if other else ""
    if original := original_of(name.repo):
        instead = f"; or take the original weights, {original}"
    response = getattr(error, "response", None)
    status = response.status_code if response is not None else 0
    unsigned = status == 401 and not get_token()
    published = {one for preset in PRESETS.values() for one in (preset.hub_id, preset.qat_id)}
    if isinstance(error, GatedRepoError) or (unsigned and name.repo in published):
        token = "with the account of your token" if get_token() else "and set HF_TOKEN to a token of that account"
        return GemkitError(f"{name.repo} is gated: open {page}, accept its terms {token}{instead}")
    if status == 407:
        return GemkitError("the proxy asks for a user: set HTTPS_PROXY=http://user:password@host:port")
    if status == 511:
        return page_error(endpoint(), "HF_ENDPOINT")
    if status == 401 and not unsigned:
        message = response.headers.get("X-Error-Message", "")
        state = "has expired" if "expired" in message else "is not known there: it may have expired or been revoked"
        origin = _token_origin()
        return GemkitError(
            f"Hugging Face does not accept your token ({origin}), which {state}; get a new one from {_HUB}/settings/"
            f"tokens, or unset {origin if origin.isupper() else 'it with hf auth logout'}"
        )
    if isinstance(error, RepositoryNotFoundError) or unsigned:
        private = "" if get_token() else ", and set HF_TOKEN if it is private"
        private += instead if original else ""
        return GemkitError(f"Hugging Face has no model {name.repo}: check the name{private}")
    if isinstance(error, RevisionNotFoundError):
        return GemkitError(f"{name.repo} has no revision {name.revision or 'main'!r}: see {page}/commits")
    if isinstance(error, EntryNotFoundError):
        return GemkitError(f"{name} has lost a file on the hub: run it again, or see {page}/tree/main")
    if status in (401, 403):
        return GemkitError(
            f"Hugging Face refuses {name.repo} ({status}): set HF_TOKEN to a token that may read it{instead}"
        )
    return GemkitError(f"Hugging Face answered {status} for {name.repo}: try again later{instead}")
