"""Files and folders to rows: JSON, JSON lines, CSV, Parquet, data sets that Hugging Face's library saved.

A row knows its file and line, or its number in a file without lines. Parquet and saved data sets need pyarrow (extra
``data``); saved data sets are read without the library ``datasets``.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemkit.data.rows import COLUMNS, BadRows, Row, RowError, format_of, parse_row
from gemkit.errors import GemkitError

# Names of the files and folders of a part of a data set: train.jsonl, train-00000-of-00002.parquet, validation/.
_PARTS = {
    "train": "train",
    "validation": "valid|validation|val|dev|eval",
}
_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, by surrogateescape
_CSV_FIELD = 2**31 - 1
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

Record = tuple[str, object]  # where it is, and its fields or the RowError


@dataclass(frozen=True)
class Source:
    """Files of a data set, or folders that Hugging Face's library saved. validation: empty if it has no such part."""

    train: tuple[Path, ...]
    validation: tuple[Path, ...] = ()

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Source:
        """Return the files of a path: a file, a saved data set, or a folder with train.jsonl, valid.jsonl and the like.

        In a folder each part may have any of the formats, and several files: train-00000-of-00002.parquet. Raises
        GemkitError if there is nothing to read.
        """
        path = Path(path)
        if not path.exists():
            raise GemkitError(f"{path} does not exist: give a file of rows or a folder with train.jsonl")
        if not path.is_dir():
            return cls((path,))
        if (path / "state.json").is_file():
            return cls((path,))
        found = {part: cls._part(path, pattern) for part, pattern in _PARTS.items()}
        if not found["train"]:
            raise GemkitError(
                f"{path} has neither train.jsonl (or .json, .csv, .parquet) nor a data set that Hugging Face's library "
                "saved: give a file of rows"
            )
        return cls(**found)

    @staticmethod
    def _part(folder: Path, pattern: str) -> tuple[Path, ...]:
        if (folder / "dataset_dict.json").is_file():
            return tuple(
                child
                for child in _children(folder)
                if re.fullmatch(pattern, child.name) and (child / "state.json").is_file()
            )
        named = re.compile(rf"(?:{pattern})(?:[-_.].*)?(?:{'|'.join(map(re.escape, _SUFFIXES))})")
        folders = [folder, folder / "data"] if (folder / "data").is_dir() else [folder]
        return tuple(child for top in folders for child in _children(top) if named.fullmatch(child.name))


def read_rows(paths: Iterable[Path], bad: BadRows) -> Iterator[Row]:
    """Yield the rows of files, in order. bad: takes those that cannot be used.

    All rows of a file have one format: that of its first usable row. Raises GemkitError for a file that is broken as a
    whole, and for one without rows.
    """
    for path in paths:
        first, empty = None, True
        for where, fields in _records(path):
            empty = False
            try:
                if isinstance(fields, RowError):
                    raise fields
                format = format_of(fields, where)
                if first not in (None, format):
                    raise RowError(where, "the row has another format than the first", f"{format}, not {first}")
                row = parse_row(fields, format, where)
            except RowError as error:
                bad.handle(error)
                continue
            first = format
            yield row
        if empty:
            raise GemkitError(f"{path} has no rows: give a file with at least one")


def _children(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if not child.name.startswith("."))


def _records(path: Path) -> Iterator[Record]:
    suffix = path.suffix.lower()
    if path.is_dir():
        return _saved(path)
    if suffix == ".parquet":
        return _parquet(path)
    if suffix not in _SUFFIXES:
        raise GemkitError(f"{path} has a format that gemkit does not know: give {', '.join(_SUFFIXES)} or a folder")
    return _text_records(path, suffix)


def _text_records(path: Path, suffix: str) -> Iterator[Record]:
    try:
        with open(path, "rb") as file:
            head = file.read(4)
        encoding = next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8-sig")
        with open(path, encoding=encoding, errors="surrogateescape", newline="") as file:
            if suffix in (".csv", ".tsv"):
                yield from _csv(path, file, "\t" if suffix == ".tsv" else ",")
            elif suffix == ".json" and _first_character(file) == "[":
                yield from _array(path, file.read())
            else:
                yield from _lines(path, file)
    except UnicodeDecodeError as error:
        raise GemkitError(f"{path} is no {error.encoding.upper()}: save it as UTF-8") from None
    except OSError as error:
        raise GemkitError(f"cannot read {path}: {error.strerror or error}") from None


def _first_character(file: io.TextIOBase) -> str:
    character = " "
    while character.isspace():
        character = file.read(1)
    file.seek(0)
    return character


def _lines(path: Path, file: Iterable[str]) -> Iterator[Record]:
    for number, line in enumerate(file, 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield where, _invalid(line, where) or json.loads(line)
            except (ValueError, RecursionError) as error:
                yield where, RowError(where, "the row is no JSON", _json_fault(error))


def _array(path: Path, text: str) -> Iterator[Record]:
    """Yield the elements of a JSON array, each with the line where it begins."""
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    at, line, closed = text.index("[") + 1, 1 + text[: text.index("[")].count("\n"), False
    expected = False  # an element, after a comma
    while True:
        start, at = at, space.match(text, at).end()
        line += text.count("\n", start, at)
        if text.startswith("]", at) and not expected:
            closed = not text[at + 1 :].strip()
            break
        where = f"{path}:{line}"
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise GemkitError(f"{where}: the file is no JSON: {_json_fault(error)}; correct it") from None
        yield where, _invalid(text[at:end], where) or value
        line += text.count("\n", at, end)
        start, at = end, space.match(text, end).end()
        line += text.count("\n", start, at)
        expected = text.startswith(",", at)
        if expected:
            at += 1
        elif not text.startswith("]", at):
            break
    if not closed:
        raise GemkitError(f"{path}:{line}: the file is no JSON: the array is not closed here; correct it")


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _invalid(text: str, where: str) -> RowError | None:
    found = _ESCAPED.search(text)
    return RowError(where, "invalid UTF-8", f"byte 0x{ord(found[0]) - 0xDC00:02X}") if found else None


def _csv(path: Path, file: Iterable[str], delimiter: str) -> Iterator[Record]:
    limit = csv.field_size_limit(_CSV_FIELD)
    try:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header = [name.strip() for name in next(reader, [])]
        while True:
            where = f"{path}:{reader.line_num + 1}"
            values = next(reader, None)
            if values is None:
                return
            if not values:
                continue
            wrong = _invalid("\n".join(values), where)
            if len(values) != len(header):
                wrong = RowError(where, "the row and the header differ in length", f"{len(values)}, not {len(header)}")
            yield where, wrong or dict(zip(header, values))
    except csv.Error as error:
        raise GemkitError(f"{where}: the file is no CSV: {error}; correct it") from None
    finally:
        csv.field_size_limit(limit)


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        from gemkit.extras import install

        raise GemkitError(f"reading {path} needs the library pyarrow: {install('data')}") from None
    return pyarrow


def _parquet(path: Path) -> Iterator[Record]:
    arrow = _pyarrow(path)
    try:
        with arrow.parquet.ParquetFile(path) as file:
            columns = [name for name in COLUMNS if name in file.schema_arrow.names]
            yield from _numbered(path, 0, file.iter_batches(1024, columns=columns or None))
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _broken(path, error) from None


def _saved(folder: Path) -> Iterator[Record]:
    """Yield the rows of a folder that the ``save_to_disk`` of Hugging Face's library wrote: Arrow streams, in order."""
    arrow = _pyarrow(folder)
    try:
        state = json.loads((folder / "state.json").read_bytes())
        names = [file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise GemkitError(f"{folder / 'state.json'} names no data files: save the data set again") from None
    done = 0
    for name in names:
        path = folder / Path(str(name)).name
        try:
            with arrow.OSFile(str(path)) as file, arrow.ipc.open_stream(file) as batches:
                for where, fields in _numbered(folder, done, batches):
                    done += 1
                    yield where, fields
        except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _broken(path, error) from None


def _numbered(path: Path, done: int, batches: Iterable[Any]) -> Iterator[Record]:
    """Yield the rows of record batches. Raises ArrowException for one that is damaged: reading it could crash."""
    for batch in batches:
        try:
            batch.validate(full=True)
            rows = iter(batch.to_pylist())
        except ValueError:  # damaged, or text that is not UTF-8, which concerns single rows
            rows = None
        for at in range(batch.num_rows):
            done += 1
            where = f"{path}, row {done}"
            try:
                if rows is None:
                    batch.slice(at, 1).validate(full=True)
                yield where, next(rows) if rows is not None else batch.slice(at, 1).to_pylist()[0]
            except ValueError as error:
                if "UTF8" not in str(error):
                    raise
                yield where, RowError(where, "invalid UTF-8")


def _broken(path: Path, error: Exception) -> GemkitError:
    reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    return GemkitError(f"cannot read {path}: {reason}; get the file again")
