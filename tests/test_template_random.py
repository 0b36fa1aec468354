"""Random expressions over random values, rendered by Jinja2 as Transformers sets it up and by our renderer.

What both render is the same text; what we refuse is an error. We never give other text. `SFTCORE_RANDOM_TEMPLATES`
sets the number of examples.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftcore._core import Template  # noqa: TID251  the renderer without a tokenizer
from sftcore.errors import SftcoreError

chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")

MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
ADDRESS = re.compile(r" at 0x[0-9a-f]+>")

TEXTS = st.one_of(
    st.text(alphabet="aB1 <&'\"\n\t-_.,ßéΣ中😀\x1c\u2028%{}", max_size=8),
    st.sampled_from(
        ["", "a", "Hello World", "1.5", "-3", "one two\r\nthree", "a,b,,c", "key", "%s"]
    ),
)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
NUMBERS = st.one_of(
    st.integers(-12, 12),
    st.integers(-(2**63), 2**63 - 1),
    FLOATS,
    st.sampled_from([0.5, 1.5, -0.0, 1e16, 1e-5, 2.675]),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["a", "b", "key", "items", "x y"]), inner, max_size=3),
    ),
    max_leaves=8,
)
VALUES = st.fixed_dictionaries(
    {
        "s": TEXTS,
        "n": NUMBERS,
        "ls": st.lists(LEAVES, max_size=4),
        "texts": st.lists(TEXTS, max_size=4),
        "nums": st.lists(NUMBERS, max_size=4),
        "d": st.dictionaries(st.sampled_from(["a", "b", "key", "items", "get"]), JSON, max_size=4),
        "recs": st.lists(st.fixed_dictionaries({"a": LEAVES, "b": TEXTS}), max_size=3),
        "v": JSON,
    }
)

NAMES = st.sampled_from(
    ["s", "n", "ls", "texts", "nums", "d", "recs", "v", "missing", "none", "true"]
)
LITERALS = st.sampled_from(
    [
        "0",
        "1",
        "-1",
        "2",
        "7",
        "1.5",
        "1e3",
        "''",
        "'a'",
        "'l'",
        "' '",
        "'%s'",
        "'{}'",
        "'x%d'",
        "'items'",
    ]
)
ATTRIBUTES = st.sampled_from(["a", "b", "items", "key", "upper", "zz"])
FILTERS = st.sampled_from(
    [
        "tojson",
        "tojson(indent=2)",
        "tojson(true)",
        "tojson(sort_keys=true)",
        "trim",
        "upper",
        "lower",
        "title",
        "capitalize",
        "length",
        "count",
        "first",
        "last",
        "list",
        "string",
        "join",
        "join(',')",
        "join(', ',attribute='a')",
        "default('z')",
        "default('z',true)",
        "int",
        "float",
        "abs",
        "round",
        "round(1)",
        "round(2,'floor')",
        "sum",
        "sum(attribute='a')",
        "min",
        "max",
        "sort",
        "sort(reverse=true)",
        "sort(attribute='b')",
        "unique",
        "reverse",
        "batch(2)",
        "slice(2)",
        "items",
        "dictsort",
        "dictsort(by='value')",
        "groupby('b')",
        "map('upper')",
        "map(attribute='a')",
        "map('string')",
        "select",
        "select('string')",
        "reject('none')",
        "selectattr('a')",
        "selectattr('b','equalto','a')",
        "rejectattr('a','defined')",
        "indent",
        "indent(2,true)",
        "replace('a','b')",
        "replace('','-',2)",
        "wordcount",
        "center(9)",
        "truncate(5)",
        "e",
        "safe",
        "format('a')",
        "format(1,2)",
        "trim('a')",
    ]
)
TESTS = st.sampled_from(
    [
        "defined",
        "undefined",
        "none",
        "string",
        "number",
        "integer",
        "float",
        "boolean",
        "mapping",
        "sequence",
        "iterable",
        "callable",
        "odd",
        "even",
        "true",
        "false",
        "upper",
        "lower",
        "in('abc')",
        "in([1,'a'])",
        "eq(1)",
        "lt(2)",
        "ge('a')",
        "divisibleby(2)",
    ]
)
METHODS = st.sampled_from(
    [
        "strip()",
        "lstrip()",
        "rstrip()",
        "strip('a')",
        "split()",
        "split(' ')",
        "split(',',1)",
        "rsplit(none,1)",
        "rsplit(',',maxsplit=1)",
        "splitlines()",
        "splitlines(true)",
        "upper()",
        "lower()",
        "title()",
        "capitalize()",
        "swapcase()",
        "startswith('a')",
        "endswith(('a','d'))",
        "find('l')",
        "rfind('l')",
        "index('l')",
        "count('l')",
        "count('')",
        "find('',2)",
        "replace('a','b',1)",
        "join(texts)",
        "join(nums)",
        "partition(' ')",
        "rpartition(' ')",
        "center(9,'*')",
        "ljust(4)",
        "rjust(4)",
        "zfill(5)",
        "isdigit()",
        "isalpha()",
        "isupper()",
        "islower()",
        "isspace()",
        "isalnum()",
        "istitle()",
        "format(1,'a')",
        "format(a=n)",
        "removeprefix('a')",
        "removesuffix('d')",
        "expandtabs()",
        "items()",
        "keys()",
        "values()",
        "get('a')",
        "get('zz',1)",
        "get('items')",
        "pop('a')",
        "append(1)",
        "index(1)",
        "count(1)",
        "copy()",
    ]
)
OPERATORS = st.sampled_from(
    [
        "+",
        "-",
        "*",
        "/",
        "//",
        "%",
        "**",
        "~",
        "==",
        "!=",
        "<",
        "<=",
        ">",
        ">=",
        "in",
        "not in",
        "and",
        "or",
    ]
)


def _grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds("({} {} {})".format, inner, OPERATORS, inner),
        st.builds("{} {} {}".format, inner, OPERATORS, inner),
        st.builds("({})|{}".format, inner, FILTERS),
        st.builds("{}|{}".format, inner, FILTERS),
        st.builds("({} is {})".format, inner, TESTS),
        st.builds("{} is not {}".format, inner, TESTS),
        st.builds("({}).{}".format, inner, METHODS),
        st.builds("({}).{}".format, inner, ATTRIBUTES),
        st.builds("({})[{}]".format, inner, inner),
        st.builds("({})[{}:{}]".format, inner, LITERALS, LITERALS),
        st.builds("({})[::{}]".format, inner, LITERALS),
        st.builds("[{}, {}]".format, inner, inner),
        st.builds("({}, {})".format, inner, inner),
        st.builds("{{'a': {}, {}: 1}}".format, inner, LITERALS),
        st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("(not {})".format, inner),
        st.builds("-{}".format, inner),
    )


EXPRESSIONS = st.recursive(st.one_of(NAMES, LITERALS), _grow, max_leaves=6)
STATEMENTS = st.one_of(
    st.builds("{{{{ {} }}}}".format, EXPRESSIONS),
    st.builds("{{% if {} %}}y{{% else %}}n{{% endif %}}".format, EXPRESSIONS),
    st.builds(
        "{{% for x in {} %}}{{{{ loop.index }}}}{{{{ x }}}}{{{{ loop.last }}}},{{% else %}}e{{% endfor %}}".format,
        EXPRESSIONS,
    ),
    st.builds("{{% for x in {} if x %}}{{{{ x|string|{} }}}}{{% endfor %}}".format, NAMES, FILTERS),
    st.builds("{{% set x = {} %}}{{{{ x }}}}{{{{ x|{} }}}}".format, EXPRESSIONS, FILTERS),
    st.builds(
        "{{% set x %}}  {{{{ {} }}}}{{% endset %}}[{{{{ x|{} }}}}]".format, EXPRESSIONS, FILTERS
    ),
    st.builds(
        "{{% set k = namespace(a={}) %}}{{% set k.a = k.a ~ 'z' %}}{{{{ k.a }}}}".format,
        EXPRESSIONS,
    ),
    st.builds(
        "{{% macro m(a, b={}) %}}{{{{ a }}}}{{{{ b }}}}{{% endmacro %}}{{{{ m({}) }}}}".format,
        LITERALS,
        NAMES,
    ),
    st.builds(
        "a \n  {{%{} if {} {}%}} \n b {{%- endif %}}\n c".format,
        st.sampled_from(["-", "+", ""]),
        NAMES,
        st.sampled_from(["-", ""]),
    ),
)


def _check(snippets: list[str], values: dict[str, Any]) -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}|" + "".join(snippets)
    row = json.dumps({"messages": MESSAGES, "chat_template_kwargs": values}).encode()
    try:
        text = Template(source, []).render_row(row)[0]
    except SftcoreError:
        return
    texts, _ = chat_template_utils.render_jinja_template(
        conversations=[MESSAGES], chat_template=source, **values
    )
    assert not ADDRESS.search(texts[0])
    assert text == texts[0]


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@settings(
    max_examples=int(os.environ.get("SFTCORE_RANDOM_TEMPLATES", "150")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(st.lists(STATEMENTS, min_size=1, max_size=2), VALUES)
def test_random_templates_give_the_text_of_jinja_or_an_error(
    snippets: list[str], values: dict[str, Any]
) -> None:
    _check(snippets, values)
