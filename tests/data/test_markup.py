"""Markup is not learned as text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.data.formats import entries
from octavo.data.markup import REFUSED, text_of_html
from octavo.errors import DataError


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<html><head><title>T</title></head><body><p>The tide came in.</p></body></html>", "The tide came in."),
        ("<title>T</title><p>no body</p>", "no body"),
        ("<head><title>T</title><p>an open head", "an open head"),
        ("<p>one<p>two<br>three<div>four</div>five", "one\n\ntwo\nthree\nfour\nfive"),
        ("a  <b>bold\n word</b>, &amp; &eacute;&#8212;&lt;b&gt;", "a bold word, & é—<b>"),
        ("<p>x</p><script>if (a < b) { '</p>' }</script><style>p {}</style><!-- no --><p>y</p>", "x\n\ny"),
        ("<pre>  a\n    b\n</pre><p>c</p>", "a\n    b\n\nc"),
        ("<ul><li>one</li><li>two</li></ul>", "one\ntwo"),
        ("<table><tr><td>a</td><td>b</td></tr><tr><td>c</td><td>d</td></tr></table>", "a\tb\nc\td"),
        ("<svg><text>no</text></svg>seen<img alt='no'>", "seen"),
        ("<div><div><p>deep</p></div></div><template>no</template></b></p>", "deep"),
        ("", ""),
    ],
)
def test_a_page_is_what_a_reader_sees(html: str, text: str) -> None:
    assert text_of_html(html) == text


@given(
    st.lists(
        st.sampled_from(["<p>", "</p>", "<b>", "</div>", "<pre>", "<head>", "<", ">", "&", " ", "\n", "word", "<!"])
    )
)
def test_any_page_gives_its_words_without_tags(parts: list[str]) -> None:
    text = text_of_html("".join(parts))
    assert "<p>" not in text
    assert "\n\n\n" not in text
    assert text == text.strip()


@pytest.mark.parametrize("name", ["a.html", "a.HTM", "a.xhtml", "page", "a.asp"])
def test_html_is_read_as_text_by_its_name_or_its_beginning(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\n<!DOCTYPE html>\n<html><body><p>The tide came in.</p></body></html>")
    assert [entry.value for entry in entries(tmp_path / name)] == ["The tide came in."]


def test_html_in_a_text_file_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<html>a lesson</html>")
    assert [entry.value for entry in entries(tmp_path / "a.txt")] == ["<html>a lesson</html>"]


@pytest.mark.parametrize("ending", REFUSED)
def test_other_markup_that_is_named_is_refused(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a{ending}").write_text("The tide")
    with pytest.raises(DataError, match=r"not plain text.*\n.*Convert"):
        list(entries(tmp_path / f"a{ending}"))


def test_rtf_is_known_by_its_beginning(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(r"{\rtf1\ansi The tide}")
    with pytest.raises(DataError, match="is RTF, not text"):
        list(entries(tmp_path / "a.txt"))
