"""What a template prints, beside Transformers' own renderer: numbers, lists, generators, white space."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sftcore._core import Template  # noqa: TID251  the renderer without a tokenizer
from sftcore.errors import SftcoreError

chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")

MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
VALUES: dict[str, Any] = {
    "t": True,
    "i": 7,
    "u64": 2**64 - 1,
    "e": "",
    "s": "Hello World",
    "html": "<b>&'\"</b>",
    "multi": "one two\nthree  four\r\nfive\n\nsix ",
    "uni": "ßÉǅİ σς straße ﬁ ²½٣",
    "nums": [3, 1, 2],
    "dups": ["a", "B", "b", "A", "a"],
    "recs": [{"x": 2, "y": "b"}, {"x": 1, "y": "B"}, {"x": 2, "y": "a"}],
    "nested": {"a": {"b": [1, {"c": 2}]}},
    "tree": [{"n": "1", "c": [{"n": "2", "c": []}, {"n": "3", "c": []}]}],
    "el": [],
    "ed": {},
    "f": 1e-05,
    "g": 1e16,
    "h": 123456789.123,
    "z": -0.0,
    "n": None,
    "quoted": "a'b\"c\n\té\u200b",
    "mixed": [1e-05, 1, None, True, "x'y", {"k": 1e22}],
    "d": {"b": 1, "a": 2e-7, "c": None},
    "ls": ["b", "a", "C"],
    "dicts": [{"x": 1, "y": "p"}, {"x": 2}],
}

SNIPPETS = [
    # numbers, wherever a value becomes text
    "{{ f }} {{ g }} {{ h }} {{ z }} {{ 5e-324 }} {{ 1e22 }} {{ 1e308 * 10 }} {{ f * 2 }}",
    "{{ f ~ g }} {{ 'a' ~ f ~ 2 * 3 ~ z }} {{ -f ~ 'q' }} {{ 'q' ~ -f }} {{ 'x' ~ f * 2 }}",
    "{{ 'a' ~ mixed[0] ~ d['a'] ~ d.a }} {{ [f ~ 'x'] }} {{ {'k' ~ f: 'v' ~ g} }} {{ 'a' ~ f == 'a1e-05' }}",
    "{{ 'x' ~ (f if true else 1) ~ 'y' }} {{ 'a' ~ f if true else 'c' }} {{ f is number ~ 'x' }}",
    "{{ f|string }} {{ f|trim }} {{ f|upper }} {{ g|replace('+', 'p') }} {{ 'v: ' + f|string }}",
    "{{ mixed|join(', ') }} {{ [n, f]|join('-') }} {{ dicts|join(',', attribute='x') }}",
    "{{ mixed|map('string')|list }} {{ '%s'|format(f) }} {{ '{}'.format(f) }}",
    "{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}{% macro m(a=f) %}{{ a }}{% endmacro %}{{ m() }}",
    # the repr of lists, dicts and texts
    "{{ mixed }} {{ d }} {{ (1, f) }} {{ (1,) }} {{ () }} {{ [quoted] }} {{ [missing] }} {{ namespace(a=f) }}",
    "{{ d.items() }} {{ d.keys() }} {{ d.values()|list }} {{ d.keys()|length }}",
    # loops
    "{% for x in n %}a{% endfor %}",
    "{% for x in d.c %}a{% endfor %}",
    "{% for x in missing %}a{% else %}e{% endfor %}{% for x in d.c or [] %}a{% endfor %}",
    "{% for x in 'abc'|trim %}{{ x }}{{ loop.last }}{% endfor %}",
    "{% for x in ls|map('upper') %}{{ loop.length }}{{ loop.last }}{{ x }}{% endfor %}",
    "{% for x in ls if x != 'a' %}{{ x }}{{ loop.index }}{% endfor %}",
    "{{ n|list }}",
    "{{ n|join(',') }}",
    # generators
    "{{ ls|map('upper')|tojson }}",
    "{{ ls|map('upper')|list|tojson }}",
    "{{ dicts|selectattr('y', 'defined')|tojson }}",
    "{{ dicts|selectattr('y', 'defined')|list|tojson }}",
    "{{ ls|reject('equalto', 'a')|length }}",
    "{% set once = ls|map('upper') %}{{ once|list }}{{ once|list }}",
    "{% set none_left = ls|select('equalto', 'z') %}{{ 'yes' if none_left else 'no' }}",
    "{{ d.items()|tojson }}",
    "{{ range(3)|tojson }}",
    # tests
    "{{ 'a' is sequence }} {{ ls is sequence }} {{ d is sequence }} {{ n is sequence }} {{ 1 is sequence }}",
    "{{ ls|map('upper') is sequence }} {{ (ls|map('upper')) is iterable }} {{ n is iterable }}",
    # line ends
    "{% raw %}\na{{ b }}\n{% endraw %}\nc",
    "x\n  {% raw %}\n\na\n  {%- endraw %}\n\ny",
    "{% raw -%} \n a {% endraw -%} \n y",
    "{%+ raw %}\na{%+ endraw +%}\nc",
    "a\r\n{% if true %}\r\nb\rc{% endif %}\r\n",
]


def _both(snippet: str) -> tuple[str | None, str | None]:
    """The text of Jinja2 and ours; None for an error."""
    source = "{% for m in messages %}{{ m.content }}{% endfor %}|" + snippet
    try:
        texts, _ = chat_template_utils.render_jinja_template(
            conversations=[MESSAGES], chat_template=source, **VALUES
        )
        expected = texts[0]
    except Exception:  # whatever Jinja2 lets through
        expected = None
    row = json.dumps({"messages": MESSAGES, "chat_template_kwargs": VALUES}).encode()
    try:
        text = Template(source, []).render_row(row)[0]
    except SftcoreError:
        text = None
    return expected, text


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_prints_what_transformers_prints(snippet: str) -> None:
    expected, text = _both(snippet)
    assert text == expected


@pytest.mark.parametrize("name", ["methods", "operators", "filters"])
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_the_snippets_of_a_file_print_what_transformers_prints(name: str) -> None:
    lines = (Path(__file__).parent / "snippets" / f"{name}.txt").read_text(encoding="utf-8")
    wrong = []
    for line in lines.split("\n"):
        is_refused = line.startswith("! ")
        snippet = line.removeprefix("! ").replace("␊", "\n").replace("␍", "\r")
        if not snippet or snippet.startswith("##"):
            continue
        expected, text = _both(snippet)
        if is_refused:
            # what no longer is an error must become an equal text
            if text is not None or expected is None:
                wrong.append((snippet, expected, text))
        elif text != expected:
            wrong.append((snippet, expected, text))
    assert wrong == []


@pytest.mark.parametrize(
    "before",
    [
        "{{ 'a\\nb' }}",
        "{{ 'a\\n' ~ \"b\\n\" }}",
        "{{ 'a\nb\\n' }}",
        "{% set x = [1,\n2][1:] %}",
        "{# \n #}",
    ],
)
def test_an_error_names_the_line_of_the_template(before: str) -> None:
    source = before + "\n{{ raise_exception('here') }}"
    with pytest.raises(SftcoreError, match=rf"line {source.count(chr(10)) + 1} of the template"):
        Template(source, []).render_row(json.dumps(MESSAGES).encode())


def test_a_generator_is_not_printed() -> None:
    template = Template(
        "{{ messages[0].content }}{{ messages[1].content }}{{ [1]|map('string') }}", []
    )
    with pytest.raises(SftcoreError, match=r"a generator has no text but its address; put \|list"):
        template.render_row(json.dumps(MESSAGES).encode())


def test_numbers_of_calls_print_as_python_prints_them_in_every_template(shared_data: Path) -> None:
    lines = (shared_data.parent / "cases" / "numbers" / "rows.jsonl").read_text(encoding="utf-8")
    special = [("bos_token", "<s>"), ("eos_token", "</s>")]
    compared = 0
    for line in lines.splitlines():
        row = json.loads(line)
        messages = [
            {key: value for key, value in message.items() if value is not None}
            for message in row["messages"]
        ]
        for path in sorted((shared_data / "templates").glob("*.jinja")):
            source = path.read_text(encoding="utf-8")
            # without a place for calls, they become text here
            if "tool_calls" not in source:
                continue
            try:
                texts, _ = chat_template_utils.render_jinja_template(
                    conversations=[messages],
                    tools=row["tools"],
                    chat_template=source,
                    **dict(special),
                )
            except Exception:
                continue
            try:
                text = Template(source, special).render_row(line.encode())[0]
            except SftcoreError:
                # what is refused is another test's business
                continue
            assert text == texts[0], path.name
            compared += 1
    assert compared > 30
