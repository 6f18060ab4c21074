"""A GGUF model in one file, or in the numbered parts that llama.cpp splits large ones into: `open_parts`.

The parts are ``NAME-00001-of-00003.gguf`` and so on. The first one holds the key-values, each holds some tensors.
"""

from __future__ import annotations

import os

from gemkit.errors import GemkitError, listed
from gemkit.weights.folder import MOST_PARTS, part_paths
from gemkit.weights.gguf.container import GGUFFile, GGUFTensor, shown


class GGUFParts:
    """The open files of one model. path, metadata: of the first file. tensors: of all, by name."""

    def __init__(self, files: list[GGUFFile]) -> None:
        self.first, self._files = files[0], files
        self.path, self.metadata = self.first.path, self.first.metadata
        self.tensors: dict[str, GGUFTensor] = {}
        for file in files:
            if twice := [shown(name) for name in file.tensors if name in self.tensors]:
                raise GemkitError(f"{file.path}: an earlier part has {listed(twice)} too; get the parts again")
            self.tensors |= file.tensors

    def close(self) -> None:
        """Close all files; see `GGUFFile.close`."""
        self.tensors = {}
        for file in self._files:
            file.close()


def open_parts(path: str | os.PathLike[str]) -> GGUFParts:
    """Open the model of which `path` is the file or any part.

    Raises GemkitError if a part is missing, is of another model or has lost the name that says which part it is.
    """
    files: list[GGUFFile] = []
    try:
        files.append(GGUFFile.open(path, part=True))
        count = files[0].metadata.get("split.count", 1)
        if type(count) is not int or not 0 <= count <= MOST_PARTS:
            raise GemkitError(f"{files[0].path}: split.count is {shown(count)}, not a number of parts; get it again")
        if count > 1:
            _open_others(files, count)
        return GGUFParts(files)
    except BaseException:
        for file in files:
            file.close()
        raise


def _open_others(files: list[GGUFFile], count: int) -> None:
    """Replace the opened part of a split model by all of its parts."""
    given = files[0]
    paths = part_paths(given.path)
    if len(paths) != count or given.path != paths[_number(given, count)]:
        raise GemkitError(
            f"{given.path} is part {_number(given, count) + 1} of {count} of a split model, which its name must say: "
            f"name the parts as they were published, …-00001-of-{count:05}.gguf"
        )
    if missing := [other.name for other in paths if not other.exists()]:
        raise GemkitError(f"{given.path} is one of {count} parts, of which {listed(missing)} are missing: get them too")
    files.clear()
    for other in paths:
        files.append(given if other == given.path else GGUFFile.open(other, part=True))
    for number, file in enumerate(files):
        if (file.metadata.get("split.count"), _number(file, count)) != (count, number):
            raise GemkitError(f"{file.path} is not part {number + 1} of {count} of this model: get the parts again")
    total, held = files[0].metadata.get("split.tensors.count"), sum(len(file.tensors) for file in files)
    if total not in (None, held):
        raise GemkitError(f"{files[0].path}: its parts hold {held} tensors of {shown(total)}; get the parts again")


def _number(file: GGUFFile, count: int) -> int:
    """Return the part's number from 0."""
    number = file.metadata.get("split.no")
    if type(number) is not int or not 0 <= number < count:
        raise GemkitError(f"{file.path}: split.no is {shown(number)}, not the number of a part; get it again")
    return number
