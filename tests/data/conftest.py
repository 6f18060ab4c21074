"""The demo model's tokenizer, and transformers' tokenizer of Gemma 3."""

import gzip
import shutil

import pytest
from testdata import data_file

from gemkit.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    from gemkit.api.load import load_tokenizer

    return load_tokenizer("demo")


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """transformers' tokenizer of Gemma 3, whose ids the demo has, with Google's chat template."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("gemma3")
    packed = data_file("tokenizers", "gemma3.tokenizer.json.gz")
    (folder / "tokenizer.json").write_bytes(gzip.decompress(packed.read_bytes()))
    shutil.copyfile(data_file("tokenizers", "gemma3.tokenizer_config.json"), folder / "tokenizer_config.json")
    return AutoTokenizer.from_pretrained(folder)
