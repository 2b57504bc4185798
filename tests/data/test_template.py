"""Chat templates: the same text as transformers, and an error for templates that loop, grow or fail."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from octavo.data import template_limits
from octavo.data.records import Document
from octavo.data.template import TemplateRefusalError, render
from octavo.data.tokens import encode
from octavo.data.turns import Message
from octavo.errors import DataError, ModelError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " How are\nyou? <b>&"},
    {"role": "assistant", "content": "Well.\n"},
]
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string", "x": [1, 2.5]}}}}
]
# The constructs of templates in use: tool lists, macros, namespaces, loops that stop, white-space control.
TEMPLATES = {
    "date": "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}",
    "tools": "{% if tools %}{{ tools | tojson }}|{{ tools | tojson(indent=4) }}{% for t in tools %}"
    "{{- t.function.name }}:{{ t['function'] | tojson(indent=2, sort_keys=true) }}{% endfor %}{% endif %}",
    "namespace": "{% set ns = namespace(text='', last=none) %}{% for m in messages %}"
    "{% set ns.text = ns.text + m.role[0]|upper ~ loop.index0 ~ loop.length %}{% set ns.last = m %}{% endfor %}"
    "{{ ns.text }}{{ ns.last.content | trim }}{{ bos_token }}",
    "macro": "{%- macro turn(m, more=false) -%}<{{ m['role'] }}>{{ m['content'] | trim }}{% if more %}+{% endif %}"
    "{%- endmacro -%}{% for m in messages[1:] %}  {{ turn(m, more=not loop.last) }}\n{% endfor %}",
    "stops": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content.split('\\n')[-1] }}"
    "{% if m.role == 'system' %}{% continue %}{% endif %}!{% endfor %}",
    "filters": "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | join('; ') }}"
    "{{ messages | length }}{{ '%s-%05.1f' % ('a', 2.5) }}{{ '{:>5}'.format('b') }}{{ [1, 2] + [3] }}{{ (1, 'x') }}"
    "{{ {'k': messages[0].content} }}{{ messages[0].items() | list }}{{ 'ab' * 3 }}{{ 'a,b'.split(',') }}",
    "escapes": "{{ messages[1].content | e }}{{ messages[1].content.replace('\\n', ' ') }}{{ 7 // 2 }}{{ -3 % 2 }}"
    "{{ 2 ** 10 }}{{ missing is defined }}{{ missing }}{{ none }}{{ true and 1.50 }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "blocks": "{% set x %}\n {{ messages[0].content }} {% endset %}{{ x | length }}{% filter upper %}{{ x }}"
    "{% endfilter %}{% macro each() %}{{ caller(1) }}{{ caller(2) }}{% endmacro %}"
    "{% call(a) each() %}({{ a }}){% endcall %}",
    "recursive": "{% for x in [[1, [2]], [3]] recursive %}{{ x if x is number else loop(x) }},{% endfor %}",
    "prompt": "{% if add_generation_prompt %}go{% endif %}{{ eos_token }}{{ documents is none }}{{ tools is none }}",
}


def test_the_template_gets_the_given_date(tokenizer_copy: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(
        tokenizer_copy, "{% macro day(f) %}{{ strftime_now(f) }}{% endmacro %}{{ day('%d %b %Y') }}"
    )
    assert render(tokenizer, TALK, now=datetime(2024, 2, 29)) == "29 Feb 2024"


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("more", [False, True])
def test_the_rendered_text_equals_that_of_transformers(
    name: str, tools: Any, more: bool, tokenizer_copy: PreTrainedTokenizerFast
) -> None:
    tokenizer = with_template(tokenizer_copy, TEMPLATES[name])
    expected = tokenizer.apply_chat_template(TALK, tools=tools, tokenize=False, add_generation_prompt=more)
    assert render(tokenizer, TALK, tools=tools, add_generation_prompt=more) == expected


@given(contents=st.lists(st.text(), min_size=1, max_size=4), indent=st.sampled_from([None, 0, 2]))
def test_any_content_is_written_as_transformers_writes_it(
    tokenizer: PreTrainedTokenizerFast, contents: list[str], indent: int | None
) -> None:
    talk = [{"role": "user", "content": content} for content in contents]
    assert render(tokenizer, talk) == tokenizer.apply_chat_template(talk, tokenize=False)
    named = {
        "default": tokenizer.chat_template,
        "tool_use": f"{{{{ messages | tojson(indent={str(indent).lower()}) }}}}",
    }
    with_template = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=named)
    expected = with_template.apply_chat_template(talk, tools=TOOLS, tokenize=False)
    assert render(with_template, talk, tools=TOOLS) == expected == json.dumps(talk, ensure_ascii=False, indent=indent)


def test_a_conversation_of_thousands_of_turns_is_rendered(tokenizer: PreTrainedTokenizerFast) -> None:
    talk = [{"role": "user" if i % 2 else "assistant", "content": "word " * 50} for i in range(5000)]
    assert render(tokenizer, talk) == tokenizer.apply_chat_template(talk, tokenize=False)


GROWS = "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = GROWN %}{% endfor %}{{ ns.x }}"
BOMBS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that write": "{% for i in range(9999) %}" + "y" * 9999 + "{% endfor %}",
    "loops in a macro": "{% macro f() %}{% for i in range(9999) %}"
    + "y" * 9999
    + "{% endfor %}{% endmacro %}{{ f() }}",
    "times": "{{ 'a' * 500000000 }}",
    "times, turned": "{{ 500000000 * 'a' }}",
    "times, unseen": "{% if ['a'] * 5000000000 %}{% endif %}",
    "powers": "{{ (10 ** 1000) ** 1000000 }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "autoescape": "{% autoescape 'a' | center(1000000000) %}{% endautoescape %}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "to_bytes": "{{ (5).to_bytes(1000000000) }}",
    "%": "{{ '%1000000000d' % 1 }}",
    "% *": "{{ '%*d' % (1000000000, 1) }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "format, nested": "{{ '{:>{}}'.format(1, 1000000000) }}",
    "format, repeated": "{{ ('{0}' * 100000).format('a' * 1000000) }}",
    "format filter": "{{ '%1000000000s' | format('a') }}",
    "replace": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "replace nothing": "{{ ('a' * 1000000) | replace('', 'b' * 1000000) }}",
    "join": "{{ range(100000) | join('a' * 1000000) }}",
    "join method": "{{ ('a' * 1000000).join(range(100000) | map('string')) }}",
    "map": "{{ range(100000) | map('center', 100000) | list }}",
    "indent": "{{ ('\\n' * 1000000) | indent(1000000) }}",
    "expandtabs": "{{ ('\\t' * 1000000).expandtabs(1000000) }}",
    "translate": "{{ ('a' * 1000000).translate({97: 'x' * 1000000}) }}",
    "tojson": "{% set a = [1] * 100000 %}{{ ([a] * 100000) | tojson }}",
    "tojson, wide": "{{ [[1]] | tojson(indent=1000000000) }}",
    "batch": "{{ [1] | batch(1000000000, 1) | list }}",
    "fromkeys": "{{ dict.fromkeys(range(100000), 'a' * 1000000) }}",
    "sum": "{{ [[1]] | sum(start=[]) }}",
    "text that doubles": "{% set x = 'aaaa' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 50,
    "~ that doubles": GROWS.replace("GROWN", "ns.x ~ ns.x"),
    "+ that doubles": GROWS.replace("GROWN", "ns.x + ns.x"),
    "lists that double": GROWS.replace("GROWN", "[ns.x, ns.x]"),
    "tuples that double": GROWS.replace("GROWN", "(ns.x, ns.x)"),
    "objects that double": GROWS.replace("GROWN", "{'a': ns.x, 'b': ns.x}"),
    "dict that doubles": GROWS.replace("GROWN", "dict(a=ns.x, b=ns.x)"),
    "not Jinja": "{% for %}",
    "deep": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "deep blocks": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "long": "x" * (2**20 + 1),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_never_ends_or_fills_the_memory_is_a_model_error(
    name: str, tokenizer_copy: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ModelError, match="chat template") as caught:
        render(with_template(tokenizer_copy, BOMBS[name]), TALK)
    assert len(caught.value.message) < 400


BROKEN = {
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{% for i in range(10000000000) %}x{% endfor %}": "Range too big",
    "{{ missing.part.of }}": "missing",
    "{{ 'a'.__class__.__mro__ }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{% include '/etc/passwd' %}": "no loader",
    "{{ lipsum(9) }}": "lipsum",
    "{{ raise_exception('no system role') }}": "refuses the conversation: no system role",
    "{{ raise_exception('x' * 100000) }}": "refuses",
    "{{ [1] + 'a' }}": "TypeError",
    "{{ (9).real.nothing() }}": "nothing",
}


@pytest.mark.parametrize("template", BROKEN)
def test_the_error_quotes_why_a_template_cannot_render_a_conversation(
    template: str, tokenizer_copy: PreTrainedTokenizerFast
) -> None:
    tokenizer = with_template(tokenizer_copy, template)
    with pytest.raises(TemplateRefusalError, match=BROKEN[template]) as caught:
        render(tokenizer, TALK)
    assert len(str(caught.value)) < 300
    document = Document("f", 3, messages=(Message("user", "a"), Message("assistant", "b")))
    with pytest.raises(DataError, match="f:3: the chat template"):
        encode(document, tokenizer)


def test_a_template_that_takes_too_long_is_stopped(
    tokenizer_copy: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_limits, "MAX_SECONDS", -1.0)
    with pytest.raises(ModelError, match="seconds"):
        render(tokenizer_copy, TALK)
