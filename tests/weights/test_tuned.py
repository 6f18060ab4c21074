"""Models that expect turns. Budget: 2 s."""

import pytest

from gemkit.weights.tuned import by_name, instruction_tuned


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gemma-3-1b-it", True),
        ("google/gemma-3-1b-it", True),
        ("it/gemma-3-1b", None),
        ("Gemma 3 270m It", True),
        ("Gemma_2_2B_Instruct", True),
        ("chat.gguf", True),
        ("gemma-3-1b-pt", False),
        ("gemma-7b-base-it", False),
        ("Unity", None),
        ("", None),
    ],
)
def test_names(name: str, said: bool | None):
    assert by_name(name) is said
    assert instruction_tuned(None, None, name) is (None if name == "" else bool(said))
    assert instruction_tuned(None, "{{ x }}", name) is True
    for mark in (True, False):
        assert instruction_tuned(mark, "{{ x }}", name) is mark
    assert instruction_tuned("no", None, name, "it") is (said is not False)
