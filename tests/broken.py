"""A folder of images of which a share is broken, in more than 20 ways, each with the reason that it
must be refused for."""

import functools
import gzip
import io
import pathlib
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def encode(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    """An array or image as the bytes of a file."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        buffer, kind, **options
    )
    return buffer.getvalue()


def smooth(height: int, width: int) -> np.ndarray:
    """An RGB image without symmetry that survives JPEG: two ramps and a diagonal wave."""
    y, x = np.mgrid[:height, :width]
    wave = 127 + 100 * np.sin((x + 2 * y) / 9)
    return np.stack(
        [x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), wave.astype(int)], -1
    ).astype(np.uint8)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixel."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
    )


@functools.cache
def bad_files() -> dict[str, tuple[bytes, str]]:
    """Files that are no usable images, with the reason each must be refused for, by file name."""
    image = Image.fromarray(smooth(480, 400))
    jpeg, png, webp = encode(image, "JPEG", quality=95), encode(image, "PNG"), encode(image, "WEBP")
    gif, tiff = encode(image.quantize(64), "GIF"), encode(image, "TIFF")
    return {
        "empty.jpg": (b"", "empty"),
        "noise.jpg": (np.random.default_rng(0).bytes(5000), "undecodable"),
        "page.jpg": (b"<!DOCTYPE html><html><body>404 not found</body></html>", "undecodable"),
        "drawing.png": (
            b'<svg xmlns="http://www.w3.org/2000/svg" width="99" height="99"/>',
            "undecodable",
        ),
        "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", "undecodable"),
        "start_only.jpg": (jpeg[:20], "undecodable"),
        "cut.jpg": (jpeg[: len(jpeg) * 6 // 10], "truncated"),
        "cut_early.jpg": (jpeg[: len(jpeg) // 20], "truncated"),
        "cut.png": (png[: len(png) * 6 // 10], "truncated"),
        "cut.webp": (webp[: len(webp) * 6 // 10], "undecodable"),
        "crc.png": (png[:16] + b"\xff" + png[17:], "undecodable"),
        "dot.png": (encode(image.resize((1, 1)), "PNG"), "too_small"),
        "line.jpg": (encode(image.resize((5000, 3)), "JPEG"), "too_small"),
        "stripe.gif": (encode(image.resize((15, 300)), "GIF"), "too_small"),
        "bomb.png": (png_header(60_000, 60_000), "too_large"),
        "large.png": (encode(Image.new("1", (9000, 8000)), "PNG"), "too_large"),
        "cut.gif": (gif[: len(gif) * 6 // 10], "truncated"),
        "cut.tif": (tiff[: len(tiff) * 6 // 10], "truncated"),
        "flipped.png": (
            png[: len(png) // 2] + bytes([png[len(png) // 2] ^ 255]) + png[len(png) // 2 + 1 :],
            "undecodable",
        ),
        "zeros.jpg": (bytes(5000), "undecodable"),
        "packed.jpg": (gzip.compress(jpeg), "undecodable"),
        "pointer.jpg": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "undecodable",
        ),
    }


def fill(folder: pathlib.Path, *, good: int, kinds: int = 22) -> dict[str, str]:
    """Writes `good` sound images in two classes, with captions, and one broken file a kind; returns
    the broken ones' reasons by key."""
    rng, reasons = np.random.default_rng(3), {}
    for i in range(good):
        place = folder / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(
            (48, 40), Image.Resampling.BICUBIC
        )
        (place / f"{i:04}.png").write_bytes(encode(coarse, "PNG"))
        (place / f"{i:04}.txt").write_text(f"picture number {i}")
    for i, (name, (content, reason)) in enumerate(list(bad_files().items())[:kinds]):
        (folder / "ab"[i % 2] / f"bad_{name}").write_bytes(content)
        reasons[f"{'ab'[i % 2]}/bad_{name}"] = reason
    return reasons
