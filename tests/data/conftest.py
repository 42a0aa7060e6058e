"""Makes images of every kind, good and bad, and small streams of them, so that no data test needs
files from outside."""

import functools
import io
import pathlib
import tarfile
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3i_jax import schema
from m3i_jax.data import decode, pipeline, sampler, tokenizer
from m3i_jax.data.sources import base
from tests.broken import bad_files, encode, png_header, smooth


@functools.cache
def good_files() -> dict[str, bytes]:
    """Valid images of unusual formats, 48 x 40 pixels (height x width), by file name."""
    rgb = smooth(48, 40)
    image = Image.fromarray(rgb)
    alpha = np.dstack([rgb, np.full((48, 40), 255, np.uint8)])
    palette = image.quantize(64)
    return {
        "plain.jpg": encode(image, "JPEG", quality=95),
        "progressive.JPEG": encode(image, "JPEG", quality=95, progressive=True),
        "gray.jpg": encode(image.convert("L"), "JPEG", quality=95),
        "cmyk.jpg": encode(image.convert("CMYK"), "JPEG", quality=95),
        "plain.png": encode(image, "PNG"),
        "gray.png": encode(image.convert("L"), "PNG"),
        "gray16.png": encode(rgb[..., 0].astype(np.uint16) * 257, "PNG"),
        "bilevel.png": encode(image.convert("1"), "PNG"),
        "alpha.png": encode(alpha, "PNG"),
        "gray_alpha.png": encode(Image.fromarray(alpha).convert("LA"), "PNG"),
        "palette.png": encode(palette, "PNG"),
        "palette_transparent.png": encode(palette, "PNG", transparency=bytes(range(64))),
        "lossless.webp": encode(image, "WEBP", lossless=True),
        "plain.gif": encode(palette, "GIF"),
        "plain.bmp": encode(image, "BMP"),
        "plain.tif": encode(image, "TIFF"),
        "png_called.jpg": encode(image, "PNG"),
    }


def tar_bytes(members: list[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar file of regular members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


SIZE, LENGTH = 32, 12


def settings(batch: int = 8, **data: Any) -> schema.Config:
    """A small run: views of 32 pixels, a mask of 4 x 4 cells, captions of 12 tokens."""
    data = {"image_size": SIZE, "caption_length": LENGTH, "threads": 0, "max_bad_share": 1.0} | data
    encoder = schema.Encoder(patch_size=8)
    return schema.Config(
        data=schema.Data(**data),
        train=schema.Train(batch_size=batch),
        model=schema.Model(encoder=encoder),
    )


class ColorImages:
    """A source of arrays: image i has one colour, so that a view identifies its record. Records
    below `bad` are not images."""

    name, captions = "images", True

    def __init__(
        self, count: int, classes: int = 7, size: tuple[int, int] = (24, 20), bad: int = 0
    ) -> None:
        self.count, self.size, self.bad = count, size, bad
        self.classes = tuple(map(str, range(classes)))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> base.Record:
        image = b"<html>" if index < self.bad else np.full((*self.size, 3), index % 256, np.uint8)
        return base.Record(
            self.key(index),
            image,
            index % (len(self.classes) + 1) - 1,
            f"number {index}" if index % 4 else None,
        )

    def key(self, index: int) -> str:
        return f"p{index}"

    def fingerprint(self) -> str:
        return base.stable_digest(self.count)

    def description(self) -> str:
        return f"{self.count} images"


def stream(
    config: schema.Config, source: Any, bpe: tokenizer.Tokenizer | None, count: int, **options: int
) -> list[pipeline.Batch]:
    """Returns the first `count` batches."""
    batches = pipeline.iterate_batches(config, source, bpe, **{"start": 0, **options})
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


def joined(batches: list[pipeline.Batch]) -> pipeline.Batch:
    """Concatenates batches."""
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


def expected_stream(
    source: Any, bad: dict[int, str], count: int
) -> tuple[list[int], dict[str, int]]:
    """Returns the records of the first `count` positions and the bad draws by reason, computed one
    by one: draw again until the record is good and differs from its partner."""
    used: list[int] = []
    skipped = dict.fromkeys(decode.REASONS, 0)
    for position in range(count):
        for attempt in range(100):
            index = int(sampler.sample_index(0, np.array([position]), len(source), attempt)[0])
            if position % 2 and index == used[-1]:
                continue
            if index in bad:
                skipped[bad[index]] += 1
                continue
            used.append(index)
            break
    return used, skipped


@pytest.fixture(scope="session")
def make() -> types.SimpleNamespace:
    """Namespace of the helpers of this file."""
    helpers = (
        encode,
        smooth,
        good_files,
        bad_files,
        png_header,
        tar_bytes,
        settings,
        ColorImages,
        stream,
        joined,
        expected_stream,
    )
    return types.SimpleNamespace(**{f.__name__: f for f in helpers})


@pytest.fixture(scope="session")
def bpe() -> tokenizer.Tokenizer:
    """A small trained tokenizer."""
    return tokenizer.train_tokenizer([f"number {i}" for i in range(100)], 300, LENGTH)


@pytest.fixture
def fill(tmp_path: pathlib.Path) -> Callable[..., pathlib.Path]:
    """fill({name: bytes}, folder="images") writes files below tmp_path and returns the folder."""

    def write(files: dict[str, bytes], folder: str = "images") -> pathlib.Path:
        for name, content in files.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return tmp_path / folder

    return write
