"""The reports of --mode=data and --mode=curate as one HTML file each, see `html_page`."""

from collections.abc import Mapping, Sequence
from typing import Any

from m3i_jax.reporting import data_report, html_page
from m3i_jax.reporting.data_report import DataReport, format_share
from m3i_jax.reporting.html_page import escape_html as _text

Thumbnail = Mapping[str, Any]
LONGEST = 160  # characters of a caption on the page
Example = Sequence[Mapping[str, Any]]  # an image that is left out, then the one that stays


def data_page_html(
    report: DataReport, *, images: Sequence[Thumbnail], twins: Sequence[Sequence[Thumbnail]]
) -> str:
    """Returns the HTML page.

    Args:
      report: content of `data.json`.
      images: example images, each with "jpeg" (bytes), "key", "size", "label" and "caption".
      twins: groups of duplicates, each of two or more such examples.
    """
    source, sample = report["source"], report["sample"]
    examined, good = report["pictures"]["looked_at"], report["pictures"]["usable"]
    fed = report["feeds"]["chips"] and report["speed"]["pipeline"]
    numbers = [
        (f"{source['records']:,}", "records"),
        (
            format_share(good, examined),
            "usable" + ("" if sample["whole"] else f" of {examined:,} examined"),
        ),
        *_annotated(report),
        _duplicate_number(report),
        (data_report.format_rate(fed) if fed else "-", "samples a second a core"),
    ]
    sentence, chips = data_report.feeding_lines(report)
    body = [
        f"<h1>{_text(source['name'])}</h1><p class=muted>{_text(source['description'])}</p>",
        html_page.headline(numbers),
        html_page.definition_list(data_report.report_facts(report)),
        "<h2>Images</h2>" + (_image_list(images) or "<p>No usable image.</p>"),
        '<h2>Distributions</h2><div class="charts">'
        + "".join(
            _bars(title, bars, data_report.histogram_unit(title, report)[1])
            for title, bars in data_report.histogram_lines(report, 24)
        )
        + "</div>",
        "<h2>Bad records</h2>" + _bad(report),
        "<h2>Duplicates</h2>" + _twins(report, twins),
        f"<h2>Speed of this machine</h2><p>{_text(sentence)}</p>"
        + (
            html_page.html_table(
                ("chip", "peak", "images/s it needs", "chips this machine feeds"), chips, numeric=1
            )
            if chips
            else ""
        ),
    ]
    return html_page.render_page(f"Data: {source['name']}", body)


def _duplicate_number(report: DataReport) -> tuple[str, str]:
    count, among = report["duplicates"]["records"], data_report.examined_scope(report)
    if among:
        return f"≥ {count:,}", f"are duplicates, found{among}"
    return format_share(count, report["pictures"]["usable"]), "are duplicates"


def _annotated(report: DataReport) -> list[tuple[str, str]]:
    """The shares of images with labels and captions, or with objects or maps."""
    good = report["pictures"]["usable"]
    if not data_report.has_annotations_alone(report):
        return [
            (format_share(report["pictures"]["with_label"], good), "have a label"),
            (format_share(report["pictures"]["with_caption"], good), "have a caption"),
        ]
    objects, maps = (report["annotations"][name] for name in ("objects", "maps"))
    numbers = []
    if objects:
        numbers += [
            (format_share(objects["images"] - objects["without_object"], good), "show an object"),
            (f"{objects['mean']:g}", "objects an image"),
        ]
    if maps:
        numbers += [
            (format_share(1 - maps["unlabelled"], 1), "of the pixels have a class"),
            (f"{maps['classes_per_image']:g}", "classes of the map an image"),
        ]
    return numbers


def _bars(title: str, bars: Sequence[tuple[str, int]], total: int) -> str:
    most = max(n for _, n in bars)
    rows = "".join(
        f'<tr title="{_text(label)}: {n:,}'
        f' ({format_share(n, total)})"><td>{_text(label)}</td><td><div class="bar"'
        f' style="width:{100 * n / most:.1f}%"></div></td><td class="number">{n:,}</td></tr>'
        for label, n in bars
    )
    return f'<section><h3>{_text(title)}</h3><table class="bars">{rows}</table></section>'


def _image_item(image: Thumbnail) -> str:
    caption = (
        image["caption"]
        if len(image["caption"]) <= LONGEST
        else image["caption"][:LONGEST].rstrip() + "…"
    )
    lines = [f"<b>{_text(image['label'])}</b>"] if image["label"] else []
    lines += [_text(caption)] if caption else []
    lines.append(f'<span class="key">{_text(image["key"])} · {_text(image["size"])}</span>')
    shown = html_page.embed_image(image["jpeg"], image["label"] or image["key"], "jpeg")
    return f"<figure>{shown}<figcaption>{'<br>'.join(lines)}</figcaption></figure>"


def _image_list(images: Sequence[Thumbnail]) -> str:
    return '<div class="pictures">' + "".join(map(_image_item, images)) + "</div>" if images else ""


def _bad(report: DataReport) -> str:
    if not report["bad"]:
        return f"<p>None of {report['pictures']['looked_at']:,}.</p>"
    examined, out = report["pictures"]["looked_at"], []
    for row in report["bad"]:
        examples = "".join(
            f"<li>{_text(key)} <span class=muted>{_text(detail)}</span></li>"
            for key, detail in row["examples"]
        )
        out.append(
            f"<p><b class=bad>{_text(row['reason'])}</b>: {row['count']:,}"
            f" ({format_share(row['count'], examined)})</p><ul>{examples}</ul>"
        )
    return "".join(out)


def _twins(report: DataReport, twins: Sequence[Sequence[Thumbnail]]) -> str:
    count, scope = report["duplicates"], data_report.examined_scope(report)
    if not count["records"]:
        return f"<p>No two images have the same bytes{scope}.</p>"
    summary = (
        f"{count['groups']:,} images occur more than once{scope}, {count['records']:,} records are"
        f" duplicates; of these images {count['with_several_labels']:,} have several labels,"
        f" {count['in_both_parts']:,} are both trained on and held out."
    )
    return f"<p>{summary}</p>" + _image_list([image for group in twins for image in group])


def curation_page_html(report: Mapping[str, Any], examples: Mapping[str, Sequence[Example]]) -> str:
    """Returns the HTML page.

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
        figures = f"<div class=pairs>{figures}</div>" if pairs else figures
        kind = "" if pairs else ' class="pictures"'
        body.append(f"<h2>{_text(reason)}{note}</h2><div{kind}>{figures}</div>")
    return html_page.render_page(f"Curation: {report['source']}", body)


def _figure(image: Mapping[str, Any]) -> str:
    shown = html_page.embed_image(image["jpeg"], image["key"], "jpeg") if image["jpeg"] else ""
    caption = f'{_text(image["note"])}<br><span class="key">{_text(image["key"])}</span>'
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"
