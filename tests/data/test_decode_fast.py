"""The extra `fast`: both decoders give the same pixels, and a damaged file has the same reason."""

import threading

import numpy as np
import pytest
from PIL import Image

from m3i_jax.data import crops, decode, decode_fast

pytest.importorskip("cykooz_resizer", reason="the extra `fast` is not installed")
pytest.importorskip("simplejpeg", reason="the extra `fast` is not installed")


@pytest.mark.parametrize("in_place", [True, False])
def test_the_fast_resizer_agrees_with_pillow(monkeypatch, in_place):
    monkeypatch.setattr(decode_fast, "_IN_PLACE", in_place)
    monkeypatch.setattr(decode_fast, "_LOCAL", threading.local())
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(
        (500, 375), Image.Resampling.BICUBIC
    )
    for u in rng.random((20, 22)).tolist():
        box = crops.crop_box(u, 375, 500)
        slow, quick = (
            crops.cut_view(coarse, box, 96, height=375, width=500, by=by).astype(int)
            for by in ("pillow", "fast 4")
        )
        assert np.abs(slow - quick).mean() <= 0.5
    # A window whose far edge rounds above that of the image.
    small = coarse.reduce(3)
    for width in range(480, 500):
        assert (
            crops.cut_view(
                small, (0, 500 - width, 375, width), 16, height=375, width=500, by="fast 4"
            ).size
            == 768
        )


def test_packed_and_pillow_input_give_the_same_bytes():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 120, 3), np.uint8))
    out = []
    for in_place in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode_fast, "_IN_PLACE", in_place)
            patch.setattr(decode_fast, "_LOCAL", threading.local())
            out.append(
                crops.cut_view(
                    image, (3.5, 7.25, 60.5, 80.0), 48, height=90, width=120, by="fast 4"
                ).tobytes()
            )
    assert out[0] == out[1]


def plain(make, height, width, **options):
    rng = np.random.default_rng(height)
    noisy = np.clip(
        make.smooth(height, width) + rng.normal(0, 12, (height, width, 3)), 0, 255
    ).astype(np.uint8)
    return make.encode(noisy, "JPEG", **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subsampling": 0},
        {"subsampling": 1},
        {"progressive": True},
        {"quality": 20},
        {"optimize": True},
    ],
    ids=str,
)
def test_packed_pixels_are_those_of_pillow(make, options):
    for height, width in ((75, 103), (64, 64), (211, 97)):
        content = plain(make, height, width, **options)
        packed, image = decode.open_jpeg_fast(content).rgb(), decode.open_image(content).rgb()
        assert isinstance(packed, decode_fast.PackedImage)
        assert packed.size == image.size
        rng = np.random.default_rng(width)
        for _ in range(2):
            box = crops.crop_box(rng.random(22).tolist(), height, width)
            one, two = (
                crops.cut_view(p, box, 48, height=height, width=width, by="fast 4")
                for p in (packed, image)
            )
            np.testing.assert_array_equal(one, two)


def test_other_files_are_left_to_pillow(make):
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "a PNG": make.encode(make.smooth(64, 64), "PNG"),
        "gray": make.encode(make.smooth(64, 64)[:, :, 0], "JPEG"),
        "CMYK": make.encode(Image.fromarray(make.smooth(64, 64)).convert("CMYK"), "JPEG"),
        "turned": plain(make, 64, 96, exif=turned),
    }
    for name, content in files.items():
        assert isinstance(decode.open_jpeg_fast(content).rgb(), Image.Image), name
    reduced = decode.open_jpeg_fast(plain(make, 640, 480)).rgb(least=(300, 200))
    assert reduced.size == (240, 320)
    assert isinstance(reduced, Image.Image)


def outcome(raw, how):
    """Returns (bytes of a view or the reason of its refusal, whether it was decoded packed)."""
    try:
        opened = how(raw)
        decoded = opened.rgb()
        view = crops.cut_view(
            decoded, (3, 5, 60, 70), 32, height=opened.height, width=opened.width, by="fast 4"
        )
        return view.tobytes(), isinstance(decoded, decode_fast.PackedImage)
    except decode.BadRecord as error:
        return error.reason, False


@pytest.mark.parametrize("harm", ["flipped", "cut"])
def test_a_damaged_jpeg_has_the_reason_of_pillow(make, harm):
    content, rng = plain(make, 96, 128), np.random.default_rng(0)
    packed = 0
    for trial in range(100):
        raw = bytearray(content)
        if harm == "cut":
            del raw[rng.integers(2, len(raw)) :]
        else:
            for at in rng.integers(2, len(raw), 1 + trial % 3):
                raw[at] ^= 1 << rng.integers(8)
        one, two = (outcome(bytes(raw), how) for how in (decode.open_jpeg_fast, decode.open_image))
        assert one[0] == two[0], trial
        packed += one[1]
    assert packed > 5 or harm == "cut"  # some flips do no harm that libjpeg would see


def test_without_simplejpeg_the_pixels_are_equal(make, monkeypatch):
    content = plain(make, 64, 80)
    monkeypatch.setattr(decode_fast, "is_installed", lambda package: package != "simplejpeg")
    assert isinstance(decode.open_jpeg_fast(content).rgb(), Image.Image)


@pytest.mark.parametrize("filler", [b"\xff", b"\xff\xff\xff", b"\x00\x07"], ids=repr)
def test_exif_behind_filler_bytes_is_seen(make, filler):
    """Pillow skips them between two segments, and turns the image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = make.encode(make.smooth(40, 60), "JPEG", exif=exif.tobytes())
    at = content.index(b"\xff\xe1")
    content = content[:at] + filler + content[at:]
    opened = decode.open_jpeg_fast(content)
    assert (opened.height, opened.width) == (60, 40)
    assert decode.open_image(content).height == 60
    without = make.encode(make.smooth(40, 60), "JPEG")
    assert decode_fast.plain_jpeg_size(without[:2] + b"\xff" + without[2:]) == (40, 60)
