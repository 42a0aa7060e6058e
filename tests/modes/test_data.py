"""--mode=data on a folder with known contents: every value of the report, and a self-contained
page."""

import html.parser
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from m3i_jax import schema
from m3i_jax.data import dataset_scan, dataset_stats
from m3i_jax.data.sources.folder import FolderSource
from m3i_jax.errors import UnreadableError
from m3i_jax.modes import data
from m3i_jax.parallel.chips import CHIPS
from m3i_jax.reporting import data_page, data_report
from tests import broken, toy


@pytest.fixture(scope="module")
def survey(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str, str, dict[str, str]]:
    """(report, page, console, reasons of the broken files) of 24 good images, 22 broken ones and
    two copies."""
    folder, directory = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("run")
    reasons = broken.fill(folder, good=24)
    (folder / "b" / "copy<i>.png").write_bytes((folder / "a" / "0000.png").read_bytes())
    (folder / "b" / "copy<i>.txt").write_text("<script>alert(1)</script> " + "long " * 40)
    (folder / "a" / "copy.png").write_bytes((folder / "a" / "0002.png").read_bytes())
    encoder = schema.Encoder(patch_size=16, width=32, depth=1, heads=2)
    small = schema.Model(
        encoder=encoder,
        decoder=schema.Decoder(width=32, depth=1, heads=2),
        pool=schema.Pool(width=32, heads=2),
        text=schema.Text(width=32, depth=1, heads=2, embed=32),
    )
    source = schema.Data(
        source="folder",
        path=str(folder),
        image_size=32,
        holdout=0.25,
        caption_length=16,
        vocabulary_size=300,
    )
    config = schema.Config(data=source, model=small, train=schema.Train(batch_size=8, steps=10))
    patch = pytest.MonkeyPatch()
    patch.setattr(data.dataset_scan.measure_speed, "__kwdefaults__", {"seconds": 0.05})
    printed: list[str] = []
    patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
    try:
        assert data.run(config, workdir=str(directory)) == 0
    finally:
        patch.undo()
    return (
        json.loads((directory / "data.json").read_text()),
        (directory / "data.html").read_text(),
        "\n".join(printed),
        reasons,
    )


def test_the_counts_are_exact(survey):
    report, _, console, reasons = survey
    images = report["pictures"]
    assert (
        report["source"]["records"] == images["looked_at"] == 24 + 22 + 2
        and report["sample"]["whole"]
    )
    assert (images["usable"], images["bad"]) == (26, 22)
    assert (images["with_label"], images["with_caption"], images["with_neither"]) == (
        26,
        25,
        0,
    )
    assert images["formats"] == [["PNG", 26]]
    wanted = {reason: list(reasons.values()).count(reason) for reason in set(reasons.values())}
    assert {row["reason"]: row["count"] for row in report["bad"]} == wanted
    assert all(reasons[key] == row["reason"] for row in report["bad"] for key, _ in row["examples"])
    assert report["sizes"]["short_side"] == [["32-63", 26]] and report["sizes"]["aspect"] == [
        ["10:9-4:3", 26]
    ]
    assert (
        report["categories"]["table"] == [["a", 13], ["b", 13]]
        and report["categories"]["effective"] == 2.0
    )
    captions = report["captions"]
    assert (captions["count"], captions["limit"], captions["truncated"]) == (
        25,
        16,
        1,
    ) and captions["different"] == 25
    twice = report["duplicates"]
    assert (twice["records"], twice["groups"], twice["with_several_labels"]) == (2, 2, 1)
    assert {frozenset(keys) for keys in twice["examples"]} == {
        frozenset({"a/0000.png", "b/copy<i>.png"}),
        frozenset({"a/0002.png", "a/copy.png"}),
    }
    for part in (
        "26 (54.2 %); bad: 22",
        "2 (7.7 %) have the bytes of another one",
        "truncated",
        "h100",
    ):
        assert part in console


def test_speed_and_chips(survey):
    report = survey[0]
    speed, feeds = report["speed"], report["feeds"]
    assert feeds["mfu"] == schema.Report().mfu
    assert {kind: peak for kind, peak, *_ in feeds["chips"]} == {
        kind: chip.peak for kind, chip in CHIPS.items()
    }
    assert speed["decode"] > speed["pipeline"] > 10 and speed["images"] == 26
    for _, peak, wants, fed in feeds["chips"]:
        assert wants == pytest.approx(peak * feeds["mfu"] / feeds["flops_per_image"])
        assert fed == pytest.approx(speed["pipeline"] * speed["cores"] / wants)


def test_model_flops_do_not_depend_on_remat():
    plain = data.chips_fed(toy.settings(objective__forms="supervised"), toy.VOCABULARY, 100.0)
    again = toy.settings(
        objective__forms="supervised", model__remat="full", train__microbatches=2, report__mfu=0.5
    )
    made = data.chips_fed(again, toy.VOCABULARY, 100.0)
    assert made["flops_per_image"] == plain["flops_per_image"] and made["mfu"] == 0.5
    assert [row[3] for row in made["chips"]] == pytest.approx(
        [row[3] * plain["mfu"] / 0.5 for row in plain["chips"]]
    )


def test_a_missing_file_is_reported_with_data_missing_replace(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(broken.encode(broken.smooth(20, 20 + i), "PNG"))
    source, kept = FolderSource(str(tmp_path)), schema.Data(missing="replace")
    seen = dataset_scan.scan_records(source, range(3), threads=1)
    (tmp_path / "1.png").unlink()
    with pytest.raises(UnreadableError):
        dataset_scan.scan_records(source, range(3), threads=1)
    found = dataset_scan.scan_records(source, range(3), threads=1, missing="replace")
    assert [(s.index, s.reason) for s in found] == [
        (0, ""),
        (1, "unreadable"),
        (2, ""),
    ] and "1.png' cannot be read" in found[1].detail
    assert [row["key"] for row in data._examples(source, seen, kept)] == ["0.png", "2.png"]


class Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed_text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.feed_text += data


def test_the_page_needs_no_other_files(survey):
    report, page, _, _ = survey
    seen = Page()
    seen.feed(page)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in seen.tags}
    assert not [
        a
        for _, a in seen.tags
        for name, value in a.items()
        if name in ("src", "href") and not value.startswith("data:image/jpeg;base64,")
    ]
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]*", "", page).replace("http-equiv", "")
    # examples, and two of each of two duplicates
    assert sum(tag == "img" for tag, _ in seen.tags) == data.EXAMPLES + 4
    assert "<script>alert(1)</script>" in seen.feed_text and "b/copy<i>.png" in seen.feed_text
    assert f"{report['source']['records']:,}" in seen.feed_text and ("name", "viewport") in {
        x for _, a in seen.tags for x in a.items()
    }


def test_a_large_source_is_sampled_evenly_and_deterministically():
    assert dataset_scan.spread_indices(10**9, 5) == [
        0,
        200_000_000,
        400_000_000,
        600_000_000,
        800_000_000,
    ]
    assert data.spread_items(list(range(10)), 20) == list(range(10))


def test_what_a_sample_has_is_not_said_of_its_source(survey):
    """Two records of a pair are rarely in one sample: the counts are lower bounds."""
    report = survey[0]
    twice = report["duplicates"] | {"in_both_parts": 1, "keys_in_both_parts": 7}
    sampled = report | {
        "source": report["source"] | {"records": 50_000},
        "sample": {"whole": False, "rule": "every one"},
        "duplicates": twice,
    }
    facts, whole = dict(data_report.report_facts(sampled)), dict(data_report.report_facts(report))
    assert facts["duplicates"] == (
        "at least 2 have the bytes of another one; at least 1 images are both trained on and held"
        " out; at least 1 have several labels; found among 48 of 50,000 records; of all records, 7"
        " keys are in both parts"
    )
    assert "images in each among 48 of 50,000 records: 13 to 13" in facts["categories"]
    assert whole["duplicates"].startswith("2 (7.7 %) have") and "among" not in str(whole)
    pages = [data_page.data_page_html(r, images=(), twins=()) for r in (sampled, report)]
    assert "<b>≥ 2</b><span>are duplicates, found among 48 of 50,000 records</span>" in pages[0]
    assert "<b>7.7 %</b><span>are duplicates</span>" in pages[1]
    assert "occur more than once among 48 of 50,000 records" in pages[0]


def test_keys_of_both_parts_are_compared_without_reading_images(tmp_path):
    parts = []
    for part, names in (("train", "abc"), ("test", "bcd")):
        (tmp_path / part).mkdir()
        for name in names:
            (tmp_path / part / f"{name}.png").write_bytes(b"no image")
        parts.append(FolderSource(str(tmp_path / part)))
    assert data.shared_keys(*parts) == 2
    assert data.shared_keys(["a"], ["b"]) == 0  # their keys would be numbers alone
    for part in ("train", "test"):
        (tmp_path / part / "a.png").unlink(missing_ok=True)
        (tmp_path / part / "00.png").write_bytes(b"no image")
    numbered = [FolderSource(str(tmp_path / part)) for part in ("train", "test")]
    assert data.shared_keys(*numbered) == 0


def test_both_parts_are_read_in_order():
    class Part(list):
        name, classes, captions = "x (train)", (), False

    both = dataset_scan.ConcatSource(Part("abc"), Part("de"))
    assert (
        len(both) == 5
        and both.__getitems__([0, 2, 3, 4]) == ["a", "c", "d", "e"]
        and both[4] == "e"
        and both.name == "x"
    )


def test_duplicates_across_the_parts_are_counted():
    def seen(index: int, content: bytes) -> dataset_scan.RecordInfo:
        return dataset_scan.RecordInfo(
            index, str(index), "PNG", 5, content, "", "", 20, 20, -1, None
        )

    made = dataset_stats.dataset_stats(
        [seen(0, b"x"), seen(1, b"y"), seen(2, b"x"), seen(3, b"y"), seen(4, b"y"), seen(5, b"z")],
        classes=(),
        kept=0,
        length=8,
        ids=None,
        held_out=range(3, 6),
    )
    twice = made["duplicates"]
    assert (twice["records"], twice["groups"], twice["in_both_parts"]) == (3, 2, 1)
    assert twice["examples"] == [["1", "3", "4"], ["0", "2"]]
    assert made["categories"]["table"] == [] and made["captions"] == {
        "used": False,
        "count": 0,
        "limit": 8,
    }


def test_a_source_without_readable_records_is_reported(tmp_path):
    seen = [
        dataset_scan.inspect_record(i, dataset_scan.base.Record(str(i), b"<html>"))
        for i in range(3)
    ]
    made = dataset_stats.dataset_stats(seen, classes=("a",), kept=1, length=8, ids=len)
    assert (
        made["pictures"]["usable"] == 0
        and made["sizes"]["short_side"] == []
        and made["categories"]["empty"] == ["a"]
    )
    assert dataset_scan.measure_speed(schema.Config(), [], None, None) == dataset_scan.ReadSpeed(
        0.0, 0.0, 0
    )


def test_thumbnails_are_upright_and_small():
    import io

    exif = Image.Exif()
    exif[0x0112] = 6
    content = broken.encode(np.zeros((600, 300, 3), np.uint8), "JPEG", exif=exif)
    with Image.open(
        io.BytesIO(dataset_scan.thumbnail(dataset_scan.base.Record("a", content)))
    ) as image:
        assert image.size == (160, 80) and image.format == "JPEG"


def test_bins_hold_every_value():
    values = np.concatenate([np.arange(0, 5000), [10**6]])
    bars = dataset_stats.histogram(values.tolist(), dataset_stats.SIDES)
    assert (
        sum(n for _, n in bars) == len(values)
        and bars[0] == ("below 32", 32)
        and bars[1] == ("32-63", 32)
    )
    assert bars[-1] == ("4096 and more", 5000 - 4096 + 1)
    assert dataset_stats.histogram([], dataset_stats.SIDES) == []
    assert pathlib.Path(dataset_stats.__file__).is_file()
