"""The images of `tests.bench.tables`: parts of tar files by a hash of their keys, and
scikit-learn's digits as a folder."""

import io
import json
import os
import pathlib
import tarfile
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image

from m3i_jax.data.sources.base import key_hash
from m3i_jax.errors import UserError

HOLDOUT = 0.2  # share of the keys that no run of the tables trains on
SIDE = 32


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
) -> None:
    """Write one tar with the members of other tars whose key is kept. Nothing is written where the
    file is there already.

    Args:
        files: tars.
        place: the new file.
        keep: of a key.
        prefix: put before every key, so that its hash is another one.
    """
    if place.is_file():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    whole = place.with_suffix(".part")
    with tarfile.open(whole, "w") as out:
        for file in sorted(files):
            with tarfile.open(file) as tar:
                for member in tar:
                    key = member.name.split(".")[0]
                    if member.isfile() and keep(key):
                        content = tar.extractfile(member).read()  # type: ignore[union-attr]
                        made = tarfile.TarInfo(prefix + member.name)
                        made.size = len(content)
                        out.addfile(made, io.BytesIO(content))
    os.replace(whole, place)


def tars(data: pathlib.Path, out: pathlib.Path) -> list[str]:
    """Write what the tables read from the tars STYLE-*.tar of a directory: tuning/STYLE.tar, the
    images that are trained on under keys of their own, so that a part of them can be held out for
    choosing settings; styles/STYLE-train.tar and STYLE-held_out.tar; class_names.json and
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
    if (names := data / "subcategories.json").is_file():
        (out / "class_names.json").write_text(
            json.dumps([name.replace("-", " ") for name in json.loads(names.read_text())])
        )
    (out / "names.txt").write_text("{}\n")
    return sorted(by_style)


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
