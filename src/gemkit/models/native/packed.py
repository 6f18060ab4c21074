"""Packed weights kept between starts: the next one maps a file instead of reading and packing the model again.

The file also holds the head's screen, by which the core chooses tokens while it reads half of a large head. It takes
seconds to make, so a model that was never loaded before decodes its first tokens without.

Under ``cache_dir()/packed`` are images, named by the SHA-256 of the model's files and by their layout, so that copies
of a model share one, and a record for each model (JSON) that names its image and tells by size and time whether the
model's files are still those. An image is written whole under another name, then renamed; processes share its memory.
A file's pages are small, and finding them costs a sixth of the speed: once a model has been in use for a second, what
every token reads is copied into huge pages, where the system has them and memory is ample.
GEMKIT_PACKED=0 switches all of this off. `gemkit.models.kept` removes images that are dead or too many.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import json
import mmap
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gemkit import _native, forks
from gemkit.cache import cache_dir, create, staged, try_atomic_write
from gemkit.host import free_memory
from gemkit.models.kept import file_identity, size_limit, tidy, touch
from gemkit.models.native.plan import Weight
from gemkit.models.native.runner import IMAGE_VERSION

_PAGE = 4096  # bytes before the image: a line of JSON, padded; the screen begins at a multiple of it
_BLOCK = 1 << 22
_AMPLE = 4  # times what is taken in: memory that has to be free
_PATIENCE = 1.0  # seconds of waiting at the end before the terminal says what for
_GRACE = 1.0  # seconds before the work begins: a model that was just loaded has its first token to give


class PackedStore:
    """The image of one model.

    source: the model's file or folder, as the user named it. files: those that its weights come from.
    weights: its matrices; their order, types and shapes decide the layout. writes: False only looks for an image.
    size: bytes of the image that is being written.
    """

    def __init__(
        self, source: Path, files: tuple[Path, ...], weights: Mapping[str, Weight], writes: bool = True
    ) -> None:
        self.limit, self._strict = size_limit()
        self.writes, self.size = writes, 0
        self.folder = cache_dir() / "packed"
        self.source, self.files = Path(source).absolute(), files
        layout = [IMAGE_VERSION, *((name, int(w.type), *w.shape) for name, w in weights.items())]
        self.layout = hashlib.sha256(json.dumps(layout).encode()).hexdigest()
        key = hashlib.sha256(f"{self.source}\n{self.layout}".encode()).hexdigest()
        self.record = self.folder / f"{key[:32]}.json"
        self._thread: threading.Thread | None = None
        self._cancelled, self._hurry, self._over = threading.Event(), threading.Event(), threading.Event()
        forks.track(self)

    @classmethod
    def of(cls, source: Path | None, weights: Mapping[str, Weight], writes: bool = True) -> PackedStore | None:
        """Return the store of a model read from `source`, a file or a folder; None without one or if switched off."""
        if source is None or os.environ.get("GEMKIT_PACKED", "1") in ("0", "off", "no", "false"):
            return None
        if source.is_file():
            from gemkit.weights.gguf.parts import part_paths

            return cls(source, part_paths(source), weights, writes)
        # An index may name shards in a subfolder, and config.json which file has the weights
        files = tuple(sorted(path for name in ("*", "*/*") for path in source.glob(f"{name}.safetensors")))
        files += tuple(source.glob("config.json"))
        return cls(source, files, weights, writes)

    def find(self) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Return the image and the screen kept earlier, mapped; None if there are none or they are not this model's."""
        try:
            record = json.loads(self.record.read_bytes())
            if record["layout"] != self.layout or record["files"] != self._identities():
                return None
            found = self._map(self.folder / Path(record["packed"]).name)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if found is not None and self.writes:
            touch(self.record)
        return found

    def keep(self, model: _native.Model) -> None:
        """Give the model a screen and write both in the background; a full disk is no error."""
        if self.writes:
            self._begin(self._keep, model)

    def take_in(self, model: _native.Model) -> None:
        """Move what was found into huge pages, in the background."""
        if self.writes:
            self._begin(self._take_in, model)

    def settle(self) -> None:
        """Wait until all is written and taken in; an interrupt aborts the writing and leaves no file."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        atexit.unregister(self._finish_at_exit)
        self._hurry.set()
        try:
            if not self._done.wait(_PATIENCE):
                with _said(self.size):
                    self._done.wait()
        except BaseException:
            self._cancelled.set()
            self._done.wait()
            raise
        thread.join()

    def finish(self) -> None:
        """The same before an end: what only this process would have gained from is not begun any more."""
        self._over.set()
        self.settle()

    def _finish_at_exit(self) -> None:
        with contextlib.suppress(KeyboardInterrupt):  # nothing is left to interrupt
            self.finish()

    def hold(self) -> None:
        """Do nothing before a fork: no state needs a lock."""

    def release(self, in_child: bool) -> None:
        """After a fork: the work is the parent's, and the child has no thread that does it."""
        if in_child and self._thread is not None:
            self._thread = None
            self._cancelled, self._hurry, self._over = threading.Event(), threading.Event(), threading.Event()

    def _begin(self, work: Callable[[_native.Model], None], model: _native.Model) -> None:
        # An event, since Thread.join takes a thread for ended once it was interrupted (Python 3.11)
        done = self._done = threading.Event()

        def run() -> None:
            try:
                work(model)
            finally:
                done.set()

        self._thread = threading.Thread(target=run, name="gemkit-packed", daemon=True)
        self._thread.start()
        atexit.register(self._finish_at_exit)

    def _take_in(self, model: _native.Model, mapped: bool = True) -> None:
        self._hurry.wait(_GRACE)
        if not self._over.is_set():
            with contextlib.suppress(OSError):
                tidy(limit=self.limit)
        free = free_memory()
        if not self._over.is_set() and (free is None or free > _AMPLE * model.token_bytes):
            _yield_to_others()
            model.take_in(mapped)

    def _map(self, path: Path) -> tuple[np.ndarray, np.ndarray | None] | None:
        with open(path, "rb") as file:
            header = json.loads(file.read(_PAGE))
            image, screen = header["image"], header["screen"]
            size = _PAGE + _whole_pages(image) + screen
            if header["layout"] != self.layout or os.fstat(file.fileno()).st_size != size:
                return None
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        parts = np.frombuffer(mapped, np.uint8)
        at = _PAGE + _whole_pages(image)
        return parts[_PAGE : _PAGE + image], parts[at : at + screen] if screen else None

    def _keep(self, model: _native.Model) -> None:
        self._hurry.wait(_GRACE)
        _yield_to_others()
        screen = kept = None
        self.size = model.image().nbytes + model.screen_bytes
        try:
            identities = self._identities()
            name = f"{self._digest()[:32]}-{self.layout[:16]}.packed"
            path = self.folder / name
            if not self._is_kept(path):
                screen = model.make_screen()
                self._write(path, model.image(), screen)
            if identities == self._identities():  # else the model changed while it was read
                record = {"source": str(self.source), "files": identities, "layout": self.layout, "packed": name}
                try_atomic_write(self.record, json.dumps(record).encode())
                tidy(name, self.limit)
            kept = self._map(path)
            screen = kept[1] if kept is not None else screen  # its pages are shared with other processes
        except (OSError, ValueError):
            pass  # a full disk, or a cache that cannot be written
        except _Cancelled:
            return
        if screen is not None and screen.size:
            model.attach_screen(screen)
            self._take_in(model, mapped=kept is not None)

    def _is_kept(self, path: Path) -> bool:
        try:
            return self._map(path) is not None
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _write(self, path: Path, image: np.ndarray, screen: np.ndarray) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tidy(path.name, self.limit)
        # A limit that the user set holds for one image too
        if self._strict and image.nbytes + screen.nbytes > self.limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        # Half as much again is left free: a cache must not be what fills a disk
        if shutil.disk_usage(self.folder).free < 1.5 * (image.nbytes + screen.nbytes):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        header = json.dumps({"layout": self.layout, "image": image.nbytes, "screen": screen.nbytes}).encode()
        with staged(path) as temporary:
            with create(temporary) as file:
                for part in (header.ljust(_PAGE), image, bytes(_whole_pages(image.nbytes) - image.nbytes), screen):
                    for at in range(0, len(part), _BLOCK):
                        self._check()
                        _write_block(file, part[at : at + _BLOCK])
                file.flush()
                os.fsync(file.fileno())  # else a power cut could leave a file of the right size full of zeros
            self._check()

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for path in self.files:
            with open(path, "rb", buffering=0) as file:
                while block := file.read(_BLOCK):
                    self._check()
                    digest.update(block)
        return digest.hexdigest()

    def _identities(self) -> list[list[object]]:
        """Return the identity of the model's files, which a record stores."""
        return [file_identity(path) for path in self.files]

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise _Cancelled


@contextlib.contextmanager
def _said(size: int) -> Iterator[None]:
    """Say on a terminal, as long as it lasts, why the process does not end yet."""
    stream = sys.stderr
    if not size or stream is None or not stream.isatty():
        yield
        return
    text = f"gemkit: writing a packed copy of the weights for faster starts ({size / 1e6:,.0f} MB) ..."
    text = text[: shutil.get_terminal_size().columns - 1]
    stream.write(text)
    stream.flush()
    try:
        yield
    finally:
        stream.write("\r" + " " * len(text) + "\r")
        stream.flush()


class _Cancelled(Exception):
    pass


def _write_block(file: BinaryIO, data: bytes | np.ndarray) -> None:
    file.write(data)


def _whole_pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _yield_to_others() -> None:
    """The model that was just loaded has the processor first."""
    if hasattr(os, "setpriority") and hasattr(threading, "get_native_id"):
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
