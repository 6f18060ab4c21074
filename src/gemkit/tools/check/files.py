"""Rules about the files themselves: whole, harmless, complete, and with the terms that go with a Gemma."""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from gemkit.errors import listed
from gemkit.tools.check.finding import ERROR, NOTE, WARNING, Hit, rule
from gemkit.tools.check.folder import is_adapter
from gemkit.tools.check.keras import FILES, SHARDS, SINGLE
from gemkit.tools.check.subject import GGUF, GOOGLE, HF, KERAS, Subject

TERMS = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
_TERMS = re.compile(r"gemma terms of use|ai\.google\.dev/gemma/terms|^license:\s*[\"']?gemma", re.IGNORECASE | re.M)
_TEXTS = re.compile(r"(?i)^(notice|licen[cs]e|readme|terms|use_policy)[^/]*$|^[^/]*\.(md|txt)$")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_UNFINISHED = re.compile(r"\.(incomplete|part|partial|crdownload|aria2|download)$|(^|/)\.[^/]+\.safetensors\.\w+$")
_LEFT_OVER = re.compile(
    r"(^|/)(trainer_state\.json|all_results\.json|train_results\.json|zero_to_fp32\.py|events\.out\.tfevents[^/]*"
    r"|wandb/.*|(checkpoint-|global_step)\d+/.*)$"
)
_MAX_PICKLE = 64 << 20
# Globals that weights and their metadata need; torch's own loader allows about the same.
_HARMLESS = re.compile(
    r"torch(\._utils _rebuild_\w+|\._tensor _rebuild\w*|\.\w*Storage| \w*Storage| Size| device| dtype"
    r"| (b?float\d*|double|half|u?int\d+|long|bool)|\.serialization _get_layout|\.nn\.parameter Parameter)"
    r"|collections (OrderedDict|defaultdict)|_codecs encode|numpy(\.core|\._core)?(\.multiarray)? \w+"
    r"|(transformers|accelerate|trl|peft)[\w.]* \w+|builtins (set|dict|list|tuple|int|float|str|bytearray|complex)"
    r"|pathlib \w*Path|datetime \w+"
)


@rule(
    "unreadable",
    ERROR,
    "A file is damaged, or not of the format that its name says.",
    why="nothing can load it; what it held could not be checked",
    remedy="get the file again, and compare its size or checksum with the source's",
    causes=("unloadable",),
)
def unreadable(s: Subject) -> Iterator[Hit]:
    yield from (hit for hit in s.broken if hit[0] not in s.pointers)


@rule(
    "lfs-pointer",
    ERROR,
    "A file is a Git LFS pointer: some lines of text in place of the file.",
    why="git cloned the repository without Git LFS; the file itself was never downloaded",
    remedy="run `git lfs pull` in the folder, or get the model with `gemkit download`",
    causes=("unloadable", "weights-missing", "tensor-missing", "tokenizer-missing"),
)
def lfs_pointer(s: Subject) -> Iterator[Hit]:
    for name in s.pointers:
        yield name, "a pointer"


@rule(
    "truncated",
    ERROR,
    "A file ends before its last tensor.",
    why="the download or copy broke off; the missing weights are gone",
    remedy="download the file again (`gemkit download` goes on where it stopped)",
    causes=("unloadable",),
)
def truncated(s: Subject) -> Iterator[Hit]:
    for name in dict.fromkeys(where for where, _ in s.truncated):
        yield name, listed((found for where, found in s.truncated if where == name), 2)


@rule(
    "shard-missing",
    ERROR,
    "The index names a file, or a tensor in a file, that is missing.",
    why="loaders stop, or fill the hole with random numbers",
    remedy="download all shards together with their index",
    causes=("unloadable",),
)
def shard_missing(s: Subject) -> Iterator[Hit]:
    yield from s.absent_shards


@rule(
    "unlisted",
    WARNING,
    "The index and the files of weights do not agree on what there is.",
    why="something is left over from another save, and programs differ in what they read: one file, or all of them",
    remedy="delete what does not belong, or write the index again (save_pretrained into an empty folder)",
    causes=("tensor-extra",),
)
def unlisted(s: Subject) -> Iterator[Hit]:
    yield from s.unlisted


@rule(
    "unfinished",
    WARNING,
    "A download or a copy was not finished.",
    why="what it should become is missing, or an older file takes its place",
    remedy="download again (`gemkit download` goes on where it stopped), or delete it",
)
def unfinished(s: Subject) -> Iterator[Hit]:
    for name in s.files:
        if _UNFINISHED.search(name):
            yield name, "the name of an unfinished file"


@rule(
    "leftovers",
    NOTE,
    "A training run's own files are in the folder.",
    why="users of the model do not need them; they may be larger than the weights, and tell of the training data",
    remedy="delete them from what you publish",
)
def leftovers(s: Subject) -> Iterator[Hit]:
    names = [name for name in s.files if _LEFT_OVER.search(name) and not name.endswith(_PICKLES)]
    if names:
        yield s.path.name, f"{len(names)} files: {listed(names)}"


@rule(
    "weights-missing",
    ERROR,
    "A folder has a configuration and no weights.",
    why="there is nothing to run",
    remedy="get the weights in safetensors (a pickle does not count), or give the folder that has them",
    causes=("unloadable",),
)
def weights_missing(s: Subject) -> Iterator[Hit]:
    if s.kind == HF and not any(n.endswith(".safetensors") and not is_adapter(n) and "/" not in n for n in s.files):
        yield s.path.name, "no .safetensors file of a model"
    if s.kind == KERAS and SINGLE not in s.files and SHARDS not in s.files:
        yield s.path.name, f"neither {SINGLE} nor {SHARDS}"


@rule(
    "keras-files",
    WARNING,
    "A KerasHub preset lacks one of the files that from_preset reads.",
    why="from_preset fails, or makes a bare backbone without tokenizer and generation",
    remedy="save the whole task again: gemma_lm.save_to_preset(folder)",
)
def keras_files(s: Subject) -> Iterator[Hit]:
    if s.kind == KERAS:
        for name in FILES:
            if name not in s.files:
                yield name, "it is missing"


@rule(
    "pickle",
    WARNING,
    "Weights or settings are stored as a pickle (.bin, .pt, .pth, .ckpt, .pkl).",
    why="opening a pickle runs the program in it",
    remedy="save the weights as safetensors and delete the pickle",
)
def pickle(s: Subject) -> Iterator[Hit]:
    # Google's own .ckpt files are such, and gemkit reads them without running them
    for name in s.files if s.kind != GOOGLE else ():
        if name.endswith(_PICKLES):
            yield name, "a pickle"


@rule(
    "pickle-code",
    ERROR,
    "A pickle calls something that has no business in a file of weights.",
    why="opening it runs that call on the reader's machine: this is how malware is spread in models",
    remedy="do not open it; delete it and tell its publisher",
    causes=("pickle",),
)
def pickle_code(s: Subject) -> Iterator[Hit]:
    for name in s.files:
        if name.endswith(_PICKLES):
            calls = [call for call in _calls(s.folder / name) if not _HARMLESS.fullmatch(call)]
            if calls:
                yield name, f"it imports {listed(calls)}"


def _calls(path: Path) -> list[str]:
    """Return the names "module attribute" imported by a pickle or those in a torch archive; none for other files."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                inside = [i for i in archive.infolist() if i.filename.endswith(".pkl") and i.file_size <= _MAX_PICKLE]
                data = [archive.open(info).read(_MAX_PICKLE) for info in inside[:100]]
        else:
            with open(path, "rb") as file:
                data = [file.read(_MAX_PICKLE)]
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError, ValueError, EOFError):
        return []
    return [call for part in data for call in _imports(part)]


def _imports(data: bytes) -> list[str]:
    """Return the imported names: GLOBAL has both; STACK_GLOBAL pops two strings, which may come from the memo."""
    found: dict[str, None] = {}
    memo: dict[int, object] = {}
    pushed: list[object] = []
    try:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
            if opcode.name in ("GLOBAL", "INST"):
                found[str(argument)] = None
            elif opcode.name == "STACK_GLOBAL":
                found[" ".join(map(str, pushed[-2:]))] = None
            if opcode.name == "MEMOIZE":
                memo[len(memo)] = pushed[-1] if pushed else None
            elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[int(argument)] = pushed[-1] if pushed else None
            elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
                pushed.append(memo.get(int(argument)))
            elif opcode.stack_after:
                pushed.append(argument if isinstance(argument, str) else None)
            del pushed[:-4]
    except Exception:  # pickletools raises any exception for broken bytes; the names before them are known
        pass
    return list(found)


@rule(
    "terms",
    WARNING,
    "A folder of weights says nowhere that they are a Gemma's, under the Gemma Terms of Use.",
    why="the terms ask everyone who passes weights on to pass on a copy of them and this notice",
    remedy=f'add a file NOTICE with the sentence "{TERMS}", and a copy of the terms',
)
def terms(s: Subject) -> Iterator[Hit]:
    cached = any(part.startswith("models--") or part == "kagglehub" for part in s.path.absolute().parts)
    if s.folder is None or s.kind == GGUF or cached:
        return  # a hub's cache is not published
    for name in filter(_TEXTS.match, s.files):
        try:
            with open(s.folder / name, encoding="utf-8", errors="replace") as file:
                if _TERMS.search(file.read(1 << 20)):
                    return
        except OSError:
            continue
    yield s.path.name, "no NOTICE, LICENSE or README that names the terms"


@rule(
    "terms-unsaid",
    NOTE,
    "A GGUF file does not say under which licence it is.",
    why="the file travels alone, and its readers cannot tell that the Gemma Terms of Use apply",
    remedy='set general.license to "gemma" when converting',
)
def terms_unsaid(s: Subject) -> Iterator[Hit]:
    if s.kind == GGUF and s.raw and not s.raw.get("general.license"):
        yield f"{s.config_file}: general.license", "it is missing"


@rule(
    "adapter-beside",
    WARNING,
    "A LoRA adapter is in the folder of a whole model.",
    why="if the weights are merged already, loaders that find the adapter add it a second time",
    remedy="delete adapter_config.json and adapter_model.* from the merged model, or give the adapter its own folder",
)
def adapter_beside(s: Subject) -> Iterator[Hit]:
    adapters = [name for name in s.files if is_adapter(name) and "/" not in name]
    if adapters and s.tensors:
        yield listed(adapters), "next to the weights of a model"
