"""The images of `tests.bench.tables`: parts of tar files by a hash of their keys, tars of which a
share has annotations, scikit-learn's digits and Fashion-MNIST as folders."""

import gzip
import io
import json
import os
import pathlib
import tarfile
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from PIL import Image

from m3i_jax.data.sources.base import key_hash
from m3i_jax.errors import UserError

HOLDOUT = 0.2  # share of the keys that no run of the tables trains on
SIDE = 32
FASHION = pathlib.Path("/usr/share/datasets/fashion-mnist")  # of Debian's dataset-fashion-mnist
FASHION_IMAGES = 6000  # a part of the 60,000, as many images as the other sets have


def held_out(key: str) -> bool:
    """Whether a key is held out, by the rule of `base.split_by_hash`.

    >>> sum(held_out(str(i)) for i in range(1000))
    196
    """
    return key_hash(key) / 2.0**64 < HOLDOUT


def part(
    files: Iterable[pathlib.Path],
    place: pathlib.Path,
    keep: Callable[[str], bool],
    prefix: str = "",
    edit: Callable[[str, str, bytes], bytes | None] = lambda key, ending, content: content,
) -> None:
    """Write one tar with the members of other tars whose key is kept. Nothing is written where the
    file is there already.

    Args:
        files: tars.
        place: the new file.
        keep: of a key.
        prefix: put before every key, so that its hash is another one.
        edit: (key, ending, content) -> the content to write; None leaves the member out.
    """
    if place.is_file():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    whole = place.with_suffix(".part")
    with tarfile.open(whole, "w") as out:
        for file in sorted(files):
            with tarfile.open(file) as tar:
                for member in tar:
                    key, _, ending = member.name.partition(".")
                    if not member.isfile() or not keep(key):
                        continue
                    content = edit(key, ending, tar.extractfile(member).read())  # type: ignore[union-attr]
                    if content is not None:
                        made = tarfile.TarInfo(prefix + member.name)
                        made.size = len(content)
                        out.addfile(made, io.BytesIO(content))
    os.replace(whole, place)


def annotation_shares(
    directories: Sequence[pathlib.Path],
    out: pathlib.Path,
    labelled: float,
    captioned: float,
    *,
    one_tar: bool = False,
) -> list[str]:
    """Write the tars of each directory as tars shares/NAME-labelsL-captionsC/*.tar, in which a
    share of the training images has a label and another share a caption. Held-out images keep
    both, to be evaluated.

    Args:
        directories, out: of the tars, and of what is written.
        labelled, captioned: the shares.
        one_tar: write shares/NAME-labelsL-captionsC.tar instead, of which a run reads the first of
            several images with one key, as of two drawings of one emoji.

    Returns:
        For each directory the pattern of its files.
    """

    def edit(key: str, ending: str, content: bytes) -> bytes | None:
        # two hashes that do not depend on each other, nor on the one that holds out
        label = held_out(key) or key_hash(f"label-{key}") / 2.0**64 < labelled
        caption = held_out(key) or key_hash(f"caption-{key}") / 2.0**64 < captioned
        if ending == "txt":
            return content if caption else None
        if ending != "json":
            return content
        dropped = ([] if label else ["label"]) + ([] if caption else ["caption"])
        return json.dumps(
            {k: v for k, v in json.loads(content).items() if k not in dropped}
        ).encode()

    written = []
    for directory in directories:
        name = f"{directory.name}-labels{100 * labelled:.0f}-captions{100 * captioned:.0f}"
        files, place = sorted(directory.glob("*.tar")), out / "shares" / name
        if one_tar:
            part(files, place.with_name(f"{name}.tar"), lambda key: True, edit=edit)
        else:
            for file in files:
                part([file], place / file.name, lambda key: True, edit=edit)
        written.append(f"{place}.tar" if one_tar else f"{place}/*.tar")
    return written


def tars(data: pathlib.Path, out: pathlib.Path) -> list[str]:
    """Write what the tables read from the tars STYLE-*.tar of a directory: tuning/STYLE.tar, the
    images that are trained on under keys of their own, so that a part of them can be held out for
    choosing settings; styles/STYLE-train.tar and STYLE-held_out.tar; emoji_names.json and
    names.txt, the prompt that is the bare name.

    Returns:
        The styles, sorted.

    Raises:
        UserError: there is no such tar.
    """
    by_style: dict[str, list[pathlib.Path]] = {}
    for file in sorted(data.glob("*-*.tar")):
        by_style.setdefault(file.name.rpartition("-")[0], []).append(file)
    if not by_style:
        raise UserError(
            f"--data {data}: holds no STYLE-NUMBER.tar; give the directory of the tar files, such"
            " as google-00000.tar"
        )
    for style, files in by_style.items():
        part(files, out / "tuning" / f"{style}.tar", lambda key: not held_out(key), "tune-")
        part(files, out / "styles" / f"{style}-train.tar", lambda key: not held_out(key))
        part(files, out / "styles" / f"{style}-held_out.tar", held_out)
    write_names(data / "subcategories.json", out / "emoji_names.json")
    (out / "names.txt").write_text("{}\n")
    return sorted(by_style)


def write_names(categories: pathlib.Path, place: pathlib.Path) -> None:
    """Write a list of categories as words, if there is one.

    The separators of compound names and of directories become spaces.
    """
    if categories.is_file():
        names = json.loads(categories.read_text())
        place.write_text(json.dumps([n.replace("-", " ").replace("/", " ") for n in names]))


def fashion(files: pathlib.Path, place: pathlib.Path) -> bool:
    """Write the first images of Fashion-MNIST as PNG of 28 pixels, a folder a class. False if its
    files are not there."""
    if place.is_dir():
        return True
    images, labels = (files / f"train-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1"))
    if not images.is_file() or not labels.is_file():
        return False
    with gzip.open(images) as pixels, gzip.open(labels) as classes:
        pixels.read(16)  # number of the format, of images, of rows and of columns
        classes.read(8)
        pixels_NxHxW = np.frombuffer(pixels.read(FASHION_IMAGES * 784), np.uint8)
        categories = classes.read(FASHION_IMAGES)
    whole = place.with_name(place.name + ".part")
    for number, (image_HxW, label) in enumerate(
        zip(pixels_NxHxW.reshape(-1, 28, 28), categories, strict=True)
    ):
        folder = whole / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image_HxW).convert("RGB").save(folder / f"{number:05d}.png")
    os.replace(whole, place)
    return True


def digits(place: pathlib.Path) -> bool:
    """Write scikit-learn's 1,797 handwritten digits as PNG of 32 pixels, a folder a class. False if
    scikit-learn is not installed."""
    if place.is_dir():
        return True
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        return False
    found = load_digits()
    whole = place.with_name(place.name + ".part")
    for number, (image_8x8, label) in enumerate(zip(found.images, found.target, strict=True)):
        folder = whole / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        gray = Image.fromarray(np.round(image_8x8 * (255 / 16)).astype(np.uint8))
        gray.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB").save(
            folder / f"{number:04d}.png"
        )
    os.replace(whole, place)
    return True
