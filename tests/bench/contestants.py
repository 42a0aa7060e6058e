"""The contestants of `tests.bench.input`. Each is a process,

    python -m tests.bench.contestants NAME FOLDER

that reads numbers of batches from its standard input and answers each when the batches are ready.
The cost is measured by the parent process.
"""

import dataclasses
import importlib.util
import io
import os
import pathlib
import sys
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from m3i_jax import schema
from m3i_jax.data import crops, decode_fast, splits
from m3i_jax.data import pipeline as m3i_pipeline
from m3i_jax.data.sources import base

BATCH, SIZE = 256, 224  # a host's share of a typical batch
WARM = 6  # warm-up batches, after which workers reuse returned buffers
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def make_pictures(
    folder: pathlib.Path, count: int = 64, height: int = 375, width: int = 500
) -> None:
    """JPEGs with the dimensions and file size of a photograph: smooth shapes and noise, fixed
    seed."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        pixels = np.clip(np.asarray(coarse) + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(
            np.uint8
        )
        class_folder = folder / str(i % 8)
        class_folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(class_folder / f"{i:04}.jpg", quality=92)


def config(batch: int = BATCH, **data: object) -> schema.Config:
    """A ViT-B/16 run without captions and prefetch threads."""
    plain = {
        "source": "folder",
        "holdout": 0.0,
        "captions": "no",
        "threads": 0,
        "image_size": SIZE,
        "resizer": "auto",
    }
    settings_ = schema.Data(**{**plain, **data})
    return schema.Config(data=settings_, train=schema.Train(batch_size=batch))


def pipeline(
    folder: str, *, start: int = 0, batch: int = BATCH, **data: object
) -> m3i_pipeline.Batches:
    """The pipeline of this package."""
    settings = config(batch, path=folder, **data)
    source = base.split_by_hash(splits.open_source(settings.data), 0.0, "train")
    return m3i_pipeline.iterate_batches(settings, source, None, start=start)


def without_augmentation(folder: str) -> Iterator[dict[str, np.ndarray]]:
    """The pipeline of this package without photometric augmentation."""
    off = schema.Augment(jitter_p=0.0, grayscale_p=0.0, blur_p=(0.0, 0.0), solarize_p=(0.0, 0.0))
    return pipeline(folder, augment=off)


def raw(folder: str, resizer: str = "auto") -> Iterator[None]:
    """Decoder and resizer only, on precomputed boxes: no order, batch, flip, mask or label."""
    files = sorted(pathlib.Path(folder).rglob("*.jpg"))
    u = np.random.default_rng(1).random((4096, 2, 22)).tolist()
    boxes = [[crops.crop_box(v, 375, 500, scale=SCALE, ratio=RATIO) for v in row] for row in u]
    windows = [[(left, top, left + w, top + h) for top, left, h, w in pair] for pair in boxes]
    row, by = 0, crops.choose_resizer(resizer)
    while True:
        for _ in range(BATCH):
            with open(files[row * 37 % len(files)], "rb", buffering=0) as file:
                content = file.read()
            packed = decode_fast.decode_jpeg(content, 375, 500) if by != "pillow" else None
            image = packed or Image.open(io.BytesIO(content))
            for window in windows[row % len(windows)]:
                if isinstance(image, decode_fast.PackedImage):
                    image.cut(window, SIZE)
                elif by == "pillow":
                    image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, window)
                else:
                    image.load()
                    decode_fast.resize_region(image, window, SIZE)
            row += 1
        yield None


class _Views:
    """torchvision's ImageFolder, with two views of each decoded image."""

    def __init__(self, folder: str, tensors: bool) -> None:
        from torchvision import datasets, transforms

        bicubic = transforms.InterpolationMode.BICUBIC
        steps = [
            transforms.RandomResizedCrop(SIZE, SCALE, RATIO, bicubic, antialias=True),
            transforms.RandomHorizontalFlip(),
        ]
        self.view = transforms.Compose(steps if tensors else [*steps, transforms.PILToTensor()])
        self.files, self.tensors = datasets.ImageFolder(folder), tensors

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, index: int) -> tuple[object, object, int]:
        path, label = self.files.samples[index * 37 % len(self.files.samples)]
        if self.tensors:
            from torchvision import io as tensors

            image = tensors.decode_image(tensors.read_file(path), tensors.ImageReadMode.RGB)
        else:
            image = self.files.loader(path)
        return self.view(image), self.view(image), label


def dataloader(folder: str, *, tensors: bool = False) -> Iterator[object]:
    """torchvision with a DataLoader of one worker, on Pillow images (its default) or tensors."""
    import torch

    torch.set_num_threads(1)
    return iter(
        torch.utils.data.DataLoader(
            _Views(folder, tensors), BATCH, num_workers=1, prefetch_factor=2
        )
    )


def tf_data(folder: str) -> Iterator[object]:
    """tf.data on one thread, with an antialiased bicubic filter."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    def view(image: object) -> object:
        box = tf.constant([[[0.0, 0.0, 1.0, 1.0]]])
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.shape(image),
            box,
            area_range=SCALE,
            aspect_ratio_range=RATIO,
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        cut = tf.image.resize(tf.slice(image, begin, size), (SIZE, SIZE), "bicubic", antialias=True)
        return tf.image.random_flip_left_right(
            tf.cast(tf.clip_by_value(tf.round(cut), 0, 255), tf.uint8)
        )

    def sample(path: object) -> object:
        image = tf.io.decode_jpeg(tf.io.read_file(path), 3)
        return tf.stack([view(image), view(image)])

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    files = sorted(map(str, pathlib.Path(folder).rglob("*.jpg")))
    return iter(
        tf.data.Dataset.from_tensor_slices(files)
        .repeat()
        .map(sample)
        .batch(BATCH)
        .with_options(options)
    )


def decode_pillow(folder: str) -> Iterator[None]:
    """Decoding only, with Pillow."""
    return _decode(folder, lambda raw: Image.open(io.BytesIO(raw)).load())


def decode_simplejpeg(folder: str) -> Iterator[None]:
    """Decoding only, with simplejpeg, to an image that Pillow can resize."""
    import simplejpeg

    return _decode(folder, lambda raw: Image.fromarray(simplejpeg.decode_jpeg(raw, "RGB")))


def _decode(folder: str, decode: Callable[[bytes], object]) -> Iterator[None]:
    files = [path.read_bytes() for path in sorted(pathlib.Path(folder).rglob("*.jpg"))]
    at = 0
    while True:
        for _ in range(BATCH):
            decode(files[at % len(files)])
            at += 1
        yield None


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A contestant. `needs`: the packages that it requires."""

    begin: Callable[[str], Iterator[object]]
    needs: tuple[str, ...] = ()

    @property
    def absent(self) -> str:
        """The first required package that is not installed."""
        return next((name for name in self.needs if importlib.util.find_spec(name) is None), "")


CONTESTANTS = {
    "raw loop": Contestant(raw),
    "pipeline": Contestant(pipeline),
    "pipeline, 1 worker": Contestant(lambda folder: pipeline(folder, workers=1)),
    "raw loop, Pillow": Contestant(lambda folder: raw(folder, "pillow")),
    "pipeline, Pillow": Contestant(lambda folder: pipeline(folder, resizer="pillow")),
    "pipeline, Pillow, 1 worker": Contestant(
        lambda folder: pipeline(folder, resizer="pillow", workers=1)
    ),
    "pipeline, no augmentation": Contestant(without_augmentation),
    "DataLoader, Pillow, 1 worker": Contestant(dataloader, ("torch", "torchvision")),
    "DataLoader, tensors, 1 worker": Contestant(
        lambda folder: dataloader(folder, tensors=True), ("torch", "torchvision")
    ),
    "tf.data": Contestant(tf_data, ("tensorflow",)),
    "decode: Pillow": Contestant(decode_pillow),
    "decode: simplejpeg": Contestant(decode_simplejpeg, ("simplejpeg",)),
}


def main(name: str, folder: str) -> None:
    batches = CONTESTANTS[name].begin(folder)
    for _ in range(WARM):
        next(batches)
    print("ready", flush=True)
    for line in sys.stdin:
        for _ in range(int(line)):
            next(batches)
        print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
