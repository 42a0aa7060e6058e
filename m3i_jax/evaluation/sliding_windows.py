"""Class maps of images of any size, from a model of one input size: sliding windows, several scales
and mirrored images, in static shapes (mmsegmentation's).

The windows of all images form one stream, which is cut into batches of a fixed size, so the model
is compiled once. Logits are summed on the host, in one array per image that is being worked on:
4 * height * width * classes bytes, 0.6 GB for 2048 x 512 and 150 classes. The final resize runs in
strips of rows. With several scales or a mirrored image, the sum of the probabilities has the size
of the original image.

With `dense.segment.test_whole`, a window is a whole image, whose sides are resized to multiples of
that many pixels, and the model is compiled for every size that occurs."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from PIL import Image

from m3i_jax import parallel, schema
from m3i_jax.data import geometry
from m3i_jax.models.dense.task_heads import segmentation_head

_CHUNK = 8  # images whose windows are listed, and counted on all hosts, at a time
_STRIP = 1 << 24  # numbers of a strip of rows of the final resize
Size = tuple[int, int]  # (height, width)
Predict = Callable[[np.ndarray, np.ndarray], Any]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Returns first pixels of the windows along one axis: multiples of the stride, the last moved
    back to the end; one window if the axis is shorter.

    >>> window_starts(683, 512, 256), window_starts(512, 512, 256), window_starts(300, 512, 256)
    ([0, 171], [0], [0])
    """
    count = max(0, -(-(length - window) // stride)) + 1
    return [max(0, min(i * stride, length - window)) for i in range(count)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlidingSettings:
    """Settings of the windows that images are cut into.

    Attributes:
      window: side of the model's input in pixels.
      stride: pixels between windows.
      whole: whether a window is a whole image instead.
      batch: windows of this host in a call of the model.
      classes: K.
      scales: of the images; the probabilities of all are averaged.
      flip: average with the mirrored images.
      softmax: whether the softmax of the model's outputs is averaged over views; else they are
        scores that are averaged as they are. Of one view, both give the same class map.
    """

    window: int
    stride: int
    batch: int
    classes: int
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    softmax: bool = True
    whole: bool = False

    @property
    def averages(self) -> bool:
        """Whether probabilities of several views are averaged, instead of logits of one."""
        return len(self.scales) > 1 or self.flip


def sliding_settings(config: schema.Config, *, classes: int, batch: int) -> SlidingSettings:
    """Returns the windows that a run's settings ask for: dense.segment.test_*, data.image_size.

    >>> sliding_settings(schema.Config(), classes=150, batch=4).stride
    112
    """
    segment, side = config.dense.segment, config.data.image_size
    return SlidingSettings(
        window=side,
        stride=segment.test_stride or max(1, side // 2),
        # a batch of whole images has one size, so it seldom fills up: a row for every device
        batch=min(batch, jax.local_device_count()) if segment.test_whole else batch,
        classes=classes,
        whole=segment.test_whole > 0,
        scales=tuple(segment.test_scales),
        flip=segment.test_flip,
        softmax=segment.test_average == "softmax" or not segmentation_head(segment).averaged,
    )


def resize_rule(
    config: schema.Config,
) -> tuple[Callable[[Size, float], Size], Callable[[np.ndarray, Size], np.ndarray]]:
    """Returns (size_of, resize) of `class_maps` as the run's training resizes images, without the
    random factor: to dense.geometry.long and short for the rule "range", to a long side of
    data.image_size for the rule "jitter"; each times the scale and rounded down. For the rule
    "range" no scale makes the short side smaller than a window (mmsegmentation's ViTs), unless that
    of scale 1 is. With `dense.segment.test_whole`, there are no windows, and the sides are then
    rounded up to its multiples.

    >>> size_of, resize = resize_rule(schema.Config())
    >>> size_of((480, 640), 1.0), resize(np.zeros((480, 640, 3), np.uint8), (168, 224)).shape
    ((168, 224), (168, 224, 3))
    """
    rule = config.dense.geometry
    smooth = rule.rule == "jitter"
    long, short = (config.data.image_size,) * 2 if smooth else (rule.long, rule.short)
    whole = config.dense.segment.test_whole
    multiple = max(1, whole)
    least = 0.0 if smooth or whole else min(1.0, config.data.image_size / short)

    def size_of(size: Size, scale: float) -> Size:
        scale = max(scale, least)
        height, width = geometry.range_sides(*size, int(long * scale), int(short * scale))
        return -(-height // multiple) * multiple, -(-width // multiple) * multiple

    def resize(image_HxWx3: np.ndarray, size: Size) -> np.ndarray:
        source = (image_HxWx3.shape[0], image_HxWx3.shape[1])
        if source == size:
            return image_HxWx3
        placement = geometry.whole_placement(source, size, smooth=smooth)
        return geometry.cut_image(Image.fromarray(np.ascontiguousarray(image_HxWx3)), placement)

    return size_of, resize


class _View:
    """One resized, perhaps mirrored, version of an image: its windows, and the sum of their
    logits."""

    def __init__(self, owner: "_Canvas", size: Size, flip: bool, settings: SlidingSettings) -> None:
        self.owner, self.size, self.flip = owner, size, flip
        self.window = size if settings.whole else (settings.window, settings.window)
        starts = [
            window_starts(n, side, settings.stride)
            for n, side in zip(size, self.window, strict=True)
        ]
        self.windows = [(top, left) for top in starts[0] for left in starts[1]]
        self.left = len(self.windows)
        self._classes = settings.classes
        self._counts = [
            _cover(n, at, side) for n, at, side in zip(size, starts, self.window, strict=True)
        ]
        self._image: np.ndarray | None = None
        self._sum: np.ndarray | None = None

    def cut(self, resize: Callable[[np.ndarray, Size], np.ndarray], at: Size) -> np.ndarray:
        """Returns the pixels of a window, smaller than it at the border of a small image."""
        if self._image is None:
            image = resize(self.owner.image, self.size)
            self._image = image[:, ::-1] if self.flip else image
        return self._image[self._rows(at)]

    def add(self, logits_SxSxK: np.ndarray, at: Size) -> None:
        if self._sum is None:
            self._sum = np.zeros((*self.size, self._classes), np.float32)
        part = self._sum[self._rows(at)]
        part += logits_SxSxK[: part.shape[0], : part.shape[1]]
        self.left -= 1

    def mean_logits(self) -> np.ndarray:
        """Returns [height, width, K], not mirrored any more."""
        assert self._sum is not None
        rows, columns = self._counts
        mean = self._sum
        mean /= (rows[:, None] * columns)[..., None]
        return mean[:, ::-1] if self.flip else mean

    def _rows(self, at: Size) -> tuple[slice, slice]:
        return slice(at[0], at[0] + self.window[0]), slice(at[1], at[1] + self.window[1])

    def free(self) -> None:
        self._image = self._sum = None


def _cover(length: int, starts: list[int], window: int) -> np.ndarray:
    """Number of windows over each pixel of an axis."""
    counts = np.zeros(length, np.float32)
    for start in starts:
        counts[start : start + window] += 1
    return counts


class _Canvas:
    """An image, and what its views have given so far."""

    def __init__(
        self,
        key: Any,
        image_HxWx3: np.ndarray,
        settings: SlidingSettings,
        size_of: Callable[[Size, float], Size],
    ) -> None:
        self.key, self.image, self._averages = key, image_HxWx3, settings.averages
        self._softmax = settings.softmax
        height, width = image_HxWx3.shape[:2]
        self.size = (height, width)
        self._total: np.ndarray | None = None
        self.pixels: np.ndarray | None = None  # the class map
        flips = (False, True) if settings.flip else (False,)
        self.views = [
            _View(self, size_of(self.size, scale), flip, settings)
            for scale in settings.scales
            for flip in flips
        ]

    def finish_view(self, view: _View) -> np.ndarray | None:
        """Takes a view whose windows are done; the class map after the last view."""
        logits, last = view.mean_logits(), all(each.left == 0 for each in self.views)
        classes = logits.shape[-1]
        out = np.zeros(self.size, np.uint8 if classes <= 256 else np.uint16)
        if self._averages and self._total is None:
            self._total = np.zeros((*self.size, classes), np.float32)
        for rows, strip in resized_strips(logits, self.size):
            if self._total is not None:
                if self._softmax:
                    strip = np.exp(strip - strip.max(-1, keepdims=True))
                    strip = strip / strip.sum(-1, keepdims=True)
                self._total[rows] += strip
                strip = self._total[rows]
            if last:
                out[rows] = strip.argmax(-1)
        view.free()
        if last:  # views and canvas refer to each other: nothing large waits for the collector
            self.views, self._total, self.image = [], None, self.image[:0]
        return out if last else None


def resized_strips(map_hxwxK: np.ndarray, size: Size) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (rows, their values) of a map that is resized bilinearly with half-pixel centres and
    without antialiasing, strip by strip.

    >>> ((rows, values),) = resized_strips(np.array([[[0.0], [1.0]]]), (1, 4))
    >>> values[0, :, 0].tolist()
    [0.0, 0.25, 0.75, 1.0]
    """
    (height, width), (h, w, classes) = size, map_hxwxK.shape
    rows = max(1, _STRIP // (max(width, w) * classes))
    same = (h, w) == (height, width)
    low_H, high_H, share_H = _neighbours(h, height)
    low_W, high_W, share_W = _neighbours(w, width)
    for start in range(0, height, rows):
        strip = slice(start, min(start + rows, height))
        if same:
            yield strip, map_hxwxK[strip]
            continue
        a, b, t = low_H[strip], high_H[strip], share_H[strip, None, None]
        band = map_hxwxK[a] * (1 - t) + map_hxwxK[b] * t
        t = share_W[:, None]
        yield strip, band[:, low_W] * (1 - t) + band[:, high_W] * t


def _neighbours(length: int, out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each output pixel: the two input pixels, and the share of the second."""
    at = np.maximum((np.arange(out) + 0.5) * (length / out) - 0.5, 0)
    low = np.minimum(at.astype(np.int64), length - 1)
    return low, np.minimum(low + 1, length - 1), (at - low).astype(np.float32)


def _most_of_hosts(count: int) -> int:
    return max(map(int, parallel.exchange_values("windows", str(count))))


def _sizes_of_hosts(sizes: set[Size]) -> list[Size]:
    """All sizes of windows of all hosts, in one order."""
    text = ";".join(f"{h},{w}" for h, w in sorted(sizes))
    given = parallel.exchange_values("sizes", text)
    found = {part for one in given for part in one.strip().split(";") if part}
    return sorted((int(h), int(w)) for h, w in (part.split(",") for part in found))


def class_maps(
    predict: Predict,
    images: Iterable[tuple[Any, np.ndarray]],
    settings: SlidingSettings,
    *,
    size_of: Callable[[Size, float], Size],
    resize: Callable[[np.ndarray, Size], np.ndarray],
    poll: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Any, np.ndarray]]:
    """Yields the class map of each image at its original size, in their order.

    Logits of overlapping windows are averaged, resized to the original size, and the largest is
    taken; with several scales or mirrored images, the mean of the resized logits' softmax, or of
    scores as they are.

    Several hosts pass their own images, which may differ in number and size: all call the model
    equally often, so it may be a collective; a host that has no more windows passes zeros.

    Args:
      predict: (images uint8 [B, S, S, 3], sizes int32 [B, 2]) -> logits [B, S, S, K] of any float
        type; B and S as in `settings`. The content of an image is its top left `size` pixels; the
        rest is 0.
      images: (key, uint8 [H, W, 3]) of this host.
      settings: of the windows.
      size_of: (original size, scale) -> size of the resized image, see `resize_rule`.
      resize: (image, size) -> resized image, uint8.
      poll: called between batches; may raise.

    Yields:
      (key, uint8 [H, W], uint16 for more than 256 classes).

    >>> def predict(images_BxSxSx3, size_Bx2):  # class 1 where red is large
    ...     red = images_BxSxSx3[..., :1].astype(np.float32)
    ...     return np.concatenate([255 - red, red], -1)
    >>> image = np.zeros((4, 6, 3), np.uint8)
    >>> image[:, 3:] = 200
    >>> settings = SlidingSettings(window=4, stride=2, batch=3, classes=2)
    >>> found = class_maps(predict, [("a", image)], settings, size_of=lambda size, scale: size,
    ...                    resize=lambda image, size: image)
    >>> [(key, pixels[0].tolist()) for key, pixels in found]
    [('a', [0, 0, 0, 1, 1, 1])]
    """
    batch = settings.batch
    stream = iter(images)
    while True:
        chunk = [
            _Canvas(key, image, settings, size_of)
            for key, image in itertools.islice(stream, _CHUNK)
        ]
        windows = [(view, at) for canvas in chunk for view in canvas.views for at in view.windows]
        sizes = [(settings.window, settings.window)]
        if settings.whole:
            sizes = _sizes_of_hosts({view.window for view, _ in windows})
        # taken from the end, so that finished images are freed
        groups = {size: [row for row in windows[::-1] if row[0].window == size] for size in sizes}
        rounds = [
            size
            for size, group in groups.items()
            for _ in range(_most_of_hosts(-(-len(group) // batch)))
        ]
        if not rounds:
            return
        order = collections.deque(chunk)
        del chunk, windows
        for size in rounds:
            poll()
            group = groups[size]
            taken = [group.pop() for _ in range(min(batch, len(group)))]
            pixels_BxSxSx3 = np.zeros((batch, *size, 3), np.uint8)
            size_Bx2 = np.zeros((batch, 2), np.int32)
            for row, (view, at) in enumerate(taken):
                part = view.cut(resize, at)
                pixels_BxSxSx3[row, : part.shape[0], : part.shape[1]] = part
                size_Bx2[row] = part.shape[:2]
            logits_BxSxSxK = np.asarray(predict(pixels_BxSxSx3, size_Bx2))
            for row, (view, at) in enumerate(taken):
                view.add(logits_BxSxSxK[row], at)
                if not view.left:
                    view.owner.pixels = view.owner.finish_view(view)
            while order and (pixels := order[0].pixels) is not None:
                yield order.popleft().key, pixels
            del logits_BxSxSxK
