"""reStructuredText and front matter."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.data.documents import ReadOptions, read
from octavo.data.extract.front_matter import front_matter


def opened(path: Path, text: str, **options: str) -> tuple[list[str], dict[str, int]]:
    path.write_text(text, encoding="utf-8")
    reading = read([str(path)], ReadOptions(**options))  # type: ignore[arg-type]
    return [document.text for document in reading.documents], dict(reading.removed.get(str(path), {}))


@pytest.mark.parametrize(
    ("rst", "text"),
    [
        ("Title\n=====\n\nOne\nline.\n", "Title\n\nOne line."),
        ("=====\nTitle\n=====\n:Author: A\n:Date: 1\n   2\n\nText.\n", "Title\n\nText."),
        ("Some *word*, **bold**, ``co*de`` and 2 * 3 * 4.", "Some word, bold, co*de and 2 * 3 * 4."),
        (
            "A `link <http://x.y>`_, `same`_, word_ and :ref:`role`, :doc:`text </a>`.",
            "A link, same, word and role, text.",
        ),
        ("Escaped \\*star\\*, a\\ b and |sub|.", "Escaped *star*, ab and sub."),
        ("A note [1]_ here.\n\n.. [1] The *note*\n   goes on.\n\nEnd.", "A note here.\n\nEnd.\n\nThe note goes on."),
        ("a\n\n.. image:: b.png\n   :alt: no\n\n.. comment\n   more\n\n.. _target: http://x\n\nb", "a\n\nb"),
        (".. note:: Be *careful*.\n\n   Really.\n\nx", "Be careful.\n\nReally.\n\nx"),
        (".. code:: python\n   :name: n\n\n   a = *b*\n     c\n\nx", "a = *b*\n  c\n\nx"),
        ("Code::\n\n    a\n      b\n\nx", "Code:\n\na\n  b\n\nx"),
        ("| verse one\n| verse two\n  goes on\n|\n| three\n", "verse one\nverse two goes on\n\nthree"),
        ("+---+---+\n| a | b |\n+===+===+\n| c | d |\n|   | e |\n+---+---+\n", "a\tb\nc\td e"),
        ("=====  =====\na      b\n=====  =====\nc      d\n       e\n=====  =====\n\nx", "a\tb\nc\td e\n\nx"),
        ("- one\n- two\n  more\n\n1. three", "one\n\ntwo more\n\n1. three"),
        ("a\n\n-----\n\nb", "a\n\nb"),
    ],
)
def test_markup_becomes_the_text_that_it_displays(tmp_path: Path, rst: str, text: str) -> None:
    assert opened(tmp_path / "a.rst", rst)[0] == [text]


def test_no_directive_opens_a_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    rst = "a\n\n.. include:: secret\n\n.. raw:: html\n   :file: secret\n\n.. literalinclude:: secret\n\nb"
    assert opened(tmp_path / "a.rst", rst) == (
        ["a\n\nb"],
        {"directive of include": 1, "directive of raw": 1, "directive of literalinclude": 1},
    )


@pytest.mark.parametrize(
    ("head", "is_front_matter"),
    [
        ("---\ntitle: A\ntags:\n- x\n- y\nlong: >\n  text\n\n# c\n---\n", True),
        ("---\ntitle: A\n...\n", True),
        ("\ufeff---\r\ntitle: A\r\n---\r\n", True),
        ('+++\ntitle = "A"\n[extra]\nx = [\n  1,\n]\n+++\n', True),
        ("---\n\nA line of text.\n\n---\n", False),
        ("---\nWord: then text\nof a paragraph.\n---\n", False),
        ("---\ntitle: A\n", False),
        ("---\n---\n", False),
        ("text\n---\ntitle: A\n---\n", False),
        ("", False),
    ],
)
def test_front_matter_is_settings_between_fences(tmp_path: Path, head: str, is_front_matter: bool) -> None:
    assert front_matter(head.encode() + b"Text.\n") == (len(head.encode()) if is_front_matter else 0)
    texts, removed = opened(tmp_path / "a.md", head + "Text.\n")
    assert removed == ({"front matter": 1} if is_front_matter else {})
    assert texts[0].strip() == (
        "Text." if is_front_matter else (head.lstrip("\ufeff") + "Text.").replace("\r", "").strip()
    )


def test_front_matter_is_no_document_of_a_file_that_is_split(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    assert opened(path, "---\ntitle: A\n---\none\n\ntwo\n", split_on="lines")[0] == ["one", "two"]
    assert [document.line for document in read([str(path)], ReadOptions(split_on="lines")).documents] == [4, 6]
