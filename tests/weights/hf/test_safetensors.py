"""safetensors files: equal to the library's reading, and damaged or malicious ones give GemkitError. Budget: 8 s."""

import json
import os
import time
import tracemalloc

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from weights.hf_files import entry, raw, write_shards

from gemkit.errors import GemkitError
from gemkit.weights.hf.safetensors import DTYPES, INDEX, SINGLE, Entry, SafetensorsFile, open_weights


def attempt(path) -> str:
    """Returns the error's text, or "" if the file was read."""
    try:
        with SafetensorsFile(path) as file:
            for name, tensor in file.tensors.items():
                assert file.data(name).size == tensor.end - tensor.begin
    except GemkitError as error:
        assert "\n" not in str(error) and str(path) in str(error), error
        return str(error)
    return ""


def library(path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """Type and shape of each tensor as the library reads them; None if it refuses the file."""
    try:
        with safetensors.safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except safetensors.SafetensorError:
        return None


@pytest.fixture
def small(tmp_path):
    """A file of the library with all kinds of tensors, as bytes, and where its header ends."""
    state = {
        "f32": torch.randn(3, 5),
        "bf16": torch.randn(4, 2).bfloat16(),
        "f16": torch.randn(7).half(),
        "f8": torch.randn(4).to(torch.float8_e4m3fn),
        "i64": torch.arange(6).reshape(1, 2, 3),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(1.5),
        "none": torch.zeros(0, 3),
        "é\n": torch.randn(1),
    }
    path = tmp_path / "whole.safetensors"
    safetensors.torch.save_file(state, path, metadata={"format": "pt", "é": "ü"})
    data = path.read_bytes()
    return path, state, data, 8 + int.from_bytes(data[:8], "little")


def test_equals_the_library(small):
    path, state, _, _ = small
    with SafetensorsFile(path) as file:
        assert file.metadata == {"format": "pt", "é": "ü"}
        assert {name: (t.dtype, t.shape) for name, t in file.tensors.items()} == library(path)
        for name, value in state.items():
            assert file.data(name).tobytes() == value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert not file.data(name).flags.writeable
        kept = file.data("f32")
    assert kept.tobytes() == state["f32"].numpy().tobytes()  # a view outlives the file
    with pytest.raises(GemkitError, match="closed"):
        file.data("f32")


def test_every_type_of_the_library_is_known(tmp_path):
    """A file with 8 elements of each; the library names more types in the message that refuses a wrong one."""
    path = tmp_path / "x.safetensors"
    refused = []
    for dtype, bits in DTYPES.items():
        path.write_bytes(raw({"a": entry((8,), dtype, (0, bits))}, bytes(bits)))
        assert attempt(path) == ""
        refused += [dtype] if library(path) is None else []
    assert refused == []
    path.write_bytes(raw({"a": entry(dtype="F128")}, bytes(8)))
    assert "unknown type" in attempt(path) and library(path) is None
    with pytest.raises(safetensors.SafetensorError) as error:
        safetensors.safe_open(path, "np")
    listed = str(error.value).partition("expected one of ")[2]
    assert not set(listed.replace("`", "").split(" at line")[0].split(", ")) - DTYPES.keys()


def test_only_the_header_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    head = raw({"a": entry((1 << 31, 2), "F32", (0, 1 << 34))})
    path.write_bytes(head)
    os.truncate(path, len(head) + (1 << 34))
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with SafetensorsFile(path) as file:
            assert file.tensors == {"a": Entry("F32", (1 << 31, 2), len(head), len(head) + (1 << 34))}
            assert file.data("a")[-1] == 0
        assert tracemalloc.get_traced_memory()[1] < 1 << 20 and time.perf_counter() - start < 1
    finally:
        tracemalloc.stop()


ONE = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
HUGE = 2**63
CASES = {
    "empty": (b"", "too short"),
    "seven bytes": (bytes(7), "too short"),
    "no header": (raw(b""), "not a safetensors file"),
    "gguf": (b"GGUF\3\0\0\0" + bytes(99), "not a safetensors file"),
    "pickle": (b"PK\3\4" + bytes(99), "not a safetensors file"),
    "header past the end": (raw({}, length=99), "past the end"),
    "header of 2^64-1": (raw({}, length=2**64 - 1), "allowed are 100000000"),
    "header of 100 MB and 1": (raw({}, length=100_000_001), "allowed are 100000000"),
    "list": (raw(b"[]"), "not a safetensors file"),
    "space first": (raw(b' {"a":' + ONE + b"}", bytes(8)), "not a safetensors file"),
    "not JSON": (raw(b'{"a":}'), "no JSON"),
    "behind the JSON": (raw(b"{}{}"), "no JSON"),
    "not UTF-8": (raw(b'{"\xff":' + ONE + b"}", bytes(8)), "not UTF-8"),
    "deep": (raw(b'{"a":' * 100_000), "no JSON object"),
    "deep list": (raw(b'{"a":' + b"[" * 100_000), "no JSON object"),
    "long number": (raw(b'{"a":{"dtype":"F32","shape":[' + b"9" * 9999 + b'],"data_offsets":[0,8]}}'), "no JSON"),
    "NaN": (raw(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', bytes(8)), "holds NaN"),
    "tensor twice": (raw(b'{"a":' + ONE + b',"a":' + ONE + b"}", bytes(8)), "'a' appears twice"),
    "key twice": (raw(b'{"a":{"dtype":"F16",' + ONE[1:] + b"}", bytes(8)), "'dtype' appears twice"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}, "a": entry()}, bytes(8)), "__metadata__"),
    "metadata a list": (raw({"__metadata__": [], "a": entry()}, bytes(8)), "__metadata__"),
    "tensor a list": (raw({"a": []}), "lacks a dtype"),
    "no shape": (raw({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), "lacks a dtype"),
    "type a list": (raw({"a": entry(dtype=["F32"])}, bytes(8)), "unknown type"),
    "unknown type": (raw({"a": entry(dtype="Q4_K")}, bytes(8)), "unknown type 'Q4_K'"),
    "shape a number": (raw({"a": entry() | {"shape": 2}}, bytes(8)), "not a list of whole numbers"),
    "shape negative": (raw({"a": entry((-1, -2))}, bytes(8)), "not a list of whole numbers"),
    "shape true": (raw({"a": entry((True, 2))}, bytes(8)), "not a list of whole numbers"),
    "shape 2.0": (raw({"a": entry((2.0,))}, bytes(8)), "not a list of whole numbers"),
    "shape overflows": (raw({"a": entry((HUGE - 1, HUGE - 1))}, bytes(8)), "not those of F32"),
    "shape overflows to 2": (raw({"a": entry((2**62 + 2, 4))}, bytes(8)), "not those of F32"),
    "99 dimensions": (raw({"a": entry((1,) * 98 + (2,))}, bytes(8)), "not a list of whole numbers"),
    "three offsets": (raw({"a": entry(offsets=(0, 8, 8))}, bytes(8)), "not where it begins"),
    "offsets backwards": (raw({"a": entry(offsets=(8, 0))}, bytes(8)), "not where it begins"),
    "offsets negative": (raw({"a": entry(offsets=(-8, 0))}, bytes(8)), "not where it begins"),
    "offset 2^63": (raw({"a": entry(offsets=(HUGE, HUGE + 8))}, bytes(8)), "not where it begins"),
    "offset 2^62": (raw({"a": entry(offsets=(HUGE // 2, HUGE // 2 + 8))}, bytes(8)), "gap"),
    "too few bytes": (raw({"a": entry(offsets=(0, 4))}, bytes(4)), "4 bytes, not those of F32 [2]"),
    "half a byte": (raw({"a": entry((3,), "F4", (0, 1))}, bytes(1)), "not those of F4"),
    "past the end": (raw({"a": entry((4,), offsets=(0, 16))}, bytes(8)), "past the end"),
    "gap at the start": (raw({"a": entry(offsets=(8, 16))}, bytes(16)), "the header and the tensor 'a' have a gap"),
    "gap": (raw({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "'a' and the tensor 'b' have a gap"),
    "bytes at the end": (raw({"a": entry()}, bytes(9)), "1 bytes follow"),
    "overlap": (raw({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "'a' and the tensor 'b' overlap"),
    "same place": (raw({"a": entry(), "b": entry()}, bytes(8)), "overlap"),
    "line break in a name": (raw({"a\n\x1b[31m": entry(dtype="X")}, bytes(8)), "a\\n\\x1b"),
    "half a character": (raw(b'{"\\ud800":' + ONE.replace(b"F32", b"F3") + b"}", bytes(8)), "\\ud800"),
}
# What the library lets pass though its format forbids it, or though no memory holds it
LENIENT = {"space first", "tensor twice", "99 dimensions"}


@pytest.mark.parametrize("case", CASES)
def test_malicious(tmp_path, case: str):
    data, message = CASES[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    start = time.perf_counter()
    assert message in attempt(path)
    assert time.perf_counter() - start < 2
    assert (library(path) is None) == (case not in LENIENT)


def test_unusual_but_right(tmp_path):
    path = tmp_path / "x.safetensors"
    for header, data in (
        ({}, b""),
        ({"__metadata__": None, "a": entry()}, bytes(8)),
        ({"a": entry(more=1)}, bytes(8)),
        ({"z": entry((0,), offsets=(0, 0)), "a": entry(), "b": entry((0, 9), offsets=(8, 8))}, bytes(8)),
        ({"b": entry(offsets=(8, 16)), "a": entry()}, bytes(16)),
        (json.dumps({"a": entry()}).encode() + b"  \n ", bytes(8)),
    ):
        path.write_bytes(raw(header, data))
        assert attempt(path) == ""
        with SafetensorsFile(path) as file:
            assert {name: (t.dtype, t.shape) for name, t in file.tensors.items()} == library(path)


def test_truncated_at_every_byte(small, tmp_path):
    _, _, data, _ = small
    path = tmp_path / "x.safetensors"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        assert attempt(path), size
    path.write_bytes(data + b"\0")
    assert "1 bytes follow" in attempt(path)


def test_changed_headers_are_refused_or_read_as_the_library_does(small, tmp_path):
    _, _, data, end = small
    path = tmp_path / "x.safetensors"
    rng = np.random.default_rng(7)
    refused, slowest = 0, 0.0
    for turn in range(3000):
        bad = bytearray(data)
        for at in rng.integers(0, end, rng.integers(1, 3)).tolist():
            bad[at] = bad[at] ^ 1 << int(rng.integers(8)) if turn % 2 else rng.choice(np.frombuffer(data[8:end], "u1"))
        path.write_bytes(bad)
        start = time.perf_counter()
        error = attempt(path)
        slowest = max(slowest, time.perf_counter() - start)
        refused += bool(error)
        if not error:
            with SafetensorsFile(path) as file:
                assert {name: (t.dtype, t.shape) for name, t in file.tensors.items()} == library(path)
    assert 1000 < refused < 3000 and slowest < 1


def test_what_is_no_file(tmp_path):
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name in ("nothing", "loop.safetensors", "pipe.safetensors", "."):
        assert "read" in attempt(tmp_path / name) or "regular" in attempt(tmp_path / name)


# --- folders ---------------------------------------------------------------------------------------------------------


def refusal(folder) -> str:
    with pytest.raises(GemkitError) as error:
        open_weights(folder).close()
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


PARTS = [{"a": torch.ones(2), "b": torch.ones(3)}, {"c": torch.full((4,), 7.0)}]


def test_shards(tmp_path):
    write_shards(tmp_path, PARTS)
    with open_weights(tmp_path) as files:
        assert {name: tensor.shape for name, tensor in files.tensors.items()} == {"a": (2,), "b": (3,), "c": (4,)}
        assert files.path("c").name == "model-00002-of-00002.safetensors"
        assert files.data("c").tobytes() == PARTS[1]["c"].numpy().tobytes()
    safetensors.torch.save_file(PARTS[1], tmp_path / SINGLE)  # goes before the index, as in transformers
    with open_weights(tmp_path) as files:
        assert list(files.tensors) == ["c"]


def test_one_file_of_another_name(tmp_path):
    assert "no safetensors files" in refusal(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"x")
    assert "no safetensors files" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "pickled weights (pytorch_model.bin)" in refusal(tmp_path)
    safetensors.torch.save_file(PARTS[0], tmp_path / "weights.safetensors")
    with open_weights(tmp_path) as files:
        assert sorted(files.tensors) == ["a", "b"]
    safetensors.torch.save_file(PARTS[1], tmp_path / "more.safetensors")
    assert "2 safetensors files" in refusal(tmp_path) and "more.safetensors" in refusal(tmp_path)
    assert "cannot be read" in refusal(tmp_path / "nothing")


def test_an_adapter_is_no_model(tmp_path):
    safetensors.torch.save_file(PARTS[0], tmp_path / "adapter_model.safetensors")
    assert "adapter" in refusal(tmp_path)
    safetensors.torch.save_file(PARTS[0], tmp_path / "mine.safetensors")
    with open_weights(tmp_path) as files:
        assert files.path("a").name == "mine.safetensors"


def test_folders_of_models_and_of_runs(tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / "config.json").write_text("{}")
    assert "such as checkpoint-500" in refusal(tmp_path)
    (tmp_path / "zero_to_fp32.py").write_text("")
    assert "DeepSpeed" in refusal(tmp_path)


def test_the_same_tensor_in_two_shards(tmp_path):
    """The last one counts, as in transformers."""
    write_shards(tmp_path, [{"a": torch.ones(2)}, {"a": torch.zeros(2), "b": torch.ones(1)}])
    with open_weights(tmp_path) as files:
        assert files.data("a").tobytes() == bytes(8)


def test_git_lfs_pointers(tmp_path):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12\n"
    (tmp_path / SINGLE).write_text(pointer)
    assert "Git LFS pointer" in refusal(tmp_path) and "git lfs pull" in refusal(tmp_path)
    write_shards(tmp_path, PARTS)
    (tmp_path / "model-00002-of-00002.safetensors").write_text(pointer)
    assert "model-00002-of-00002.safetensors is a Git LFS pointer" in refusal(tmp_path)
    (tmp_path / INDEX).write_text(pointer)
    assert f"{INDEX} is a Git LFS pointer" in refusal(tmp_path)


def test_shards_and_index_disagree(tmp_path):
    index = write_shards(tmp_path, PARTS)
    whole = json.loads(index.read_text())["weight_map"]
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

    def with_index(value: object) -> str:
        index.write_text(value if isinstance(value, str) else json.dumps({"weight_map": value}))
        return refusal(tmp_path)

    # As in transformers, the shards that are named are read whole
    for shards in (whole | {"d": two}, whole | {"c": one, "a": two}, {"a": one, "c": two}):
        index.write_text(json.dumps({"weight_map": shards}))
        with open_weights(tmp_path) as files:
            assert files.tensors.keys() == {"a", "b", "c"}
    assert "missing" in with_index(whole | {"d": "model-00003-of-00003.safetensors"})
    for name in ("../x.safetensors", "/x.safetensors", "a//b.safetensors", "a\\b.safetensors", "c:x.safetensors"):
        assert "no name of a file" in with_index(whole | {"a": name})
    for name in ("..", "", "x.bin", "x\0.safetensors", 7, None, ["x.safetensors"]):
        assert "no name of a file" in with_index(whole | {"a": name})
    for broken in ("", "[]", "{", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', '{"weight_map": {"a":"","a":""}}'):
        with_index(broken)
    index.unlink()
    assert f"no {INDEX}" in refusal(tmp_path)


def test_a_loop_of_links(tmp_path):
    write_shards(tmp_path, PARTS)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(shard.name)
    assert "missing" in refusal(tmp_path) or "read" in refusal(tmp_path)
    (tmp_path / SINGLE).symlink_to(SINGLE)
    assert "cannot be read" in refusal(tmp_path)
