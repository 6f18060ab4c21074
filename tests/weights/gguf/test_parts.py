"""Split GGUF models: read from any part and from their folder, as llama.cpp reads them; refusals. Budget: 10 s."""

import gguf as peer
import numpy as np
import pytest
from engine.vocabulary import vocabulary
from parity import llama_cpp
from weights import files

import gemkit
from gemkit.errors import GemkitError
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.gguf.container import GGUFFile
from gemkit.weights.gguf.parts import part_paths
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.open import open_checkpoint
from gemkit.weights.quant import GGMLType


@pytest.fixture
def whole(tmp_path):
    config = files.tiny_config("gemma3_text", head_dim=32, vocab_size=300)
    start = Checkpoint.from_params(config, files.tiny_params(config), GGMLType.F32, vocabulary(), name="Tiny")
    return write_gguf(tmp_path / "whole.gguf", start)


@pytest.fixture
def parts(tmp_path, whole):
    """The model in three files, by gguf-py's writer."""
    folder = tmp_path / "split"
    folder.mkdir()
    writer = peer.GGUFWriter(folder / "tiny.gguf", "gemma3", split_max_tensors=40)
    with GGUFFile.open(whole) as file:
        for key, value in file.metadata.items():
            if key != "general.architecture":
                files.add_pair(writer, key, value)
        for name, tensor in file.tensors.items():
            writer.add_tensor(name, tensor.data.view("<f4").reshape(tensor.shape).copy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    found = sorted(folder.iterdir())
    assert [path.name for path in found] == [f"tiny-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    return found


def test_any_part_and_the_folder_are_the_model(whole, parts):
    with llama_cpp.opened(parts[0]) as theirs:
        assert theirs is not None and theirs.rows == 300
    with open_checkpoint(whole) as one:
        for path in (*parts, parts[0].parent):
            with open_checkpoint(path) as other:
                assert other.config == one.config and other.vocabulary.pieces == one.vocabulary.pieces
                assert other.source == parts[0] and other.tensors.keys() == one.tensors.keys()
                for name, tensor in one.tensors.items():
                    np.testing.assert_array_equal(other.tensors[name].data, tensor.data)
    with gemkit.load(whole, threads=1) as one, gemkit.load(parts[1], threads=1) as other:
        answers = [model.generate("the sea", max_tokens=4, temperature=0).ids for model in (one, other)]
    assert answers[0] == answers[1]


def test_closing_closes_all(parts):
    checkpoint = open_checkpoint(parts[0])
    tensor = checkpoint.tensors["model.norm.weight"]
    checkpoint.close()
    with pytest.raises(GemkitError, match="closed"):
        _ = tensor.data
    for path in parts:
        assert str(path) not in open("/proc/self/maps").read()


def test_a_changed_part_is_another_model(parts, tmp_path):
    """A packed copy is found by the files that it was made from."""
    from gemkit.models.native import PackedStore

    with open_checkpoint(parts[0]) as checkpoint:
        assert PackedStore.of(checkpoint.source, checkpoint.tensors).files == tuple(parts)


def test_what_is_wrong_with_the_parts_is_named(parts):
    def refused(message: str, path=parts[0]) -> None:
        with pytest.raises(GemkitError, match=message) as caught:
            open_checkpoint(path)
        assert "\n" not in str(caught.value)

    data = [path.read_bytes() for path in parts]
    parts[1].unlink()
    refused(r"one of 3 parts, of which tiny-00002-of-00003\.gguf are missing")
    refused(r"one of 3 parts, of which tiny-00002-of-00003\.gguf are missing", parts[2])
    parts[1].write_bytes(data[2])
    refused(r"tiny-00002-of-00003\.gguf is not part 2 of 3")
    parts[1].write_bytes(data[1][:-100])
    refused(r"tiny-00002-of-00003\.gguf: .*past the end")
    parts[1].write_bytes(data[1])
    parts[0].rename(parts[0].with_name("renamed.gguf"))
    refused("is part 1 of 3 of a split model, which its name must say", parts[0].with_name("renamed.gguf"))
    with pytest.raises(GemkitError, match="one of 3 parts of a split model"):
        GGUFFile.open(parts[1])


def test_names(tmp_path):
    assert part_paths("a-00002-of-00002.gguf")[0].name == "a-00001-of-00002.gguf"
    for name in ("a.gguf", "a-00001-of-00001.gguf", "a-00003-of-00002.gguf", "a-1-of-2.gguf", "a-00000-of-00002.gguf"):
        assert [path.name for path in part_paths(name)] == [name]
