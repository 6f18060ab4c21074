"""Quantized models: llama.cpp's types, bytes that it runs, scales that are not worse, the damage. Budget: 50 s."""

import math
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
from engine.vocabulary import vocabulary
from parity import llama_cpp
from parity.tolerances import QUANTIZED_MARGIN, SEARCHED_PERPLEXITY_RATIO_TO_GGML
from weights.files import tiny_config, tiny_params
from weights.test_quant_search import ggml

import gemkit
from gemkit.arch.reference import forward
from gemkit.cli.quantize import EMBEDDINGS
from gemkit.cli.quantize import NAMES as CLI_NAMES
from gemkit.errors import GemkitError, GemkitWarning, UsageError
from gemkit.hub.demo import demo_path
from gemkit.tools.quantize import NAMES, TYPES, measure, plan, quantize
from gemkit.tools.sample import TEXT
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.open import open_checkpoint
from gemkit.weights.quant import BLOCKS, GGMLType

HEAD = "model.embed_tokens.weight"
# Relative errors of rounding to the float types
FLOATS = {GGMLType.F32: 0.0, GGMLType.F16: 2.0**-11, GGMLType.BF16: 2.0**-8}
WORDS = "the sea was calm and the boats lay in the harbour"


def tiny(model_type: str = "gemma3_text", kind: GGMLType = GGMLType.F32, **changes) -> Checkpoint:
    facts = {"hidden_size": 256, "head_dim": 32, "vocab_size": len(vocabulary().pieces), **changes}
    config = tiny_config(model_type, **facts)
    params = {name: value * 0.1 for name, value in tiny_params(config).items()}
    return Checkpoint.from_params(config, params, kind, vocabulary(), name="Tiny")


@pytest.fixture
def start(tmp_path) -> Path:
    return write_gguf(tmp_path / "start.gguf", tiny())


def test_the_types_of_a_mix_are_those_that_llama_cpp_chose():
    """The demo was made by llama.cpp's own quantiser as Q4_K_M."""
    with open_checkpoint(demo_path()) as checkpoint:
        theirs = {name: tensor.type for name, tensor in checkpoint.tensors.items()}
        assert plan(checkpoint, "Q4_K_M") == theirs
        counts = plan(checkpoint, "q5_k_m")
        assert counts["model.layers.0.mlp.down_proj.weight"] == GGMLType.Q6_K
        assert counts["model.layers.2.mlp.down_proj.weight"] == GGMLType.Q5_K


@pytest.mark.parametrize(
    ("layers", "wider"),
    [(18, [0, 1, 4, 7, 10, 13, 15, 16, 17]), (26, [0, 1, 2, 5, 8, 11, 14, 17, 20, 22, 23, 24, 25]), (7, [2, 5, 6])],
)
def test_the_layers_that_a_mix_keeps_wider(layers, wider):
    checkpoint = tiny("gemma", num_hidden_layers=layers, intermediate_size=256)
    for name, main in (("q4_k_m", GGMLType.Q4_K), ("q5_k_m", GGMLType.Q5_K)):
        types = plan(checkpoint, name)
        for part in ("self_attn.v_proj", "mlp.down_proj"):
            found = [types[f"model.layers.{i}.{part}.weight"] for i in range(layers)]
            assert found == [GGMLType.Q6_K if i in wider else main for i in range(layers)]
        for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.gate_proj"):
            assert {types[f"model.layers.{i}.{part}.weight"] for i in range(layers)} == {main}


@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [("q4_k", 64, "Q5_0"), ("q5_k", 64, "Q5_1"), ("q6_k", 64, "Q8_0"), ("q4_k", 512, "Q4_K"), ("q4_0", 64, "Q4_0"),
     ("q6_k", 48, "F16"), ("q8_0", 48, "F16"), ("bf16", 48, "BF16")],
)  # fmt: skip
def test_rows_that_are_no_whole_blocks(tmp_path, name, columns, expected):
    path = write_gguf(tmp_path / "start.gguf", tiny("gemma", intermediate_size=columns))
    done = quantize(path, tmp_path / "end.gguf", name)
    with open_checkpoint(tmp_path / "end.gguf") as end:
        assert end.tensors["model.layers.0.mlp.down_proj.weight"].type.name == expected
        assert done.types == {kind.name: n for kind, n in _counts(end).items()}


def _counts(checkpoint: Checkpoint) -> dict[GGMLType, int]:
    kinds = [tensor.type for tensor in checkpoint.tensors.values()]
    return {kind: kinds.count(kind) for kind in kinds}


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_keeps_eight_bits_unless_asked(tmp_path, tied):
    checkpoint = tiny("gemma", tie_word_embeddings=tied)
    heads = [HEAD] if tied else [HEAD, "lm_head.weight"]
    for name in NAMES:
        wide = name in ("f32", "bf16", "f16")
        types = plan(checkpoint, name)
        assert {types[head] for head in heads} == {TYPES[name] if wide else GGMLType.Q8_0}
        assert {types[head] for head in heads} != {GGMLType.Q4_0}
        assert all(types[key] == GGMLType.F32 for key in types if "norm" in key)
    types = plan(checkpoint, "q8_0", "Q4_0")
    assert {types[head] for head in heads} == {GGMLType.Q4_0}
    path = write_gguf(tmp_path / "start.gguf", checkpoint)
    with pytest.warns(GemkitWarning, match="below 8 bits") as caught:
        quantize(path, tmp_path / "low.gguf", "q8_0", "q6_k")
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(path, tmp_path / "high.gguf", "q4_0", "q8_0")


@pytest.mark.parametrize("name", NAMES)
def test_every_type_is_written_read_and_run(tmp_path, start, name):
    target = tmp_path / "end.gguf"
    calls = []
    done = quantize(start, target, name.upper(), progress=lambda *state: calls.append(state))
    assert done.path == target and done.bytes == target.stat().st_size
    reader = gguf.GGUFReader(target)
    with open_checkpoint(start) as before, open_checkpoint(target) as after:
        assert plan(before, name) == {key: tensor.type for key, tensor in after.tensors.items()}
        assert after.vocabulary.pieces == before.vocabulary.pieces and after.config == before.config
        assert reader.tensors[0].tensor_type == after.tensors[HEAD].type
        for key, tensor in after.tensors.items():
            old, new = before.tensors[key].to_float32(), tensor.to_float32()
            error = float(np.linalg.norm(new - old) / np.linalg.norm(old))
            bits = 8 * BLOCKS[tensor.type].bytes / BLOCKS[tensor.type].elements
            assert error <= FLOATS.get(tensor.type, 2.5 * 2.0**-bits)
            assert done.errors.get(key, 0) == pytest.approx(error, rel=1e-3, abs=1e-12)
    assert list(done.errors.values()) == sorted(done.errors.values(), reverse=True)
    if name != "f32":
        assert calls[-1][0] == calls[-1][1] == sum(math.prod(before.tensors[key].shape) for key in done.errors)
    with gemkit.load(target, threads=2) as model:
        assert len(model.generate(WORDS, max_tokens=3, temperature=0).ids) > 0


def test_what_has_its_type_already_is_kept(tmp_path):
    start = write_gguf(tmp_path / "start.gguf", tiny("gemma", GGMLType.Q8_0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = quantize(start, tmp_path / "end.gguf", "q8_0")
    assert done.errors == {} and start.read_bytes() == (tmp_path / "end.gguf").read_bytes()
    with pytest.warns(GemkitWarning, match=r"quantised already \(Q8_0\)"):
        quantize(start, tmp_path / "twice.gguf", "q4_0")


def test_the_damage_is_what_the_definitions_say(tmp_path, start):
    """Against float64 logits of the reference."""
    target = tmp_path / "end.gguf"
    quantize(start, target, "q4_0")
    damage = measure(start, target, WORDS)
    logits = []
    for path in (start, target):
        with open_checkpoint(path) as checkpoint:
            ids = gemkit.text.tokenizer.Tokenizer.from_vocabulary(checkpoint.vocabulary).encode(WORDS)
            params = {name: tensor.to_float32() for name, tensor in checkpoint.tensors.items()}
            logits.append(forward(checkpoint.config, params, np.array(ids)))
    p, q = (values - np.logaddexp.reduce(values, axis=1, keepdims=True) for values in logits)
    found, rows = damage.compared, np.arange(len(ids) - 1)
    assert found.tokens == len(ids) and damage.activations == "float32"
    assert found.kl == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=1e-3) and found.kl > 1e-4
    for mine, logprobs in zip(found.perplexity, (p, q)):
        assert mine == pytest.approx(np.exp(-logprobs[rows, ids[1:]].mean()), rel=1e-5)
    assert found.agreement == (p.argmax(1) == q.argmax(1)).mean()
    assert damage.rise == found.perplexity[1] / found.perplexity[0] - 1
    assert damage.bytes[0] > 3 * damage.bytes[1]


# ---------------------------------------------------------------------------------------------------------------------
# Google's weights


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> tuple[Path, Path]:
    """The demo in Q4_0 by gemkit, and the same types with the bytes of llama.cpp's quantiser."""
    folder = tmp_path_factory.mktemp("real")
    paths = folder / "ours.gguf", folder / "theirs.gguf"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", GemkitWarning)
        quantize(demo_path(), paths[0], "q4_0")
        patch.setattr("gemkit.tools.quantize.search", lambda kind, rows: ggml(kind, rows))
        quantize(demo_path(), paths[1], "q4_0")
    return paths


def test_the_file_says_its_type(real):
    assert open_checkpoint(real[0]).metadata["general.file_type"] == 2, "Q4_0, though most bytes are the embedding's"


def test_perplexity_is_not_above_that_of_llama_cpps_quantiser(real):
    values = []
    for path in real:
        with gemkit.load(path, threads=2) as model:
            logprobs = model.score(TEXT[:1600]).logprobs
            values.append(math.exp(-float(logprobs.mean())))
    assert len(logprobs) > 300
    assert values[0] <= SEARCHED_PERPLEXITY_RATIO_TO_GGML * values[1]


def test_llama_cpp_chooses_the_same_tokens(real):
    """Select positions whose two most probable tokens are too far apart for another rounding of activations."""
    with gemkit.load(real[0], threads=2) as model:
        ids = model.tokenizer.encode("The planets of the solar system, in order from the Sun, are")
        answer = model.generate(ids, max_tokens=24, temperature=0).ids
        (logits,) = llama_cpp.logits(real[0], [*ids, *answer], model.config.vocab_size)
        logits = logits[len(ids) - 1 : -1]
    top = np.sort(logits, axis=1)[:, -2:]
    clear = top[:, 1] - top[:, 0] > QUANTIZED_MARGIN
    assert (logits.argmax(1) == answer)[clear].all()
    assert clear.sum() > 12


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


def test_bad_requests_are_refused_and_leave_nothing(tmp_path, start, monkeypatch):
    target = tmp_path / "end.gguf"
    with pytest.raises(UsageError, match="type is 'q3_k'; choose from f32"):
        quantize(start, target, "q3_k")
    with pytest.raises(UsageError, match="embedding's type is 'q4_k_m'"):
        quantize(start, target, "q4_0", "q4_k_m")
    with pytest.raises(GemkitError, match="exists"):
        quantize(start, start, "q4_0")
    with pytest.raises(GemkitError, match="make it, or name another"):
        quantize(start, tmp_path / "nowhere" / "end.gguf", "q4_0")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(GemkitError, match=r"needs [\d,]+ bytes and its disk has 1,000 free"):
        quantize(start, target, "q4_0")
    monkeypatch.undo()
    large = tiny("gemma")
    large.tensors["model.layers.0.mlp.up_proj.weight"].data.view("<f4")[0] = 1e5
    huge = write_gguf(tmp_path / "huge.gguf", large)
    with pytest.raises(GemkitError, match=r"model\.layers\.0\.mlp\.up_proj\.weight: a number is too large for f16"):
        quantize(huge, target, "f16")
    large.tensors["model.layers.0.mlp.up_proj.weight"].data.view("<f4")[0] = np.inf
    write_gguf(huge, large)
    with pytest.raises(GemkitError, match=r"up_proj\.weight: numbers that are not finite"):
        quantize(huge, target, "q4_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["huge.gguf", "start.gguf"]


def test_the_room_that_is_asked_for_is_enough_and_not_much_more(tmp_path, start, monkeypatch):
    room = []
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": room[0]})())

    room.append(1 << 40)
    size = quantize(start, tmp_path / "first.gguf", "q4_0").bytes
    room[0] = size - 1
    with pytest.raises(GemkitError, match="needs"):
        quantize(start, tmp_path / "second.gguf", "q4_0")
    room[0] = size + (1 << 18)
    quantize(start, tmp_path / "third.gguf", "q4_0")


def test_an_interruption_leaves_nothing(tmp_path, start):
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(start, tmp_path / "end.gguf", "q4_k", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["start.gguf"]


def test_the_command_line_has_the_same_names():
    assert set(CLI_NAMES) == set(NAMES) and set(EMBEDDINGS) == set(TYPES)


def test_threads_change_no_byte(tmp_path, start):
    files = [tmp_path / f"{threads}.gguf" for threads in (1, 3)]
    for path, threads in zip(files, (1, 3)):
        quantize(start, path, "q5_k", threads=threads)
    assert files[0].read_bytes() == files[1].read_bytes()
