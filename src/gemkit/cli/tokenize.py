"""`gemkit tokenize MODEL TEXT`: the ids and pieces of a text."""

from typing import TYPE_CHECKING

import click

from gemkit.cli.command import Verb
from gemkit.cli.common import (
    Text,
    default_model_argument,
    files_option,
    json_option,
    print_json,
    special_option,
    split_text,
    warn_of_control,
)
from gemkit.cli.prompt import Prompt, input_kind
from gemkit.errors import UsageError

if TYPE_CHECKING:
    from gemkit.text.tokenizer import Tokenizer


@click.command("tokenize", cls=Verb, short_help="Print the tokens of a text.")
@default_model_argument
@click.argument("words", metavar="[TEXT]", nargs=-1, type=Text())
@files_option("A UTF-8 file with the text; may be repeated.")
@special_option("Read control tokens such as <start_of_turn> in the text.")
@click.option("--chat", is_flag=True, help="Take the text as a user's message, in MODEL's chat template.")
@click.option("--no-bos", is_flag=True, help="Leave out the BOS token, which a prompt begins with.")
@click.option("--ids", is_flag=True, help="Print the ids alone, as a list.")
@click.option("--count", is_flag=True, help="Print the number of tokens alone.")
@click.option("--offline", is_flag=True, help="Use downloaded files only; make no request to a hub.")
@json_option
def command(
    model: str,
    words: tuple[str, ...],
    files: tuple[str, ...],
    special: bool,
    chat: bool,
    no_bos: bool,
    ids: bool,
    count: bool,
    offline: bool,
    as_json: bool,
) -> None:
    """Print the ids and pieces of a text, by the vocabulary of MODEL; its weights are not read.

    MODEL may also be a tokenizer.model or a tokenizer.json. The text is what comes after MODEL, files, and what is
    piped in, as for `gemkit generate`.
    """
    if ids + count + as_json > 1:
        raise UsageError("--ids, --count and --json are three forms of the output: choose one")
    if chat and (special or no_bos):
        raise UsageError("--chat renders the text, BOS included: leave out --special and --no-bos")
    model, words = split_text(click.get_current_context(), model, words, not files and input_kind() != "data")
    parts = Prompt(words, None, files)

    from gemkit.api.load import load_tokenizer

    tokenizer = load_tokenizer(model, offline=offline)
    text = parts.text()
    if chat:
        found = _rendered(model, tokenizer, text, offline)
    else:
        if not special:
            warn_of_control(tokenizer, text)
        found = tokenizer.encode(text, bos=not no_bos, parse_special=special)
    if count:
        click.echo(len(found))
    elif ids:
        click.echo(found)
    elif as_json:
        from gemkit.cli.tokens import token_records

        print_json({"ids": found, "tokens": token_records(tokenizer, found), "count": len(found)})
    else:
        _print(tokenizer, found)


def _rendered(model: str, tokenizer: "Tokenizer", text: str, offline: bool) -> list[int]:
    """Return the ids of a user's message in the model's chat template, as `generate` gives them to a tuned model."""
    from gemkit.api.load import find
    from gemkit.text.chat_template import ChatTemplate

    path = find(model, offline)
    if path.is_file() and path.suffix != ".gguf":  # a vocabulary alone
        template = ChatTemplate(None, tokenizer)
    else:
        from gemkit.weights.open import open_checkpoint

        with open_checkpoint(path) as checkpoint:
            template = ChatTemplate.of(checkpoint, tokenizer)
    return template.render([{"role": "user", "content": text}])


def _print(tokenizer: "Tokenizer", tokens: list[int]) -> None:
    from gemkit.cli.tokens import shown_piece

    width = max((len(str(token)) for token in tokens), default=0)
    for token in tokens:
        click.echo(f"{token:>{width}}  {shown_piece(tokenizer, token)}")
    click.echo(f"{len(tokens):,} token{'' if len(tokens) == 1 else 's'}", err=True)
