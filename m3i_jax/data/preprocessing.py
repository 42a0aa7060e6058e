"""The preprocessing of evaluation. Evaluators, `m3i_jax.load`, --mode=features and every export use
it; its values are settings of a run in config.txt."""

import dataclasses

import numpy as np
from PIL import Image

from m3i_jax import schema
from m3i_jax.data import crops

RESIZING = ("crop", "interpolation", "squash")  # settings of `evaluate`, fields of `Preprocessing`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Composes transparent pixels over gray, resizes the short side, or both, to `short_side`
    (antialiased but for nearest), crops the centre, and normalizes RGB in 0..1 by mean and standard
    deviation.

    Attributes:
      image_size: side of the view in pixels, S.
      crop: share of the short side that the view keeps.
      interpolation: a filter of Pillow, one of `crops.FILTERS`.
      squash: both sides are resized to `short_side`, so that the image becomes a square.
      background: gray level under transparent pixels.
      mean, std: of R, G and B.

    >>> Preprocessing(image_size=224).short_side, Preprocessing(image_size=32, crop=1.0).short_side
    (256, 32)
    """

    image_size: int
    crop: float = schema.Evaluate.crop
    interpolation: str = schema.Evaluate.interpolation
    squash: bool = schema.Evaluate.squash
    background: int = schema.Data.background
    mean: tuple[float, ...] = schema.Augment.mean
    std: tuple[float, ...] = schema.Augment.std

    @classmethod
    def of(cls, config: schema.Config) -> "Preprocessing":
        """Returns the preprocessing of a run."""
        data = config.data
        return cls(
            image_size=data.image_size,
            crop=config.evaluate.crop,
            interpolation=config.evaluate.interpolation,
            squash=config.evaluate.squash,
            background=data.background,
            mean=data.augment.mean,
            std=data.augment.std,
        )

    @property
    def short_side(self) -> int:
        """Pixels of the short side after resizing. The crop of a file of timm is a share of the
        length that timm rounds down to, and gives that length."""
        return round(self.image_size / self.crop)

    @property
    def resized_side(self) -> str:
        """The side that is resized to `short_side`, in words."""
        return "each side" if self.squash else "short side"

    def described(self) -> dict[str, object]:
        """Returns the values as a dict, for JSON."""
        return {**dataclasses.asdict(self), "short_side": self.short_side}

    def box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Returns the box of the view, (top, left, height, width) in pixels of the image."""
        return crops.central_box(height, width, self.image_size, crop=self.crop, squash=self.squash)

    def view(self, image_HxWx3: np.ndarray) -> np.ndarray:
        """Cuts the view of an RGB image, [S, S, 3], not normalized.

        Args:
          image_HxWx3: uint8, or floats in 0..1; the view has the same type (float32).

        Raises:
          ValueError: the shape or type is another one, or floats are outside 0..1.

        >>> preprocessing = Preprocessing(image_size=16)
        >>> preprocessing.view(np.zeros((20, 30, 3), np.uint8)).shape
        (16, 16, 3)
        >>> preprocessing.view(np.full((20, 30, 3), 0.5)).max()
        np.float32(0.5)
        """
        pixels, size = check_images(image_HxWx3), self.image_size
        height, width = pixels.shape[:2]
        box = self.box(height, width)
        if pixels.dtype == np.uint8:
            image = Image.fromarray(np.ascontiguousarray(pixels))
            return crops.cut_view(
                image, box, size, height=height, width=width, interpolation=self.interpolation
            ).reshape(size, size, 3)
        top, left, h, w = box
        window = (left, top, min(left + w, width), min(top + h, height))
        bands = [Image.fromarray(np.ascontiguousarray(pixels[..., c])) for c in range(3)]
        how = crops.FILTERS[self.interpolation]
        resized = [band.resize((size, size), how, window) for band in bands]
        # Bicubic interpolation overshoots; Pillow clips bytes but not floats.
        return np.clip(np.stack([np.asarray(band) for band in resized], -1), 0, 1)


def with_evaluation(
    own: schema.Config, asked: schema.Config, *, keep: bool = False
) -> schema.Config:
    """Returns the settings of weights with `evaluate` and the background of a command.

    Args:
      own: settings of the weights.
      asked: settings of the command.
      keep: RESIZING stay those of the weights where the command has the defaults.

    >>> own = schema.Config(evaluate=schema.Evaluate(crop=0.5, squash=True))
    >>> asked = schema.Config(evaluate=schema.Evaluate(crop=1.0))
    >>> made = [with_evaluation(own, asked, keep=keep).evaluate for keep in (False, True)]
    >>> [(evaluate.crop, evaluate.squash) for evaluate in made]
    [(1.0, False), (1.0, True)]
    """
    kept = {
        name: getattr(own.evaluate, name)
        for name in RESIZING
        if keep and getattr(asked.evaluate, name) == getattr(schema.Evaluate, name)
    }
    return dataclasses.replace(
        own,
        evaluate=dataclasses.replace(asked.evaluate, **kept),
        data=dataclasses.replace(own.data, background=asked.data.background),
    )


def check_images(image_HxWx3: np.ndarray) -> np.ndarray:
    """Checks an RGB image and converts floats to float32.

    Raises:
      ValueError: the shape or type is another one, there is no pixel, or floats are outside 0..1.
    """
    image = np.asarray(image_HxWx3)
    typed = image.dtype == np.uint8 or np.issubdtype(image.dtype, np.floating)
    if image.ndim != 3 or image.shape[-1] != 3 or not image.size or not typed:
        raise ValueError(
            f"an image has shape {image.shape} and type {image.dtype}; it must be [H, W, 3],"
            " uint8 or floats in 0..1"
        )
    if image.dtype != np.uint8:
        image = image.astype(np.float32)
        if not (image.min() >= 0 and image.max() <= 1):  # false for NaN too
            raise ValueError(
                f"a float image has values in {image.min()}..{image.max()}; they must lie in 0..1"
            )
    return image
