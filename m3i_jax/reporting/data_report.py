"""The data report as text for the console; `data_page` makes the page."""

from collections.abc import Mapping
from typing import Any

from m3i_jax import privacy
from m3i_jax.reporting import text_table

DataReport = Mapping[str, Any]
# titles of the histograms that count objects
OBJECT_SIDE, OBJECT_CLASS = "side of an object, pixels", "class of objects"


def format_share(part: float, total: float) -> str:
    """Returns a share in per cent, with two or three significant digits.

    >>> format_share(1, 3), format_share(1, 30000), format_share(5, 5), format_share(0, 0)
    ('33.3 %', '0.0033 %', '100 %', '-')
    """
    if not total:
        return "-"
    value = 100 * part / total
    if value in (0, 100):
        return f"{value:.0f} %"
    return f"{value:.1f} %" if value >= 0.1 else f"{value:.2g} %"


def format_rate(value: float) -> str:
    """Returns a rate with three significant digits.

    >>> format_rate(1234.5), format_rate(56.78), format_rate(0.1234)
    ('1,234', '56.8', '0.123')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def report_facts(report: DataReport) -> list[tuple[str, str]]:
    """Returns (name, value) of the facts at the top of the report."""
    source, sample, counts = report["source"], report["sample"], report["pictures"]
    examined, good = counts["looked_at"], counts["usable"]
    sizes, captions, categories = report["sizes"], report["captions"], report["categories"]
    annotated, whole = has_annotations_alone(report), sample["whole"]
    among = examined_scope(report)
    rows = [
        ("records", f"{source['records']:,}, of which {source['held_out']:,} are held out"),
        (
            "examined",
            "all" if whole else f"{examined:,}, evenly spread: {sample['rule']}",
        ),
        ("usable", f"{good:,} ({format_share(good, examined)}); bad: {counts['bad']:,}"),
        *([] if annotated else _label_facts(report)),
        ("formats", ", ".join(f"{n:,} {kind}" for kind, n in counts["formats"]) or "-"),
        (
            "bytes a record",
            text_table.format_bytes(counts["bytes"] / examined) if examined else "-",
        ),
        (
            "median size",
            f"{sizes['median_width']} x {sizes['median_height']} pixels (width x height)",
        ),
    ]
    if not annotated and (categories["in_source"] or categories["used"]):
        empty, dropped = len(categories["empty"]), categories["dropped"]
        rows.append(
            (
                "categories",
                f"{categories['used']:,} used of {categories['in_source']:,}; images in each"
                f"{among}: {categories['smallest']:,} to {categories['largest']:,}, median"
                f" {categories['median']:g}; entropy as of {categories['effective']:g} equal ones"
                + (f"; {empty:,} have no image{'' if whole else ' there'}" if empty else "")
                + (f"; {dropped:,} labels dropped" if dropped else ""),
            )
        )
    if "median" in captions:
        cut = (
            f"{captions['truncated']:,} ({format_share(captions['truncated'], captions['count'])})"
        )
        rows.append(
            (
                "caption length",
                f"median {captions['median']} tokens, 95 % up to {captions['percentile_95']},"
                f" longest {captions['longest']:,}; {cut} are cut at {captions['limit'] - 2};"
                f" {captions['different']:,} different ones",
            )
        )
    rows += annotation_facts(report)
    rows.append(("duplicates", _duplicate_fact(report)))
    return rows


def examined_scope(report: DataReport) -> str:
    """Returns in words that counts are those of a sample; "" if all records were examined.

    >>> report = {"sample": {"whole": False}, "pictures": {"looked_at": 1000}}
    >>> examined_scope(report | {"source": {"records": 50_000}})
    ' among 1,000 of 50,000 records'
    """
    if report["sample"]["whole"]:
        return ""
    return f" among {report['pictures']['looked_at']:,} of {report['source']['records']:,} records"


def _duplicate_fact(report: DataReport) -> str:
    """What is known of duplicates. A sample has few of the pairs of its source: its counts are
    lower bounds."""
    twice, among = report["duplicates"], examined_scope(report)
    both, labels = twice["in_both_parts"], twice["with_several_labels"]
    share = f"({format_share(twice['records'], report['pictures']['usable'])}) "
    least = "at least " if among else ""
    keys = twice.get("keys_in_both_parts", 0)
    return (
        f"{least}{twice['records']:,} {'' if among else share}have the bytes of another one"
        + (f"; {least}{both:,} images are both trained on and held out" if both else "")
        + (f"; {least}{labels:,} have several labels" if labels else "")
        + (f"; found{among}" if among else "")
        + (f"; of all records, {keys:,} keys are in both parts" if keys else "")
    )


def has_annotations_alone(report: DataReport) -> bool:
    """Returns whether images have objects or maps, and none has a label or a caption.

    >>> has_annotations_alone({"pictures": {"with_label": 0, "with_caption": 0}})
    False
    """
    counts = report["pictures"]
    labels = counts["with_label"] or counts["with_caption"]
    return any(report.get("annotations", {}).values()) and not labels


def _label_facts(report: DataReport) -> list[tuple[str, str]]:
    counts, good = report["pictures"], report["pictures"]["usable"]
    return [
        (
            "with a label",
            f"{counts['with_label']:,} ({format_share(counts['with_label'], good)})",
        ),
        (
            "with a caption",
            f"{counts['with_caption']:,} ({format_share(counts['with_caption'], good)})",
        ),
        ("with neither", f"{counts['with_neither']:,}"),
    ]


def annotation_facts(report: DataReport) -> list[tuple[str, str]]:
    """Returns (name, value) of the facts about objects and maps; [] if there are none.

    >>> annotation_facts({})
    []
    """
    annotations, rows = report.get("annotations", {}), []
    if objects := annotations.get("objects"):
        count, images = objects["objects"], objects["images"]
        without, over = objects["without_mask"], objects["objects_over"]
        sizes = ", ".join(
            f"{n:,} {name} ({format_share(n, count)})" for name, n in objects["sizes"]
        )
        rows += [
            (
                "objects",
                f"{count:,} in {images:,} images: {objects['mean']:g} an image, at most"
                f" {objects['most']:,}; {objects['without_object']:,} images have none"
                f" ({format_share(objects['without_object'], images)}), crowds:"
                f" {objects['crowds']:,}",
            ),
            ("sizes of objects", f"{sizes}; limits 32 x 32 and 96 x 96 pixels"),
            (
                "classes of objects",
                f"{len(objects['table']):,}: {objects['frequent']:,} in more than 100 of the"
                f" examined images, {objects['common']:,} in 11 to 100, {objects['rare']:,} in 1 to"
                f" 10, {len(objects['empty']):,} in none",
            ),
            (
                "masks",
                f"{without:,} objects have none ({format_share(without, count)})"
                + (f"; {objects['damaged']:,} are damaged" if objects["damaged"] else ""),
            ),
            (
                "truncated",
                f"{over:,} objects of {objects['images_over']:,} images are beyond"
                f" dense.geometry.max_objects={objects['max_objects']:,}",
            ),
        ]
    if maps := annotations.get("maps"):
        rows.append(
            (
                "class maps",
                f"{maps['images']:,} of {len(maps['table']):,} classes,"
                f" {maps['classes_per_image']:g} in an image;"
                f" {format_share(maps['unlabelled'], 1)} of the pixels are unlabelled; images"
                f" without a labelled pixel: {maps['all_unlabelled']:,}, with one class:"
                f" {maps['one_class']:,}; classes that are in none: {len(maps['empty']):,}",
            )
        )
    counted = report.get("speed", {}).get("counted", {})
    if rows and any(counted.values()):
        texts = [f"{n:,} {name.replace('_', ' ')}" for name, n in counted.items() if n]
        rows.append(
            ("in batches", f"of {report['speed']['samples']:,} samples: {', '.join(texts)}")
        )
    return rows


def feeding_lines(report: DataReport) -> tuple[str, list[tuple[str, str, str, str]]]:
    """Returns a paragraph with what was measured and assumed, and rows of (chip, peak, images a
    second that it needs, number of chips that this machine feeds)."""
    speed, feeds = report["speed"], report["feeds"]
    if speed.get("refused"):
        return f"No run can train on these data: {speed['refused']}", []
    if not speed["pipeline"]:
        return "The speed was not measured: it needs two usable images.", []
    size = feeds["image_size"]
    sample = f"two views of {size} pixels, mask, caption"
    if not feeds.get("views", True):
        sample = f"resizing and cropping to {size} pixels with annotations"
    cost = text_table.format_figures(feeds["flops_per_image"] / 1e9)
    text = (
        f"One core decodes {format_rate(speed['decode'])} images a second and prepares"
        f" {format_rate(speed['pipeline'])} samples a second (decoding, {sample}), measured on"
        f" {speed['images']:,} images"
        f" in memory. With all {speed['cores']} cores, {cost} GFLOP"
        f" an image (counted) and chips at {feeds['mfu']:.0%} of their peak (assumed):"
    )
    rows = [
        (chip, f"{peak / 1e12:,.0f} TFLOP/s", format_rate(wants), format_rate(fed))
        for chip, peak, wants, fed in feeds["chips"]
    ]
    return text, rows


def report_text(report: DataReport) -> str:
    """Returns the report for a console: facts, histograms, bad records, duplicates, speed."""
    parts = [
        report["source"]["description"],
        text_table.text_table(report_facts(report), ("of the source", "")),
    ]
    for title, bars in histogram_lines(report):
        unit, total = histogram_unit(title, report)
        bins = [
            (
                _name(label),
                f"{n:,}",
                format_share(n, total),
                "#" * round(30 * n / max(m for _, m in bars)),
            )
            for label, n in bars
        ]
        parts.append(text_table.text_table(bins, (title, unit, "share", "")))
    if report["bad"]:
        rows = [
            (
                row["reason"],
                f"{row['count']:,}",
                "; ".join(_name(key) for key, _ in row["examples"]),
            )
            for row in report["bad"]
        ]
        parts.append(text_table.text_table(rows, ("bad", "records", "such as")))
    if report["duplicates"]["examples"]:
        parts.append(
            "same bytes: "
            + "; ".join(" = ".join(map(_name, keys)) for keys in report["duplicates"]["examples"])
        )
    sentence, chips = feeding_lines(report)
    parts.append(sentence)
    if chips:
        parts.append(
            text_table.text_table(
                chips, ("chip", "peak", "images/s it needs", "chips this machine feeds")
            )
        )
    return "\n\n".join(parts)


def _name(text: str) -> str:
    """A name from the data, with control characters and line ends escaped."""
    return privacy.escape_control(text, line=True)


def histogram_lines(report: DataReport, most: int = 12) -> list[tuple[str, list[tuple[str, int]]]]:
    """Returns (title, bars) of every histogram that is not empty; of many categories only the
    largest and smallest.

    >>> bars = [(str(i), 9 - i) for i in range(9)]
    >>> report = {"sizes": {"short_side": [], "aspect": []}, "captions": {}}
    >>> shown = histogram_lines(report | {"categories": {"table": bars}}, most=4)
    >>> [label for label, _ in shown[0][1]]
    ['0', '1', '7', '8']
    """
    table = report["categories"]["table"]
    cut = table if len(table) <= most else [*table[: most - most // 2], *table[-(most // 2) :]]
    title = (
        "category"
        if len(table) <= most
        else f"category ({most - most // 2} largest, {most // 2} smallest)"
    )
    annotations = report.get("annotations", {})
    objects, maps = annotations.get("objects", {}), annotations.get("maps", {})
    histograms = [
        ("short side, pixels", report["sizes"]["short_side"]),
        ("width : height", report["sizes"]["aspect"]),
        ("caption, tokens", report["captions"].get("tokens", [])),
        (title, cut),
        ("objects per image", objects.get("per_image", [])),
        (OBJECT_SIDE, objects.get("sides", [])),
        *_class_bars(OBJECT_CLASS, objects.get("table", []), 1, most),
        *_class_bars("class of maps", maps.get("table", []), 2, most),
    ]
    return [(title, list(bars)) for title, bars in histograms if any(n for _, n in bars)]


def histogram_unit(title: str, report: DataReport) -> tuple[str, int]:
    """Returns what a histogram counts, and how many there are of it; those without a bar are among
    them.

    >>> report = {"pictures": {"usable": 9}, "annotations": {"objects": {"objects": 7}}}
    >>> histogram_unit("width : height", report), histogram_unit(OBJECT_SIDE, report)
    (('images', 9), ('objects', 7))
    """
    if title.startswith((OBJECT_SIDE, OBJECT_CLASS)):
        return "objects", report["annotations"]["objects"]["objects"]
    return "images", report["pictures"]["usable"]


def _class_bars(
    title: str, table: list[tuple[Any, ...]], column: int, most: int
) -> list[tuple[str, list[tuple[str, int]]]]:
    """Bars of the classes with the largest and smallest numbers in a column of a table."""
    rows = sorted(((row[0], row[column]) for row in table), key=lambda row: -row[1])
    if len(rows) > most:
        title = f"{title} ({most - most // 2} largest, {most // 2} smallest)"
        rows = [*rows[: most - most // 2], *rows[-(most // 2) :]]
    return [(title, rows)]
