"""Images as users of `m3i_jax.load` hold them, as RGB arrays: paths, Pillow images, and arrays of
any number of channels and any depth that have a meaning as RGB. Files and Pillow images follow the
rules of `decode`; arrays become the same pixels as a file of them would."""

import logging
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from m3i_jax.data import decode
from m3i_jax.data.sources.folder import FolderSource

_log = logging.getLogger(__name__)
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # of Pillow, by channels
_EXPECTED = (
    "it must be [H, W] or [H, W, C] with C in 1 (gray), 2 (gray and alpha), 3 (RGB), 4 (RGBA), of"
    " uint8, uint16, bool, or floats in 0..1"
)


def rgb_pixels(image: Any, *, background: int = 255, skip: bool = False) -> np.ndarray:
    """One image as RGB, [H, W, 3]: uint8, or float32 in 0..1 for floats.

    Args:
      image: path of a file, Pillow image, or array [H, W] or [H, W, C] of 1 to 4 channels: uint8,
        uint16 (white is 65535), bool, or floats in 0..1.
      background: gray level 0..255 that replaces transparent pixels.
      skip: return [0, 0, 3] for a file that cannot be used.

    Raises:
      ValueError: an array of another shape or type, floats outside 0..1, or a file that cannot be
        used.

    >>> gray = np.full((20, 30), 65535, np.uint16)
    >>> rgb_pixels(gray).shape, rgb_pixels(gray).max()
    ((20, 30, 3), np.uint8(255))
    >>> rgb_pixels(np.full((20, 30, 2), 0.5))[0, 0].tolist()
    [0.75, 0.75, 0.75]
    """
    if isinstance(image, str | os.PathLike):
        try:
            return _decode_file(pathlib.Path(image).expanduser(), background)
        except ValueError:
            if not skip:
                raise
            return np.zeros((0, 0, 3), np.uint8)
    if isinstance(image, Image.Image):
        return np.asarray(decode.convert_to_rgb(image, background=background))
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    floats = np.issubdtype(pixels.dtype, np.floating)
    if (
        pixels.ndim != 3
        or pixels.shape[-1] not in _MODES
        or not pixels.size
        or not (floats or pixels.dtype in (np.uint8, np.uint16, np.bool_))
    ):
        raise ValueError(f"an image has shape {pixels.shape} and type {pixels.dtype}; {_EXPECTED}")
    if floats:
        return _float_rgb(pixels.astype(np.float32), background)
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * 255
    elif pixels.dtype == np.uint16:  # scaled as a 16-bit file, not clipped
        pixels = np.rint(pixels.astype(np.float32) * (255 / 65535)).astype(np.uint8)
    if pixels.shape[-1] == 3:
        return pixels
    if pixels.shape[-1] == 1:
        return np.repeat(pixels, 3, -1)
    view = Image.fromarray(np.ascontiguousarray(pixels), _MODES[pixels.shape[-1]])
    return np.asarray(decode.convert_to_rgb(view, background=background))


def _float_rgb(pixels_HxWxC: np.ndarray, background: int) -> np.ndarray:
    low, high = pixels_HxWxC.min(), pixels_HxWxC.max()
    if not (low >= 0 and high <= 1):  # false for NaN too
        raise ValueError(f"a float image has values in {low}..{high}; they must lie in 0..1")
    channels = pixels_HxWxC.shape[-1]
    if channels in (2, 4):
        alpha = pixels_HxWxC[..., -1:]
        plain = np.float32(background / 255) * (1 - alpha)
        pixels_HxWxC = np.clip(pixels_HxWxC[..., :-1] * alpha + plain, 0, 1)
    return pixels_HxWxC if channels > 2 else np.repeat(pixels_HxWxC, 3, -1)


def _decode_file(path: pathlib.Path, background: int) -> np.ndarray:
    try:
        return decode.decode_image(path.read_bytes(), background=background)
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
    except decode.BadRecord as error:
        raise ValueError(f"{str(path)!r} is not a usable image: {error}; leave it out") from error


def image_files(directory: str | os.PathLike[str]) -> list[pathlib.Path]:
    """The images of a directory and its sub-folders, sorted by their relative path.

    Raises:
      UserError: the directory does not exist or has no image.
    """
    source = FolderSource(os.fspath(directory))
    return [pathlib.Path(source.path, source.key(i)) for i in range(len(source))]


def is_directory(images: Any) -> bool:
    """Whether images are a directory, of whose files the caller need not know."""
    return isinstance(images, str | os.PathLike) and pathlib.Path(images).expanduser().is_dir()


def mark_unusable(features: np.ndarray, files: Sequence[Any]) -> None:
    """Makes the rows of files that cannot be used NaN, in place, and logs how many these are.

    Args:
      features: rows of images.
      files: for each row such a file, or None.
    """
    if rows := [row for row, file in enumerate(files) if file is not None]:
        features[rows] = np.nan
        first = (
            f"{len(rows):,} of {len(files):,} files cannot be used, the first is {files[rows[0]]}"
        )
        _log.warning("%s: their rows of features are NaN", first)


def iterate_images(images: Any) -> tuple[Iterator[Any], int | None]:
    """(images one by one, their number or None if unknown) of one image, a batch, a directory, or
    any iterable of images and directories.

    An array of four dimensions is a batch; so is one of three whose last is no number of channels,
    of gray images. One whose first is 3 or 4 may also be a single image with its channels first, as
    torch has them.

    Raises:
      ValueError: it is no image and no batch, or could be either.

    >>> [iterate_images(np.zeros(s))[1] for s in ((9, 9), (9, 9, 3), (5, 9, 9), (5, 9, 9, 3))]
    [1, 1, 5, 5]
    """
    if is_directory(images):
        files = image_files(images)
        return iter(files), len(files)
    if isinstance(images, str | os.PathLike):
        return iter([images]), 1
    if isinstance(images, Image.Image):
        return iter([images]), 1
    if (dimensions := getattr(images, "ndim", None)) is not None:
        _refuse_channels_first(images.shape)
        single = dimensions == 2 or (dimensions == 3 and images.shape[-1] in _MODES)
        return (iter([images]), 1) if single else (iter(images), len(images))
    if not isinstance(images, Iterable):
        raise ValueError(f"images are of type {type(images).__name__}; give an image, or several")
    several = images if isinstance(images, list | tuple) else None
    if several is None:
        return _flatten(images), None
    flat = list(_flatten(several))
    return iter(flat), len(flat)


def _refuse_channels_first(shape: Sequence[int]) -> None:
    if len(shape) == 3 and shape[0] in (3, 4) and shape[-1] not in _MODES:
        raise ValueError(
            f"images have shape {tuple(shape)}, which is one image with its channels first or"
            f" {shape[0]} gray ones: give one image as images.transpose(1, 2, 0) (of torch:"
            " images.permute(1, 2, 0)), several gray ones as list(images)"
        )


def _flatten(images: Iterable[Any]) -> Iterator[Any]:
    for image in images:
        if is_directory(image):
            yield from image_files(image)
        else:
            yield image
