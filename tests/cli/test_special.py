"""Control tokens typed into a prompt: one line on standard error, and `--special` reads them. Budget: 15 s."""

import json
from types import SimpleNamespace

import pytest
from engine.vocabulary import tokenizer

import gemkit
from gemkit.cli import main
from gemkit.cli.generate import _prompt_ids
from gemkit.text.chat import render

RENDERED = "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"
NAMES = "<bos>, <start_of_turn>, <end_of_turn>"


def run(capsys: pytest.CaptureFixture, *args: str) -> tuple[str, str]:
    with pytest.raises(SystemExit) as exit_:
        main(list(args))
    output = capsys.readouterr()
    assert not exit_.value.code, output.err
    return output.out, output.err


def test_generate_and_score_say_so_and_read_them_when_asked(capsys):
    with gemkit.load("demo", threads=2) as model:
        ids = render(model.tokenizer, [{"role": "user", "content": "hi"}])
        answer, score = model.generate(ids, max_tokens=3, temperature=0), model.score(ids)
    capsys.readouterr()  # the first load on a machine shows the terms
    for verb, options in (("generate", ["--max-tokens", "3", "--temp", "0", "--prompt"]), ("score", ["--text"])):
        out, err = run(capsys, verb, "demo", "--json", *options, RENDERED)
        plain = json.loads(out)
        assert err.count("\n") == 1 and NAMES in err and "--special" in err
        out, err = run(capsys, verb, "demo", "--json", "--special", *options, RENDERED)
        read = json.loads(out)
        assert err == ""
        if verb == "generate":
            assert read["ids"] == answer.ids and read["usage"]["prompt_tokens"] == len(ids) == 10
            assert plain["usage"]["prompt_tokens"] == 30
        else:
            assert read["tokens"] == 9 and read["perplexity"] == pytest.approx(score.perplexity) != plain["perplexity"]
    with pytest.raises(SystemExit):
        main(["generate", "demo", "--prompt", "x", "--special", "--system-prompt", "y"])
    assert "--special leaves out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (RENDERED, True),
        ("\n<start_of_turn>user", True),
        ("what does <end_of_turn> mean?", False),
        ("<b>bold</b> <eos>", False),
    ],
)
def test_a_user_may_speak_of_them_but_a_message_that_begins_with_them_was_rendered_before(capsys, text, said):
    model = SimpleNamespace(
        tokenizer=tokenizer(),
        checkpoint=SimpleNamespace(instruction_tuned=True),
        render=lambda messages: render(tokenizer(), messages),
        has_own_template=False,
    )
    ids = _prompt_ids(model, text, None, None, raw=False, special=False)
    assert ids == render(tokenizer(), [{"role": "user", "content": text}])
    assert ("--special" in capsys.readouterr().err) == said
    assert _prompt_ids(model, text, None, None, raw=False, special=True) == tokenizer().encode(text, parse_special=True)
    assert capsys.readouterr().err == ""
