"""Packed weights kept between starts: found, refused, written whole, shared, and cleared away. Budget: 15 s."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from engine.vocabulary import tokenizer, vocabulary
from weights.files import tiny_config, tiny_params

import gemkit
from gemkit.models import kept
from gemkit.models.native import NativeRunner, PackedStore, packed
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.gguf.read import read_gguf
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.lora import LoraPart
from gemkit.weights.quant import GGMLType

IDS = [2, 40, 50, 60, 70, 80]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("GEMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GEMKIT_PACKED", raising=False)
    return tmp_path / "cache" / "packed"


def write_model(path: Path, model_type: str = "gemma3_text") -> Path:
    config = tiny_config(model_type, head_dim=32, vocab_size=len(vocabulary()))
    checkpoint = Checkpoint.from_params(config, tiny_params(config), GGMLType.Q8_0, vocabulary(), name="Tiny")
    return write_gguf(path, checkpoint)


@pytest.fixture
def model(tmp_path) -> Path:
    return write_model(tmp_path / "model.gguf")


def images(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.packed"))


def start(path: Path) -> tuple[np.ndarray, PackedStore]:
    """Loads a model as `gemkit.load` does and returns what it scores, with its store."""
    with read_gguf(path) as checkpoint:
        store = PackedStore.of(checkpoint.source, checkpoint.tensors)
        runner = NativeRunner(checkpoint.config, checkpoint.tensors, store=store, threads=2)
    model = gemkit.Model(checkpoint, runner, tokenizer())
    scores = model.score(IDS).logprobs
    model.close()
    return scores, store


def refuse_to_pack(monkeypatch) -> None:
    """From here on a model can only be loaded from a kept image."""

    def keep(self, model):
        raise AssertionError("packed anew")

    monkeypatch.setattr(PackedStore, "keep", keep)


def test_the_second_start_maps_the_image_and_gives_the_same_bits(cache, model, monkeypatch):
    first, _ = start(model)
    assert len(images(cache)) == 1 and len(list(cache.iterdir())) == 2, "one image, one record, nothing else"
    refuse_to_pack(monkeypatch)
    with read_gguf(model) as checkpoint:
        # The matrices are not even read
        for tensor in checkpoint.tensors.values():
            if len(tensor.shape) == 2:
                tensor._data = None
        store = PackedStore.of(checkpoint.source, checkpoint.tensors)
        runner = NativeRunner(checkpoint.config, checkpoint.tensors, store=store, threads=2)
    again = gemkit.Model(checkpoint, runner, tokenizer()).score(IDS).logprobs
    assert again.tobytes() == first.tobytes()


def huge_pages() -> bool:
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return switch.exists() and "[never]" not in switch.read_text()


def test_what_is_read_often_moves_to_huge_pages_between_steps(cache, model, monkeypatch):
    start(model)
    refuse_to_pack(monkeypatch)
    monkeypatch.setattr(PackedStore, "take_in", lambda self, model: None)
    with read_gguf(model) as checkpoint:
        store = PackedStore.of(checkpoint.source, checkpoint.tensors)
        runner = NativeRunner(checkpoint.config, checkpoint.tensors, store=store, threads=2)
    loaded = gemkit.Model(checkpoint, runner, tokenizer())
    want = loaded.score(IDS).logprobs.tobytes()
    moved = []
    thread = threading.Thread(target=lambda: moved.append(runner._model.take_in(True)))
    thread.start()
    found = [loaded.score(IDS).logprobs.tobytes() for _ in range(20)]
    thread.join()
    assert {*found, loaded.score(IDS).logprobs.tobytes()} == {want}
    assert (moved[0] >= runner.info.weight_bytes) == huge_pages()
    assert runner._model.take_in(True) == 0, "once is enough"


def test_settling_takes_in_and_an_early_end_does_not(cache, model, monkeypatch):
    start(model)
    calls = []
    monkeypatch.setattr(packed, "_yield_to_others", lambda: calls.append("taken in"))
    for end, expected in (("close", []), ("settle", ["taken in"])):
        loaded = gemkit.load(model, threads=1)
        getattr(loaded, end)()
        assert calls == expected
    monkeypatch.setattr(packed, "free_memory", lambda: 0)
    gemkit.load(model, threads=1).settle()
    assert calls == ["taken in"], "with memory short the file's pages serve"


def test_float_activations_and_the_switch_keep_nothing(cache, model, monkeypatch):
    with gemkit.load(model, threads=1, activations="float32"):
        pass
    monkeypatch.setenv("GEMKIT_PACKED", "0")
    with gemkit.load(model, threads=1):
        pass
    assert not cache.exists()


def test_a_changed_model_is_packed_anew_and_a_copy_shares_its_image(cache, model, tmp_path):
    first, _ = start(model)
    copy = tmp_path / "copy.gguf"
    shutil.copyfile(model, copy)
    assert np.array_equal(start(copy)[0], first) and len(images(cache)) == 1 and len(list(cache.glob("*.json"))) == 2
    data = bytearray(model.read_bytes())
    data[-200:-100] = bytes(100)
    model.write_bytes(data)
    changed, _ = start(model)
    assert not np.array_equal(changed, first) and len(images(cache)) == 2
    assert np.array_equal(start(copy)[0], first)


@pytest.mark.parametrize("damage", ["short", "long", "empty", "other layout", "no header", "gone", "record", "outside"])
def test_a_damaged_image_is_not_used(cache, model, damage, tmp_path):
    first, store = start(model)
    [image] = images(cache)
    data = image.read_bytes()
    if damage == "short":
        image.write_bytes(data[:-1])
    elif damage == "long":
        image.write_bytes(data + b"x")
    elif damage == "empty":
        image.write_bytes(b"")
    elif damage == "other layout":
        image.write_bytes(data.replace(store.layout.encode(), b"0" * 64, 1))
    elif damage == "no header":
        image.write_bytes(bytes(len(data)))
    elif damage == "gone":
        image.unlink()
    elif damage == "record":
        store.record.write_bytes(b"[1, 2")
    else:
        outside = tmp_path / "outside.packed"
        outside.write_bytes(b"not an image")
        record = json.loads(store.record.read_bytes()) | {"packed": str(outside)}
        store.record.write_text(json.dumps(record))
    assert store.find() is None
    assert np.array_equal(start(model)[0], first)
    assert PackedStore(store.source, store.files, read_gguf(model).tensors).find() is not None, "mended"


def test_an_image_of_another_model_is_refused_by_the_core(cache, model, monkeypatch):
    monkeypatch.setattr(PackedStore, "find", lambda self: (np.zeros(64, np.uint8), None))
    with pytest.raises(gemkit.GemkitError, match="packed weights are not those of this model"):
        start(model)


def test_a_full_disk_leaves_nothing_behind(cache, model, monkeypatch):
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    first, _ = start(model)
    assert not list(cache.iterdir())
    monkeypatch.undo()
    monkeypatch.setenv("GEMKIT_CACHE", str(cache.parent))
    # The disk fills up while the image is written
    real = packed._write_block
    writes = []

    def write(file, data):
        writes.append(len(data))
        if len(writes) == 2:
            file.write(bytes(100))
            raise OSError(28, "No space left on device")
        real(file, data)

    monkeypatch.setattr(packed, "_write_block", write)
    assert np.array_equal(start(model)[0], first)
    assert len(writes) == 2 and not list(cache.iterdir())


def test_copies_of_models_that_are_gone_go_while_another_is_used(cache, model, tmp_path):
    start(model)
    other = write_model(tmp_path / "other.gguf", "gemma2")
    start(other)
    other.unlink()
    gemkit.load(model, threads=1).settle()
    assert len(images(cache)) == 1 and len(list(cache.iterdir())) == 2


def test_copies_are_held_to_a_limit(cache, model, tmp_path, monkeypatch):
    start(model)
    other = write_model(tmp_path / "other.gguf", "gemma2")
    monkeypatch.setattr(kept, "LIMIT", 1)
    start(other)
    assert len(images(cache)) == 1, "the one in use is kept, the other one had to go"
    assert json.loads(next(cache.glob("*.json")).read_bytes())["source"] == str(other)
    monkeypatch.setenv("GEMKIT_CACHE_SIZE", "100B")
    first, _ = start(model)
    assert not images(cache), "a limit that the user set holds for one copy too"
    monkeypatch.setenv("GEMKIT_CACHE_SIZE", "100MB")
    assert np.array_equal(start(model)[0], first) and len(images(cache)) == 1
    monkeypatch.setenv("GEMKIT_CACHE_SIZE", "plenty")
    with pytest.raises(gemkit.UsageError, match="GEMKIT_CACHE_SIZE"):
        start(model)


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_told_what_the_end_waits_for(cache, model, monkeypatch):
    real = packed._write_block
    monkeypatch.setattr(packed, "_PATIENCE", 0.01)
    monkeypatch.setattr(packed, "_write_block", lambda file, data: (time.sleep(0.05), real(file, data)))
    for kind in (Screen, io.StringIO):
        stream = kind()
        monkeypatch.setattr(sys, "stderr", stream)
        start(model)
        shown = stream.getvalue().split("\r")
        shutil.rmtree(cache)
        if kind is Screen:
            assert shown[0] == "gemkit: writing a packed copy of the weights for faster starts (0 MB) ..."
            assert shown[1].strip() == "" and len(shown[1]) == len(shown[0]) and shown[2] == ""
        else:
            assert shown == [""]
    monkeypatch.setattr(packed, "_PATIENCE", 60)
    monkeypatch.setattr(sys, "stderr", stream := Screen())
    start(model)
    assert stream.getvalue() == "", "a short wait needs no word"


def test_an_interrupt_while_closing_leaves_nothing_behind(cache, model, monkeypatch):
    inside = threading.Event()

    def write(file, data):
        inside.set()
        time.sleep(0.2)

    monkeypatch.setattr(packed, "_write_block", write)
    with read_gguf(model) as checkpoint:
        store = PackedStore.of(checkpoint.source, checkpoint.tensors)
        NativeRunner(checkpoint.config, checkpoint.tensors, store=store, threads=1)
    inside.wait(10)
    done = store._done

    class Interrupted:
        calls = 0

        def wait(self, timeout=None):
            self.calls += 1
            if self.calls == 1:
                raise KeyboardInterrupt
            return done.wait(timeout)

    store._done = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        store.finish()
    assert done.is_set() and not list(cache.iterdir())


def test_a_real_interrupt_leaves_nothing_behind(cache, model):
    """The signal arrives while the main thread waits for the copy at the end."""
    code = (
        "import sys, time, gemkit\nfrom gemkit.models.native import packed\n"
        "packed._write_block = lambda file, data: (time.sleep(0.2), file.write(data[:10]))\n"
        "with gemkit.load(sys.argv[1], threads=1):\n    print('waits', flush=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(model)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout.readline() == "waits\n"
        until = time.monotonic() + 20
        while not list(cache.glob(".*")) and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in err and "leaked" not in err
    assert not list(cache.iterdir())


PROGRAM = """
import sys, gemkit
with gemkit.load(sys.argv[1], threads=1) as m:
    print(m.score([2, 40, 50, 60, 70, 80]).logprobs.tobytes().hex())
"""


def test_processes_that_pack_at_once_end_with_one_image(cache, model):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROGRAM, str(model)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(4)]
    scores = {process.communicate(timeout=60)[0] for process in running}
    assert [process.returncode for process in running] == [0] * 4 and len(scores) == 1
    assert len(images(cache)) == 1 and len(list(cache.iterdir())) == 2


def test_a_program_that_forgets_to_close_still_keeps_the_image(cache, model):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [sys.executable, "-c", f"import gemkit; m = gemkit.load({str(model)!r})"], env=environment, check=True
    )
    assert len(images(cache)) == 1


def test_what_killed_processes_and_removed_models_left_is_cleared_away(cache, model, tmp_path):
    start(model)
    [image] = images(cache)
    half = cache / ".packed-abc"
    half.write_bytes(b"half")
    other = write_model(tmp_path / "other.gguf", "gemma2")
    start(other)
    assert half.exists() and image.exists(), "a fresh one may be in use"
    model.unlink()
    hour_ago = time.time() - 3700
    for path in cache.iterdir():
        os.utime(path, (hour_ago, hour_ago))
    start(write_model(tmp_path / "third.gguf", "gemma"))
    assert not half.exists() and not image.exists() and len(images(cache)) == 2


def test_adapters_leave_the_image_as_it_is(cache, model):
    start(model)
    with read_gguf(model) as checkpoint:
        config = checkpoint.config
        parts = {
            "model.layers.0.self_attn.q_proj.weight": LoraPart(
                np.ones((1, config.hidden_size), np.float32),
                np.ones((rows := config.num_attention_heads * config.head_dim, 1), np.float32),
                0.5,
                np.ones(rows, np.float32),
            )
        }
        adapter = type("Adapter", (), {"parts": parts})()
        store = PackedStore.of(checkpoint.source, checkpoint.tensors)
        mapped = NativeRunner(checkpoint.config, checkpoint.tensors, adapters=[adapter], store=store, threads=2)
        packed_now = NativeRunner(checkpoint.config, checkpoint.tensors, adapters=[adapter], threads=2)
    models = [gemkit.Model(checkpoint, runner, tokenizer(), adapters=[""]) for runner in (mapped, packed_now)]
    one, other = (m.score(IDS).logprobs for m in models)
    base = models[0].score(IDS, adapter="base").logprobs
    assert np.array_equal(one, other) and not np.allclose(one, base, atol=1e-3)
    assert len(images(cache)) == 1
