"""Options of generation and of loading, with the one set of defaults; importing this file imports no NumPy."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, TypedDict, TypeVar

from gemkit.errors import UsageError, brief, check_flag, whole_number

if TYPE_CHECKING:
    from gemkit.engine.sampling import Sampling

Adapters = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]]

# Most tokens of an answer by default. An instruction-tuned model nearly always ends before
# it; a pretrained one may never end.
MAX_TOKENS = 1024
# By backend, the types that `dtype` may name.
DTYPES = {
    "native": ("auto", "bfloat16", "float32", "int8"),
    "torch": ("auto", "bfloat16", "float32", "float16", "int8", "int4"),
    "jax": ("auto", "bfloat16", "float32", "float16", "int8", "int4"),
    "keras": ("auto", "bfloat16", "float32", "float16"),
}
BACKENDS = tuple(DTYPES)
ACTIVATIONS = ("int8", "float32")


class UnknownOptionError(UsageError, TypeError):
    """A keyword that is not the name of an option."""


@dataclass(frozen=True)
class GenerateOptions:
    """Options of `Model.generate`, `Model.stream` and `Model.chat`, checked on construction (UsageError).

    The sampling defaults are those that Google publishes for Gemma.

    max_tokens: the most tokens of an answer; None goes up to the end of the context, which ends it in any case.
    temperature: 0 takes the most probable token; otherwise the logits are divided by it before a token is drawn.
    top_k: draw from the k most probable tokens; 0 is off.
    top_p: draw from the fewest tokens, most probable first, that make up this share of the probability; 1 is off.
    min_p: leave out tokens with less than this share of the largest probability; 0 is off.
    repetition_penalty: the logits of all tokens so far, prompt included, are divided by it if positive, else
        multiplied; 1 is off.
    presence_penalty: taken off the logit of every token generated before; 0 is off.
    frequency_penalty: taken off the logit once for each time the token was generated; 0 is off.
    logit_bias: added to the logits, by token id.
    seed: the same seed gives the same text, alone or in a list; None takes a random one for each prompt.
    stop: a text, or several, before which the answer ends.
    ignore_eos: do not end at the model's stop tokens.
    logprobs: report the log-probability of each token and of this many of the most probable ones, up to 20; None
        reports nothing, which is faster.
    adapter: the name of one of the model's adapters; "base" for none. None takes the only one, if it has no name.
    """

    max_tokens: int | None = MAX_TOKENS
    temperature: float = 1.0
    top_k: int = 64
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Iterable[str] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        from gemkit.engine.engine import check_max_tokens, check_stop

        self.sampling()
        if self.max_tokens is not None:
            object.__setattr__(self, "max_tokens", check_max_tokens(self.max_tokens))
        object.__setattr__(self, "stop", check_stop(self.stop))
        object.__setattr__(self, "ignore_eos", check_flag("ignore_eos", self.ignore_eos))
        if self.adapter is not None and not isinstance(self.adapter, str):
            raise UsageError(f"adapter is {brief(self.adapter)}; give the name of one, a text")

    def sampling(self) -> Sampling:
        """Return the settings of one request, with a random seed where none is given."""
        from gemkit.engine.sampling import Sampling

        settings = {field.name: getattr(self, field.name) for field in fields(Sampling)}
        unset = {"logit_bias": (), "seed": int.from_bytes(os.urandom(8), "little")}
        return Sampling(**{name: unset.get(name) if value is None else value for name, value in settings.items()})


@dataclass(frozen=True)
class LoadOptions:
    """Options of `gemkit.load`, checked on construction (UsageError).

    threads: by default the physical cores that this process may use.
    activations: "int8" is fast, "float32" is close to the reference.
    ctx_size: the most tokens, prompt and answer together, by default those that the model was trained for; memory is
        taken as it is needed.
    dtype: "auto" takes the weights as they are stored; "bfloat16", "float32" and "int8" convert them. With the other
        backends, "auto" is bfloat16 on accelerators that have it and else float32, "float16" is for Gemma 1, and "int8"
        and "int4" are of the matrices alone; for Keras, "auto" is its own dtype policy.
    adapter: a PEFT folder that is used for all requests, or several by name, chosen with each request. Adapters are
        not merged.
    offline: never ask a hub.
    backend: "native", gemkit's own engine on the CPU; "torch", "jax" or "keras", from the extras of these names. Keras
        runs on the framework that KERAS_BACKEND names, or else on one that is installed.
    device: of the backends torch and jax: "cpu", "cuda", …; by default an accelerator where there is one.
    """

    threads: int | None = None
    activations: str = "int8"
    ctx_size: int | None = None
    dtype: str = "auto"
    adapter: Adapters | None = None
    offline: bool = False
    backend: str = "native"
    device: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "offline", check_flag("offline", self.offline))
        count = None if self.threads is None else whole_number(self.threads)
        if self.threads is not None and (count is None or not 1 <= count <= 1024):
            raise UsageError(f"threads is {brief(self.threads)}; give a whole number from 1 to 1024")
        object.__setattr__(self, "threads", count)
        size = None if self.ctx_size is None else whole_number(self.ctx_size)
        if self.ctx_size is not None and (size is None or size < 2):
            raise UsageError(f"ctx_size is {brief(self.ctx_size)}; give a whole number of tokens, from 2")
        object.__setattr__(self, "ctx_size", size)
        if self.activations not in ACTIVATIONS:
            raise UsageError(f"activations is {brief(self.activations)}; choose int8 or float32")
        if not isinstance(self.backend, str) or self.backend not in DTYPES:
            raise UsageError(f"backend is {brief(self.backend)}; choose from {', '.join(BACKENDS)}")
        if self.dtype not in DTYPES[self.backend]:
            known = ", ".join(DTYPES[self.backend])
            raise UsageError(f"dtype is {brief(self.dtype)}; with the backend {self.backend} choose from {known}")
        if self.device is not None and not isinstance(self.device, str):
            raise UsageError(f"device is {brief(self.device)}; give a name, such as cpu or cuda")
        if self.backend == "native" and self.device not in (None, "cpu"):
            raise UsageError(
                f"device is {brief(self.device)}; the native backend runs on the CPU: choose backend torch or jax"
            )
        if self.backend != "native" and self.activations != "int8":
            raise UsageError("float32 activations are for the native backend: leave them or the backend out")
        if self.backend != "native" and isinstance(self.adapter, Mapping):
            raise UsageError("adapters by name are for the native backend: give one adapter's folder, or no backend")


class GenerateKeywords(TypedDict, total=False):
    """Fields of `GenerateOptions` as keywords, for type checkers."""

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Iterable[str]
    ignore_eos: bool
    logprobs: int | None
    adapter: str | None


class LoadKeywords(TypedDict, total=False):
    """Fields of `LoadOptions` as keywords, for type checkers."""

    threads: int | None
    activations: str
    ctx_size: int | None
    dtype: str
    adapter: Adapters | None
    offline: bool
    backend: str
    device: str | None


Options = TypeVar("Options", GenerateOptions, LoadOptions)


def merged(kind: type[Options], options: Options | None, keywords: Mapping[str, object]) -> Options:
    """Return options of a kind, the defaults without any, with keywords in place of their fields.

    Raises UnknownOptionError for a keyword that is no field, UsageError for a bad value.
    """
    if options is not None and not isinstance(options, kind):
        raise UsageError(f"options is {brief(options)}; give gemkit.{kind.__name__}(…), or keywords")
    names = [field.name for field in fields(kind)]
    for name in keywords:
        if name not in names:
            raise UnknownOptionError(f"there is no option {brief(name)}: choose from {', '.join(names)}")
    return kind(**keywords) if options is None else replace(options, **keywords)
