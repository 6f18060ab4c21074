"""Arrays in a safetensors file: what the safetensors library reads, and back. Budget: 2 s."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemkit.errors import GemkitError
from gemkit.weights.hf.arrays import checksum, read_arrays, write_arrays

ARRAYS = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
    "count": np.array(7, np.int64),
    "mask": np.array([True, False, True]),
    "half": np.array([1.5, -0.0, np.inf], np.float16),
    "wide": np.array([np.pi, np.nan]),
    "random": np.array([2**64 - 1, 3], np.uint64),
    "none": np.zeros((0, 4), np.float32),
}


def test_the_safetensors_library_reads_the_file(tmp_path):
    path = tmp_path / "state.safetensors"
    assert write_arrays(path, ARRAYS) == checksum(path)
    for found in (load_file(path), read_arrays(path)):
        assert found.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert found[name].dtype == array.dtype and found[name].flags.aligned
            np.testing.assert_array_equal(found[name], array)


def test_the_checksum_is_that_of_the_bytes(tmp_path):
    path = tmp_path / "state.safetensors"
    before = write_arrays(path, ARRAYS)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert checksum(path) != before


def test_a_type_that_numpy_lacks_is_named(tmp_path):
    import ml_dtypes

    save_file({"norm": np.ones(3, ml_dtypes.bfloat16)}, tmp_path / "model.safetensors")
    with pytest.raises(GemkitError, match=r"'norm' is BF16, which NumPy lacks"):
        read_arrays(tmp_path / "model.safetensors")


def test_a_file_is_never_overwritten(tmp_path):
    write_arrays(tmp_path / "a.safetensors", ARRAYS)
    with pytest.raises(FileExistsError):
        write_arrays(tmp_path / "a.safetensors", ARRAYS)
