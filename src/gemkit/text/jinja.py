"""Chat templates in Jinja, run as the untrusted programs that they are: in Jinja's sandbox, bounded in time and size.

The surroundings are those that templates expect of transformers (``utils/chat_template_utils.py``): blocks trimmed,
``break`` and ``continue``, the tag ``generation``, ``raise_exception``, ``strftime_now``, ``tojson`` without escapes.
"""

from __future__ import annotations

import ctypes
import functools
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from gemkit.errors import GemkitError

MAX_SOURCE, MAX_TEXT = 1 << 20, 1 << 25  # characters
MAX_COUNT = 1 << 16  # of a width, an indentation, a repetition
MAX_MEMORY = 2 << 30  # bytes that the process may grow by
SECONDS = 10.0

# In a format, a width of many digits or one that is computed
_PERCENT_WIDTH = re.compile(r"%[^a-zA-Z%]*(\d{5,}|\*)")
_BRACE_WIDTH = re.compile(r"\{[^{}]*:[^{}]*(\d{5,}|\{)")
T = TypeVar("T")


class Template:
    """A compiled chat template.

    texts: the strings of the template itself, its text and its constants. names: the variables that it may read from
    outside. assigned: those that it sets.
    Raises GemkitError for a template that is no Jinja.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise GemkitError(f"it has {len(source):,} characters, far more than a chat template needs")
        self.texts, self.names, self.assigned, self._compiled = _bounded(lambda: _compile(source), SECONDS)

    def render(self, variables: Mapping[str, Any], seconds: float = SECONDS) -> str:
        """Return the text for variables of plain data; raises GemkitError, also when it takes too long or too much."""

        def run() -> str:
            parts, size = [], 0
            for part in self._compiled.generate(variables):
                parts.append(part)
                size += len(part)
                if size > MAX_TEXT:
                    raise GemkitError(f"it writes more than {MAX_TEXT:,} characters")
            return "".join(parts)

        return _bounded(run, seconds)


def _compile(source: str) -> tuple[tuple[str, ...], frozenset[str], frozenset[str], jinja2.Template]:
    environment = _environment()
    tree = environment.parse(source)
    texts = [node.data for node in tree.find_all(nodes.TemplateData)]
    texts += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    names = meta.find_undeclared_variables(tree)
    assigned = frozenset(node.name for node in tree.find_all(nodes.Name) if node.ctx != "load")
    return tuple(texts), frozenset(names), assigned, environment.from_string(tree)


# --- the environment -------------------------------------------------------------------------------------------------


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's text for training; here it is a block like any other."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """``namespace()`` without names that begin with an underscore, which belong to Python."""

    def __init__(*args: Any, **values: Any) -> None:
        self, found = args[0], dict(*args[1:], **values)
        for name in found:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, found)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: object) -> None:
        if not isinstance(name, str) or name.startswith("_"):
            raise SecurityError(f"a namespace has no {name!r}")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Operations that make much of little are checked before they run; loops and recursion end with the time."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        elif operator == "%":
            pass
        elif isinstance(left, int | float) and isinstance(right, int | float):
            bits = [value.bit_length() for value in (left, right) if isinstance(value, int)]
            if operator == "**" and len(bits) == 2 and (bits[1] > 16 or bits[0] * right > MAX_COUNT):
                raise SecurityError("a power is too large")
            if sum(bits) > MAX_COUNT:
                raise SecurityError("a product is too large")
        else:
            for value, count in ((left, right), (right, left)):
                if hasattr(value, "__len__") and isinstance(count, int) and len(value) * count > MAX_TEXT:
                    raise SecurityError("a repetition is too long")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes | int):
            _check_text(getattr(__obj, "__name__", ""), owner if isinstance(owner, str) else "", args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            if _BRACE_WIDTH.search(value.__self__.replace("{{", "").replace("}}", "")):
                raise SecurityError("a format has too large a width")
            return wrapped(*args, **kwargs)

        return checked


def _check_text(name: str, text: str, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Raise SecurityError if a method or filter of text could make far more text."""
    values = (*args, *kwargs.values())
    if any(isinstance(value, int) and abs(value) > MAX_COUNT for value in values):
        raise SecurityError(f"{name} is called with a number that is too large")
    if name == "translate":
        raise SecurityError("translate is not available")
    strings = [value for value in values if isinstance(value, str)]
    if name == "replace" and len(strings) > 1 and (len(text) + 1) * len(strings[1]) > MAX_TEXT:
        found = len(text) + 1 if not strings[0] else text.count(strings[0])
        if found * len(strings[1]) > MAX_TEXT:
            raise SecurityError("replace makes too long a text")
    if name == "expandtabs" and (text.count("\t") + 1) * MAX_COUNT > MAX_TEXT:
        raise SecurityError("expandtabs makes too long a text")
    if name in ("join", "indent"):
        items = args[0] if args and isinstance(args[0], list | tuple) else ()
        separators = max([len(text), *map(len, strings)])
        if separators * (len(items) + text.count("\n")) > MAX_TEXT:
            raise SecurityError(f"{name} makes too long a text")


def _check_format(text: str) -> None:
    if _PERCENT_WIDTH.search(text):
        raise SecurityError("a format has too large a width")


def _bounded_filter(name: str, function: Callable) -> Callable:
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def filter(*args: Any, **kwargs: Any) -> Any:
        given = args[skipped:]
        text = given[0] if given and isinstance(given[0], str) else ""
        if name == "format":
            _check_format(text)
        if name == "sum" and given and isinstance(kwargs.get("start", (given[2:] or (0,))[0]), list | tuple | str):
            raise SecurityError("sum adds numbers only")
        if name == "join" and given:
            rest = (given[0], *given[1:]) if isinstance(given[0], list | tuple) else given[1:]
            _check_text(name, "", rest, kwargs)
        else:
            _check_text(name, text, given[1:], kwargs)
        return function(*args, **kwargs)

    return filter


@functools.cache
def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, loopcontrols], cache_size=0
    )
    filters = environment.filters
    for name in ("urlize", "xmlattr", "pprint", "random", "wordwrap"):
        filters.pop(name, None)
    environment.filters = {name: _bounded_filter(name, function) for name, function in filters.items()}
    environment.filters["tojson"] = _to_json
    environment.globals.pop("lipsum", None)
    environment.globals.update(raise_exception=_raise, strftime_now=_now, namespace=_Namespace)
    return environment


class _Raised(jinja2.TemplateError):
    """``raise_exception`` of a template."""


def _raise(message: object) -> None:
    raise _Raised(str(message))


def _now(format: str) -> str:
    _check_format(format)
    return datetime.now().strftime(format)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    if (isinstance(indent, int) and indent > 64) or (isinstance(indent, str) and len(indent) > 64):
        raise SecurityError("tojson has too large an indentation")
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    # The marks of `gemkit.text.marks` stand for characters that need no escape
    return re.sub(r"\\u[ef][0-9a-f]{3}", lambda found: _mark(found[0]), text) if ensure_ascii else text


def _mark(escape: str) -> str:
    character = chr(int(escape[2:], 16))
    return character if "\ue000" <= character <= "\uf8ff" else escape


# --- bounds ----------------------------------------------------------------------------------------------------------


class _Stopped(BaseException):
    """Raised in the thread of a template that runs too long; no ``except Exception`` catches it."""


def _bounded(run: Callable[[], T], seconds: float) -> T:
    """Return run(); raises GemkitError in one line if it fails, or takes more time or memory than it may."""
    guard = _Guard(seconds)
    try:
        with guard:
            return run()
    except _Stopped:
        raise GemkitError(guard.why) from None
    except GemkitError:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise GemkitError(f"line {error.lineno}: {_line(error.message)}") from None
    except _Raised as error:
        raise GemkitError(f"it says {_line(error.message)!r}") from None
    except RecursionError:
        raise GemkitError("it is nested too deeply") from None
    except MemoryError:
        raise GemkitError("it takes too much memory") from None
    except Exception as error:  # a template may fail in any way
        raise GemkitError(f"{type(error).__name__}: {_line(error)}") from None


class _Guard:
    """A thread that stops the thread which made it, unless that leaves in time."""

    def __init__(self, seconds: float) -> None:
        self.why = ""
        self._seconds, self._target = seconds, threading.get_ident()
        self._done, self._lock = threading.Event(), threading.Lock()
        self._fired = False

    def __enter__(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._done.set()
            if self._fired:  # raised already, or not to be raised any more
                _set_exception(self._target, None)

    def _watch(self) -> None:
        end, most = time.monotonic() + self._seconds, _memory() + MAX_MEMORY
        while not self._done.wait(0.02):
            if time.monotonic() > end:
                self.why = f"it takes more than {self._seconds:g} seconds"
            elif _memory() > most:
                self.why = f"it takes more than {MAX_MEMORY >> 30} GiB of memory"
            if self.why:
                with self._lock:
                    if not self._done.is_set():
                        self._fired = True
                        _set_exception(self._target, _Stopped)
                return


def _set_exception(thread: int, kind: type[BaseException] | None) -> None:
    exception = ctypes.py_object(kind) if kind is not None else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), exception)


def _memory() -> int:
    """Return bytes that the process holds; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * 4096
    except (OSError, ValueError, IndexError):
        return 0


def _line(error: object) -> str:
    text = " ".join(str(error).split())
    text = "".join(character if character.isprintable() else "�" for character in text)
    return text if len(text) <= 200 else f"{text[:200]} …"
