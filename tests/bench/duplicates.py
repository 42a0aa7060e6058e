"""How many known copies --mode=curate finds, and how many images it takes for copies that are none.

python -m tests.bench.duplicates TARS... --images 20000 --out DIR

Originals are drawn from tar files, and composed of their drawings where those do not suffice. A
quarter of the images are copies of them: encoded again, resized, cropped, or cropped and resized.
Recall is the share of the copies that are left out, or for which their original is; precision the
share of the images left out that are copies of what stays. Originals may be like each other: those
that are left out count as errors, unless their files are equal, and are in curate.html to be judged
by eye. The thresholds were chosen on the originals of even number; the table is that of the
others."""

import argparse
import collections
import io
import pathlib
import resource

import numpy as np
from PIL import Image
from pyarrow import parquet

from m3i_jax import schema
from m3i_jax.data import curation, decode
from m3i_jax.data.sources.tars import TarSource
from m3i_jax.modes import curate

KINDS = ("jpeg 40", "webp 60", "half", "double", "crop .9", "crop .8", "crop .7", "crop .85 half")


def make_copy(image: Image.Image, kind: str, rng: np.random.Generator) -> bytes:
    """A copy of an image as the bytes of a file."""
    options = {"format": "JPEG", "quality": 85}
    if kind == "jpeg 40":
        options["quality"] = 40
    elif kind == "webp 60":
        options = {"format": "WEBP", "quality": 60}
    if kind.startswith("crop"):
        width, height = image.size
        side = float(kind.split()[1]) + rng.uniform(-0.05, 0.05)
        w, h = max(16, int(width * side)), max(16, int(height * side))
        x, y = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
        image = image.crop((x, y, x + w, y + h))
    if kind.endswith(("half", "double")):
        factor = 0.5 if kind.endswith("half") else 2
        image = image.resize(tuple(max(16, int(side * factor)) for side in image.size))
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def composed(drawings: list[Image.Image], rng: np.random.Generator) -> Image.Image:
    """An image of its own: some drawings on smooth random colours with noise."""
    width, height = rng.integers(112, 257, 2).tolist()
    colours = rng.integers(0, 256, (*rng.integers(2, 6, 2), 3)).astype(np.uint8)
    smooth = Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)
    noise = rng.normal(0, rng.uniform(0, 12), (height, width, 3))
    image = Image.fromarray((np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8))
    for _ in range(int(rng.integers(2, 6))):
        drawing = drawings[int(rng.integers(len(drawings)))]
        factor = rng.uniform(0.2, 0.6) * min(image.size) / max(drawing.size)
        drawing = drawing.resize(tuple(max(8, int(side * factor)) for side in drawing.size))
        place = tuple(int(rng.integers(-8, side - 16)) for side in image.size)
        image.paste(drawing, place, drawing)
    return image


def write_images(tars: list[str], count: int, folder: pathlib.Path) -> None:
    """Writes originals `o<i>.png` and copies `o<i> <kind>.<ext>` to a folder. Where the tar files
    have too few, originals are composed from them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    originals = count - count // 4
    copied = set(rng.permutation(originals)[: count // 4].tolist())
    sources = [TarSource(tar) for tar in tars]
    orders = [iter(rng.permutation(len(source)).tolist()) for source in sources]
    drawings: list[Image.Image] = []
    taken = 0
    while taken < originals:
        if orders:
            place = taken % len(sources)
            index = next(orders[place], None)
            if index is None:
                del sources[place], orders[place]
                continue
            if "annotations" in sources[place].key(index):  # class maps beside the scenes
                continue
            raw = sources[place][index].image
            try:
                image = Image.fromarray(decode.decode_image(raw))
            except decode.BadRecord:  # too small
                continue
            if min(image.size) < 32:
                continue
            drawing = Image.open(io.BytesIO(raw)).convert("RGBA")
            if drawing.getextrema()[3][0] < 255:
                drawings.append(drawing)
        else:
            image = composed(drawings, rng)
        image.save(folder / f"o{taken}.png")
        if taken in copied:
            kind = KINDS[int(rng.integers(len(KINDS)))]
            (folder / f"o{taken} {kind}.jpg").write_bytes(make_copy(image, kind, rng))
        taken += 1


def number_of(key: str) -> int:
    """The number of an original, from the name of its file or of that of its copy.

    >>> number_of("o17 crop .9.jpg"), number_of("o17.png")
    (17, 17)
    """
    return int(key.split()[0].split(".")[0][1:])


def print_table(out: pathlib.Path) -> None:
    """Prints recall by kind and precision of a finished run, of the originals of odd number."""
    rows = parquet.read_table(out / "run" / "left_out.parquet").to_pylist()
    copy_of = {row["key"]: row["copy_of"] for row in rows if row["copy_of"]}
    equal = {row["key"] for row in rows if row["reason"] == curation.EXACT}
    found: dict[str, list[bool]] = collections.defaultdict(list)
    direct: list[bool] = []
    for path in sorted((out / "images").iterdir()):
        stem, _, kind = path.stem.partition(" ")
        if kind and number_of(path.name) % 2:
            pair = {path.name, f"{stem}.png"}
            # one of the two is left out; for the other, or for a third that is like both
            found[kind].append(bool(pair & set(copy_of)))
            direct.append(any({key, copy_of.get(key)} == pair for key in pair))
    right = [
        key in equal or number_of(key) == number_of(of)
        for key, of in copy_of.items()
        if number_of(key) % 2
    ]
    print("| copies | number | found % |\n|---|---:|---:|")
    for kind in KINDS:
        print(f"| {kind} | {len(found[kind])} | {100 * np.mean(found[kind] or [0]):.1f} |")
    every = [value for values in found.values() for value in values]
    print(f"| all | {len(every)} | {100 * np.mean(every):.1f} |")
    print(f"{100 * np.mean(direct):.1f} % are left out for each other")
    print(f"precision: {100 * np.mean(right):.1f} % of {len(right)} images that are left out")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tars", nargs="+")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--out", required=True)
    parser.add_argument("--difference", type=float, default=schema.Curate().difference)
    parser.add_argument("--detail", type=float, default=schema.Curate().detail)
    parser.add_argument("--workers", type=int, default=1)
    flags = parser.parse_args()
    out = pathlib.Path(flags.out)
    if not (out / "images").exists():
        write_images(flags.tars, flags.images, out / "images")
    data = schema.Data(source="folder", path=str(out / "images"), split=".", workers=flags.workers)
    rules = schema.Curate(difference=flags.difference, detail=flags.detail)
    curate.run(schema.Config(data=data, curate=rules), workdir=str(out / "run"))
    print_table(out)
    used = resource.getrusage(resource.RUSAGE_SELF)
    chunks = -(-flags.images // curation.CHUNK)
    print(f"processor time {used.ru_utime + used.ru_stime:.0f} s, {chunks} chunks, this process")


if __name__ == "__main__":
    main()
