"""Regular expressions of adapter_config.json: as Python's on module names, and bounded in time on hostile ones."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.bounded_json import JsonError
from octavo.store import name_pattern
from octavo.store.name_pattern import NamePattern

NAMES = [
    "model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "model.language_model.layers.3.mlp.gate_proj",
    "model.vision_tower.encoder.layers.0.self_attn.q_proj", "lm_head", "transformer.h.7.attn.c_attn", "",
]  # fmt: skip
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj|"
    r"out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|"
    r"mlp|feed_forward|ffn|dense)\.(?:(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj)))"
)
PATTERNS = [
    r".*\.(q|v)_proj", r".*self_attn.*", "lm_head", r"^model\.layers\.(0|11)\..*$", r"model.layers.[0-9]{1,2}.mlp.\w+",
    r"^(?!.*vision).*\.q_proj$", r"^(model\.layers(?=\.).*\.(q_proj|down_proj))$", r".*\.[^.]+_proj", r"(?P<a>.*)_head",
    r"(.*\.)?(c_attn|lm_head)", r".*layers\.(?:\d+)\.(?:mlp|self_attn)\..+?", r"\A.*\Z", r".*\bmlp\b.*", "", "(|a)*",
    UNSLOTH,
    r"[a-z_.\d]{,40}", r"[^\W\d]+", r"[]a-z_]+", r"l{0}m?_?.+",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_the_names_that_python_matches(pattern: str) -> None:
    compiled = NamePattern(pattern)
    assert [compiled.fullmatch(name) for name in NAMES] == [bool(re.fullmatch(pattern, name)) for name in NAMES]


PIECES = st.recursive(
    st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\b", "^", "$", ""]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{1,2}", "*?", "{2}"])).map(lambda p: f"(?:{p[0]}){p[1]}"),
        inner.map(lambda one: f"(?={one})"),
        inner.map(lambda one: f"(?!{one})"),
    ),
    max_leaves=6,
)


@given(PIECES, st.text("ab.", max_size=6))
def test_any_pattern_matches_as_in_python(pattern: str, name: str) -> None:
    assert NamePattern(pattern).fullmatch(name) is bool(re.fullmatch(pattern, name))


@pytest.mark.parametrize(
    "pattern",
    ["(", "a)", "[a", "*a", "a**", r"(a)\1", "(?<=a)b", "(?i)a", "(?#a)", "a{99999}", "a{", "\\", "[z-a]", "a" * 5000,
     "(" * 5000, "(" * 40 + ")" * 40, r"\p", "(?>a)", "a*+", "[a--b]"],
    ids=lambda pattern: repr(pattern[:12]),
)  # fmt: skip
def test_other_expressions_are_errors(pattern: str) -> None:
    with pytest.raises(JsonError, match="a regular expression that octavo does not read") as caught:
        NamePattern(pattern)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "pattern",
    [
        "(?:(?:[a-z_.0-9]+)+)+!",
        "((.*)*)*x",
        "(((a?){1000}){1000}){1000}",
        "(?:.*.*.*.*.*.*.*.*)*!",
        "((|)*|(|)*)*" * 300,
    ],
)
def test_a_pattern_that_backtracks_takes_few_steps(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    step = name_pattern._Name.step

    def counted(name: name_pattern._Name) -> None:
        taken.append(name.steps)
        step(name)

    monkeypatch.setattr(name_pattern._Name, "step", counted)
    compiled, reason = NamePattern(pattern), ""
    try:
        assert not compiled.fullmatch("a.b_" * 50)
    except JsonError as error:
        reason = str(error)
    assert not reason or "takes too long" in reason
    assert 0 < len(taken) <= name_pattern.MAX_STEPS + 1
