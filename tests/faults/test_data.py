"""Rows C1 to C7: bad images, captions, labels and files. Whatever their content, batches keep their
shape, order and counts."""

import html
import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import tarfile
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from m3i_jax.data import decode, pipeline, tokenizer
from m3i_jax.data.sources import base
from m3i_jax.data.sources.tars import TarSource
from m3i_jax.errors import UserError
from tests import broken
from tests.data.conftest import expected_stream, settings
from tests.faults.hostile import JPEG, PEAK, ROOT, tar


class Mixed:
    """Good images of one colour each, and every kind of bad file, evenly spread: record i is bad if
    it is a multiple of `every`."""

    name, classes, captions = "mixed", (), False

    def __init__(self, count: int, every: int) -> None:
        kinds = list(broken.bad_files().values())
        self.count = count
        self.bad = (
            {i: kinds[i // every % len(kinds)] for i in range(0, count, every)} if every else {}
        )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> base.Record:
        colour = np.full((20, 20, 3), (index % 256, index // 256, 0), np.uint8)
        return base.Record(str(index), self.bad[index][0] if index in self.bad else colour)


@pytest.mark.fast
@pytest.mark.row("C1")
@pytest.mark.parametrize("every", [pytest.param(100, marks=pytest.mark.slow), 5])
def test_bad_images_are_replaced_and_counted(every: int, trials) -> None:
    """1 % and 20 %, all 22 kinds: counts, order and pixels follow the rule, also the second
    time."""
    source = Mixed(22 * every if every > 50 else 440, every)
    reasons = {i: reason for i, (_, reason) in source.bad.items()}
    count = len(source) // 40 * 40
    used, skipped = expected_stream(source, reasons, count)
    assert set(source.bad.values()) == set(broken.bad_files().values())
    for _ in range(2):
        batches = pipeline.iterate_batches(settings(batch=40), source, None, start=0)
        views_of_batches = [next(batches)["views"] for _ in range(count // 40)]
        batches.close()
        assert {views.shape for views in views_of_batches} == {(40, 2, 32, 32, 3)}
        seen = np.concatenate(views_of_batches)[:, 0, 0, 0].astype(int)
        assert (seen[:, 0] + 256 * seen[:, 1]).tolist() == used
        for reason, number in skipped.items():
            assert trials.add(batches.skipped[reason] == number), (reason, batches.skipped, skipped)
    trials.figure = (
        f"{1 / every:.0%} bad: {sum(skipped.values())} bad images in {count:,} samples, all counted"
    )


@pytest.mark.slow
@pytest.mark.row("C1")
def test_a_whole_run_on_a_folder_that_is_one_fifth_broken(tmp_path: pathlib.Path) -> None:
    from tests.training import test_broken_folder

    test_broken_folder.test_a_run_on_a_folder_that_is_one_fifth_broken(tmp_path)


@pytest.mark.slow
@pytest.mark.row("C1")
def test_the_cost_of_bad_images(trials) -> None:
    """Processor seconds for the same samples with and without a fifth of bad files: reported, since
    no limit holds everywhere."""
    seconds = []
    for every in (0, 5):
        batches = pipeline.iterate_batches(settings(batch=40), Mixed(440, every), None, start=0)
        start = time.process_time()
        for _ in range(100):
            next(batches)
        seconds.append(time.process_time() - start)
        batches.close()
    trials.figure = (
        f"20 % bad take {seconds[1] / seconds[0]:.2f} times the processor of none, for images of 20"
        " pixels"
    )


@pytest.mark.fast
@pytest.mark.row("C2")
def test_too_many_bad_images_end_the_run_with_reasons_and_examples(trials) -> None:
    batches = pipeline.iterate_batches(
        settings(batch=50, max_bad_share=0.05), Mixed(440, 2), None, start=0
    )
    seen = 0
    with pytest.raises(UserError) as stop:
        while seen < 2 * pipeline.WINDOW:
            seen += len(next(batches)["label"])
    batches.close()
    message = str(stop.value)
    assert trials.add(seen < 2 * pipeline.WINDOW and "data.max_bad_share=0.05" in message)
    worst = max(batches.skipped, key=lambda reason: batches.skipped[reason])
    assert (
        f": {batches.skipped[worst]:,} {worst} (such as '" in message
        and message.count("such as") == 5
    )
    trials.figure = f"50 % bad: stopped after {seen:,} samples"


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


BOMBS = (
    PEAK
    + """
import json, pathlib, resource, sys, time
from m3i_jax.data import decode

folder = pathlib.Path(sys.argv[1])
decode.decode_image(folder.joinpath("first").read_bytes())  # so that libraries are loaded
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
for path in sorted(folder.glob("*.bomb")):
    content, before, start = path.read_bytes(), peak(), time.process_time()
    try:
        decode.decode_image(content)
        reason = ""
    except decode.BadRecord as error:
        reason = error.reason
    print(json.dumps([path.stem, reason, peak() - before, time.process_time() - start]))
"""
)


@pytest.mark.fast
@pytest.mark.row("C3")
def test_bombs_are_refused_by_their_header(trials, tmp_path: pathlib.Path) -> None:
    """In a process that may allocate 300 MB more than it has."""
    image = Image.fromarray(broken.smooth(40, 48))
    jpeg, gif = broken.encode(image, "JPEG"), broken.encode(image.quantize(16), "GIF")
    tall, png = Image.new("1", (17, 65_500)), broken.encode(image, "PNG")
    packed = zlib.compress(bytes(50_000_000))
    bombs = {
        "png_60k": (broken.png_header(60_000, 60_000), "too_large"),
        "png_400_million": (broken.encode(Image.new("1", (20_000, 20_000)), "PNG"), "too_large"),
        "jpeg_header": (
            jpeg.replace(jpeg[jpeg.index(b"\xff\xc0") + 5 :][:4], b"\xff\xdc\xff\xdc", 1),
            "too_large",
        ),
        "gif_frame": (gif[:6] + b"\xff\xff\xff\xff" + gif[10:], "too_large"),
        "bmp_header": (
            (lambda b: b[:18] + b"\x60\xea\0\0\x60\xea\0\0" + b[26:])(broken.encode(image, "BMP")),
            "too_large",
        ),
        "text_of_50_MB": (png[:33] + chunk(b"zTXt", b"a\0\0" + packed) + png[33:], "undecodable"),
        "profile_of_50_MB": (png[:33] + chunk(b"iCCP", b"a\0\0" + packed) + png[33:], None),
        "dot": (broken.encode(Image.new("RGB", (1, 1)), "PNG"), "too_small"),
        "line": (broken.encode(Image.new("RGB", (5000, 3)), "JPEG"), "too_small"),
        "tall_jpeg": (broken.encode(tall.convert("L"), "JPEG"), ""),
        "tall_png": (broken.encode(tall, "PNG"), ""),
    }
    (tmp_path / "first").write_bytes(jpeg)
    for name, (content, _) in bombs.items():
        (tmp_path / f"{name}.bomb").write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    results = {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}
    assert results.keys() == bombs.keys()
    for name, (reason, grown, _) in results.items():
        wanted = bombs[name][1]  # None: a profile is not applied, so that it may be passed over
        assert trials.add(reason == wanted or wanted is None) and trials.add(grown < 300 * 1024), (
            name,
            reason,
            grown,
        )
    refused = [seconds for reason, _, seconds in results.values() if reason]
    trials.figure = (
        f"most memory {max(g for _, g, _ in results.values()) / 1024:.0f} MB; a refusal takes at"
        f" most {1000 * max(refused):.0f} ms"
    )


@pytest.mark.slow
@pytest.mark.row("C3")
def test_memory_of_the_largest_images_that_are_accepted(trials, tmp_path: pathlib.Path) -> None:
    """64 million pixels of every mode: the bytes of the image and of its RGB, 4 a pixel, are in
    memory at once, and little else."""
    shapes = {"RGB": (8000, 8000, 3), "RGBA": (8000, 8000, 4), "L": (8000, 8000)}
    for mode, shape in shapes.items():
        (tmp_path / f"{mode}.bomb").write_bytes(
            broken.encode(np.full(shape, 7, np.uint8), "PNG", compress_level=1)
        )
    (tmp_path / "I;16.bomb").write_bytes(
        broken.encode(np.full((8000, 8000), 700, np.uint16), "PNG", compress_level=1)
    )
    (tmp_path / "first").write_bytes(JPEG)
    sizes = {}
    for path in sorted(tmp_path.glob("*.bomb")):
        alone = tmp_path / "alone"
        alone.mkdir(exist_ok=True)
        path.rename(alone / path.name)
        (alone / "first").write_bytes(JPEG)
        code = BOMBS.replace("resource.setrlimit", "lambda *_: resource.setrlimit")
        done = subprocess.run(
            [sys.executable, "-c", code, str(alone)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        (line,) = done.stdout.splitlines()
        sizes[path.stem] = json.loads(line)[2] / 1024
        assert json.loads(line)[1] == ""
        (alone / path.name).unlink()
    trials.figure = "64 million pixels take " + ", ".join(
        f"{mode} {size:.0f} MB" for mode, size in sizes.items()
    )
    for mode, size in sizes.items():
        assert trials.add(size < 800), (mode, size)


@pytest.mark.fast
@pytest.mark.row("C4")
def test_the_same_rgb_from_every_kind_of_file(trials) -> None:
    """Compared with the encoded array; lossy formats (JPEG, WebP) may differ by 2 of 255 on
    average."""
    rgb = broken.smooth(48, 64)
    image, gray = Image.fromarray(rgb), rgb[..., 0]
    alpha = np.dstack([rgb, np.full((48, 64), 255, np.uint8)])
    clear = np.dstack([rgb, np.zeros((48, 64), np.uint8)])
    palette = image.quantize(200)
    gray_rgb, white = np.repeat(gray[..., None], 3, 2), np.full_like(rgb, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = lambda **kw: broken.encode(image, "JPEG", quality=98, subsampling=0, **kw)
    cmyk = Image.fromarray(255 - np.dstack([rgb, np.full((48, 64), 255, np.uint8)]), "CMYK")
    cases = {
        "PNG": (broken.encode(image, "PNG"), rgb),
        "16-bit gray": (broken.encode(gray.astype(np.uint16) * 257, "PNG"), gray_rgb),
        "gray": (
            broken.encode(image.convert("L").point(lambda v: v), "PNG"),
            np.repeat(np.asarray(image.convert("L"))[..., None], 3, 2),
        ),
        "opaque": (broken.encode(alpha, "PNG"), rgb),
        "clear": (broken.encode(clear, "PNG"), white),
        "palette": (broken.encode(palette, "PNG"), np.asarray(palette.convert("RGB"))),
        "palette with alpha": (broken.encode(palette, "PNG", transparency=bytes(256)), white),
        "GIF": (broken.encode(palette, "GIF"), np.asarray(palette.convert("RGB"))),
        "BMP": (broken.encode(image, "BMP"), rgb),
        "TIFF": (broken.encode(image, "TIFF"), rgb),
        "lossless WebP": (broken.encode(image, "WEBP", lossless=True), rgb),
        "WebP": (broken.encode(image, "WEBP", quality=99), rgb),
        "JPEG": (wide(), rgb),
        "progressive JPEG": (wide(progressive=True), rgb),
        "gray JPEG": (
            broken.encode(image.convert("L"), "JPEG", quality=98),
            np.repeat(np.asarray(image.convert("L"))[..., None], 3, 2),
        ),
        "CMYK JPEG": (broken.encode(cmyk, "JPEG", quality=98, subsampling=0), rgb),
        "turned JPEG": (wide(exif=exif), np.rot90(rgb, -1)),
        "turned PNG": (broken.encode(image, "PNG", exif=exif), np.rot90(rgb, -1)),
    }
    errors = {}
    for name, (content, truth) in cases.items():
        got = decode.decode_image(content)
        assert got.shape == truth.shape and got.dtype == np.uint8, name
        errors[name] = float(np.abs(got.astype(int) - truth).mean())
        lossless = not any(kind in name for kind in ("JPEG", "WebP")) or name == "lossless WebP"
        assert trials.add(errors[name] <= (0 if lossless else 2)), (name, errors[name])
    trials.figure = (
        f"largest mean error {max(errors.values()):.2f} of 255"
        f" ({max(errors, key=lambda name: errors[name])}), lossless 0"
    )


CAPTIONS: list[str | bytes | None] = [
    None,
    "",
    b"",
    "   \n\t ",
    b"\0\0\0",
    "\u200b",
    b"\xff\xfe\xfd",
    b"caf\xe9 au lait",
    "a\0b",
    "\ud800 lone",
    "x" * 1_000_000,
    b"y" * 1_000_000,
    ("\u0634" * 50) + " right to left",
    "\u202e reversed",
    "emoji \U0001f600\U0001f468\u200d\U0001f469",
    "&lt;b&gt; entity",
    "&amp;amp;amp; many",
    "<script>alert(1)</script>",
    "<start> <end> <pad>",
    "<|endoftext|>",
    "a\r\nb",
    "\u00c3\u00a9 mojibake",
    "1" * 400,
    "\N{COMBINING ACUTE ACCENT}" * 300,
    "{caption}",
    "%s %d",
    "../../etc/passwd",
    "caption\x1b[2J",
    "\ufeffbom",
    "日本語の説明",
]
NOTHING = 5  # of them hold nothing that could be read


class Captioned:
    name, classes, captions = "captioned", (), True

    def __len__(self) -> int:
        return len(CAPTIONS)

    def __getitem__(self, index: int) -> base.Record:
        return base.Record(
            str(index), np.full((20, 20, 3), index, np.uint8), caption=CAPTIONS[index]
        )


@pytest.mark.fast
@pytest.mark.row("C5")
def test_captions_of_every_kind(trials) -> None:
    assert len(CAPTIONS) == 30
    words = tokenizer.train_tokenizer([c for c in CAPTIONS if c], 300, 12)
    batches = pipeline.iterate_batches(settings(batch=30), Captioned(), words, start=0)
    batch = next(batches)
    batches.close()
    empty, cut = 0, 0
    for row, index in enumerate(batches.record.tolist()):
        text = decode.clean_caption(CAPTIONS[index])
        ids = words.ids(text or "")
        empty, cut = empty + (text is None), cut + (len(ids) > 10)
        wanted = [words.start, *ids[:10], words.end] if text else []
        length = int(batch["length"][row])
        good = (
            batch["tokens"][row, :length].tolist() == wanted
            and not batch["tokens"][row, length:].any()
        )
        assert trials.add(good and (batch["tokens"][row] < words.vocabulary).all()), CAPTIONS[index]
        assert text is None or (
            "\0" not in text
            and "\n" not in text
            and text.encode()
            and html.unescape(text) is not None
        )
    assert sorted(batches.record.tolist()) == list(range(30))
    assert (empty, batches.noted["caption_cut"], (batch["length"] == 0).sum()) == (
        NOTHING,
        cut,
        NOTHING,
    ) and cut >= 8
    trials.figure = f"30 captions: {empty} empty, {cut} cut, none raised"


@pytest.mark.fast
@pytest.mark.row("C6")
def test_labels_of_every_kind(trials, tmp_path: pathlib.Path) -> None:
    """Missing, negative, fractional, text, beyond the classes: dropped and counted, never clamped
    to an existing class."""
    labels = [None, -1, 0, 1, 2, 3, 7, 10**12, 1.5, "2", True, [1], {"a": 1}]
    whole = {2: 0, 3: 1, 4: 2, 5: 3, 6: 7}  # place in the list -> category that is meant
    members = [
        m
        for i, label in enumerate(labels)
        for m in ((f"{i:02}.jpg", JPEG), (f"{i:02}.json", json.dumps({"label": label}).encode()))
    ]
    source = TarSource(tar(tmp_path / "0.tar", members))
    assert [source[i].label for i in range(len(labels))] == [
        whole.get(i, -1) for i in range(len(labels))
    ]
    assert source.ignored["labels that are not a category"] == 7
    batches = pipeline.iterate_batches(settings(batch=26, classes=3), source, None, start=0)
    batch = next(batches)
    batches.close()
    for row, index in enumerate(batches.record.tolist()):
        meant = whole.get(index, -1)
        assert trials.add(batch["label"][row] == (meant if meant < 3 else -1)), (
            index,
            batch["label"][row],
        )
    dropped = sum(whole.get(i, -1) >= 3 for i in batches.record.tolist())
    assert batches.counted() == {"data/label_dropped": dropped} and dropped > 0


@pytest.mark.fast
@pytest.mark.row("C7")
def test_broken_tars_give_what_is_whole(trials, tmp_path: pathlib.Path, caplog) -> None:
    """Truncated anywhere, any byte of a header changed, the same name twice: records are read as
    they were written, and the error names the file."""
    members = [(f"{i}.jpg", bytes([i]) * (300 + 700 * i)) for i in range(6)]
    path = pathlib.Path(tar(tmp_path / "in" / "0.tar", members))
    content, written = path.read_bytes(), dict(members)
    rng = np.random.default_rng(0)
    with tarfile.open(fileobj=io.BytesIO(content)) as whole:
        headers = [m.offset for m in whole]
    changed = {f"cut at {at}": content[:at] for at in rng.integers(1100, len(content), 40).tolist()}
    for at in [offset + int(rng.integers(0, 345)) for offset in headers[1:] for _ in range(12)]:
        changed[f"byte {at}"] = content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]
    for what, damaged in changed.items():
        path.write_bytes(damaged)
        caplog.clear()
        source = TarSource(str(path))
        got = {record.key: record.image for record in (source[i] for i in range(len(source)))}
        assert trials.add(all(written.get(f"{key}.jpg") == image for key, image in got.items())), (
            what
        )
        assert len(got) >= 5 or what.startswith("cut"), what
        assert len(got) == 6 or any(str(path) in message for message in caplog.messages), what
    path.write_bytes(content)
    twice = TarSource(
        tar(tmp_path / "in" / "1.tar", [*members, ("0.jpg", b"other"), ("0.png", b"another")])
    )
    assert (
        len(twice) == 6
        and twice[0].image == members[0][1]
        and twice.ignored["images with the key of an earlier one"] == 2
    )
    assert sorted(os.listdir(tmp_path)) == ["in"]
    trials.figure = f"{len(changed)} damaged tars, 0 crashes, 0 wrong bytes"


@pytest.mark.slow
@pytest.mark.row("C7")
def test_a_million_members(trials, tmp_path: pathlib.Path) -> None:
    one = tarfile.TarInfo("0000000.jpg").tobuf()
    with open(tmp_path / "0.tar", "wb") as out:
        for i in range(1_000_000):
            header = bytearray(one[:512])
            header[:11] = b"%07d.jpg" % i
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            out.write(header)
    code = (
        PEAK
        + "import sys\nfrom m3i_jax.data.sources.tars import TarSource\nfirst = peak()\nsource ="
        " TarSource(sys.argv[1])\n"
    )
    code += "print(len(source), source.key(999_999), peak() - first)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "0.tar")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    count, key, grown = done.stdout.split()
    assert trials.add((count, key) == ("1000000", "0999999") and int(grown) < 2 << 20)
    trials.figure = f"10^6 members: {int(grown) / 1024:.0f} MB while the index is built"
