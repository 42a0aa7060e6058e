"""How an evaluation sees an image, described once. Evaluators, `m3i_jax.load`, --mode=features and
every export read this description, and it is saved with a run: it is made of settings in
config.txt."""

import dataclasses

import numpy as np
from PIL import Image

from m3i_jax import schema
from m3i_jax.data import crops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Transparent pixels over gray; the short side resized to `short_side`, bicubic with
    antialiasing; the centre cut out; RGB in 0..1 minus the mean, over the deviation.

    Attributes:
      image_size: side of the view in pixels, S.
      crop: share of the short side that the view keeps.
      background: gray level under transparent pixels.
      mean, std: of R, G and B.

    >>> Preprocessing(image_size=224).short_side, Preprocessing(image_size=32, crop=1.0).short_side
    (256, 32)
    """

    image_size: int
    crop: float = schema.Evaluate.crop
    background: int = schema.Data.background
    mean: tuple[float, ...] = schema.Augment.mean
    std: tuple[float, ...] = schema.Augment.std

    @classmethod
    def of(cls, config: schema.Config) -> "Preprocessing":
        """That of a run."""
        data = config.data
        return cls(
            image_size=data.image_size,
            crop=config.evaluate.crop,
            background=data.background,
            mean=data.augment.mean,
            std=data.augment.std,
        )

    @property
    def short_side(self) -> int:
        """Pixels of the short side after resizing."""
        return round(self.image_size / self.crop)

    def described(self) -> dict[str, object]:
        """As plain values, for JSON."""
        return {**dataclasses.asdict(self), "short_side": self.short_side}

    def box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """What the view shows of an image: (top, left, height, width) in its pixels."""
        return crops.central_box(height, width, self.image_size, crop=self.crop)

    def view(self, picture_HxWx3: np.ndarray) -> np.ndarray:
        """The view of an RGB image, [S, S, 3], before the mean is subtracted.

        Args:
          picture_HxWx3: uint8, or floats in 0..1; the view has the same type (float32).

        Raises:
          ValueError: another shape or type, or floats outside 0..1.

        >>> seen = Preprocessing(image_size=16)
        >>> seen.view(np.zeros((20, 30, 3), np.uint8)).shape, seen.view(np.full((20, 30, 3), 0.5)).max()
        ((16, 16, 3), np.float32(0.5))
        """
        picture, size = check_images(picture_HxWx3), self.image_size
        height, width = picture.shape[:2]
        box = self.box(height, width)
        if picture.dtype == np.uint8:
            image = Image.fromarray(np.ascontiguousarray(picture))
            return crops.cut_view(image, box, size, height=height, width=width).reshape(
                size, size, 3
            )
        top, left, h, w = box
        window = (left, top, min(left + w, width), min(top + h, height))
        bands = [Image.fromarray(np.ascontiguousarray(picture[..., c])) for c in range(3)]
        resized = [band.resize((size, size), Image.Resampling.BICUBIC, window) for band in bands]
        # Bicubic overshoots; bytes are clipped by Pillow itself.
        return np.clip(np.stack([np.asarray(band) for band in resized], -1), 0, 1)


def check_images(picture_HxWx3: np.ndarray) -> np.ndarray:
    """An RGB image as uint8 or float32.

    Raises:
      ValueError: another shape or type, no pixel, or floats outside 0..1.
    """
    picture = np.asarray(picture_HxWx3)
    typed = picture.dtype == np.uint8 or np.issubdtype(picture.dtype, np.floating)
    if picture.ndim != 3 or picture.shape[-1] != 3 or not picture.size or not typed:
        raise ValueError(
            f"an image has shape {picture.shape} and type {picture.dtype}; it must be [H, W, 3],"
            " uint8 or floats in 0..1"
        )
    if picture.dtype != np.uint8:
        picture = picture.astype(np.float32)
        if not (picture.min() >= 0 and picture.max() <= 1):  # nor NaN
            raise ValueError(
                f"a float image has values in {picture.min()}..{picture.max()}; they must lie in"
                " 0..1"
            )
    return picture
