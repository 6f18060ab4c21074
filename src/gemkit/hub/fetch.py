"""Downloads over HTTP: resumed, checked, several at a time, under their final name only when complete.

After a broken connection, a stall, a full disk or an interrupt, the next try continues the partial file.
"""

from __future__ import annotations

import errno
import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from gemkit.errors import GemkitError, UsageError
from gemkit.hub.errors import clock_note, explain, is_page, page_error
from gemkit.hub.item import Item, locked, rename
from gemkit.hub.progress import Progress, Tally

if TYPE_CHECKING:
    import httpx2

_BLOCK = 1 << 20
_THREADS = 4
_ATTEMPTS = 5  # in a row without a byte
_PAUSE = 0.5  # seconds before the second attempt; doubled each time
_LONGEST_WAIT = 60.0  # seconds; the most that a server's Retry-After is obeyed
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


class Unreachable(GemkitError):
    """The hub did not answer, or not with what was asked for; a later try may succeed."""


def unreachable(reason: str, variable: str) -> Unreachable:
    """Return the error for a hub that did not answer. variable: the one that sets its address."""
    address = f", correct {variable}," if os.environ.get(variable) else ","
    return Unreachable(f"{reason}{address} or use a model that is here already ('gemkit ls')")


def timeout() -> float:
    """Return the seconds without data until a timeout: GEMKIT_DOWNLOAD_TIMEOUT, or Hugging Face's variable."""
    for variable in ("GEMKIT_DOWNLOAD_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        if text := os.environ.get(variable):
            try:
                seconds = float(text)
            except ValueError:
                seconds = 0.0
            if not 0 < seconds < 1e6:
                raise UsageError(f"{variable} is {text!r}: give seconds, such as 30")
            return seconds
    return 20.0


def pause(failures: int) -> float:
    """Return seconds to wait after this number of failures in a row."""
    return _PAUSE * 2 ** (failures - 1)


def fetch_all(
    items: Sequence[Item],
    client: httpx2.Client,
    refused: Callable[[httpx2.Response], GemkitError],
    progress: Callable[[Progress], None],
) -> None:
    """Fetch all items, several at a time; an item with an existing target is skipped.

    refused: what to raise for a response that is neither the file nor a temporary error. progress is called from this
    thread. Raises GemkitError, and KeyboardInterrupt at once; partial files stay for the next try.
    """
    _check_room(items)
    tally, stop = Tally(items), threading.Event()
    todo: queue.SimpleQueue[Item] = queue.SimpleQueue()
    for item in items:
        todo.put(item)
    errors: list[BaseException] = []
    ended = threading.Semaphore(0)

    def work() -> None:
        try:
            while not stop.is_set():
                _fetch(todo.get_nowait(), client, refused, tally, stop)
        except (queue.Empty, _Stopped):
            pass
        except BaseException as error:
            errors.append(error)
        finally:
            ended.release()

    # Daemons: an interrupt must not wait for a server that says nothing
    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(_THREADS, len(items)))]
    for worker in workers:
        worker.start()
    running = len(workers)
    try:
        while running and not errors:
            running -= ended.acquire(timeout=0.1)
            progress(tally.now())
    finally:
        stop.set()
        until = time.monotonic() + 0.5
        for worker in workers:
            worker.join(max(0.0, until - time.monotonic()))
    if errors:
        raise errors[0]


def write_error(error: OSError, folder: Path, needed: int | None = None) -> GemkitError:
    """Return the line for a file that cannot be written; needed: bytes still to come."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return no_room(folder, needed)
    reason = error.strerror or str(error)
    return GemkitError(f"{folder} cannot be written ({reason}): choose another folder (HF_HOME, KAGGLEHUB_CACHE)")


def no_room(folder: Path, needed: int | None) -> GemkitError:
    """Return the line for a full disk, with the bytes that are needed and free."""
    try:
        free = f"{shutil.disk_usage(_existing(folder)).free:,} bytes are free"
    except OSError:
        free = "the disk is full"
    need = f"{needed:,} bytes are needed and " if needed is not None else ""
    return GemkitError(
        f"{folder} has no room: {need}{free}; free some or choose another disk (HF_HOME, KAGGLEHUB_CACHE), "
        "then run it again: it goes on where it stopped"
    )


class _Stopped(Exception):
    pass


class _Again(Exception):
    """This attempt failed; the reason is its text. wait: seconds of the server's Retry-After."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


def _check_room(items: Sequence[Item]) -> None:
    """Raise GemkitError before the download if the disk is too small."""
    needs: dict[Path, int] = {}
    for item in items:
        have = item.partial.stat().st_size if item.partial.is_file() else 0
        folder = _existing(item.partial.parent)
        needs[folder] = needs.get(folder, 0) + max((item.size or item.about) - have, 0)
    for folder, needed in needs.items():
        if needed > shutil.disk_usage(folder).free:
            raise no_room(folder, needed)


def _existing(folder: Path) -> Path:
    return next((path for path in (folder, *folder.parents) if path.is_dir()), Path("."))


def _fetch(
    item: Item,
    client: httpx2.Client,
    refused: Callable[[httpx2.Response], GemkitError],
    tally: Tally,
    stop: threading.Event,
) -> None:
    left = None
    try:
        with locked(item, stop.is_set) as file:
            if file is None:
                tally.whole(item)
                return
            transfer = _Transfer(item, file, tally, stop)
            try:
                transfer.run(client, refused)
            except OSError:
                left = transfer.size - transfer.at if transfer.size is not None else None
                raise
            os.fsync(file.fileno())
            item.finish()
            if os.name == "nt":
                file.close()  # Windows renames no open file
            rename(item)
            tally.whole(item)
    except OSError as error:
        raise write_error(error, item.target.parent, left) from None


class _Transfer:
    """The transfer of one item, from the partial file to the end. at: bytes so far."""

    def __init__(self, item: Item, file: BinaryIO, tally: Tally, stop: threading.Event) -> None:
        self.item, self.file, self.tally, self.stop = item, file, tally, stop
        self.at, self.size = 0, item.size
        self.digest, self.failures = item.digest(), 0
        self.expected: bytes | None = None
        self.ended = False

    def run(self, client: httpx2.Client, refused: Callable[[httpx2.Response], GemkitError]) -> None:
        """Download until the file is complete, then check it."""
        import httpx2

        self._read_back()
        while not self._is_all():
            try:
                self._attempt(client, refused)
            except httpx2.TransportError as error:
                reason, may_pass = explain(error, self.item.url)
                if not may_pass:
                    raise Unreachable(f"{self.item.name} cannot be fetched: {reason}") from None
                self._failed(reason)
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                raise GemkitError(
                    f"{self.item.name} cannot be fetched ({' '.join(str(error).split())}): a proxy or a login page of "
                    "the network may stand in between"
                ) from None
            except _Again as again:
                self._failed(str(again), again.wait)
        expected = self.expected or self.item.expected(httpx2.Headers())
        if expected is not None and self.digest.digest() != expected:
            self._restart()
            raise GemkitError(
                f"{self.item.name} arrived with a wrong checksum and was deleted: run it again; if that happens twice, "
                "the hub's copy or a proxy on the way is at fault"
            )

    def _is_all(self) -> bool:
        return self.ended if self.size is None else self.at == self.size

    def _read_back(self) -> None:
        """Feed the bytes of an earlier try to the checksum."""
        size = os.fstat(self.file.fileno()).st_size
        if self.size is not None and size > self.size:
            self._restart()
            return
        self.file.seek(0)
        while block := self.file.read(_BLOCK):
            self._check_stop()
            self.digest.update(block)
            self.at += len(block)
        self.tally.resumed(self.item, self.at)

    def _restart(self) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.at, self.digest = 0, self.item.digest()
        self.tally.resumed(self.item, 0)

    def _attempt(self, client: httpx2.Client, refused: Callable[[httpx2.Response], GemkitError]) -> None:
        headers = {**self.item.headers, "Accept-Encoding": "identity"}
        if self.at:
            headers["Range"] = f"bytes={self.at}-"
        with client.stream("GET", self.item.url, headers=headers, timeout=timeout(), follow_redirects=True) as response:
            self._accept(response, refused)
            self.expected = self.item.expected(response.headers) or self.expected
            self.file.seek(self.at)
            for block in response.iter_bytes():  # as they come: a break loses nothing
                self._check_stop()
                self._write(block)
            self.ended = True
        if self.size is not None and self.at < self.size:
            raise _Again(f"the server ended it {self.size - self.at:,} bytes early")

    def _accept(self, response: httpx2.Response, refused: Callable[[httpx2.Response], GemkitError]) -> None:
        """Return if the response is the rest of the file, or all of it: then what is there is dropped."""
        status = response.status_code
        if status in (200, 206, 511) and (status == 511 or is_page(response.headers.get("Content-Type", ""))):
            raise page_error(response.url.host, "")
        part = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if status == 206 and part and int(part[1]) == self.at:
            self.size = int(part[2]) if self.size is None else self.size
            return
        if status == 200:
            if self.at:
                self._restart()
            length = response.headers.get("Content-Length", "")
            self.size = int(length) if self.size is None and length.isdecimal() else self.size
            return
        if self.at and status in (206, 416):
            self._restart()
            raise _Again("the server refused to go on with the file")
        # A redirect's signature runs out on a slow line; the hub then gives a fresh one
        expired = status in (401, 403) and response.history and "X-Error-Code" not in response.headers
        if status in _TRANSIENT or expired:
            host = response.url.host
            raise _Again(f"{host} answered {status}{clock_note(response.headers)}", _wait(response))
        response.read()
        raise refused(response)

    def _write(self, block: bytes) -> None:
        if self.size is not None and self.at + len(block) > self.size:
            size, self.size = self.size, self.item.size
            self._restart()
            raise _Again(f"the server sent more than its {size:,} bytes")
        view = memoryview(block)
        while view:
            written = self.file.write(view)
            self.digest.update(view[:written])
            self.at += written
            view = view[written:]
        self.tally.arrived(self.item, len(block))
        self.failures = 0

    def _failed(self, reason: str, wait: float = 0.0) -> None:
        self.failures += 1
        if self.failures >= _ATTEMPTS:
            raise Unreachable(
                f"{self.item.name} cannot be fetched: {' '.join(reason.split())}; run it again, and it goes on where "
                "it stopped"
            ) from None
        if self.stop.wait(max(pause(self.failures), wait)):
            raise _Stopped

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise _Stopped


def _wait(response: httpx2.Response) -> float:
    try:
        return min(max(float(response.headers.get("Retry-After", 0)), 0.0), _LONGEST_WAIT)
    except ValueError:
        return 0.0
