"""gemma_pytorch checkpoints: what torch saves is read without torch, and nothing else is. Budget: 15 s."""

import collections
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import time
import warnings
import zipfile

import numpy as np
import pytest
import torch
from engine.vocabulary import vocabulary
from parity.cases import CASES
from parity.tolerances import REFERENCE_VS_TRANSFORMERS_F64, relative_error

from gemkit.arch import reference
from gemkit.arch.hf_config import to_hf
from gemkit.arch.presets import PRESETS, Preset
from gemkit.errors import GemkitError
from gemkit.text.spm_proto import write_model
from gemkit.weights.google.torch_ckpt import read_torch
from gemkit.weights.google.torch_zip import TorchFile
from gemkit.weights.open import open_checkpoint

from . import official_files as make

CONFIG = CASES["gemma1_2b"].config


def params_of(checkpoint) -> dict[str, np.ndarray]:
    return {name: tensor.to_float32() for name, tensor in checkpoint.tensors.items()}


def refusal(path) -> str:
    with pytest.raises(GemkitError) as error, open_checkpoint(path) as checkpoint:
        params_of(checkpoint)
    assert "\n" not in str(error.value) and str(path.name) in str(error.value), error.value
    return str(error.value)


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.config.tie_word_embeddings])
def test_the_official_state_means_what_the_official_module_computes(tmp_path, name):
    case = CASES[name]
    state = make.torch_state(case.config)
    path = make.save_torch(tmp_path / "model.ckpt", state, case.config)
    tokens = case.tokens()[:40]
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config == case.config
        logits = reference.forward(checkpoint.config, params_of(checkpoint), tokens)
    assert relative_error(logits, make.torch_logits(case.config, state, tokens)) < REFERENCE_VS_TRANSFORMERS_F64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_types_and_strides_are_those_of_the_file(tmp_path, dtype):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in make.torch_state(CONFIG).items()}
    for key in ("model.layers.0.self_attn.qkv_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        state[key] = state[key].t().contiguous().t()  # saved with its strides
    path = make.save_torch(tmp_path / "model.ckpt", state, CONFIG)
    with open_checkpoint(path) as checkpoint:
        found = checkpoint.tensors
        assert {tensor.type.name for tensor in found.values()} == {
            {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
        }
        down = state["model.layers.1.mlp.down_proj.weight"].float().numpy()
        assert np.array_equal(found["model.layers.1.mlp.down_proj.weight"].to_float32(), down)
        qkv = [found[f"model.layers.0.self_attn.{x}_proj.weight"].to_float32() for x in "qkv"]
        assert np.array_equal(np.concatenate(qkv), state["model.layers.0.self_attn.qkv_proj.weight"].float().numpy())


def quantised(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Every matrix as int8 with a number a row; and what they stand for, in float32."""
    small, plain = {}, {}
    for key, value in state.items():
        small[key] = plain[key] = value
        if value.is_floating_point() and value.ndim == 2:
            scale = (value.abs().amax(1) / 127).to(torch.bfloat16)
            small[key] = (value / scale[:, None].float()).round().clamp(-127, 127).to(torch.int8)
            small[key.replace(".weight", ".weight_scaler")] = scale
            plain[key] = small[key].float() * scale[:, None].float()
    return small, plain


def test_quantised_files_are_read_by_their_types(tmp_path):
    small, plain = quantised(make.torch_state(CONFIG))
    one = make.save_torch(tmp_path / "int8" / "model.ckpt", small, CONFIG)
    other = make.save_torch(tmp_path / "float" / "model.ckpt", plain, CONFIG)
    with open_checkpoint(one) as a, open_checkpoint(other) as b:
        assert "int8" in a.metadata["quantised"] and "quantised" not in b.metadata
        for key, value in params_of(b).items():
            assert np.array_equal(a.tensors[key].to_float32(), value), key


def test_a_folder_a_multimodal_model_and_shards(tmp_path):
    config = CASES["gemma3"].config
    state = make.torch_state(config, embedding="text_token_embedder")
    images = {"siglip_vision_model.x.weight": torch.ones(2), "mm_input_projection.weight": torch.ones(2, 2)}
    path = make.save_torch(tmp_path / "whole" / "model.ckpt", state | images, config)
    names = list(state)
    index = {}
    for number, keys in enumerate((names[:20], names[20:])):
        file = f"pytorch_model-{number}.bin"
        (tmp_path / "shards").mkdir(exist_ok=True)
        torch.save({key: state[key].clone() for key in keys}, tmp_path / "shards" / file)
        index |= dict.fromkeys(keys, file)
    facts = tmp_path / "shards" / "pytorch_model.bin.index.json"
    facts.write_text(json.dumps({"weight_map": index}))
    (tmp_path / "shards" / "config.json").write_text(json.dumps(to_hf(config)))
    with open_checkpoint(path) as a, open_checkpoint(path.parent) as b, open_checkpoint(facts.parent) as c:
        assert "2 tensors for images" in a.metadata["ignored"]
        assert a.source == b.source == path and c.source is None
        expected = params_of(a)
        for other in (params_of(b), params_of(c)):
            assert all(np.array_equal(other[key], value) for key, value in expected.items())
    facts.write_text(json.dumps({"weight_map": {"a": "../model.bin"}}))
    assert "no file next to it" in refusal(facts.parent)


def test_a_release_has_a_tokenizer_and_no_config(tmp_path, monkeypatch):
    path = make.save_torch(tmp_path / "gemma-tiny-it.ckpt", make.torch_state(CONFIG))
    assert "put its config.json" in refusal(path)
    monkeypatch.setitem(PRESETS, "tiny", Preset("tiny", "google/tiny", True, CONFIG))
    (tmp_path / "tokenizer.model").write_bytes(write_model(vocabulary()))
    (tmp_path / "config.json").write_text('{"architecture": "GEMMA_1"}')  # not Hugging Face's
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config == CONFIG and checkpoint.name == "gemma-tiny-it" and checkpoint.instruction_tuned
        assert checkpoint.vocabulary.pieces == vocabulary().pieces and checkpoint.vocabulary_key


def test_all_that_torch_saves_of_tensors_is_understood(tmp_path):
    """Parameters, dictionaries of modules, views that share a storage, numbers; protocols 2 and 4."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    base = torch.arange(24, dtype=torch.float32)
    value = {
        "model_state_dict": module.state_dict(),
        "parameter": torch.nn.Parameter(torch.ones(2, 3)),
        "views": [base[4:10].view(2, 3), base.view(4, 6).t()[1:3], base[:0], torch.tensor(7.0)],
        "facts": (1, -2, 2**40, 0.5, None, True, "text", {"a": {}}),
    }
    for protocol in (2, 4):
        torch.save(value, tmp_path / "x.ckpt", pickle_protocol=protocol)
        with TorchFile(tmp_path / "x.ckpt") as file:
            found = file.value
            assert found["facts"] == value["facts"]
            assert set(found["model_state_dict"]) == {"0.weight", "0.bias", "1.weight", "1.bias"}
            pairs = [*zip(found["views"], value["views"], strict=True), (found["parameter"], value["parameter"])]
            pairs += [(found["model_state_dict"][key], tensor) for key, tensor in module.state_dict().items()]
            for mine, theirs in pairs:
                read = np.ascontiguousarray(file.data(mine, "x")).view("<f4")[..., 0]
                assert np.array_equal(read, theirs.detach().numpy())


def test_reading_imports_no_torch(tmp_path):
    path = make.save_torch(tmp_path / "model.ckpt", make.torch_state(CONFIG), CONFIG)
    code = (
        "import sys; from gemkit.weights.open import open_checkpoint\n"
        f"c = open_checkpoint({str(path)!r}); [t.data for t in c.tensors.values()]\n"
        "assert not {'torch', 'orbax', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- what is refused -------------------------------------------------------------------------------------------------


def archive(path, data: bytes, storages: dict[str, bytes] | None = None, **options):
    """A zip as torch's, with a pickle of one's own."""
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("x/data.pkl", data)
        file.writestr("x/byteorder", b"little")
        for key, storage in (storages or {}).items():
            file.writestr(f"x/data/{key}", storage)
    return path


class Storage:
    """Pickles as a reference to a storage."""

    def __init__(self, key="0", count=4, kind="FloatStorage") -> None:
        self.key, self.count, self.kind = key, count, kind


class Call:
    def __init__(self, function, *arguments) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def pickled(value) -> bytes:
    import io

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            if isinstance(thing, Storage):
                return ("storage", getattr(torch, thing.kind), thing.key, "cpu", thing.count)
            return None

    out = io.BytesIO()
    Pickler(out, 2).dump(value)
    return out.getvalue()


def tensor(shape=(2, 2), strides=(2, 1), offset=0, storage=None):
    from torch._utils import _rebuild_tensor_v2

    hooks = collections.OrderedDict()
    return Call(_rebuild_tensor_v2, storage or Storage(), offset, shape, strides, False, hooks)


def read_all(path) -> None:
    with TorchFile(path) as file:
        for name, found in file.value["model_state_dict"].items():
            file.data(found, name)


def fault(path) -> str:
    start = time.monotonic()
    with pytest.raises(GemkitError) as error:
        read_all(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value) and len(str(error.value)) < 600
    assert time.monotonic() - start < 5
    return str(error.value)


def test_a_whole_handmade_archive_is_read(tmp_path):
    read_all(archive(tmp_path / "x.ckpt", pickled({"model_state_dict": {"w": tensor()}}), {"0": bytes(16)}))


@pytest.mark.parametrize(
    ("made", "word"),
    [
        (Call(os.system, "touch owned"), "posix.system"),
        (Call(eval, "1"), "__builtin__.eval"),
        (Call(torch.load, "x"), "torch.serialization.load"),
        (Call(getattr, "x", "y"), "getattr"),
        (re.compile("x"), "re._compile"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        ({1, 2}, "set"),
        (np.zeros(2), "numpy"),
        (b"bytes", "_codecs.encode"),
    ],
)
def test_everything_but_tensors_is_refused_by_name_and_never_run(tmp_path, monkeypatch, made, word):
    monkeypatch.chdir(tmp_path)
    text = fault(archive(tmp_path / "x.ckpt", pickle.dumps({"model_state_dict": {"w": made}}, 2)))
    assert word in text and "harmful" in text
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def nested(depth: int) -> bytes:
    """A tuple of two of itself, so often that its text or checksum would take years: as a key, a size, a name."""
    return b"(" + b"K\x01" + b"t" + b"q\x00" + b"".join(b"h\x00h\x00\x86q\x00" for _ in range(depth))


ORDERED = b"ccollections\nOrderedDict\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
STREAMS = {
    "nothing": b"",
    "no end": b"\x80\x02}",
    "empty stack": b"\x80\x020.",
    "not one value": b"\x80\x02}}.",
    "a mark too few": b"\x80\x02t.",
    "below the mark": b"\x80\x02](a.",
    "no such memo": b"\x80\x02h\x05.",
    "a huge memo": b"\x80\x02}r\xff\xff\xff\x7f(h\x01.",
    "items of a list": b"\x80\x02](K\x01K\x02u.",
    "odd items": b"\x80\x02}(K\x01u.",
    "a key that holds itself": b"\x80\x02}" + nested(80) + b"K\x01s.",
    "a name that holds itself": b"\x80\x04" + nested(80) + nested(80) + b"\x93.",
    "a storage that holds itself": b"\x80\x02"
    + b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    + nested(80)
    + b"NK\x01tQ.",
    "an unknown instruction": b"\x80\x02\xfe.",
    "a text longer than the file": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "bytes longer than memory": b"\x80\x05\x8e" + struct.pack("<Q", 2**62) + b".",
    "a number of a gigabyte": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "a call of a number": b"\x80\x02K\x01)R.",
    "a call without a tuple": b"\x80\x02" + ORDERED + b"]R.",
    "a call of a storage": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "a tensor of nothing": b"\x80\x02" + REBUILD + b")R.",
    "an extension": b"\x80\x02\x82\x01.",
    "attributes of a number": b"\x80\x02K\x01}b.",
    "an old reference": b"\x80\x02P1\n.",
    "text for a persistent id": b"\x80\x02X\x01\x00\x00\x00aQ.",
    "deep lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep marks": b"\x80\x02" + b"(" * 100_000 + b".",
    "a million entries": b"\x80\x02}(" + b"K\x01K\x02" * 100_000 + b"u.",
}


@pytest.mark.parametrize("name", STREAMS)
def test_broken_pickles_are_one_line(tmp_path, name):
    path = archive(tmp_path / "x.ckpt", STREAMS[name])
    with pytest.raises(GemkitError) as error:
        read_torch(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("made", "word"),
    [
        (tensor((3, 2)), "more numbers than its storage"),
        (tensor((2, 2), (3, 1)), "w reaches to element 4 of a storage that has 4"),
        (tensor(offset=1), "w reaches to element 4"),
        (tensor((2, 2), (-2, 1)), "a size is -2"),
        (tensor((2, 2), (2,)), "strides"),
        (tensor((2**40, 2**40), (0, 0)), "more numbers"),
        (tensor((4, 4), (0, 0)), "more numbers"),
        (tensor((2**50,), (0,)), "a size is"),
        (tensor((1.0,), (1,)), "a size is 1.0"),
        (tensor((True,), (1,)), "a size is"),
        (tensor((1,) * 9, (1,) * 9), "too long"),
        (tensor([2, 2]), "a shape is a list"),
        (tensor(storage=Storage("1")), "the entry 'data/1', which is missing"),
        (tensor(storage=Storage("../0")), "a storage is called '../0'"),
        (tensor(storage=Storage(count=8)), "the storage of w has 16 bytes, not 8 numbers of F32"),
        (tensor(storage=Storage(kind="HalfStorage")), "not 4 numbers of F16"),
        (tensor(storage=Storage(kind="QInt8Storage")), "torch.QInt8Storage"),
        (tensor(storage=7), "no storage"),
    ],
)
def test_tensors_beyond_their_storage_are_refused(tmp_path, made, word):
    data = pickled({"model_state_dict": {"w": made}})
    assert word in fault(archive(tmp_path / "x.ckpt", data, {"0": bytes(16)}))


def test_bad_archives_are_refused(tmp_path):
    good = pickled({"model_state_dict": {"w": tensor()}})
    path = tmp_path / "x.ckpt"

    def damaged(change) -> str:
        archive(path, good, {"0": bytes(16)})
        data = bytearray(path.read_bytes())
        path.write_bytes(bytes(change(data)))
        return fault(path)

    assert "no whole zip" in damaged(lambda data: data[:-40])
    assert "no file of torch.save" in damaged(lambda data: data[:1])
    assert "no file of torch.save" in damaged(lambda data: b"GGUF" + data)
    assert "no header" in damaged(
        lambda data: data.replace(b"PK\x03\x04", b"PK\x03\x05").replace(b"PK\x03\x05", b"PK\x03\x04", 1)
    )
    for options, word in (({"compression": zipfile.ZIP_DEFLATED}, "compressed"),):
        assert word in fault(archive(path, good, {"0": bytes(1 << 16)}, **options))
    for name, word in (
        ("x/../y", "outside"),
        ("/etc/passwd", "outside"),
        ("x/data.pkl", "two entries"),
        ("y", "outside"),
    ):
        archive(path, good, {"0": bytes(16)})
        with zipfile.ZipFile(path, "a") as file, warnings.catch_warnings(action="ignore"):
            file.writestr(name, b"")
        assert word in fault(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/other", b"")
    assert "no data.pkl" in fault(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", good)
        file.writestr("x/byteorder", b"big")
    assert "little-endian" in fault(path)
    archive(path, bytes(17 << 20))
    assert "far more" in fault(path)
    torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
    assert "torch before 1.6" in fault(path)
    path.unlink()
    path.mkdir()
    assert "not a regular file" in fault(path)
    path.rmdir()
    path.symlink_to(path)
    assert "cannot be read" in fault(path)


def test_every_cut_of_a_file_is_refused(tmp_path):
    """As a download that broke off."""
    whole = make.save_torch(tmp_path / "whole.ckpt", make.torch_state(CONFIG), CONFIG).read_bytes()
    path = tmp_path / "cut.ckpt"
    for at in (0, 1, 4, 30, 500, len(whole) // 2, len(whole) - 23, len(whole) - 1):
        path.write_bytes(whole[:at])
        refusal(path)


def test_wrong_tensors_are_named(tmp_path):
    state = make.torch_state(CONFIG)
    at = "model.layers.1."
    changes = {
        "misshapen": (
            {at + "mlp.up_proj.weight": state[at + "mlp.up_proj.weight"].t()},
            at + "mlp.up_proj.weight is [96, 128]",
        ),
        "wide": ({at + "self_attn.qkv_proj.weight": torch.ones(7, 96)}, at + "self_attn.qkv_proj.weight is [7, 96]"),
        "flat": ({at + "self_attn.qkv_proj.weight": torch.tensor(1.0)}, at + "self_attn.qkv_proj.weight is []"),
        "type": ({at + "mlp.up_proj.weight": torch.ones(128, 96).double()}, at + "mlp.up_proj.weight is F64"),
        "int8": ({at + "mlp.up_proj.weight": torch.ones(128, 96).to(torch.int8)}, "int8 and has no weight_scaler"),
        "scaler": ({at + "mlp.up_proj.weight_scaler": torch.ones(128)}, "not int8"),
        "unknown": ({at + "mlp.other.weight": torch.ones(2)}, "unknown " + at + "mlp.other.weight"),
        "far": ({"model.layers.5.mlp.up_proj.weight": torch.ones(2, 2)}, "unknown model.layers.5"),
        "hugging face": ({"model.embed_tokens.weight": torch.ones(2, 2)}, "get safetensors"),
        "number": ({"step": 3}, "'step' is no tensor"),
    }
    for name, (change, word) in changes.items():
        path = make.save_torch(tmp_path / name / "x.ckpt", state | change, CONFIG)
        assert word in refusal(path), name
    for key in (
        "embedder.weight",
        at + "mlp.down_proj.weight",
        "model.norm.weight",
        "model.layers.0.mlp.gate_proj.weight",
    ):
        path = make.save_torch(tmp_path / "less" / "x.ckpt", {k: v for k, v in state.items() if k != key}, CONFIG)
        assert key in refusal(path)
    small, _ = quantised(state)
    small["embedder.weight_scaler"] = torch.ones(3)
    assert "embedder.weight_scaler is F32 [3]" in refusal(make.save_torch(tmp_path / "q" / "x.ckpt", small, CONFIG))
    assert "no model_state_dict" in refusal(make.save_torch(tmp_path / "l" / "x.ckpt", [], CONFIG))


def test_two_checkpoints_in_a_folder_and_none(tmp_path):
    for name in ("a.ckpt", "b.ckpt"):
        make.save_torch(tmp_path / name, make.torch_state(CONFIG))
    with pytest.raises(GemkitError, match=r"2 \.ckpt files"):
        read_torch(tmp_path)
    with pytest.raises(GemkitError, match=r"config\.json"):
        open_checkpoint(tmp_path)
