"""Source, tests, benchmarks and documents use the terms of the field: no name or word of octavo's former vocabulary.

Two searches over all .py and .md files. Names are searched in code: the NAME tokens of Python, and text in backticks or
fenced blocks. Words are searched everywhere, also as parts of names: `turned_card`, `RoadMap`. EXCEPTIONS lists what
is the right word in some files, with the reason.
"""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "tests", "benchmarks", "docs", "tools")
# The plays are by Shakespeare, and this file lists the words.
NOT_SEARCHED = ("src/octavo/shakespeare/*", "tests/test_language.py")

# Former names, by the package of what they named. Some are left out because they are ordinary words, or name something
# else today: asked, codes, coded, Config, Context, Cost, ends, fold, Found, Held, host, inner, keep, levels, names,
# numbers, one_pass, onto, pairs, parts, Piece, place, plan, probe, Prompts, read, Reader, RESULTS, room, Run, seed,
# Sides, spans, SPAN, stacked, Step, Sums, table, told, turned, wide, words; and --batch, --clip, --room and --targets.
FORMER_NAMES = {
    "runtime": "OBSERVERS GLUON gluon_untested choose_road Away lie_on_host_ on_card",
    "ops": "in_eight compute_in_eight_ Coded code_rows_into product_into turned_codes Trial take_apart Apart",
    "fused": "Wide Room Frozen dinner to_beside to_input to_trained Known Learnt Told gelu_learn_ spread_into",
    "layers": "Keep Bank Routing LowRankPair LowRank Pass _Behind Thin few_rows int8_rows slot_attention",
    "models": "Place is_table for_tables",
    "train": "rehearse rehearsal Rehearsal Launched Recorded Fitted cheapen settle",
    "infer": "preparations _ahead telling",
    "server": "Shelf Exchange RefusedError",
}
FORMER = frozenset(name for names in FORMER_NAMES.values() for name in names.split())
WORDS = frozenset({"card", "cards", "product", "products", "road", "roads", "twin", "twins", "beside"})
LIE_ON = re.compile(r"\b(?:lie|lies)[\s_#]+on\b", re.IGNORECASE)

# (file or glob, name or words, reason)
EXCEPTIONS = [
    ("*", "model card", "the hub's term for README.md"),
    ("*.py", "model_card", "the hub's term for README.md; an entry of /v1/models in the server"),
    ("src/octavo/server/*.py", "ModelCard", "the name of vLLM's schema"),
    ("src/octavo/html_report/*.py", "card", "a CSS class"),
    ("src/octavo/html_report/*.py", "cards", "HTML elements of that class"),
    ("src/octavo/server/reference.py", "card", "a CSS class"),
    ("*.py", "scaled_dot_product_attention", "PyTorch's function"),
    ("benchmarks/measure.py", "dot_product", "the term"),
    ("tests/gpu/cases.py", "product", "itertools.product"),
    ("tests/infer/test_batch_invariance.py", "product", "itertools.product"),
    ("tests/infer/test_engine_adapters.py", "product", "itertools.product"),
    ("tests/kernels/test_pointwise.py", "product", "itertools.product"),
    ("tests/models/test_weight_map.py", "product", "itertools.product"),
    ("tests/store/test_hf_folder.py", "product", "itertools.product"),
]

_CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
_NAME = re.compile(r"[^\W\d]\w*")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def former_words(text: str, *, python: bool, allowed: Iterable[str] = ()) -> list[tuple[int, str]]:
    """(line, name or word) of the former vocabulary in a text, in order, without the phrases that are `allowed`."""
    for phrase in allowed:
        text = _pattern(phrase).sub(lambda match: "_" * len(match[0]), text)
    hits = {(line, name) for line, name in _names(text, python=python) if name in FORMER}
    for number, line in enumerate(text.splitlines(), start=1):
        hits |= {(number, part.lower()) for part in _PART.findall(line) if part.lower() in WORDS}
    hits |= {(_line(text, match.start()), "lie on") for match in LIE_ON.finditer(text)}
    return sorted(hits)


def _names(text: str, *, python: bool) -> Iterator[tuple[int, str]]:
    """(line, name) of the names in code."""
    if python:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME:
                yield token.start[0], token.string
    for code in _CODE.finditer(text):
        for name in _NAME.finditer(code[0]):
            yield _line(text, code.start() + name.start()), name[0]


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _pattern(phrase: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(phrase)}(?!\w)")


@cache
def texts() -> dict[Path, str]:
    """The text of every searched file, by its path relative to the root."""
    paths = [*ROOT.glob("*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    files = [path.relative_to(ROOT) for path in paths if path.suffix in (".py", ".md") and path.is_file()]
    searched = [path for path in files if not any(path.match(glob) for glob in NOT_SEARCHED)]
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in searched}


def test_no_file_uses_the_former_vocabulary() -> None:
    assert {path.parts[0] for path in texts()} >= {*FOLDERS, "README.md", "CHANGELOG.md"}
    hits = []
    for path, text in texts().items():
        allowed = [phrase for glob, phrase, _ in EXCEPTIONS if path.match(glob)]
        hits += [
            f"{path}:{line}: {word}" for line, word in former_words(text, python=path.suffix == ".py", allowed=allowed)
        ]
    assert not hits, "\n".join(["Use a term of the field, or add an exception with its reason:", *hits])


@pytest.mark.parametrize(("glob", "phrase", "reason"), EXCEPTIONS)
def test_every_exception_is_used_and_has_a_reason(glob: str, phrase: str, reason: str) -> None:
    assert reason
    assert any(path.match(glob) and _pattern(phrase).search(text) for path, text in texts().items())


@pytest.mark.parametrize(
    ("text", "python", "expected"),
    [
        ("x = Wide(1)\n", True, [(1, "Wide")]),
        ('"""Wide tables."""\n', True, []),
        ('"""\nA `Wide` table."""\n', True, [(2, "Wide")]),
        ("Keep it.\n\n```\nKeep.ALL\n```\n", False, [(4, "Keep")]),
        ("# what a\n# card has\nturned_card = 1\n", True, [(2, "card"), (3, "card")]),
        ("class OldRoadMap: ...\n", True, [(1, "road")]),
        ("discard = broadcast = production = besides = 1\n", True, []),
        ("# it lies\n# on the CPU\n", True, [(1, "lie on")]),
        ("a model card, and a card\n", False, [(1, "card")]),
        ("class ModelCard: ...\n", True, [(1, "card")]),
    ],
)
def test_names_are_found_in_code_and_words_anywhere(text: str, python: bool, expected: list[tuple[int, str]]) -> None:
    assert former_words(text, python=python, allowed=["model card"]) == expected
