"""docs/guides/check.md lists the rules there are; `python tests/tools/check/test_page.py` writes it. Budget: 1 s."""

from pathlib import Path

from gemkit.tools.check import RULES
from gemkit.tools.check.finding import LEVELS

PAGE = Path(__file__).parents[3] / "docs" / "guides" / "check.md"

HEAD = """# Check a model's files

```
gemkit check MODEL            # a GGUF file, a Hugging Face folder, a KerasHub preset, or `demo`
gemkit check MODEL --deep     # reads every tensor to its end, not a sample of the large ones
gemkit check MODEL --strict   # warnings fail too
gemkit check MODEL --json     # for programs
```

Run it on what you downloaded, before it costs an evening, and on what you are about to publish. It reads files that
would not load and reports all that it finds:

```text
error stop-turn: An instruction-tuned model's stop ids lack <end_of_turn> (106
  in Gemma 3, 107 in Gemma 1 and 2).
  at  generation_config.json: eos_token_id: it is 1, without 106
  why it ends its answers with that token: generation runs on, talking to
      itself, until the length limit
  fix set eos_token_id in generation_config.json to [1, 106] (Gemma 1 and 2:
      [1, 107])

my-gemma-it
looked at: Hugging Face folder, gemma3_text, sizes of gemma-3-1b-pt, 340
tensors sampled, 262,145 pieces, chat template
1 error, 0 warnings
```

It exits with 1 if there are errors, with 2 if there is no model to look at. Nothing is executed and nothing is sent
anywhere; pickles are looked into without being opened. In a healthy model nothing is found.

- An **error** makes the model wrong, unsafe or unloadable.
- A **warning** is probably not what you want.
- A **note** is true, and harmless if you know it.

A finding that is only the consequence of another is left out: mend what is named, and check again. The line "looked
at" says how far the check went; of a KerasHub preset the weights are not read, since they are in HDF5: export it with
`export_to_transformers` and check that folder.

What is "published" is what `gemkit` knows of the models that Google released; a model of your own sizes is held only to
what all models of its generation have in common. From Python: `gemkit.tools.check.check(path)` returns a list of
`Finding`.

The rules, generated from the program:
"""


def page() -> str:
    lines = [HEAD]
    for level in LEVELS:
        rows = [rule for rule in RULES if rule.level == level]
        lines += [f"## {level.capitalize()}s", "", "| rule | what | why it hurts | remedy |", "|---|---|---|---|"]
        for rule in rows:
            cells = (_cell(text) for text in (rule.what, rule.why, rule.remedy))
            lines.append(f"| `{rule.id}` | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    """Angle brackets and bars have a meaning of their own in Markdown tables."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("{{", "&#123;&#123;").replace("{%", "&#123;%")


def test_the_page_lists_the_rules():
    text = page()
    assert PAGE.read_text(encoding="utf-8") == text, "run `python tests/tools/check/test_page.py`"
    assert all(text.count(f"| `{rule.id}` |") == 1 for rule in RULES)


if __name__ == "__main__":
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8", newline="\n")
