"""Shared parts of the tests of downloads: the server process, models to serve, and caches of their own."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVER = Path(__file__).with_name("server.py")
SOURCE = Path(__file__).parents[2] / "src"
SHARD = 120_000  # bytes
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NEEDED = {"config.json", "generation_config.json", "tokenizer.model", "model.safetensors.index.json", *SHARDS}
KAGGLE = "kaggle:google/gemma/transformers/2b"


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def gemma(seed: int = 0) -> dict[str, bytes]:
    """The files of a repository with a Gemma model and much that gemkit does not need."""
    config = {"model_type": "gemma", "torch_dtype": "bfloat16"}
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    return {
        "config.json": json.dumps(config).encode(),
        "generation_config.json": b"{}",
        "tokenizer.model": noise(1, 5000),
        "model.safetensors.index.json": json.dumps(index).encode(),
        SHARDS[0]: noise(2, SHARD),
        SHARDS[1]: noise(3 + seed, SHARD),
        "README.md": b"read me",
        "pytorch_model.bin": b"pickle",
        "original/model.safetensors": b"twice",
        "onnx/model.onnx": b"other",
        "gemma.gguf": b"big",
    }


def gguf(seed: int = 0, size: int = 3000) -> bytes:
    """The head of a GGUF file that says it is a Gemma, and noise."""
    key, value = b"general.architecture", b"gemma"
    head = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    head += len(key).to_bytes(8, "little") + key + (8).to_bytes(4, "little") + len(value).to_bytes(8, "little") + value
    return head + noise(seed, size)


class World:
    """A server, the folder it serves, and the caches of this test."""

    def __init__(self, hub: int, served: Path, caches: Path) -> None:
        self.address, self.served, self.caches = f"http://127.0.0.1:{hub}", served, caches
        self.hf, self.kaggle = caches / "hf" / "hub", caches / "kaggle"

    def put(self, path: str, value: object) -> None:
        request = urllib.request.Request(self.address + path, json.dumps(value).encode(), method="PUT")
        urllib.request.urlopen(request, timeout=10).close()

    def fault(self, path: str, do: str, **options: object) -> None:
        """Adds to the rules; a rule that comes later is used when those before it are used up."""
        self.faults.append({"path": path, "do": do, **options})
        self.put("/_faults", self.faults)

    def calm(self) -> None:
        self.faults: list[dict] = []
        self.put("/_faults", [])
        self.log()

    def log(self) -> list[dict]:
        """The requests since the last call."""
        with urllib.request.urlopen(self.address + "/_log", timeout=10) as answer:
            return json.load(answer)

    def left(self, *, models: bool = False) -> list[str]:
        """Partial files, locks and temporary files anywhere in the caches; with `models`, every file."""
        paths = [path.relative_to(self.caches).as_posix() for path in self.caches.rglob("*") if not path.is_dir()]
        return sorted(path for path in paths if models or "incomplete" in path or "lock" in path or ".tmp" in path)

    def wait_until_half(self, size: int) -> None:
        """Waits until all but the two shards are complete, and these have at least so many bytes."""
        until = time.monotonic() + 20
        while True:
            blobs = list(self.hf.glob("*/blobs/*"))
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                partial = [blob.stat().st_size for blob in blobs if blob.suffix == ".incomplete"]
                if len(blobs) == len(NEEDED) and len(partial) == len(SHARDS) and min(partial) >= size:
                    return
            assert time.monotonic() < until, "the download does not begin"
            time.sleep(0.02)

    def python(self, code: str, **options: object) -> subprocess.Popen:
        """Starts Python on some code, with this world's caches and gemkit's sources."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-c", code], env=environment, **{**pipes, **options})


@pytest.fixture(scope="module", name="server")
def server_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict, Path]]:
    root = tmp_path_factory.mktemp("served")
    with subprocess.Popen(
        [sys.executable, str(SERVER), str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield json.loads(process.stdout.readline()), root
        process.stdin.close()
        process.wait(10)


@pytest.fixture(name="world")
def world_fixture(server: tuple[dict, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A calm server with google/gemma-2b on both hubs, empty caches, no user signed in, short pauses."""
    import huggingface_hub.constants

    from gemkit.hub import fetch as hub_fetch

    ports, served = server
    shutil.rmtree(served / "hf", ignore_errors=True)
    shutil.rmtree(served / "kaggle", ignore_errors=True)
    write(served / "hf/google/gemma-2b", gemma())
    write(served / "kaggle/google/gemma/transformers/2b/3", gemma())
    world = World(ports["hub"], served, tmp_path / "caches")
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "KAGGLE", "TRANSFORMERS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", world.address)
    monkeypatch.setenv("KAGGLE_API_ENDPOINT", world.address)
    monkeypatch.setenv("HF_HOME", str(world.caches / "hf"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(world.kaggle))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(world.caches / "no-keys"))
    monkeypatch.setenv("GEMKIT_CACHE", str(world.caches / "gemkit"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(world.caches / "no-token"))
    monkeypatch.setattr(hub_fetch, "_PAUSE", 0.01)
    world.put("/_settings", {"gated": []})
    world.calm()
    return world
