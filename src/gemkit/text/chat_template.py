"""Chat templates: conversations to ids, by the template in the model's own file.

Google's templates, and all that render the same turns, are not run: `gemkit.text.chat` makes those ids, and
accepts input that they refuse, such as system text in Gemma 1 and 2. Other templates run in a sandbox, and the
content of a message never becomes a control token.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from gemkit.cache import cache_dir, try_atomic_write
from gemkit.errors import GemkitError, GemkitWarning, listed
from gemkit.text import chat
from gemkit.text.template import DEFAULT_TEMPLATE
from gemkit.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gemkit.text.jinja import Template

Message = Mapping[str, Any]

# SHA-256 of published templates: Gemma 1, 1.1 and 2 (line breaks as such or as \n, with the BOS and without), Gemma 3.
_PUBLISHED = {
    "ecd6ae513fe103f0eb62e8ab5bfa8d0fe45c1074fa398b089c93a7e70c15cfd6",
    "1e51d5c0fec2f83da1953fb850b7b532b7da02d0dc35f9201e671e0b9a35a123",
    "3919b9309d8949ee8f4b710215987700f87dc5bb0e87bf24dd39189ec65e3eec",
    "3c050259279da4341947d5f012aadc5975af71c235e71ef7e520531aaec17a86",
    "8d9e3a3c114fb2053ec500184677af4f7e5f8ec2582443cd535834e68b3ade29",
}
# To be changed whenever a verdict on the same template could be another.
_CACHE_FORMAT = b"gemkit chat template 1\n"
_PROBE_SECONDS = 2.0
_REMEDY = "give the prompt as plain text (--raw), or name another template (--chat-template FILE or gemma)"


class ChatTemplate:
    """The chat template of one model.

    source: the file's own, in Jinja; None for Google's turns. name: the model's, for messages. special_tokens: the
    names of control tokens that the file states, such as {"eos_token": "<|im_end|>"}.
    """

    def __init__(
        self,
        source: str | None,
        tokenizer: Tokenizer,
        name: str = "",
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.source, self.name = source, name
        self._tokenizer = tokenizer
        self._special = dict(special_tokens or {})
        self._warned = False

    @classmethod
    def of(cls, checkpoint: Any, tokenizer: Tokenizer) -> ChatTemplate:
        """Return that of a checkpoint: its ``chat_template``, ``name``, ``special_tokens`` and ``metadata`` count."""
        special = dict(getattr(checkpoint, "special_tokens", {}))
        end = getattr(checkpoint, "metadata", {}).get("tokenizer.ggml.eos_token_id")
        if type(end) is int and 0 <= end < tokenizer.vocab_size:
            special.setdefault("eos_token", tokenizer.id_to_piece(end))
        source = getattr(checkpoint, "chat_template", None)
        return cls(source, tokenizer, getattr(checkpoint, "name", ""), special)

    def replaced(self, source: str | None) -> ChatTemplate:
        """Return one with another template; None for Google's turns."""
        return ChatTemplate(source, self._tokenizer, "", self._special)

    @cached_property
    def is_own(self) -> bool:
        """Return whether the template renders other turns than Google's, and so is run."""
        return self.source is not None and not renders_gemma_turns(self.source)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Return the ids of a conversation, after exactly one BOS.

        add_generation_prompt: open the assistant's next turn; where the last message is the assistant's, leave that
        open instead, to be continued. tools: JSON schemas of functions, for a template that lists them.
        Raises GemkitError for messages that the template refuses, and for a template that cannot be run.
        """
        if not self.is_own:
            if tools:
                raise GemkitError("this model's chat template has no place for tools: describe them in a message")
            return chat.gemma_turns(self._tokenizer, messages, add_generation_prompt)
        plain = _plain_messages(messages)
        try:
            ids = self._run(plain, add_generation_prompt, None if tools is None else _plain(list(tools)))
            if "messages" not in self._template.names:
                raise GemkitError("it writes nothing of the messages")
            return ids
        except GemkitError as error:
            of = f" of {self.name}" if self.name else ""
            raise GemkitError(f"the chat template{of} cannot be followed: {error}; {_REMEDY}") from None

    @cached_property
    def _template(self) -> Template:
        from gemkit.text.jinja import Template

        return Template(self.source)

    @cached_property
    def _variables(self) -> dict[str, Any]:
        t = self._tokenizer
        ids = {"bos_token": t.bos_id, "eos_token": t.eos_id, "pad_token": t.pad_id, "unk_token": t.unk_id}
        return {name: t.id_to_piece(token) for name, token in ids.items()} | self._special

    @cached_property
    def _control(self) -> Any:
        from gemkit.text.marks import ControlTokens

        used = [value for name, value in self._variables.items() if name in self._template.names]
        return ControlTokens(self._tokenizer, [*self._template.texts, *used])

    def _run(self, messages: list[dict[str, Any]], add: bool, tools: list | None) -> list[int]:
        if not any(isinstance(message.get("content"), list) for message in messages):
            return self._ids(messages, add, tools)
        whole = [_joined(message) for message in messages]
        try:
            return self._ids(messages, add, tools, unlike=None if whole == messages else "'type': 'text'")
        except GemkitError:
            if whole == messages:
                raise
        return self._ids(whole, add, tools)  # the template does not support content in parts

    def _warn(self, missing: list[str]) -> None:
        """Warn once of control tokens that the template writes and the vocabulary lacks."""
        if missing and not self._warned:
            self._warned = True
            warnings.warn(
                f"the chat template{f' of {self.name}' if self.name else ''} writes {listed(missing)}, which the "
                "vocabulary lacks: plain text takes the place of control tokens, as in transformers; "
                "--chat-template gemma gives Google's turns",
                GemkitWarning,
                stacklevel=4,
            )

    def _ids(
        self, messages: list[dict[str, Any]], add: bool, tools: list | None, unlike: str | None = None
    ) -> list[int]:
        """Encode rendered text. unlike: GemkitError if the text has this in it, the sign of a list rendered as text."""
        from gemkit.text.marks import Marks

        control, marks = self._control, Marks([self.source, *self._special.values(), *_strings([messages, tools])])
        continued = marks.new() if add and messages and messages[-1].get("role") == "assistant" else ""

        def render(brackets: bool) -> str:
            given = control.marked(messages, marks, brackets)
            if continued:
                _append(given[-1], f"{continued} ")
            variables = self._variables | {
                "messages": given,
                "tools": control.marked(tools, marks, brackets),
                "documents": None,
                "add_generation_prompt": add and not continued,
            }
            text = self._template.render(variables)
            return _cut(text, continued) if continued else text

        text = render(False)
        if unlike is not None and unlike in text:
            raise GemkitError("it takes content for text")
        try:
            safe = render(True)
        except GemkitError:  # it searches messages for brackets
            safe = text
        # Where brackets in messages decide on control tokens, the template turns the content of messages into tokens
        if control.tokens(safe) != control.tokens(text):
            text = safe
        self._warn(control.missing(text))
        return self._tokenizer.with_bos(control.encode(text, marks))


def renders_gemma_turns(source: str) -> bool:
    """Return whether a template renders Google's turns: it is a published one, gemkit's, or does so in samples.

    The verdict on an unknown template is kept in the cache folder. False for one that cannot be run.
    """
    text = source.replace("\r\n", "\n").strip()
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    if digest in _PUBLISHED or text == DEFAULT_TEMPLATE:
        return True
    name = hashlib.sha256(_CACHE_FORMAT + digest.encode()).hexdigest()[:32]
    try:
        path = cache_dir() / "templates" / name
        kept = path.read_bytes()
    except GemkitError:
        path, kept = None, b""
    except OSError:
        kept = b""
    if kept in (b"gemma\n", b"own\n"):
        return kept == b"gemma\n"
    found = _compare(source)
    if path is not None:
        try_atomic_write(path, b"gemma\n" if found else b"own\n")
    return found


# Conversations that tell templates apart, "role:content" each. The first must render; where a template refuses another,
# as Google's refuse system text, the turns of `gemkit.text.chat` are what is missing.
_NEEDED = (("user:a",), ("user: x\n", "assistant:\n y ", "user:z"), ("user:", "assistant:", "user:b"))
_COMPARED = (
    ("system:s", "user:a"),
    ("system: s \n", "user: a", "assistant:b", "user:c"),
    ("developer:d", "user:a"),
    ("user:a", "user:b"),
    ("user:a", "assistant:b", "assistant:c", "user:d"),
    ("assistant:a", "user:b"),
    ("user:<think>p</think>a", "assistant:<think>q</think>\n\nb", "user:<b> & \"c\" 'd'"),
    tuple(f"{role}:{n}" for n in range(5) for role in ("user", "assistant")) + ("user:end",),
)


def _compare(source: str) -> bool:
    from gemkit.text.jinja import Template

    try:
        template = Template(source)
        known = {*_variables_of_turns(), "raise_exception", "namespace", "range"}
        if "tool" in source or not template.names - template.assigned <= known:
            return False
        samples = [(sample, True) for sample in _NEEDED] + [(sample, False) for sample in _COMPARED]
        for sample, needed in samples:
            messages = [dict(zip(("role", "content"), said.split(":", 1))) for said in sample]
            for add in (True, False):
                wanted, found = _turns(messages, add), _rendered(template, messages, add)
                if (found is None and needed) or (found is not None and found != wanted):
                    return False
    except GemkitError:
        return False
    return True


def _variables_of_turns() -> dict[str, Any]:
    return {"bos_token": "<bos>", "eos_token": "<eos>", "messages": [], "add_generation_prompt": True}


def _rendered(template: Template, messages: list[dict[str, str]], add: bool) -> str | None:
    try:
        text = template.render(
            _variables_of_turns() | {"messages": messages, "add_generation_prompt": add, "tools": None}, _PROBE_SECONDS
        )
    except GemkitError:
        return None
    return text.removeprefix("<bos>")


def _turns(messages: list[dict[str, str]], add: bool) -> str | None:
    """Return Google's turns as text; None for messages that have none."""
    try:
        rows = chat.turns(messages)
    except GemkitError:
        return None
    text = "".join(f"<start_of_turn>{role}\n{said}<end_of_turn>\n" for role, said in rows)
    return text + ("<start_of_turn>model\n" if add else "")


# --- messages --------------------------------------------------------------------------------------------------------


def _plain_messages(messages: object) -> list[dict[str, Any]]:
    """Return copies of the messages in plain data, without empty keys; raises GemkitError for anything else."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise GemkitError("messages is no list: give a list of {'role': …, 'content': …}")
    if not messages:
        raise GemkitError("the conversation is empty: give at least one user's message")
    plain = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise GemkitError(f"message {number} is {message!r:.80}: give {{'role': …, 'content': …}}")
        row = _plain({key: value for key, value in message.items() if value is not None}, f"message {number}")
        row["role"] = {"model": "assistant"}.get(row["role"], row["role"])
        plain.append(row)
    return plain


def _plain(value: Any, where: str = "a tool", depth: int = 0) -> Any:
    """Return a copy in Python's built-in types, so that a template cannot reach other objects."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind.__new__(kind, value) if type(value) is kind else kind(value)
    if depth < 64 and isinstance(value, Mapping):
        return {str(key): _plain(item, where, depth + 1) for key, item in value.items()}
    if depth < 64 and isinstance(value, (list, tuple)):
        return [_plain(item, where, depth + 1) for item in value]
    raise GemkitError(f"{where} holds {value!r:.80}: give text, numbers, lists and dictionaries")


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for pair in value.items() for item in pair for text in _strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with content in parts as one text, if all of them are text."""
    parts = message.get("content")
    if not isinstance(parts, list) or not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        return message
    return message | {"content": "".join(str(part.get("text", "")) for part in parts)}


def _append(message: dict[str, Any], end: str) -> None:
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + end
        return
    for part in reversed(content if isinstance(content, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            part["text"] += end
            return
    raise GemkitError("the last message is the assistant's and has no text to continue")


def _cut(text: str, mark: str) -> str:
    """Return the text up to the mark and one space after it; without white space before it where the template trims."""
    at = text.rfind(mark)
    if at < 0:
        raise GemkitError("it leaves out the text of the last message, which is to be continued")
    return text[:at] if text.startswith(f"{mark} ", at) else text[:at].rstrip()
