"""The sandbox of chat templates: what it offers, what it forbids, and its bounds. Budget: 10 s."""

import threading
import time

import pytest

from gemkit.errors import GemkitError
from gemkit.text import jinja
from gemkit.text.jinja import Template


def render(source: str, seconds: float = 5.0, **variables) -> str:
    return Template(source).render(variables, seconds)


def test_blocks_are_trimmed_and_loops_can_be_left():
    source = "{% for x in xs %}\n    {% if x == 2 %}\n{% continue %}\n{% endif %}\n{{ x }}\n{% endfor %}\nend\n"
    assert render(source, xs=[1, 2, 3]) == "1\n3\nend"


def test_what_templates_expect():
    assert render("{% generation %}a{% set b = 1 %}{{ b }}{% endgeneration %}c") == "a1c"
    assert render("{{ {'b': 'é<', 'a': none} | tojson }}") == '{"b": "é<", "a": null}'
    assert render("{{ [1] | tojson(indent=1, separators=(',', ':'), sort_keys=true) }}") == "[\n 1\n]"
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")
    assert render("{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}{{ n['x'] if false }}") == "2"
    assert (
        render("{{ 'a%sb' % 'x' }}{{ '{:>3}'.format(1) }}{{ '*{{}}{}*'.format(2) }}{{ 'a' * 3 }}") == "axb  1*{}2*aaa"
    )
    assert render("{{ 5 % 3 }}{{ 2 ** 8 }}{{ 1.5 * 2 }}{{ [0] * 2 }}{{ '%d' | format(3) }}") == "22563.0[0, 0]3"
    assert render("{{ 'a' | center(5) | replace(' ', '-') | indent(2) }}{{ ['x', 'y'] | join(', ') }}") == "--a--x, y"
    assert Template("{{ a }}{% set b = c %}{{ b }}x").names >= {"a", "c"}
    template = Template("x{{ 'y' }}{% set b = 1 %}")
    assert set(template.texts) == {"x", "y"} and template.assigned == {"b"}


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ xs.append(1) }}",
        "{{ xs.clear() }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '{0.__class__}' | format(1) }}x{{ ''['__class__'].x }}",
        "{{ namespace(__init__=1) }}",
        "{{ namespace.__init__ }}",
        "{{ self.__dict__ }}",
        "{% include 'x' %}",
        "{% import 'x' as x %}",
        "{{ lipsum(5) }}",
        "{{ 'a' | pprint }}",
        "{{ range(10**7) }}",
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * 'a' }}",
        "{{ [0] * 10**9 }}",
        "{{ 10**(10**10) }}",
        "{{ 7**99999 }}",
        "{{ 'a' | center(10**9) }}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ 'a'.encode().zfill(10**9) }}",
        "{{ (1).to_bytes(10**9, 'big') }}",
        "{{ ['a'] | map('center', 10**9) | list }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 10**9) }}",
        "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (10**9, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ strftime_now('%1000000000d') }}",
        "{{ [1] | tojson(indent=10**6) }}",
        "{{ ('a' * 10**6) | replace('a', 'b' * 10**6) }}",
        "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
        "{{ range(10**4) | list | join('a' * 10**6) }}",
        "{{ ('a' * 10**6).join(['a'] * 10**4) }}",
        "{{ ('a\\n' * 10**6) | indent(10**4) }}",
        "{{ ('\\t' * 10**6).expandtabs(10**4) }}",
        "{{ [[1] * 10**4] * 10**4 | sum(start=[]) }}",
        "{% for i in range(10**5) %}{{ 'a' * 10**4 }}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) }}{% endmacro %}{{ f(9) }}",
        "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
        "{# " + "x" * (1 << 20) + " #}",
    ],
)
def test_escapes_and_bombs_are_refused_at_once(source):
    start = time.monotonic()
    with pytest.raises(GemkitError) as error:
        assert not render(source, xs=[1])
        raise GemkitError("nothing was written, which is as good")
    assert time.monotonic() - start < 4.0 and "\n" not in str(error.value) and "seconds" not in str(error.value)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set x %}{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}{% endset %}",
    ],
)
def test_a_template_that_does_not_end_is_stopped(source):
    start = time.monotonic()
    with pytest.raises(GemkitError, match=r"it takes more than 0\.2 seconds"):
        render(source, 0.2)
    assert time.monotonic() - start < 5.0
    assert render("{{ 1 }}") == "1"  # the thread goes on as before


def test_a_template_that_takes_much_memory_is_stopped(monkeypatch):
    monkeypatch.setattr(jinja, "MAX_MEMORY", 64 << 20)
    source = "{% set n = namespace(x=['a' * 1000]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}"
    with pytest.raises(GemkitError, match=r"memory|more than 10 seconds"):
        render(source, 10.0)


def test_threads_are_stopped_each_alone():
    results = []

    def run(source: str, seconds: float) -> None:
        try:
            results.append(render(source, seconds))
        except GemkitError as error:
            results.append(str(error))

    endless = "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}"
    jobs = [(endless, 0.2), ("{% for i in range(1000) %}{% endfor %}ok", 60.0)] * 2
    threads = [threading.Thread(target=run, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(results) == ["it takes more than 0.2 seconds"] * 2 + ["ok"] * 2
