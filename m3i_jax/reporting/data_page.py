"""The report of a source as one HTML file: pictures and style are inside it, nothing is fetched and nothing runs, so it can be mailed, and
read on a phone. Everything that comes from the data is escaped."""

import base64
import html as escaping
from collections.abc import Mapping, Sequence
from typing import Any

from m3i_jax.reporting import data_report
from m3i_jax.reporting.data_report import Report, share

Picture = Mapping[str, Any]
LONGEST = 160  # characters of a caption on the page

STYLE = """
:root { --paper: #fcfcfa; --ink: #26282c; --muted: #6d7078; --rule: #e4e4e0; --bar: #4676b2; --bad: #b4442f; --card: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17181a; --ink: #e6e6e2; --muted: #9b9ea6; --rule: #313338; --bar: #6c9bd8; --bad: #e58671; --card: #1f2124; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.25rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .6rem; }
h3 { font-size: .95rem; margin: 0 0 .5rem; font-weight: 600; }
p { margin: .4rem 0; } .muted { color: var(--muted); } .bad { color: var(--bad); }
.big { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; margin: 1.1rem 0; }
.big div { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: .6rem .8rem; }
.big b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; }
.big span { color: var(--muted); font-size: .85rem; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .3rem 1rem; margin: 0; }
dt { color: var(--muted); } dd { margin: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.75rem 2.5rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--muted); border-bottom: 1px solid var(--rule); padding: .25rem .5rem .25rem 0; }
td { padding: .2rem .5rem .2rem 0; vertical-align: top; } .number { text-align: right; white-space: nowrap; }
.bars td { border: 0; padding-block: .12rem; } .bars td:first-child { width: 8.5rem; } .bars .number { width: 4rem; color: var(--muted); }
.bar { height: .95rem; background: var(--bar); border-radius: 0 3px 3px 0; min-width: 1px; margin-top: .2rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 1rem .8rem; }
figure { margin: 0; } figcaption { font-size: .8rem; line-height: 1.35; margin-top: .3rem; }
figure img { display: block; width: 100%; height: 8.5rem; object-fit: contain; background: var(--card); border: 1px solid var(--rule);
  border-radius: 6px; }
.key { color: var(--muted); }
"""


def html(report: Report, *, pictures: Sequence[Picture], twins: Sequence[Sequence[Picture]]) -> str:
    """The page.

    Args:
      report: as `data.json` holds it.
      pictures: examples, each with "jpeg" (bytes), "key", "size", "label" and "caption".
      twins: for some duplicates, two or more of such examples.
    """
    source, sample = report["source"], report["sample"]
    looked, good = report["pictures"]["looked_at"], report["pictures"]["usable"]
    fed = report["feeds"]["chips"] and report["speed"]["pipeline"]
    numbers = [
        (f"{source['records']:,}", "records"),
        (share(good, looked), "usable" + ("" if sample["whole"] else f" of {looked:,} looked at")),
        (share(report["pictures"]["with_label"], good), "have a label"),
        (share(report["pictures"]["with_caption"], good), "have a caption"),
        (share(report["duplicates"]["records"], good), "are duplicates"),
        (data_report.rate(fed) if fed else "-", "samples a second a core"),
    ]
    sentence, chips = data_report.feeding(report)
    body = [
        f"<h1>{_text(source['name'])}</h1><p class=muted>{_text(source['description'])}</p>",
        '<div class="big">' + "".join(f"<div><b>{_text(n)}</b><span>{_text(what)}</span></div>" for n, what in numbers) + "</div>",
        "<dl>" + "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in data_report.facts(report)) + "</dl>",
        "<h2>Pictures</h2>" + (_pictures(pictures) or "<p>There is no usable picture.</p>"),
        '<h2>Distributions</h2><div class="charts">'
        + "".join(_bars(title, bars, good) for title, bars in data_report.histograms(report, 24))
        + "</div>",
        "<h2>Bad records</h2>" + _bad(report),
        "<h2>Duplicates</h2>" + _twins(report, twins),
        f"<h2>Speed of this machine</h2><p>{_text(sentence)}</p>"
        + (_table(("chip", "peak", "asks for pictures/s", "fed by this machine"), chips, numeric=1) if chips else ""),
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>Data: {_text(source["name"])}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _text(value: object) -> str:
    return escaping.escape(str(value))


def _bars(title: str, bars: Sequence[tuple[str, int]], whole: int) -> str:
    most = max(n for _, n in bars)
    rows = "".join(
        f'<tr title="{_text(label)}: {n:,} ({share(n, whole)})"><td>{_text(label)}</td>'
        f'<td><div class="bar" style="width:{100 * n / most:.1f}%"></div></td><td class="number">{n:,}</td></tr>'
        for label, n in bars
    )
    return f'<section><h3>{_text(title)}</h3><table class="bars">{rows}</table></section>'


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], numeric: int) -> str:
    """Columns from `numeric` on are set flush right."""

    def line(cells: Sequence[str], tag: str) -> str:
        return (
            "<tr>" + "".join(f"<{tag}{' class=number' if i >= numeric else ''}>{_text(c)}</{tag}>" for i, c in enumerate(cells)) + "</tr>"
        )

    return "<table>" + line(headers, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _picture(picture: Picture) -> str:
    source = "data:image/jpeg;base64," + base64.b64encode(picture["jpeg"]).decode("ascii")
    caption = picture["caption"] if len(picture["caption"]) <= LONGEST else picture["caption"][:LONGEST].rstrip() + "…"
    lines = [f"<b>{_text(picture['label'])}</b>"] if picture["label"] else []
    lines += [_text(caption)] if caption else []
    lines.append(f'<span class="key">{_text(picture["key"])} · {_text(picture["size"])}</span>')
    alt = _text(picture["label"] or picture["key"])
    return f'<figure><img alt="{alt}" src="{source}"><figcaption>{"<br>".join(lines)}</figcaption></figure>'


def _pictures(pictures: Sequence[Picture]) -> str:
    return '<div class="pictures">' + "".join(map(_picture, pictures)) + "</div>" if pictures else ""


def _bad(report: Report) -> str:
    if not report["bad"]:
        return f"<p>None of {report['pictures']['looked_at']:,}.</p>"
    looked, out = report["pictures"]["looked_at"], []
    for row in report["bad"]:
        examples = "".join(f"<li>{_text(key)} <span class=muted>{_text(detail)}</span></li>" for key, detail in row["examples"])
        out.append(f"<p><b class=bad>{_text(row['reason'])}</b>: {row['count']:,} ({share(row['count'], looked)})</p><ul>{examples}</ul>")
    return "".join(out)


def _twins(report: Report, twins: Sequence[Sequence[Picture]]) -> str:
    count, scope = report["duplicates"], "" if report["sample"]["whole"] else " among the records that were looked at"
    if not count["records"]:
        return f"<p>No two pictures have the same bytes{scope}.</p>"
    told = (
        f"{count['groups']:,} pictures occur more than once{scope}, {count['records']:,} records too many; of these pictures "
        f"{count['with_several_labels']:,} have several labels, {count['in_both_parts']:,} are both trained on and held out."
    )
    return f"<p>{told}</p>" + _pictures([picture for group in twins for picture in group])
