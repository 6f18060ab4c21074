"""Text files with and without a byte order mark. Budget: 10 s."""

import codecs
import json

import pytest

from gemkit.errors import GemkitError
from gemkit.text.encoding import decode
from gemkit.text.tokenizer import Tokenizer
from gemkit.text.tokenizer_json import write_tokenizer_json
from gemkit.weights.json_file import read_object

TEXT = "naïve 日本 👍\r\nline\n"
ENCODED = {
    "utf-8": TEXT.encode(),
    "utf-8-sig": codecs.BOM_UTF8 + TEXT.encode(),
    "utf-16-le": codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
    "utf-16-be": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    "utf-32-le": codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"),
    "utf-32-be": codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"),
}


@pytest.mark.parametrize("name", ENCODED)
def test_a_mark_says_the_encoding_and_is_left_out(name):
    assert decode(ENCODED[name]) == TEXT


def test_one_mark_is_left_out_and_only_at_the_start():
    assert decode(codecs.BOM_UTF8 * 2 + b"a\xef\xbb\xbf") == "\ufeffa\ufeff"
    assert decode(b"") == "" and decode(codecs.BOM_UTF8) == "" and decode(codecs.BOM_UTF16_LE) == ""
    assert decode(b"a\0b") == "a\0b" and decode(b"\0") == "\0"


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        ("naïve".encode("latin-1"), "utf-8"),
        (codecs.BOM_UTF16_LE + b"a\0b", "utf-16-le"),
        (codecs.BOM_UTF16_BE + b"\xd8\x00", "utf-16-be"),
        ("plain".encode("utf-16-le") * 2, "utf-8"),
        ("plain".encode("utf-16-be") * 2, "utf-8"),
    ],
)
def test_other_bytes_are_refused(data, encoding):
    with pytest.raises(UnicodeDecodeError) as error:
        decode(data)
    assert error.value.encoding == encoding


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_files(tmp_path, encoding):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "gemma3_text", "name": "日本"}', encoding=encoding)
    assert read_object(path) == {"model_type": "gemma3_text", "name": "日本"}
    path.write_bytes('{"name": "é"}'.encode("latin-1"))
    with pytest.raises(GemkitError, match="not UTF-8"):
        read_object(path)


def test_a_tokenizer_file_with_a_mark(tmp_path):
    from engine.vocabulary import tokenizer, vocabulary

    data = write_tokenizer_json(vocabulary())
    assert json.loads(data)
    path = tmp_path / "tokenizer.json"
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_bytes(data.decode().encode(encoding))
        assert Tokenizer.from_file(path).encode("abc") == tokenizer().encode("abc")
