"""Markup is not read as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.data import html_tokens
from octavo.data.formats import raw_records
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
        ("<table><tr><td></td><td>b</td></tr>\n<tr><td>c</td> <td></td> <td>d</td></tr></table>", "\tb\nc\t\td"),
        ("<tr><td><p>a</p></td><td>b</td></tr><tr><td><p>c</p></td><td><p>d</p></td></tr>e", "a\tb\nc\td\ne"),
        ("<tr><td><p>a</p><p>b</p></td><td>c</td></tr>", "a\n\nb\n\nc"),
        ("<p>Let <math><mi>x</mi><annotation>TeX</annotation></math> be.</p>", "Let x be."),
        ("<p>a</p><select><p>b", "a\n\nb"),
        ("<p>a</p><iframe src=x><p>b", "a\n\nb"),
        ("<title>T<p>b", "T\n\nb"),
        ("a<svg><select></svg>b", "ab"),
        ("a<svg><svg></svg>no</svg>b", "ab"),
        ("<TITLE>a</p></TITLE ><b title='>' class=\"</b>\">c</b>", "c"),
        ("<p title=it's>a</p>b<i x='>c", "a\n\nbc"),
        ("<!-- a > b -->c<!-->d<!---->e<!-- f", "cde f"),
        ("<?xml version='1.0'?><!DOCTYPE html>a</ b>c<script/>d", "acd"),
        ("a <b 3 < 4 <", "a <b 3 < 4 <"),
        ("a<script>no", "a"),
        ("&#" + "9" * 5000 + ";&#65;", "\ufffdA"),
    ],
)
def test_the_text_of_a_page_is_its_visible_text(html: str, text: str) -> None:
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


class Counted(str):
    """A string that counts the characters that searches in it read."""

    looked_at = 0

    def find(self, part: str, start: int = 0, end: int | None = None) -> int:  # type: ignore[override]
        position = super().find(part, start)
        self.looked_at += (position if position >= 0 else len(self)) - start
        return position


@pytest.mark.parametrize(
    "html",
    [
        *("<a " * 2000, '<a b="' * 2000, "<a b='\"" * 2000, "<!--" * 2000, "<" * 2000, "</" * 2000, "<a" * 2000),
        *("<svg>" * 2000 + "</p>" * 2000, "<svg><select></p>" * 2000, '<a b="<i>"' * 2000, "<a =" * 2000 + ">"),
        *("<title>" * 2000, "<title></title>" * 2000, "<iframe><title>" * 2000 + "</iframe>", "<!-- -- >" * 2000),
        *("<? " * 2000, "<![CDATA[" * 2000, "<a\t" * 2000 + "'", "<p>" * 2000 + "</pre>" * 2000, "<td>" * 2000),
    ],
)
def test_searches_read_no_page_more_than_a_few_times(monkeypatch: pytest.MonkeyPatch, html: str) -> None:
    page = Counted(html)
    for name in ("_tag_end", "_closing"):
        search = getattr(html_tokens, name)

        def counted(text: str, *where: Any, search: Any = search) -> int:
            position: int = search(text, *where)
            page.looked_at += (position if position >= 0 else len(page)) - where[-1]
            return position

        monkeypatch.setattr(html_tokens, name, counted)
    text_of_html(page)
    assert page.looked_at <= 24 * len(page)  # four passes


def test_white_space_in_a_page_takes_linear_time() -> None:
    """Not an assertion on time: a quadratic version took minutes."""
    assert text_of_html("<pre>a" + "\t" * 1_000_000 + "x" + " " * 1_000_000 + "\ny</pre>").endswith("x\ny")


@pytest.mark.parametrize("name", ["a.html", "a.HTM", "a.xhtml", "page", "a.asp"])
def test_html_is_recognized_by_its_suffix_or_its_first_tag(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\n<!DOCTYPE html>\n<html><body><p>The tide came in.</p></body></html>")
    assert [record.value for record in raw_records(tmp_path / name)] == ["The tide came in."]


@pytest.mark.parametrize(
    "before", ["<!-- a\n-->\n", "<?xml version='1.0'?>\n", "\ufeff<!--a--> <?xml version='1.0'?><!--b-->"]
)
@pytest.mark.parametrize("begin", ["<!DOCTYPE html><html>", "<HTML lang='en'>"])
def test_html_is_recognized_after_comments_and_declarations(tmp_path: Path, before: str, begin: str) -> None:
    (tmp_path / "page").write_text(f"{before}{begin}<body><p>The tide</p></body></html>")
    assert [record.value for record in raw_records(tmp_path / "page")] == ["The tide"]


@pytest.mark.parametrize("rest", ["<book/>", "<!DOCTYPE svg><svg/>", "<!-- open"])
def test_xml_is_recognized_by_its_first_bytes(tmp_path: Path, rest: str) -> None:
    (tmp_path / "page").write_text(f"<?xml version='1.0'?>\n{rest}")
    with pytest.raises(DataError, match="is XML, not plain text"):
        list(raw_records(tmp_path / "page"))


def test_html_in_a_text_file_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<html>a lesson</html>")
    assert [record.value for record in raw_records(tmp_path / "a.txt")] == ["<html>a lesson</html>"]


@pytest.mark.parametrize("ending", REFUSED)
def test_files_with_other_markup_suffixes_are_refused(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a{ending}").write_text("The tide")
    with pytest.raises(DataError, match=r"not plain text.*\n.*Convert"):
        list(raw_records(tmp_path / f"a{ending}"))


def test_rtf_is_recognized_by_its_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(r"{\rtf1\ansi The tide}")
    with pytest.raises(DataError, match="is RTF, not text"):
        list(raw_records(tmp_path / "a.txt"))
