"""What of an HTML page is boilerplate, and what is text."""

from __future__ import annotations

import pytest

from octavo.data.markup import page_of_html


@pytest.mark.parametrize(
    ("html", "text", "removed"),
    [
        ("<nav><a>Home</a></nav><p>a</p>", "a", {"navigation block": 1}),
        ("<div role='navigation'>no</div>a", "a", {"navigation block": 1}),
        ("<p>a</p><aside>no<div>no</div></aside>b", "a\n\nb", {"aside": 1}),
        ("<blockquote>a<footer>source</footer></blockquote><footer>no</footer>", "a\nsource", {"page footer": 1}),
        ("<div class='cookie-banner'>no<div>no</div></div>a", "a", {"cookie banner": 1}),
        ("<div id='CookieConsent'><p>no</p></div>a", "a", {"cookie banner": 1}),
        ("<div class='cookie recipes'>Bake.</div>a", "Bake.\na", {}),
        ("<script>no</script><style>no</style>a", "a", {"script": 1, "style sheet": 1}),
        ("<div hidden>no</div>a", "a", {"hidden passage": 1}),
        ("a<span class='pagenum'>[Pg 7]</span>b", "ab", {"page number": 1}),
        ("<div id='toc'><ul><li>no</ul></div>a", "a", {"table of contents": 1}),
        ("<nav>kept, since it is not closed<p>a</p>", "kept, since it is not closed\n\na", {}),
        ("<nav>only navigation</nav>", "only navigation", {}),
        ("word<a href='#fn1' class='footnote-ref'><sup>1</sup></a>.", "word.", {"footnote mark": 1}),
        ("word<sup><a href='#x'>[12]</a></sup>.", "word.", {"footnote mark": 1}),
        ("see <a href='#note'>the note on tides</a> 2<sup>10</sup>", "see the note on tides 210", {}),
        ("chapter <a href='#c'>1</a>", "chapter 1", {}),
    ],
)
def test_boilerplate_is_removed_and_counted(html: str, text: str, removed: dict[str, int]) -> None:
    page = page_of_html(html)
    assert (page.text, page.removed) == (text, removed)


def test_footnotes_are_apart_without_their_marks() -> None:
    html = (
        "<p>a<a href='#n1' role='doc-noteref'>1</a></p><aside role='doc-footnote' id='n1'><p>One.</p></aside>"
        "<p>b</p><section class='footnotes'><ol><li id='fn2'>Two.<a href='#fnref2'>↩︎</a></li></ol></section>"
    )
    page = page_of_html(html)
    assert (page.text, page.notes) == ("a\n\nb", "One.\n\nTwo.")
    assert page.removed == {"footnote mark": 2}
