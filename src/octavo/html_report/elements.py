"""The elements of a self-contained HTML page: style, sections, tables, escaped text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from octavo.reporting import printable, shown

POLICY = "default-src 'none'; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --page: #fbfaf7; --ink: #23272e; --dim: #6a7079; --line: #e0ddd5;
  --card: #ffffff; --train: #2f6f9f; --held: #c2571a; --good: #2e7d4f; --bad: #b3264a; }
@media (prefers-color-scheme: dark) { :root { --page: #15171b; --ink: #e3e5e9; --dim: #969ca6;
  --line: #30343b; --card: #1c1f24; --train: #6cb2e6; --held: #f0a35e;
  --good: #74c795; --bad: #f0839f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 4rem; background: var(--page);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .75rem; }
h3 { font-size: .95rem; margin: 0 0 .4rem; }
.lead { font-size: 1.1rem; color: var(--dim); margin: .5rem 0 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.1rem;
  overflow-x: auto; }
.card + .card { margin-top: 1rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17.5rem, 100%), 1fr)); gap: 1rem; }
.pair .card + .card { margin-top: 0; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .85rem; color: var(--dim); }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .4em; }
svg { display: block; width: 100%; height: auto; margin-top: .4rem; font: 12px system-ui, sans-serif; }
svg text { fill: var(--dim); }
.grid { stroke: var(--line); }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.dots { fill: none; stroke-width: 3.5; stroke-linecap: round; opacity: .4; }
.tight { padding: .3rem 1.1rem; }
.tight td:first-child { min-width: 9rem; }
.facts td:first-child { color: var(--dim); white-space: nowrap; width: 1%; padding-right: 2rem; }
table { border-collapse: collapse; width: 100%; overflow-wrap: break-word; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .45rem .9rem .45rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--dim); white-space: nowrap; }
th.number, td.number { text-align: right; white-space: nowrap; padding-right: 0; padding-left: .9rem; }
tbody tr:last-child td { border-bottom: 0; }
tr.total td { font-weight: 600; border-top: 2px solid var(--line); }
pre { margin: 0; white-space: pre-wrap; font: .85rem/1.5 ui-monospace, monospace; }
.prompt { color: var(--dim); }
details { margin-top: 1rem; } summary { cursor: pointer; color: var(--dim); margin-bottom: .6rem; }
ul { margin: 0; padding-left: 1.1rem; } li + li { margin-top: .3rem; }
.bars { fill: none; stroke-width: 1.5; } .ring { fill: none; stroke-width: 2; }
.caption { font-size: .85rem; color: var(--dim); margin: .5rem 0 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(13rem, 100%), 1fr)); gap: .8rem;
  margin-top: 1.4rem; }
.figure { background: var(--card); border: 1px solid var(--line); border-top: 3px solid var(--line);
  border-radius: 10px; padding: .8rem 1rem; }
.figure span { display: block; font-size: .82rem; color: var(--dim); }
.figure b { display: block; font-size: 1.3rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
.figure.better { border-top-color: var(--good); } .figure.worse { border-top-color: var(--bad); }
article + article { margin-top: 1.6rem; } article > p { margin: 0 0 .5rem; white-space: pre-wrap; }
section > h3 { margin: 1.4rem 0 .6rem; } section > .card + .card { margin-top: 1rem; }
.folded > summary { font-size: 1.15rem; font-weight: 600; color: var(--ink); }
@media (max-width: 30rem) { body { padding: 1.5rem .8rem 3rem; } .tight td:first-child { min-width: 5.5rem; }
  table { font-size: .8rem; } th, td { padding-right: .5rem; } th { white-space: normal; }
  th.number { white-space: normal; } th.number, td.number { padding-left: .5rem; } .tight { padding: .3rem .7rem; }
  .figures { grid-template-columns: 1fr 1fr; gap: .6rem; } .figure { padding: .6rem .7rem; }
  .figure b { font-size: 1.05rem; } svg { overflow: visible; }
  svg.large { min-width: 0 !important; font-size: 28px; } }
@page { margin: 1.5cm; }
@media print { :root { --page: #fff; --card: #fff; --ink: #111; --dim: #555; --line: #ccc; --train: #1f6fa8;
  --held: #b8541a; --good: #2a7d4f; --bad: #b03052; }
  body { max-width: none; padding: 0; font-size: 10pt; line-height: 1.4; }
  .legend i, .figure { print-color-adjust: exact; }
  .card { overflow: visible; padding: .5rem .7rem; } .tight { padding: .1rem .7rem; }
  tr, p, .card:has(svg), .pair .card, .figure { break-inside: avoid; }
  h2 { break-after: avoid; margin: 1.3rem 0 .5rem; }
  svg { min-width: 0 !important; max-height: 7cm; } table { font-size: 8pt; } th { white-space: normal; }
  th, td { overflow-wrap: anywhere; padding: .2rem .5rem .2rem 0; } pre { font-size: 7.5pt; line-height: 1.35; }
  .figures { grid-template-columns: repeat(4, 1fr); gap: .5rem; } .figure { padding: .4rem .6rem; }
  .figure b { font-size: 1.1rem; } .pair { grid-template-columns: repeat(3, 1fr); gap: .5rem; }
  details .card > pre { columns: 2; }
  details::details-content { content-visibility: visible; block-size: auto; } }
"""


def page(title: str, parts: Iterable[str], *, style: str = "") -> str:
    """The HTML document of some parts, without those that are empty. `title` and `parts` are HTML, `style` is CSS."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def section(title: str, body: str) -> str:
    """A section with a heading; "" without a body, which is HTML."""
    return f"<section>\n<h2>{text(title)}</h2>\n{body}\n</section>" if body else ""


def folded(title: str, body: str) -> str:
    """A section that is closed until its heading is chosen; "" without a body."""
    return f'<details class="folded">\n<summary>{text(title)}</summary>\n{body}\n</details>' if body else ""


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, text_columns: int, total: bool = False) -> str:
    """A table of any values; the first `text_columns` are aligned left. `total`: the last row is a sum."""
    rows = list(rows)

    def cells_of(tag: str, cells: Sequence[object]) -> str:
        css_classes = ["" if index < text_columns else ' class="number"' for index in range(len(cells))]
        return "".join(
            f"<{tag}{css_class}>{text(cell)}</{tag}>" for css_class, cell in zip(css_classes, cells, strict=True)
        )

    css_class = "tight" if columns else "tight facts"
    header = f"<thead><tr>{cells_of('th', columns)}</tr></thead>" if columns else ""
    row_tags = ["<tr>" for _ in rows]
    if total:
        row_tags[-1] = '<tr class="total">'
    body = "".join(f"{open_row}{cells_of('td', row)}</tr>" for open_row, row in zip(row_tags, rows, strict=True))
    return f'<div class="card {css_class}"><table>{header}<tbody>{body}</tbody></table></div>'


def text(value: object) -> str:
    """A value as escaped HTML text; numbers are formatted."""
    return escape(printable(value) if isinstance(value, str) else shown(value))
