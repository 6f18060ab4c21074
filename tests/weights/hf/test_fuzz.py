"""Random exports, each loaded by transformers and by gemkit: equal logits and ids, or a refusal that names the lack.

Budget: 60 s for 200 seeds. GEMKIT_FUZZ_SECONDS=3600 goes on with more for that long; GEMKIT_FUZZ_SEED=N begins at N.
"""

import os
import re
import shutil
import time
import warnings

import numpy as np
import pytest
import torch
import transformers
from parity.tolerances import NATIVE_FLOAT32, relative_error
from weights import exports, hf_files

from gemkit.errors import GemkitError, GemkitWarning
from gemkit.text.tokenizer import Tokenizer
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.open import open_checkpoint

SEEDS = 200
FIRST = int(os.environ.get("GEMKIT_FUZZ_SEED", "0"))
SECONDS = float(os.environ.get("GEMKIT_FUZZ_SECONDS", "0"))
BATCH = 20

# What gemkit lacks, whatever the export: refusals by these words are right.
LACKS = ["gemkit merges all that make a piece"]


@pytest.fixture(scope="module")
def maker():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = hf_files.multimodal(image_token_index=300, boi_token_index=301, eoi_token_index=302)
    model.config.text_config.hidden_size = 32
    state = {
        name.removeprefix("model."): value.detach().clone()
        for name, value in transformers.Gemma3ForConditionalGeneration(model.config).state_dict().items()
        if "vision_tower" in name or "projector" in name
    }
    return exports.Maker(state, model.config.vision_config.to_dict())


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_exports(maker, tmp_path, first):
    loaded = [compare(maker, FIRST + seed, tmp_path) for seed in range(first, first + BATCH)]
    # Exports that transformers refuses prove nothing; most must be ones that it loads
    assert sum(loaded) >= BATCH // 2


if SECONDS:

    def test_more_exports(maker, tmp_path):
        end, seed = time.monotonic() + SECONDS, FIRST + SEEDS
        while time.monotonic() < end:
            compare(maker, seed, tmp_path)
            seed += 1
        print(f"seeds {FIRST} to {seed - 1}")


def compare(maker: exports.Maker, seed: int, root) -> bool:
    """Makes an export and loads it twice; whether transformers loads it whole."""
    export = maker.make(seed, root / str(seed))
    try:
        return _compare(export)
    except AssertionError as error:
        raise AssertionError(f"seed {seed} ({'; '.join(export.what)}): {error}") from error
    finally:
        shutil.rmtree(export.path, ignore_errors=True)


def _compare(export: exports.Export) -> bool:
    theirs, tokenizer = _theirs(export)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GemkitWarning)
        try:
            with open_checkpoint(export.path) as checkpoint:
                if theirs is not None:
                    _same_logits(export, checkpoint, theirs)
                if tokenizer is not None:
                    _same_ids(export, checkpoint, tokenizer)
        except GemkitError as error:
            text = str(error)
            assert "\n" not in text and len(text) < 700 and str(export.path) in text, text
            allowed = [*export.may_refuse, *LACKS]
            assert theirs is None or any(re.search(words, text) for words in allowed), f"refused: {text}"
    return theirs is not None


def _theirs(export: exports.Export):
    """transformers' logits, None if it does not load the model whole, and its tokenizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                export.path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
            )
        except Exception:  # whatever it is, it does not load
            model, info = None, {}
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(export.path)
        except Exception:
            tokenizer = None
    if model is None or info["missing_keys"] or info["mismatched_keys"]:
        return None, tokenizer
    rows = model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(exports.ids(export.seed, rows))[None], use_cache=False).logits[0]
    return logits.numpy(), tokenizer


def _same_logits(export: exports.Export, checkpoint, theirs: np.ndarray) -> None:
    ids = exports.ids(export.seed, checkpoint.config.vocab_size)
    ours = hf_files.native_logits(checkpoint.config, checkpoint.tensors, ids)
    assert relative_error(ours, theirs) <= NATIVE_FLOAT32, f"logits differ by {relative_error(ours, theirs):.2g}"
    if export.seed % 5 == 0:  # the same as GGUF in a folder with companions
        folder = export.path / "gguf"
        folder.mkdir()
        try:
            write_gguf(folder / "model.gguf", checkpoint)
        except GemkitError:  # the format has no words for some of these models
            return
        (folder / "config.json").write_bytes((export.path / "config.json").read_bytes())
        (folder / "mmproj-model.gguf").write_bytes(b"GGUF")
        with open_checkpoint(folder) as other:
            ours = hf_files.native_logits(other.config, other.tensors, ids)
        assert relative_error(ours, theirs) <= NATIVE_FLOAT32, "logits of the GGUF file differ"


def _same_ids(export: exports.Export, checkpoint, theirs) -> None:
    ours = Tokenizer.from_vocabulary(checkpoint.vocabulary)
    added = {str(token): number for number, token in theirs.added_tokens_decoder.items()}
    control = [str(token) for token in theirs.added_tokens_decoder.values() if token.special]
    control += [ours.id_to_piece(i).replace("▁", " ") for i in range(ours.vocab_size) if ours.is_control(i)]
    for content, number in added.items():
        if number < ours.vocab_size:
            piece = ours.id_to_piece(number)
            assert piece == content.replace(" ", "▁"), f"id {number} is {piece!a}, not {content!a}"
        else:
            assert content == "<mask>", f"{content!a} is {number} in transformers and missing here"
    for text in export.texts:
        if any(name in text for name in control):
            continue  # gemkit never makes these from text
        wanted = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, bos=False) == wanted, f"{text!a} is {ours.encode(text, bos=False)}, not {wanted}"
        assert ours.decode(wanted) == text
