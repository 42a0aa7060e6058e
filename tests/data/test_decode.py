"""Rules for bad and unusual input: refusals with their reasons, and the decoded pixels."""

import io
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from m3i_jax.data import decode


def reason(image: bytes | np.ndarray) -> str:
    with pytest.raises(decode.BadRecord) as caught:
        decode.decode_image(image)
    assert str(caught.value).startswith(caught.value.reason)
    return caught.value.reason


def distance(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(float) - b).mean())


def test_every_bad_file_has_its_reason(make):
    files = make.bad_files()
    assert {name: reason(content) for name, (content, _) in files.items()} == {
        name: why for name, (_, why) in files.items()
    }
    assert {why for _, why in files.values()} == set(decode.REASONS) - {
        decode.UNREADABLE,
        decode.UNREACHABLE,
    }


def test_size_is_checked_before_decoding(make):
    # Neither file holds any pixels: whoever reads them would say "truncated".
    assert reason(make.png_header(60_000, 60_000)) == "too_large"
    assert reason(make.png_header(8001, 8000)) == "too_large"
    assert reason(make.png_header(15, 8000)) == "too_small"
    assert reason(make.png_header(8000, 8000)) == "truncated"
    assert reason(make.png_header(16, 16)) == "truncated"


def test_every_good_file_has_the_same_pixels(make):
    rgb = make.smooth(48, 40)
    gray = np.asarray(Image.fromarray(rgb).convert("L").convert("RGB"))
    # What is lossless is exact; JPEG at quality 95 and 64 colours differ a little; the others are
    # compared below.
    expected = {
        **dict.fromkeys(
            ("plain.png", "alpha.png", "lossless.webp", "plain.bmp", "plain.tif", "png_called.jpg"),
            (rgb, 0),
        ),
        **dict.fromkeys(("gray.png", "gray_alpha.png"), (gray, 0)),
        **dict.fromkeys(("plain.jpg", "progressive.JPEG", "cmyk.jpg"), (rgb, 3)),
        "gray.jpg": (gray, 1),
        "gray16.png": (np.repeat(rgb[..., :1], 3, 2), 0),
        **dict.fromkeys(("palette.png", "plain.gif"), (rgb, 12)),
    }
    for name, content in make.good_files().items():
        out = decode.decode_image(content)
        assert out.shape == (48, 40, 3) and out.dtype == np.uint8, name
        if name in expected:
            image, tolerance = expected[name]
            assert distance(out, image) <= tolerance, name
    assert set(np.unique(decode.decode_image(make.good_files()["bilevel.png"]))) == {0, 255}


def stored_as(upright: np.ndarray, orientation: int) -> np.ndarray:
    """Returns the pixels that a camera stores with this EXIF orientation (TIFF 6.0, tag 274) for
    the image `upright`."""
    return {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright).copy()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_exif_orientation_is_applied(make, orientation, kind):
    upright = make.smooth(64, 48)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {
        "PNG": {},
        "WEBP": {"lossless": True},
        "TIFF": {},
        "JPEG": {"quality": 97, "subsampling": 0},
    }[kind]
    out = decode.decode_image(
        make.encode(stored_as(upright, orientation), kind, exif=exif, **options)
    )
    assert distance(out, upright) <= (2 if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_a_jpeg_decodes_at_the_smallest_scale_that_suffices(make, orientation):
    upright = make.smooth(640, 480)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = make.encode(stored_as(upright, orientation), "JPEG", quality=95, exif=exif)
    for least, scale in (
        ((640, 480), 1),
        ((321, 100), 1),
        ((320, 240), 2),
        ((320, 100), 2),
        ((100, 120), 4),
        ((10, 10), 8),
    ):
        image = decode.open_image(content)
        assert (image.height, image.width) == (640, 480)
        image = image.rgb(least=least)
        assert image.size == (480 // scale, 640 // scale), least
        small = np.asarray(Image.fromarray(upright).reduce(scale))
        assert distance(np.asarray(image), small) < 4


def test_only_jpegs_are_reduced(make):
    assert decode.open_image(make.encode(make.smooth(64, 64), "PNG")).rgb(least=(8, 8)).size == (
        64,
        64,
    )


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_drops_only_the_rotation(make):
    content = make.encode(make.smooth(32, 32), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert decode.decode_image(content).shape == (32, 32, 3)


def test_sixteen_bits_are_scaled_not_clipped(make):
    values = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    expected = np.rint(values / 257).astype(np.uint8)
    for kind in ("PNG", "TIFF"):
        out = decode.decode_image(make.encode(values, kind))
        assert (out == expected[..., None]).all(), kind
    # A dark image stays dark: its range is that of the format, not its own.
    assert decode.decode_image(make.encode(values // 256, "PNG")).max() == 1


def test_floats_and_32_bits_are_stretched(make):
    ramp = np.linspace(-3, 7, 32 * 32).reshape(32, 32)
    for array in (ramp.astype(np.float32), (ramp * 1e6).astype(np.int32)):
        out = decode.decode_image(make.encode(array, "TIFF"))
        assert out[0, 0].tolist() == [0] * 3 and out[-1, -1].tolist() == [255] * 3
        assert abs(int(out[16, 0, 0]) - 128) <= 1
    assert decode.decode_image(make.encode(np.zeros((32, 32), np.float32), "TIFF")).max() == 0
    ramp[3, 3] = np.nan
    assert reason(make.encode(ramp.astype(np.float32), "TIFF")) == "undecodable"


@pytest.mark.parametrize("background", [0, 127, 255])
def test_transparency_shows_the_background(make, background):
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[..., 0], rgba[:16, :, 3], rgba[16:, :16, 3], rgba[16:, 16:, 3] = 200, 0, 128, 255
    out = decode.decode_image(make.encode(rgba, "PNG"), background=background)
    assert out[0, 0].tolist() == [background] * 3
    assert out[31, 31].tolist() == [200, 0, 0]
    mixed = [(200 * 128 + background * 127) / 255, background * 127 / 255, background * 127 / 255]
    assert np.abs(out[31, 0] - mixed).max() <= 1
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([9, 9, 9, 50, 60, 70])
    palette.paste(0, (0, 0, 16, 32))
    for options in ({"transparency": 0}, {"transparency": bytes([0, 255])}):
        out = decode.decode_image(make.encode(palette, "PNG", **options), background=background)
        assert out[0, 0].tolist() == [background] * 3 and out[0, 31].tolist() == [50, 60, 70]
    keyed = Image.new("RGB", (32, 32), (1, 2, 3))
    out = decode.decode_image(
        make.encode(keyed, "PNG", transparency=(1, 2, 3)), background=background
    )
    assert (out == background).all()


def test_cmyk_of_adobe_is_not_a_negative(make):
    for ink, rgb in (
        ((0, 255, 255, 0), (255, 0, 0)),
        ((0, 0, 0, 0), (255, 255, 255)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((255, 0, 0, 0), (0, 255, 255)),
    ):
        content = make.encode(Image.new("CMYK", (32, 32), ink), "JPEG", quality=95)
        assert b"Adobe" in content
        assert np.abs(decode.decode_image(content).astype(int) - rgb).max() <= 4


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (32, 32), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
        assert (
            np.abs(decode.decode_image(buffer.getvalue())[16, 16].astype(int) - (255, 0, 0)).max()
            <= 4
        ), kind


def test_arrays_are_decoded_images(make):
    rgb = make.smooth(20, 30)
    assert (decode.decode_image(rgb) == rgb).all()
    assert (decode.decode_image(rgb[..., 0]) == rgb[..., :1]).all()
    assert reason(rgb[:10]) == "too_small"
    assert reason(np.zeros((32, 32, 3), np.float64)) == "undecodable"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damage_raises_only_bad_record(make):
    """Randomly changed and cut bytes give an image or a BadRecord, never another exception."""
    rng = np.random.default_rng(1)
    sound = {name: bytearray(content) for name, content in make.good_files().items()}
    refused = 0
    for trial in range(600):
        content = bytearray(list(sound.values())[trial % len(sound)])
        for _ in range(rng.integers(1, 20)):
            content[rng.integers(len(content))] = rng.integers(256)
        if trial % 3 == 0:
            del content[rng.integers(len(content)) :]
        try:
            out = decode.decode_image(bytes(content))
            assert out.ndim == 3 and out.shape[2] == 3 and out.dtype == np.uint8
        except decode.BadRecord as error:
            assert error.reason in decode.REASONS
            refused += 1
    assert 200 < refused < 600


@pytest.mark.parametrize(
    ("caption", "clean"),
    [
        (None, None),
        ("", None),
        (b"", None),
        (" \t\r\n\u00a0 ", None),
        (b"\0\0", None),
        ("&nbsp;", None),
        (b"a cat\n", "a cat"),
        (b"caf\xe9 au lait", "caf\ufffd au lait"),
        (b"\xff\xfe" + "caf\u00e9 \U0001f431".encode("utf-16-le"), "caf\u00e9 \U0001f431"),
        (b"\xfe\xff" + "caf\u00e9 au lait".encode("utf-16-be"), "caf\u00e9 au lait"),
        ("a\0b", "ab"),
        ("two  \t spaces\nand\u3000a line", "two spaces and a line"),
        ("l&amp;#39;amour &lt;3 &amp;amp; &quot;x&quot;", 'l\'amour <3 & "x"'),
        ("\u201ccurly\u201d \u2018quotes\u2019", "\"curly\" 'quotes'"),
        ("sch\u00c3\u00b6n", "sch\u00f6n"),
        ("\ufb01ne \ufb02ag", "fine flag"),
        (
            "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
            "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
        ),
        (
            "\U0001f468\u200d\U0001f469\u200d\U0001f467 family",
            "\U0001f468\u200d\U0001f469\u200d\U0001f467 family",
        ),
        ("lone \ud800 surrogate", "lone \ufffd surrogate"),
        ("&#0;a", "\ufffda"),
    ],
)
def test_captions_are_cleaned(caption, clean):
    assert decode.clean_caption(caption) == clean


def test_long_captions_are_cut():
    assert len(decode.clean_caption(b"word " * 200_000)) <= decode.CAPTION_LIMIT
    assert len(decode.clean_caption("x" * 1_000_000)) == decode.CAPTION_LIMIT
    # The cut goes through the two bytes of a letter, which is no defect of the caption.
    assert decode.clean_caption(b"x" + "\u00e9".encode() * 100_000) == "x" + "\u00e9" * (
        (decode.CAPTION_LIMIT - 1) // 2
    )
    wide = b"\xff\xfe" + ("x" + "\U0001f431" * 9000).encode("utf-16-le")
    assert decode.decode_caption(wide) == (
        "x" + "\U0001f431" * (decode.CAPTION_LIMIT // 4 - 1),
        True,
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_not_decoded(make):
    """It is refused by its header, with little memory."""
    resource = pytest.importorskip("resource")
    bombs = [
        make.png_header(60_000, 60_000),
        make.png_header(65_500, 2000),
        make.bad_files()["large.png"][0],
    ]
    decode.decode_image(make.encode(make.smooth(32, 32), "PNG"))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for bomb in bombs * 10:
        assert reason(bomb) == "too_large"
    assert time.process_time() - start < 10 * len(bombs) * 0.05
    # KB; decoded, the first would take 10 GB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_every_way_to_store_an_image_gives_the_same_pixels(make):
    """An image with an orientation, as JPEGs of every subsampling, progressive or not, CMYK, PNG,
    WebP and TIFF."""
    upright = make.smooth(64, 48)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(stored_as(upright, 6))
    for kind, options in [
        *(
            ("JPEG", {"quality": 97, "subsampling": s, "progressive": p})
            for s in (0, 1, 2) for p in (False, True)
        ),
        ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {"compression": "tiff_lzw"}),
    ]:  # fmt: skip
        out = decode.decode_image(make.encode(stored, kind, exif=exif, **options))
        assert out.shape == upright.shape and distance(out, upright) <= 2, (kind, options)


def test_filters_of_warnings_of_the_program_come_first():
    """The import put a filter before those of the program that imports it."""
    code = """
import warnings
from PIL import Image
bomb = Image.DecompressionBombWarning
warnings.filterwarnings("error", category=bomb)
from m3i_jax.data import decode
try:
    warnings.warn("large", bomb)
except bomb:
    print("raised")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "raised\n"
