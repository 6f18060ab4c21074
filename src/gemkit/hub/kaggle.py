"""Kaggle: models in kagglehub's cache folder, in its layout, so that both share them.

kagglehub's own library neither resumes a file in a new process nor fetches only the files that are needed, and
requires two more packages; its hub needs four requests: the newest version, the list of files, and each file, which
redirects to Google Cloud Storage. Sources: kagglehub 0.3 (http_resolver.py) and 1.0 (cache.py, config.py).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from gemkit.errors import GemkitError
from gemkit.hub.errors import check_token, explain, is_page, page_error, session
from gemkit.hub.fetch import Unreachable, fetch_all, pause, timeout, unreachable, write_error
from gemkit.hub.hf_cache import is_whole
from gemkit.hub.item import Item, md5
from gemkit.hub.names import KaggleName, is_safe, official, select
from gemkit.hub.progress import Progress

if TYPE_CHECKING:
    import httpx2

_HUB = "https://www.kaggle.com"
_ATTEMPTS = 4
_MOST_PAGES = 100


def cache_folder() -> Path:
    """Return kagglehub's cache of models: KAGGLEHUB_CACHE, else ~/.cache/kagglehub."""
    root = os.environ.get("KAGGLEHUB_CACHE") or os.path.join("~", ".cache", "kagglehub")
    return Path(os.path.expanduser(root)).absolute() / "models"


def endpoint() -> str:
    """Return the hub's address: KAGGLE_API_ENDPOINT, if a mirror is used."""
    return (os.environ.get("KAGGLE_API_ENDPOINT") or _HUB).rstrip("/")


def find(name: KaggleName) -> Path | None:
    """Return a complete model in the cache: its folder or its GGUF file; None if there is none. No network."""
    versions = [name.version] if name.version else [number for number, _ in versions_of(cache_folder() / name.handle)]
    for version in versions:
        if path := whole(cache_folder() / name.handle / str(version)):
            return path
    return None


def versions_of(variation: Path) -> list[tuple[int, Path]]:
    """Return the versions in a variation's folder, whole or not, the newest first."""
    found = [(int(path.name), path) for path in variation.glob("*") if path.is_dir() and path.name.isdecimal()]
    return sorted(found, reverse=True)


def variations() -> Iterator[tuple[str, Path]]:
    """Yield the variations in the cache: handle and folder."""
    for folder in sorted(cache_folder().glob("*/*/*/*")):
        if folder.is_dir():
            yield folder.relative_to(cache_folder()).as_posix(), folder


def whole(folder: Path) -> Path | None:
    """Return the model in a version's folder if it is complete.

    kagglehub writes under final names, so only a file with kagglehub's mark, or of a marked version, counts.
    """
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    files = [name for name in files if _is_marked(folder, name)]
    try:
        chosen = select(files, None, str(folder))
    except GemkitError:
        return None
    if all(file.lower().endswith(".gguf") for file in chosen):
        return folder / chosen[0]
    if chosen == official(files):
        # Only the mark of the version shows that a Flax tree is complete
        is_file = any(name.endswith(".ckpt") for name in chosen)
        return folder if is_file or _mark(folder, None).is_file() else None
    has_all = set(chosen) >= {path.name for path in folder.glob("*.safetensors")}
    return folder if has_all and is_whole(folder) else None


def download(name: KaggleName, progress: Callable[[Progress], None], *, attempts: int = _ATTEMPTS) -> Path:
    """Fetch the missing files of a model's newest or given version, and return its folder or GGUF file.

    Raises GemkitError; `Unreachable` without a connection.
    """
    client = session(endpoint(), "KAGGLE_API_ENDPOINT")
    headers = _headers()
    version = name.version or _newest(name, client, headers, attempts)
    name = KaggleName(name.handle, version)
    files = _files(name, client, headers, attempts)
    chosen = select(files, None, str(name))
    folder = cache_folder() / name.handle / str(version)
    items = [
        _item(name, file, files[file], folder, headers)
        for file in sorted(chosen, key=lambda file: files[file])
        if not ((folder / file).is_file() and _is_marked(folder, file))
    ]
    try:
        for item, file in ((item, item.target.relative_to(folder).as_posix()) for item in items):
            if item.target.is_file() and not _is_marked(folder, file):
                item.target.unlink()  # left by an interrupted kagglehub
        if items:
            fetch_all(items, client, partial(_refused, name), progress)
        if set(chosen) == set(files):
            _touch(_mark(folder, None))
    except OSError as error:
        raise write_error(error, folder) from None
    except GemkitError:
        _remove_empty(folder)
        raise
    if path := whole(folder):
        return path
    raise GemkitError(f"{name} is not whole on the hub: it lacks a tokenizer or some of its weights; choose another")


def remove(folder: Path) -> None:
    """Remove a version's folder and its marks."""
    shutil.rmtree(folder)
    shutil.rmtree(folder.parent / ".complete" / folder.name, ignore_errors=True)
    _mark(folder, None).unlink(missing_ok=True)
    for path in (folder.parent / ".complete", *folder.parents):
        if path == cache_folder().parent:
            break
        try:
            path.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            break


def _mark(folder: Path, file: str | None) -> Path:
    """Return kagglehub's marker of a complete file or version."""
    if file is None:
        return folder.with_name(f"{folder.name}.complete")
    return folder.parent / ".complete" / folder.name / f"{file}.complete"


def _is_marked(folder: Path, file: str) -> bool:
    return _mark(folder, None).is_file() or _mark(folder, file).is_file()


def _touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def _remove_empty(folder: Path) -> None:
    for path in (folder, *folder.parents):
        if path == cache_folder():
            break
        try:
            path.rmdir()
        except OSError:
            break


def _item(name: KaggleName, file: str, size: int, folder: Path, headers: dict[str, str]) -> Item:
    path = folder / file
    return Item(
        name=f"{name}/{file}",
        url=f"{_url(name)}/{name.version}/download/{quote(file)}",
        headers=headers,
        size=None,  # Google Cloud Storage tells it; the list of files is for people
        about=size,
        target=path,
        partial=path.with_name(f".{path.name}.incomplete"),
        digest=md5,
        expected=_md5_of,
        # The mark is first, so that a file of ours is never without one
        finish=partial(_touch, _mark(folder, file)),
    )


def _md5_of(headers: httpx2.Headers) -> bytes | None:
    """Return the checksum in Google Cloud Storage's header, such as `crc32c=n03x6A==,md5=Ojk9c3dhfxgoKVVHYwFbHQ==`."""
    import base64
    import binascii

    for part in headers.get("x-goog-hash", "").split(","):
        kind, _, value = part.strip().partition("=")
        if kind == "md5":
            try:
                return base64.b64decode(value, validate=True)
            except binascii.Error:
                return None
    return None


def _newest(name: KaggleName, client: httpx2.Client, headers: dict[str, str], attempts: int) -> int:
    answer = _ask(name, f"{_url(name)}/get", client, headers, attempts)
    version = answer.get("versionNumber")
    if not isinstance(version, int) or version < 1:
        raise GemkitError(f"{endpoint()} names no version of {name}: add one, kaggle:{name.handle}/1")
    return version


def _files(name: KaggleName, client: httpx2.Client, headers: dict[str, str], attempts: int) -> dict[str, int]:
    """Return sizes in bytes by name, 0 where the hub does not say."""
    found: dict[str, int] = {}
    token = ""
    for _ in range(_MOST_PAGES):
        url = f"{_url(name)}/{name.version}/files?page_size=200" + (
            f"&page_token={quote(token, safe='')}" if token else ""
        )
        answer = _ask(name, url, client, headers, attempts)
        for entry in answer.get("files") or []:
            file, size = entry.get("name"), str(entry.get("size", entry.get("totalBytes", "")))
            if isinstance(file, str) and is_safe(file):
                found[file] = int(size) if size.isdecimal() else 0
        token = answer.get("nextPageToken") or ""
        if not token:
            return found
    raise GemkitError(f"{name} has more files than a model has: choose another")


def _ask(name: KaggleName, url: str, client: httpx2.Client, headers: dict[str, str], attempts: int) -> dict[str, Any]:
    """Return one JSON answer."""
    import httpx2

    for attempt in range(attempts):
        if attempt:
            time.sleep(pause(attempt))
        try:
            response = client.get(url, headers=headers, timeout=timeout(), follow_redirects=True)
        except httpx2.TransportError as error:
            reason, may_pass = explain(error, url)
            if not may_pass:
                raise Unreachable(reason) from None
            continue
        except httpx2.TooManyRedirects:
            raise page_error(endpoint(), "KAGGLE_API_ENDPOINT") from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise GemkitError(f"{endpoint()} is not Kaggle ({error}): check KAGGLE_API_ENDPOINT") from None
        if response.status_code in (408, 429, 500, 502, 503, 504):
            reason = f"{endpoint()} cannot be reached (it answered {response.status_code}): try again later"
            continue
        if response.status_code == 511 or is_page(response.headers.get("Content-Type", ""), response.text[:200]):
            raise page_error(endpoint(), "KAGGLE_API_ENDPOINT")
        if response.status_code != 200:
            raise _refused(name, response)
        try:
            answer = response.json()
        except (json.JSONDecodeError, UnicodeDecodeError):
            answer = None
        if not isinstance(answer, dict):
            raise GemkitError(f"{endpoint()} is not Kaggle (it sends no JSON): check KAGGLE_API_ENDPOINT")
        return answer
    raise unreachable(reason, "KAGGLE_API_ENDPOINT")


def _refused(name: KaggleName, response: httpx2.Response) -> GemkitError:
    owner, model, framework, _ = name.handle.split("/")
    page = f"{_HUB}/models/{owner}/{model}"
    if response.status_code == 407:
        return GemkitError("the proxy asks for a user: set HTTPS_PROXY=http://user:password@host:port")
    if response.status_code in (401, 403):
        if not credentials():
            how = "and set KAGGLE_USERNAME and KAGGLE_KEY"
        elif response.status_code == 403:
            how = "with the account of your key"
        else:
            how = "and get a new key: Kaggle does not know the present one, which may have expired or been replaced"
        return GemkitError(
            f"Kaggle refuses {name}: open {page}, accept its terms {how} (keys: {_HUB}/settings){_elsewhere(name)}"
        )
    if response.status_code == 404:
        return GemkitError(f"Kaggle has no model {name}: look for its variation and version on {page}/{framework}")
    return GemkitError(f"Kaggle answered {response.status_code} for {name}: try again later")


def _elsewhere(name: KaggleName) -> str:
    """Return the same model on Hugging Face, where it is known."""
    from gemkit.arch.presets import PRESETS
    from gemkit.hub.names import kaggle_handle

    found = [preset.hub_id for preset in PRESETS.values() if kaggle_handle(preset.hub_id) == name.handle]
    return f"; or take hf:{found[0]} with HF_TOKEN" if found else ""


def _headers() -> dict[str, str]:
    from gemkit import __version__

    return {"User-Agent": f"gemkit/{__version__}", **credentials()}


def credentials() -> dict[str, str]:
    """Return the header that signs in, by the variables and files that kagglehub reads; empty without them."""
    import base64

    folder = Path(os.environ.get("KAGGLE_CONFIG_DIR") or os.path.expanduser(os.path.join("~", ".kaggle")))
    origin, token = "KAGGLE_API_TOKEN", (os.environ.get("KAGGLE_API_TOKEN") or "").strip()
    file = Path(token) if token else folder / "access_token"
    if _is_file(file):
        origin, token = f"the token in {file}", _read_key(file)
    if token:
        check_token(token, origin, f"{_HUB}/settings")
        return {"Authorization": f"Bearer {token}"}
    user, key = ((os.environ.get(name) or "").strip() for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"))
    path = folder / "kaggle.json"
    origin = "KAGGLE_KEY"
    if not (user and key) and _is_file(path):
        origin = f"the key in {path}"
        try:
            values = json.loads(path.read_bytes())
            user, key = str(values["username"]), str(values["key"])
        except (OSError, ValueError, KeyError, TypeError):
            raise GemkitError(f"{path} is not Kaggle's key file: get a new one from {_HUB}/settings") from None
    if not (user and key):
        return {}
    check_token(key, origin, f"{_HUB}/settings")
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{key}".encode()).decode()}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a token that is too long for a file's name, or a folder that may not be read
        return False


def _read_key(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig").strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise GemkitError(f"{path} cannot be read ({reason}): get a new key from {_HUB}/settings") from None


def _url(name: KaggleName) -> str:
    return f"{endpoint()}/api/v1/models/{name.handle}"
