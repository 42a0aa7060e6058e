"""The page of --mode=curate: what was left out and why, with images."""

from collections.abc import Mapping, Sequence
from typing import Any

from m3i_jax.reporting import html_page
from m3i_jax.reporting.data_report import format_share
from m3i_jax.reporting.html_page import escape_html as _text

Example = Sequence[Mapping[str, Any]]  # an image that is left out, then the one that stays


def curation_page_html(report: Mapping[str, Any], examples: Mapping[str, Sequence[Example]]) -> str:
    """The HTML page.

    Args:
      report: content of `curate.json`.
      examples: of each reason, images that are left out, each with the one for which it is, if
        there is one: "jpeg" (bytes, or None if there is no image), "key" and "note".

    >>> image = {"jpeg": b"", "key": "<a>", "note": "9 x 9"}
    >>> report = {"source": "s", "records": 2, "kept": 1, "left_out": {"a copy": 1}, "rules": {}}
    >>> "&lt;a&gt;" in curation_page_html(report, {"a copy": [[image]]})
    True
    """
    total, left_out = report["records"], report["left_out"]
    numbers = [
        (f"{total:,}", "records"),
        (format_share(report["kept"], total), "kept"),
        *((format_share(count, total), reason) for reason, count in left_out.items()),
    ]
    rows = [(reason, f"{n:,}", format_share(n, total)) for reason, n in left_out.items()]
    body = [
        f"<h1>Curation: {_text(report['source'])}</h1>",
        f"<p class=muted>{_text(report.get('description', ''))}</p>",
        html_page.headline(numbers),
        html_page.definition_list([(name, str(v)) for name, v in report["rules"].items()]),
        "<h2>Left out</h2>" + html_page.html_table(("reason", "records", "share"), rows, numeric=1),
    ]
    quantiles = [
        (name, records, *(f"{value:,.3g}" for value in values))
        for name, parts in report.get("scores", {}).items()
        for records, values in parts.items()
    ]
    if quantiles:
        columns = ("score", "records", "least", "1 %", "10 %", "median", "90 %", "99 %", "most")
        body.append("<h2>Scores</h2>" + html_page.html_table(columns, quantiles, numeric=2))
    for reason, shown in examples.items():
        note = "" if len(shown) == left_out[reason] else f": {len(shown)} of {left_out[reason]:,}"
        pairs = any(len(example) > 1 for example in shown)
        blocks = ["".join(map(_figure, example)) for example in shown]
        figures = "".join(f"<div>{block}</div>" if pairs else block for block in blocks)
        kind = "pictures pairs" if pairs else "pictures"
        body.append(f'<h2>{_text(reason)}{note}</h2><div class="{kind}">{figures}</div>')
    return html_page.render_page(f"Curation: {report['source']}", body)


def _figure(image: Mapping[str, Any]) -> str:
    shown = html_page.embed_image(image["jpeg"], image["key"], "jpeg") if image["jpeg"] else ""
    caption = f'{_text(image["note"])}<br><span class="key">{_text(image["key"])}</span>'
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"
