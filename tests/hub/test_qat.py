"""The short name of a Gemma 3 is Google's 4-bit file, the full one the original weights. Budget: 10 s."""

import json
from pathlib import Path

import numpy as np
import pytest
from engine.vocabulary import vocabulary
from hub.test_resolve import fails, same
from hub.world import NEEDED, World, gemma, gguf, server_fixture, world_fixture, write  # noqa: F401
from weights.files import tiny_config, tiny_params

import gemkit
import gemkit.cli
from gemkit.arch.presets import PRESETS
from gemkit.hub.names import HfName, kaggle_handle, original_of, quick, with_revision
from gemkit.hub.resolve import named, remove, resolve
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.dtype import describe, narrow_head
from gemkit.weights.gguf.read import read_gguf
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.quant import GGMLType

NAME, QAT, ORIGINAL = "gemma-3-4b-it", "google/gemma-3-4b-it-qat-q4_0-gguf", "google/gemma-3-4b-it"
FILE = "gemma-3-4b-it-q4_0.gguf"


@pytest.fixture(autouse=True)
def both(world: World) -> None:
    """The hub has Google's file, with its image encoder, and the original."""
    write(world.served / "hf" / QAT, {FILE: gguf(1), "mmproj-model-f16-4B.gguf": gguf(2), "README.md": b"read me"})
    write(world.served / "hf" / ORIGINAL, gemma())


def run(capsys: pytest.CaptureFixture, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        gemkit.cli.main(list(args))
    output = capsys.readouterr()
    return exit_.value.code or 0, output.out, output.err


def test_the_files_that_google_publishes_are_known():
    found = {name: preset.qat_id for name, preset in PRESETS.items() if preset.qat_id}
    assert set(found) == {f"gemma-3-{size}-{kind}" for size in ("1b", "4b", "12b", "27b") for kind in ("it", "pt")}
    assert quick(" Gemma-3-4B-it ") == HfName(QAT) and original_of(QAT) == ORIGINAL
    for name in ("gemma-3-270m-it", "gemma-2-2b-it", ORIGINAL, f"hf:{ORIGINAL}", "demo", "kaggle:a/b/c/d", "none"):
        assert quick(name) is None
    assert original_of(ORIGINAL) is None and kaggle_handle(QAT) is None
    assert with_revision(NAME, "v1") == f"hf:{ORIGINAL}@v1", "a revision is one of the original"


def test_the_short_name_fetches_the_file_alone_and_says_so(world: World, capsys):
    path = resolve(NAME)
    assert path.name == FILE and path.read_bytes() == gguf(1)
    said = f"{NAME} is fetched as Google's 4-bit file, hf:{QAT}; its original weights are hf:{ORIGINAL}"
    assert capsys.readouterr().err == f"gemkit: {said}\n"
    assert {entry["path"].rsplit("/", 1)[1] for entry in world.log() if entry["on"] == "cdn"} == {FILE}
    assert resolve(NAME) == resolve(NAME, offline=True) == resolve(f"hf:{QAT}") == path
    assert world.log() == [] and capsys.readouterr().err == ""


def test_download_says_it_beside_the_path(world: World, capsys):
    code, out, err = run(capsys, "download", NAME, "--json")
    assert code == 0 and json.loads(out)["path"].endswith(FILE) and err.count("\n") == 1 and "4-bit file" in err
    code, out, err = run(capsys, "download", ORIGINAL)
    assert (code, err) == (0, "") and same(Path(out.rstrip()), gemma())


def test_the_full_name_or_a_dtype_is_the_original(world: World):
    path = resolve(NAME, original=True)
    assert same(path, gemma()) and resolve(ORIGINAL) == path
    assert not list(world.hf.glob(f"models--{QAT.replace('/', '--')}"))


def test_what_is_here_is_used_without_a_network(world: World, monkeypatch):
    original = resolve(ORIGINAL)
    assert resolve(NAME) == resolve(NAME, offline=True) == original, "only that is here"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert resolve(NAME) == original
    monkeypatch.setenv("HF_ENDPOINT", world.address)
    quick_one = resolve(NAME, refresh=True)
    assert quick_one.name == FILE and resolve(NAME, offline=True) == quick_one
    assert resolve(NAME, offline=True, original=True) == original
    remove(named(ORIGINAL))
    message = fails("here only as Google's 4-bit file", NAME, offline=True, original=True)
    assert f"gemkit download hf:{ORIGINAL}" in message and "--dtype" in message
    assert resolve(NAME, offline=True) == quick_one


def test_the_original_on_kaggle_serves_too(world: World):
    handle = "google/gemma-3/transformers/gemma-3-4b-it"
    write(world.served / "kaggle" / handle / "1", gemma())
    path = resolve(f"kaggle:{handle}")
    assert resolve(NAME, offline=True) == path
    assert {entry.path for entry in named(NAME)} == {path}


def test_gates_and_gaps_name_the_original(world: World):
    world.put("/_settings", {"gated": [QAT]})
    message = fails("is gated", NAME)
    assert f"open {world.address}/{QAT}, accept" in message and f"take the original weights, {ORIGINAL}" in message
    world.put("/_settings", {"gated": [QAT, ORIGINAL]})
    assert "kaggle:google/gemma-3/transformers/gemma-3-4b-it" in fails("is gated", ORIGINAL)
    world.put("/_settings", {"gated": []})
    for path in (world.served / "hf" / QAT).iterdir():
        path.unlink()
    (world.served / "hf" / QAT).rmdir()
    assert ORIGINAL in fails(QAT, NAME)


def test_rm_takes_all_that_the_name_means(world: World):
    resolve(NAME), resolve(ORIGINAL)
    assert len(named(NAME)) == 2 and len(named(ORIGINAL)) == 1
    remove(named(NAME))
    assert world.left(models=True) == []


def tiny(path: Path, body: GGMLType, head: GGMLType) -> Path:
    config = tiny_config("gemma3_text", head_dim=32, vocab_size=len(vocabulary()))
    kinds = lambda name: head if "embed" in name else body  # noqa: E731
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_gguf(path, Checkpoint.from_params(config, tiny_params(config), kinds, vocabulary(), name="Tiny"))


def head_type(model: gemkit.Model) -> GGMLType:
    return model.checkpoint.tensors["model.embed_tokens.weight"].type


def test_its_embedding_is_used_in_8_bits(world: World, tmp_path):
    """The same file elsewhere, and with exact activations, is taken as it is stored."""
    snapshot = world.hf / f"models--{QAT.replace('/', '--')}" / "snapshots" / ("a" * 40)
    path = tiny(snapshot / FILE, GGMLType.Q4_0, GGMLType.F16)
    with gemkit.load(NAME, threads=1, offline=True) as model:
        assert head_type(model) == GGMLType.Q8_0 and "Q8_0" in describe(model.checkpoint)
        narrow = model.score([2, 40, 50, 60]).logprobs
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    for source, options in ((copy, {}), (path, {"activations": "float32"})):
        with gemkit.load(source, threads=1, **options) as model:
            assert head_type(model) == GGMLType.F16
            wide = model.score([2, 40, 50, 60]).logprobs
        assert np.abs(wide - narrow).max() < 0.02 * np.abs(wide).max() and not np.array_equal(wide, narrow)


@pytest.mark.parametrize(
    ("body", "head", "changes"),
    [
        (GGMLType.Q4_0, GGMLType.F16, True),
        (GGMLType.Q4_0, GGMLType.BF16, True),
        (GGMLType.Q4_0, GGMLType.F32, True),
        (GGMLType.Q4_0, GGMLType.Q8_0, False),
        (GGMLType.F16, GGMLType.F16, False),
    ],
)
def test_only_a_float_head_of_a_quantised_model_is_narrowed(tmp_path, body: GGMLType, head: GGMLType, changes: bool):
    with read_gguf(tiny(tmp_path / "m.gguf", body, head)) as checkpoint:
        found = narrow_head(checkpoint)
        assert (found is not checkpoint) is changes
        if changes:
            kinds = {name: tensor.type for name, tensor in found.tensors.items()}
            assert kinds.pop("model.embed_tokens.weight") == GGMLType.Q8_0
            assert all(checkpoint.tensors[name].type == kind for name, kind in kinds.items())
