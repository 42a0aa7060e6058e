"""Building blocks of the HTML reports: one file with style and images inside it, without scripts or
external resources, readable on a phone, light or dark. Text from data, names and settings is
escaped."""

import base64
import html as escaping
import re
from collections.abc import Sequence

from m3i_jax import privacy

STYLE = """
:root { --paper: #fcfcfa; --ink: #26282c; --muted: #6d7078; --rule: #e4e4e0; --bar: #4676b2;
  --bad: #b4442f; --card: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17181a; --ink: #e6e6e2; --muted: #9b9ea6; --rule: #313338; --bar: #6c9bd8;
  --bad: #e58671; --card: #1f2124; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.25rem 1rem 3rem; background: var(--paper);
  color: var(--ink);
  font: 16px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .6rem; }
h3 { font-size: .95rem; margin: 0 0 .5rem; font-weight: 600; }
p { margin: .4rem 0; } .muted { color: var(--muted); } .bad { color: var(--bad); }
.big { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem;
  margin: 1.1rem 0; }
.big div { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: .6rem .8rem; }
.big b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; }
.big span { color: var(--muted); font-size: .85rem; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .3rem 1rem;
  margin: 0; }
dt { color: var(--muted); } dd { margin: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1.75rem 2.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; overflow-wrap: break-word; }
th { text-align: left; font-weight: 600; color: var(--muted); border-bottom: 1px solid var(--rule);
  padding: .25rem .5rem .25rem 0; }
td { padding: .2rem .5rem .2rem 0; vertical-align: top; }
.number { text-align: right; } td.number { white-space: nowrap; }
.bars td { border: 0; padding-block: .12rem; } .bars td:first-child { width: 8.5rem; }
.bars .number { width: 4rem; color: var(--muted); }
.bar { height: .95rem; background: var(--bar); border-radius: 0 3px 3px 0; min-width: 1px;
  margin-top: .2rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr));
  gap: 1rem .8rem; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr));
  gap: 1rem 2rem; }
.pairs > div { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; }
figure { margin: 0; } figcaption { font-size: .8rem; line-height: 1.35; margin-top: .3rem; }
figure img { display: block; width: 100%; height: 8.5rem; object-fit: contain;
  background: var(--card); border: 1px solid var(--rule);
  border-radius: 6px; }
.key { color: var(--muted); }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .9rem; }
nav a { color: var(--bar); }
"""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render_page(title: str, body: Sequence[str], style: str = "") -> str:
    """Returns the HTML document.

    Args:
      title: plain text.
      body: HTML, already escaped.
      style: more CSS rules.

    >>> render_page("a < b", ["<h1>c</h1>"]).count("a &lt; b")
    1
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport"'
        ' content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy"'
        f' content="{_POLICY}"><title>{escape_html(title)}</title>'
        f"<style>{STYLE}{style}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def with_toc(body: Sequence[str], after: int) -> list[str]:
    """Returns a body with links to its headings (h2) after the first `after` parts.

    >>> with_toc(["<h1>a</h1>", "<h2>b</h2>"], after=1)
    ['<h1>a</h1>', '<nav><a href="#s1">b</a></nav>', '<h2 id="s1">b</h2>']
    """
    names: list[str] = []

    def name(match: re.Match[str]) -> str:
        names.append(match[1])
        return f'<h2 id="s{len(names)}">{match[1]}</h2>'

    named = [re.sub(r"<h2>(.*?)</h2>", name, part) for part in body]
    links = "".join(f'<a href="#s{number}">{title}</a>' for number, title in enumerate(names, 1))
    return [*named[:after], f"<nav>{links}</nav>", *named[after:]]


def escape_html(value: object) -> str:
    """Escape a value for HTML text and attributes; control characters are escaped too, for pages
    that are read in a terminal.

    >>> escape_html('<img src="x">'), escape_html("\\x1b[2J")
    ('&lt;img src=&quot;x&quot;&gt;', '\\\\x1b[2J')
    """
    return escaping.escape(privacy.escape_control(str(value)))


def headline(numbers: Sequence[tuple[str, str]]) -> str:
    """Returns HTML with numbers in boxes: (number, description).

    >>> headline([("7", "records")])
    '<div class="big"><div><b>7</b><span>records</span></div></div>'
    """
    return (
        '<div class="big">'
        + "".join(
            f"<div><b>{escape_html(n)}</b><span>{escape_html(what)}</span></div>"
            for n, what in numbers
        )
        + "</div>"
    )


def definition_list(rows: Sequence[tuple[str, str]]) -> str:
    """Returns a list of terms and definitions.

    >>> definition_list([("seed", "0")])
    '<dl><dt>seed</dt><dd>0</dd></dl>'
    """
    return (
        "<dl>"
        + "".join(f"<dt>{escape_html(k)}</dt><dd>{escape_html(v)}</dd>" for k, v in rows)
        + "</dl>"
    )


def html_table(headers: Sequence[str], rows: Sequence[Sequence[str]], numeric: int) -> str:
    """Returns an HTML table; columns from `numeric` on are aligned right.

    >>> html_table(("chip", "peak"), [("v5e", "197")], numeric=1).count("class=number")
    2
    """

    def line(cells: Sequence[str], tag: str) -> str:
        return (
            "<tr>"
            + "".join(
                f"<{tag}{' class=number' if i >= numeric else ''}>{escape_html(c)}</{tag}>"
                for i, c in enumerate(cells)
            )
            + "</tr>"
        )

    lines = line(headers, "th") + "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>{lines}</table></div>'


def embed_image(content: bytes, alt: str, kind: str = "png") -> str:
    """Returns an image inside the page.

    >>> embed_image(b"\\x00", "nothing")
    '<img alt="nothing" src="data:image/png;base64,AA==">'
    """
    return (
        f'<img alt="{escape_html(alt)}"'
        f' src="data:image/{kind};base64,{base64.b64encode(content).decode("ascii")}">'
    )
