"""Damaged and malicious GGUF files: GemkitError or a correct read, never anything else. Budget: 25 s."""

import struct
import time
import tracemalloc

import numpy as np
import pytest

from gemkit.errors import GemkitError
from gemkit.hub.demo import demo_path
from gemkit.weights.gguf.container import GGUFArray, GGUFFile
from gemkit.weights.gguf.read import read_gguf
from gemkit.weights.gguf.write import write_gguf

from . import files
from .files import array, gguf, info, pair, string

HUGE = 2**63


def use(path) -> None:
    """Reads everything that can be read."""
    with GGUFFile.open(path) as file:
        for value in file.metadata.values():
            if isinstance(value, GGUFArray):
                assert len(value.strings() if value.type == 8 else value.numbers()) == len(value)
        for tensor in file.tensors.values():
            assert int(tensor.data[:1].size) == 1
            del tensor


def attempt(path) -> str:
    """Returns the error's text, or "" if the file was read."""
    try:
        use(path)
        with read_gguf(path) as checkpoint:
            vocabulary = checkpoint.vocabulary
            assert vocabulary is None or len(vocabulary) <= checkpoint.config.vocab_size
            _ = checkpoint.vocabulary_key
    except GemkitError as error:
        assert "\n" not in str(error) and str(path) in str(error), error
        return str(error)
    return ""


@pytest.fixture
def small(tmp_path):
    """A whole model file, and where its tensor data starts."""
    data = write_gguf(tmp_path / "whole.gguf", files.tiny_checkpoint("gemma")).read_bytes()
    with GGUFFile.open(tmp_path / "whole.gguf") as file:
        first = len(data) - sum(-(-t.data.nbytes // 32) * 32 for t in file.tensors.values())
    assert attempt(tmp_path / "whole.gguf") == ""
    return data, first


DATA = bytes(256)
ONE = pair("a", 4, 1)
CASES = {
    "empty": (b"", "it is empty"),
    "too short": (b"GGUF\3\0\0\0", "too short"),
    "zeros": (bytes(40), "begins with zeros"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "a web page": (b"<!DOCTYPE html><html>" + bytes(40), "a web page"),
    "safetensors": (struct.pack("<Q", 40) + b'{"a":{}}' + bytes(40), "a safetensors file"),
    "an older format": (b"tjgg" + bytes(40), "older than GGUF"),
    "something else": (b"hello" + bytes(40), "not a GGUF file"),
    "a zip": (b"PK\3\4" + bytes(40), "a zip archive, not a GGUF file"),
    "version 1": (gguf(version=1), "version 1"),
    "version 4": (gguf(version=4), "version 4"),
    "big-endian": (gguf(version=3 << 24), "big-endian"),
    "2^63 tensors": (gguf(tensors=HUGE), "announces"),
    "2^64-1 tensors": (gguf(tensors=2 * HUGE - 1), "announces"),
    "2^63 key-values": (gguf(count=HUGE), "announces"),
    "long key": (gguf([struct.pack("<Q", 2**40)], count=1, data=DATA), "bytes, allowed"),
    "empty key": (gguf([pair("", 4, 1)], data=DATA), "0 bytes, allowed"),
    "key past the end": (gguf([struct.pack("<Q", 60000)], count=1, data=DATA), "past the end"),
    "long value": (gguf([string("k") + struct.pack("<IQ", 8, 2**40)], data=DATA), "past the end"),
    "wrapping value": (gguf([string("k") + struct.pack("<IQ", 8, 2 * HUGE - 1)], data=DATA), "past the end"),
    "key not UTF-8": (gguf([pair(b"\xff\xfe", 4, 1)], data=DATA), "not UTF-8"),
    "value not UTF-8": (gguf([pair("k", 8, b"\xc0\x80")], data=DATA), "not UTF-8"),
    "key twice": (gguf([ONE, ONE], data=DATA), "twice"),
    "unknown type": (gguf([string("k") + struct.pack("<IQ", 13, 0)], data=DATA), "unknown type 13"),
    "bool of 2": (gguf([string("k") + struct.pack("<IB", 7, 2)], data=DATA), "neither true nor false"),
    "nested": (gguf([string("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(64)], data=DATA), "array of arrays"),
    "long array": (gguf([string("k") + struct.pack("<IIQ", 9, 12, 2**61)], data=DATA), "announces"),
    "many strings": (gguf([string("k") + struct.pack("<IIQ", 9, 8, 2**61)], data=DATA), "announces"),
    "array type": (gguf([string("k") + struct.pack("<IIQ", 9, 77, 1)], data=DATA), "unknown type 77"),
    "wrapping string": (gguf([string("k") + struct.pack("<IIQQ", 9, 8, 2, 2**64 - 9)], data=DATA), "past the end"),
    "string in an array": (gguf([string("k") + struct.pack("<IIQQ", 9, 8, 1, 2**60)], data=DATA), "past the end"),
    "split": (gguf([pair("split.count", 2, 3)], data=DATA), "split"),
    "alignment 0": (gguf([pair("general.alignment", 4, 0)], data=DATA), "power of two"),
    "alignment 24": (gguf([pair("general.alignment", 4, 24)], data=DATA), "power of two"),
    "alignment 2^31": (gguf([pair("general.alignment", 4, 2**31)], data=DATA), "power of two"),
    "alignment text": (gguf([pair("general.alignment", 8, "32")], data=DATA), "power of two"),
    "alignment true": (gguf([pair("general.alignment", 7, True)], data=DATA), "power of two"),
    "tensor name": (gguf([], [info(b"\xff", (8,), 0, 0)], DATA), "not UTF-8"),
    "tensor twice": (gguf([], [info("a", (8,), 0, 0), info("a", (8,), 0, 32)], DATA), "twice"),
    "no dimensions": (gguf([], [info("a", (), 0, 0)], DATA), "0 dimensions"),
    "5 dimensions": (gguf([], [info("a", (1, 1, 1, 1, 1), 0, 0)], DATA), "5 dimensions"),
    "2^32-1 dimensions": (gguf([], [string("a") + struct.pack("<I", 2**32 - 1)], bytes(90)), "dimensions, allowed"),
    "zero dimension": (gguf([], [info("a", (8, 0), 0, 0)], DATA), "empty dimension"),
    "overflow": (gguf([], [info("a", (2**32, 2**32), 0, 0)], DATA), "past the end"),
    "overflow to 0": (gguf([], [info("a", (HUGE, 2, 2), 0, 0)], DATA), "past the end"),
    "overflow to 64": (gguf([], [info("a", (2**62 + 8, 4), 0, 0)], DATA), "past the end"),
    "not blocks": (gguf([], [info("a", (33,), 8, 0)], DATA), "whole Q8_0 blocks"),
    "Q2_K": (gguf([], [info("a", (256,), 10, 0)], DATA), "is Q2_K"),
    "IQ4_XS": (gguf([], [info("a", (256,), 23, 0)], DATA), "is IQ4_XS"),
    "type 99": (gguf([], [info("a", (8,), 99, 0)], DATA), "unknown type 99"),
    "offset past the end": (gguf([], [info("a", (8,), 0, 256)], DATA), "past the end"),
    "offset 2^63": (gguf([], [info("a", (8,), 0, HUGE)], DATA), "past the end"),
    "offset -32": (gguf([], [info("a", (8,), 0, 2 * HUGE - 32)], DATA), "past the end"),
    "last bytes": (gguf([], [info("a", (8,), 0, 224), info("b", (9,), 0, 0)], DATA[:-1]), "past the end"),
    "unaligned": (gguf([], [info("a", (8,), 0, 4)], DATA), "aligned to 32"),
    "overlap": (gguf([], [info("a", (16,), 0, 0), info("b", (8,), 0, 32)], DATA), "overlap"),
    "same place": (gguf([], [info("a", (8,), 0, 0), info("b", (8,), 0, 0)], DATA), "overlap"),
    "no architecture": (gguf([ONE], [], DATA), "general.architecture is missing"),
    "control letters": (gguf([pair("general.architecture", 8, "\n\x1b[31m" * 99)], [], DATA), "architecture is"),
    "line break in a name": (gguf([], [info("a\nb", (8,), 0, 4)], DATA), "aligned"),
}


@pytest.mark.parametrize("case", CASES)
def test_malicious(tmp_path, case: str):
    data, message = CASES[case]
    assert message in attempt(files.write(tmp_path / "x.gguf", data))


def test_a_fifo_a_folder_and_nothing(tmp_path):
    for path, fault in ((tmp_path, "not a regular file"), (tmp_path / "nothing.gguf", "cannot be read")):
        with pytest.raises(GemkitError, match=fault):
            GGUFFile.open(path)


def test_version_2_alignment_and_all_value_types(tmp_path):
    values = {0: 255, 1: -1, 2: 65535, 3: -2, 4: 2**32 - 1, 5: -3, 6: 0.5, 7: True, 8: "é\n", 10: 2**64 - 1}
    values |= {11: -(2**63), 12: 1e300}
    pairs = [pair(f"k{kind}", kind, value) for kind, value in values.items()]
    pairs += [array(f"a{kind}", kind, [value] * 3) for kind, value in values.items()]
    pairs += [array("empty", 8, []), array("none", 4, []), pair("general.alignment", 4, 64)]
    data = struct.pack("<8f", *range(8)) + bytes(32) + struct.pack("<2f", 8, 9)
    infos = [info("b", (2, 1, 1, 1), 0, 64), info("a", (4, 2), 0, 0)]
    path = files.write(tmp_path / "x.gguf", gguf(pairs, infos, data, version=2, alignment=64))
    with GGUFFile.open(path) as file:
        for kind, value in values.items():
            assert file.metadata[f"k{kind}"] == value and type(file.metadata[f"k{kind}"]) is type(value)
            got = file.metadata[f"a{kind}"]
            if kind == 8:
                assert got.strings() == [value.encode()] * 3
            else:
                assert got.numbers().tolist() == [value] * 3
        assert file.metadata["empty"].strings() == [] and file.metadata["none"].numbers().size == 0
        assert {n: (t.shape, t.data.view("<f4").tolist()) for n, t in file.tensors.items()} == {
            "a": ((2, 4), list(range(8))),
            "b": ((1, 1, 1, 2), [8, 9]),
        }
        assert list(file.tensors) == ["b", "a"]


@pytest.mark.parametrize("seed", range(12))
def test_the_fast_walk_finds_what_the_slow_one_finds(tmp_path, monkeypatch, seed: int):
    """Strings with zeros, empty and long ones, of which the fast walk may understand none."""
    rng = np.random.default_rng(seed)
    pool = [b"", b"\0", bytes(9), b"abc", b"x" * 255, b"x" * 256, b"y" * 70000, b"ab\0\0\0\0\0\0\0", b"\1" + bytes(7)]
    strings = (
        [pool[i] for i in rng.choice(len(pool) - (seed % 5), 300)] if seed % 3 else [b"t%d" % i for i in range(300)]
    )
    path = files.write(tmp_path / "x.gguf", gguf([array("k", 8, strings), pair("after", 4, 7)]))
    with GGUFFile.open(path) as file:
        assert file.metadata["k"].strings() == strings and file.metadata["after"] == 7
    monkeypatch.setattr(GGUFFile, "_guess", lambda self, count: None)
    with GGUFFile.open(path) as file:
        assert file.metadata["k"].strings() == strings and file.metadata["after"] == 7


def test_the_fast_walk_is_used(monkeypatch):
    found = []
    guess = GGUFFile._guess
    monkeypatch.setattr(
        GGUFFile, "_guess", lambda self, count: found.append((count, guess(self, count))) or found[-1][1]
    )
    with GGUFFile.open(demo_path()):
        assert [count for count, starts in found if starts is not None] == [262144]


def test_truncation(tmp_path, small):
    data, first = small
    path = tmp_path / "x.gguf"
    rng = np.random.default_rng(5)
    points = [*range(first), *rng.integers(first, len(data), 60).tolist()]
    for length in points:
        path.write_bytes(data[:length])
        try:
            GGUFFile.open(path).close()
        except GemkitError as error:
            assert "\n" not in str(error)
            continue
        pytest.fail(f"{length} of {len(data)} bytes were read as a whole file")


@pytest.mark.filterwarnings("ignore::gemkit.errors.GemkitWarning")
def test_bit_flips(tmp_path, small):
    """2,500 flips of 1 to 3 bits before the tensor data: refused, or read as something consistent."""
    data, first = small
    path = tmp_path / "x.gguf"
    rng = np.random.default_rng(6)
    refused, slowest = 0, 0.0
    for _ in range(2500):
        bad = bytearray(data)
        for bit in rng.integers(0, 8 * first, rng.integers(1, 4)).tolist():
            bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        start = time.perf_counter()
        refused += bool(attempt(path))
        slowest = max(slowest, time.perf_counter() - start)
    assert 800 < refused < 2500 and slowest < 2


def test_memory_stays_bounded(tmp_path):
    """Announced sizes are never allocated."""
    path = tmp_path / "x.gguf"
    tracemalloc.start()
    try:
        for data, _ in CASES.values():
            path.write_bytes(data)
            attempt(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
