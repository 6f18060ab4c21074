"""The public API: load a model, then generate, stream, chat, score and embed.

    m = gemkit.load("demo", threads=2)
    print(m.generate("The capital of France is", max_tokens=16, temperature=0))

A prompt is one of three things. A string is continued as it is, after one BOS. A list of messages, dictionaries with
the keys "role" and "content", is a conversation and goes through the chat template. A list of ids is taken as given.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack, overload

import numpy as np

from gemkit.api.chat import Chat
from gemkit.api.options import GenerateKeywords, GenerateOptions, merged
from gemkit.api.output import Completion, Score
from gemkit.api.prompt import Ids, Prompt, kind_of
from gemkit.api.stream import Stream
from gemkit.engine.engine import Engine
from gemkit.engine.request import Request
from gemkit.errors import GemkitError, GemkitWarning, UsageError, brief, check_flag, listed
from gemkit.text import fim
from gemkit.text.chat_template import ChatTemplate
from gemkit.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gemkit.arch.config import ModelConfig
    from gemkit.engine.interface import Runner
    from gemkit.weights.checkpoint import Checkpoint


Vector: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float32]]
Matrix: TypeAlias = np.ndarray[tuple[int, int], np.dtype[np.float32]]

# Names of adapters: none at all, and the one that was loaded without a name.
BASE, ONLY = "base", ""


class NotCopiedError(GemkitError, TypeError):
    """A model is asked to be copied or sent to another process."""


class Model:
    """A loaded model; `load` makes one. It may be used from several threads, and as a context manager.

    config: the model's configuration, with Hugging Face's names.
    tokenizer: its tokenizer.
    checkpoint: its files; None once the model is closed.
    threads: the number of threads it runs on.
    ctx_size: the most tokens, prompt and answer together.
    adapters: the numbers of its low-rank adapters by name; an only one, loaded without a name, serves all requests
        that do not ask for another.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        runner: Runner,
        tokenizer: Tokenizer,
        threads: int = 1,
        ctx_size: int | None = None,
        adapters: Iterable[str] = (),
    ) -> None:
        self.checkpoint = checkpoint
        self.adapters = {name: number for number, name in enumerate(adapters)}
        self.tokenizer = tokenizer
        self.threads = threads
        self.config: ModelConfig = runner.config
        self._engine: Engine | None = Engine(runner, tokenizer, context_size=ctx_size)
        self.ctx_size = self._engine.context_size
        self._template = tokenizer.template = ChatTemplate.of(checkpoint, tokenizer)

    @property
    def engine(self) -> Engine:
        """The underlying engine, for requests that this class has no method for."""
        if self._engine is None:
            raise GemkitError("the model is closed: load it again")
        return self._engine

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer: those that the model's files name and those of its vocabulary."""
        return self.engine.stop_ids

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of `render`: the file's own, or the one that was set; None for Google's turns."""
        return self._template.source

    @chat_template.setter
    def chat_template(self, source: str | None) -> None:
        if not isinstance(source, str | None):
            raise UsageError(f"chat_template is {brief(source)}; give a template in Jinja, or None for Google's turns")
        self._template = self.tokenizer.template = self._template.replaced(source)

    @property
    def has_own_template(self) -> bool:
        """True if the template renders other turns than Google's; the first call runs an unknown one on samples."""
        return self._template.is_own

    def settle(self) -> None:
        """Wait for work in the background: the packed copy for later loads, the move of weights to huge pages."""
        if self._engine is not None:
            self._engine.runner.settle()

    def close(self) -> None:
        """Free the weights and the cache; the model cannot be used any more."""
        try:
            if self._engine is not None:
                self._engine.runner.close()
        finally:
            self._engine = None
            self.checkpoint = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: int) -> tuple:
        raise NotCopiedError(
            "a model is not copied or pickled: load it in the process that uses it, and share it between threads"
        )

    def __repr__(self) -> str:
        return f"<gemkit model {getattr(self.checkpoint, 'name', 'closed')!r}, context {self.ctx_size}>"

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        options: GenerateOptions | None = None,
        suffix: str | None = None,
        parse_special: bool = False,
        **keywords: Unpack[GenerateKeywords],
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: Sequence[Prompt],
        *,
        options: GenerateOptions | None = None,
        suffix: str | None = None,
        parse_special: bool = False,
        **keywords: Unpack[GenerateKeywords],
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        options: GenerateOptions | None = None,
        suffix: str | None = None,
        parse_special: bool = False,
        **keywords: Unpack[GenerateKeywords],
    ) -> Completion | list[Completion]:
        """Generate the answer to a prompt, or to each of a list of prompts in one batch, and return it or them.

        options: see `GenerateOptions`, whose fields may be given as keywords too; a keyword replaces the field.
        suffix: the text after the gap that is to be filled after the prompt (CodeGemma).
        parse_special: read the names of control tokens in texts as those tokens, for a prompt that another program
            rendered; without it they are plain text, and a GemkitWarning says so.

        Raises UsageError for a bad value or a prompt that does not fit in the context.
        """
        options = merged(GenerateOptions, options, keywords)
        single = kind_of(prompt) != "batch"
        requests = self._requests([prompt] if single else prompt, options, suffix, parse_special)
        engine = self.engine
        try:
            for request in requests:
                engine.submit(request)
            while not all(request.finished for request in requests):
                engine.step()
        finally:
            for request in requests:
                engine.cancel(request)
        completions = [Completion._of(request) for request in requests]
        return completions[0] if single else completions

    def stream(
        self,
        prompt: Prompt,
        *,
        options: GenerateOptions | None = None,
        suffix: str | None = None,
        parse_special: bool = False,
        **keywords: Unpack[GenerateKeywords],
    ) -> Stream:
        """Return the answer to one prompt as an iterator, a piece per token; closing it cancels the rest.

        The arguments are those of `generate`. `Stream.completion` is the whole, with its usage, after the end.
        """
        if kind_of(prompt) == "batch":
            raise UsageError("stream takes one prompt: use generate for a list of them")
        options = merged(GenerateOptions, options, keywords)
        (request,) = self._requests([prompt], options, suffix, parse_special)
        return Stream(self.engine, request)

    def chat(
        self,
        system: str | None = None,
        *,
        context_shift: bool = False,
        options: GenerateOptions | None = None,
        **keywords: Unpack[GenerateKeywords],
    ) -> Chat:
        """Start a conversation.

        system: instructions put before it.
        context_shift: when the context is full, leave out the oldest messages, with a GemkitWarning each time; by
            default that is an error.
        options: as in `generate`, for every answer; its fields may be given as keywords too.
        """
        return Chat(self, system, merged(GenerateOptions, options, keywords), context_shift)

    def check_options(self, options: GenerateOptions) -> None:
        """Raise UsageError if options name an adapter or a token that the model lacks."""
        options.sampling().check_vocabulary(self.config.vocab_size)
        self._adapter(options.adapter)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Return the ids of a conversation by the model's chat template, after exactly one BOS.

        messages: dictionaries with "role" (user, assistant or system) and "content". Control tokens named in them stay
            plain text.
        add_generation_prompt: open the assistant's next turn; where the last message is the assistant's, it is left
            open instead, and generation continues it. Without it, every turn is closed.
        tools: JSON schemas of functions, for a template that lists them.

        Raises GemkitError for messages that the template refuses, and for a template that cannot be run.
        """
        return self._template.render(messages, add_generation_prompt, tools)

    @overload
    def score(self, text: str | Ids, adapter: str | None = None, parse_special: bool = False) -> Score: ...

    @overload
    def score(
        self, text: Sequence[str | Ids], adapter: str | None = None, parse_special: bool = False
    ) -> list[Score]: ...

    def score(
        self, text: str | Ids | Sequence[str | Ids], adapter: str | None = None, parse_special: bool = False
    ) -> Score | list[Score]:
        """Return the log-probabilities of a text, or of each of a list of texts.

        adapter: as in `GenerateOptions`.
        parse_special: as in `generate`.

        Raises UsageError for an empty text and for one longer than the context.
        """
        kind = kind_of(text)
        if kind == "messages":
            raise UsageError("score takes text or ids: render a conversation with Model.render first")
        texts = text if kind == "batch" else [text]
        if not check_flag("parse_special", parse_special):
            self._warn_of_control(texts)
        ids = [self.engine.check_ids(self._ids(one, parse_special)).tolist() for one in texts]
        scores = [Score(row, values) for row, values in zip(ids, self.engine.score(ids, self._adapter(adapter)))]
        return scores if kind == "batch" else scores[0]

    @overload
    def embed(self, texts: str, adapter: str | None = None, parse_special: bool = False) -> Vector: ...

    @overload
    def embed(self, texts: Sequence[str], adapter: str | None = None, parse_special: bool = False) -> Matrix: ...

    def embed(
        self, texts: str | Sequence[str], adapter: str | None = None, parse_special: bool = False
    ) -> Vector | Matrix:
        """Return one unit vector per text: float32 [n, D] for a list, [D] for a string.

        It is the mean of the hidden states after the final norm over the text's tokens, BOS left out since it is the
        same for all, divided by its length. Gemma was not trained for this: similar texts are near, that is all.

        adapter: as in `GenerateOptions`.
        parse_special: as in `generate`.

        Raises UsageError for an empty text and for one longer than the context.
        """
        single = isinstance(texts, str)
        several = isinstance(texts, Sequence | Iterator) or (isinstance(texts, np.ndarray) and texts.ndim == 1)
        if not several or isinstance(texts, bytes | bytearray):
            raise UsageError(f"embed got {brief(texts)}: give a text or a list of texts")
        texts = [texts] if single else list(texts)
        if not check_flag("parse_special", parse_special):
            self._warn_of_control(texts)
        ids = []
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise UsageError(f"text {number} is {brief(text)}: embed takes a string or a list of strings")
            ids.append(self._ids(text, parse_special))
            if len(ids[-1]) < 2:
                raise UsageError(f"text {number} is empty: there is nothing to embed")
        means = self.engine.mean_hidden(ids, [1] * len(ids), self._adapter(adapter))
        vectors = (means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-30)).astype(np.float32)
        return vectors[0] if single else vectors

    def _requests(
        self, prompts: Sequence[Prompt], options: GenerateOptions, suffix: str | None, parse_special: bool
    ) -> list[Request]:
        """Return one checked request per prompt, not queued yet."""
        requests, adapter = [], self._adapter(options.adapter)
        parse_special = check_flag("parse_special", parse_special)
        if not parse_special:
            self._warn_of_control([*prompts, suffix], stacklevel=4)
        for prompt in prompts:
            ids = self._ids(prompt, parse_special) if suffix is None else self._fim(prompt, suffix, parse_special)
            request = self.engine.prepare(
                ids,
                options.sampling(),
                max_tokens=options.max_tokens,
                stop=options.stop,
                ignore_eos=options.ignore_eos,
                adapter=adapter,
            )
            requests.append(request)
        return requests

    def _adapter(self, name: str | None) -> int:
        """Return the engine's number for an adapter's name, -1 for none."""
        if name is not None and not isinstance(name, str):
            raise UsageError(f"adapter is {brief(name)}; give the name of one, a text")
        if name == BASE or (name is None and list(self.adapters) != [ONLY]):
            return -1
        name = ONLY if name is None else name
        if name not in self.adapters:
            known = ", ".join([*self.adapters, BASE])
            raise UsageError(f"there is no adapter {brief(name)}: choose from {known}")
        return self.adapters[name]

    def _fim(self, prefix: object, suffix: object, parse_special: bool) -> list[int]:
        if not isinstance(prefix, str) or not isinstance(suffix, str):
            raise UsageError("filling in the middle takes two texts: the prompt before the gap, the suffix after it")
        return fim.render(self.tokenizer, prefix, suffix, parse_special)

    def _warn_of_control(self, texts: Iterable[object], stacklevel: int = 3) -> None:
        """Warn once of the control tokens whose names are about to be read as plain text."""
        found = [self.tokenizer.find_control(text) for text in texts if isinstance(text, str)]
        if names := list(dict.fromkeys(name for some in found for name in some)):
            warnings.warn(
                f"the text holds {listed(names)}, read as plain text and not as control tokens: pass "
                "parse_special=True if another program rendered it, or give messages",
                GemkitWarning,
                stacklevel=stacklevel,
            )

    def _ids(self, prompt: Prompt, parse_special: bool = False) -> Sequence[int]:
        """Return the token ids of one prompt."""
        kind = kind_of(prompt)
        if kind == "text":
            return self.tokenizer.encode(prompt, parse_special=parse_special)
        if kind == "ids":
            return prompt
        if kind == "batch":
            raise UsageError("a list of prompts holds another list of prompts: give one list")
        if parse_special:
            raise UsageError(
                "parse_special is for texts, and the content of a message is always plain: drop one of them"
            )
        if getattr(self.checkpoint, "instruction_tuned", None) is False:
            warnings.warn(
                f"{self.checkpoint.name} is pretrained only and was not taught to answer: "
                "give it a text to go on from, or load an instruction-tuned model",
                GemkitWarning,
                stacklevel=4,
            )
        return self.render(prompt)
