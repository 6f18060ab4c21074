"""Prompts: a text, a conversation or token ids, alone or several in a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from gemkit.errors import UsageError, brief

if TYPE_CHECKING:
    from numpy.typing import NDArray

Ids: TypeAlias = "Sequence[int] | NDArray[np.integer[Any]]"
Message: TypeAlias = "Mapping[str, object]"
Prompt: TypeAlias = "str | Sequence[Message] | Ids"


def kind_of(prompt: object) -> str:
    """Say what a prompt is: "text", "messages", "ids" or "batch" (a list of prompts)."""
    if isinstance(prompt, str):
        return "text"
    if isinstance(prompt, np.ndarray) and prompt.ndim and prompt.dtype.kind in "iu":
        return "ids" if prompt.ndim == 1 else "batch"
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise UsageError(
            f"a prompt is {brief(prompt)}: give a text, a list of messages, a list of ids, or a list of these"
        )
    if prompt and all(isinstance(item, Mapping) for item in prompt):
        return "messages"
    if prompt and all(isinstance(item, int | np.integer) for item in prompt):
        return "ids"
    return "batch"
