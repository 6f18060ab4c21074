"""Models written under a temporary name, read back, then renamed: `staged_model`, `check_readable`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from gemkit.cache import staged
from gemkit.errors import GemkitError
from gemkit.weights.checkpoint import Checkpoint

Check = Callable[[Path], None]


@contextlib.contextmanager
def staged_model(target: Path) -> Iterator[Path]:
    """Give a temporary path as `gemkit.cache.staged` does; raises GemkitError where the system refuses to write."""
    try:
        with staged(target) as temporary:
            yield temporary
    except OSError as error:
        raise GemkitError(
            f"{target} cannot be written ({error.strerror or error}): check folder and space; nothing is left of it"
        ) from None


def check_readable(
    temporary: Path, target: Path, read: Callable[[Path], Checkpoint], checkpoint: Checkpoint, check: Check | None
) -> None:
    """Open what was written, compare configuration and chat turns with `checkpoint`'s, and make its tokenizer.

    check: called last, with the path; what it raises is passed on.
    Raises GemkitError that names `target` if that cannot be read or is another model.
    """
    try:
        with read(temporary) as back:
            if wrong := _differences(checkpoint, back):
                raise GemkitError(f"{', '.join(wrong)} would be lost")
            if checkpoint.vocabulary is not None:
                from gemkit.text.spm_proto import write_model
                from gemkit.text.tokenizer import Tokenizer

                if back.vocabulary is None:
                    raise GemkitError("the tokenizer would be lost")
                Tokenizer(write_model(back.vocabulary))
    except GemkitError as error:
        cause = str(error).replace(str(temporary), "the result")
        raise GemkitError(f"{target} is not kept, since it could not be used: {cause}") from None
    if check is not None:
        check(temporary)


def _differences(one: Checkpoint, other: Checkpoint) -> list[str]:
    """Return the names of the fields of a model that another lacks."""
    fields = [field.name for field in dataclasses.fields(one.config) if field.name != "stop_token_ids"]
    wrong = [name for name in fields if getattr(one.config, name) != getattr(other.config, name)]
    if not set(one.config.stop_token_ids) <= set(other.config.stop_token_ids):
        wrong.append("stop_token_ids")
    if one.instruction_tuned is not None and one.instruction_tuned != other.instruction_tuned:
        wrong.append("instruction_tuned")
    if (one.chat_template or other.chat_template) != other.chat_template:
        wrong.append("chat_template")
    return wrong
