"""How many known copies --mode=curate finds, and how many images it takes for copies that are none.

python -m tests.bench.duplicates TARS... --images 2000 --out DIR

Originals are drawn from tar files. A quarter of the images are copies of them: encoded again,
resized, or cropped. Recall is the share of the copies that are left out, or for which their
original is; precision the share of the images left out that are copies of what stays. Originals may
be like each other: those that are left out count as errors, and are in curate.html to be judged by
eye."""

import argparse
import collections
import io
import pathlib
import resource

import numpy as np
from PIL import Image

from m3i_jax import schema
from m3i_jax.data import curation, decode
from m3i_jax.data.sources.tars import TarSource
from m3i_jax.modes import curate

KINDS = ("jpeg 40", "webp 60", "half", "double", "crop .9", "crop .8", "crop .7")


def make_copy(image: Image.Image, kind: str, rng: np.random.Generator) -> bytes:
    """A copy of an image as the bytes of a file."""
    options = {"format": "JPEG", "quality": 85}
    width, height = image.size
    if kind == "jpeg 40":
        options["quality"] = 40
    elif kind == "webp 60":
        options = {"format": "WEBP", "quality": 60}
    elif kind in ("half", "double"):
        factor = 0.5 if kind == "half" else 2
        image = image.resize((max(16, int(width * factor)), max(16, int(height * factor))))
    else:
        side = float(kind.split()[1]) + rng.uniform(-0.05, 0.05)
        w, h = max(16, int(width * side)), max(16, int(height * side))
        x, y = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
        image = image.crop((x, y, x + w, y + h))
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def write_images(tars: list[str], count: int, folder: pathlib.Path) -> None:
    """Writes originals `o<i>.png` and copies `o<i> <kind>.<ext>` to a folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    sources = [TarSource(tar) for tar in tars]
    originals = count - count // 4
    copied = set(rng.permutation(originals)[: count // 4].tolist())
    taken = 0
    orders = [iter(rng.permutation(len(source)).tolist()) for source in sources]
    while taken < originals:
        place = taken % len(sources)
        index = next(orders[place], None)
        if index is None:
            del sources[place], orders[place]
            continue
        try:
            image = Image.fromarray(decode.decode_image(sources[place][index].image))
        except decode.BadRecord:  # too small
            continue
        if min(image.size) < 32:
            continue
        image.save(folder / f"o{taken}.png")
        if taken in copied:
            kind = KINDS[int(rng.integers(len(KINDS)))]
            (folder / f"o{taken} {kind}.jpg").write_bytes(make_copy(image, kind, rng))
        taken += 1


def print_table(out: pathlib.Path) -> None:
    """Prints recall by kind and precision of a finished run."""
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(out / "run" / "left_out.parquet").to_pylist()
    copy_of = {row["key"]: row["copy_of"] for row in rows if row["copy_of"]}
    found: dict[str, list[bool]] = collections.defaultdict(list)
    direct: list[bool] = []
    for path in sorted((out / "images").iterdir()):
        stem, _, kind = path.stem.partition(" ")
        if kind:
            pair = {path.name, f"{stem}.png"}
            # one of the two is left out; for the other, or for a third that is like both
            found[kind].append(bool(pair & set(copy_of)))
            direct.append(any({key, copy_of.get(key)} == pair for key in pair))
    right = [
        key.split()[0].split(".")[0] == of.split()[0].split(".")[0] for key, of in copy_of.items()
    ]
    print("| copies | number | found % |\n|---|---|---|")
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
    parser.add_argument("--workers", type=int, default=1)
    flags = parser.parse_args()
    out = pathlib.Path(flags.out)
    if not (out / "images").exists():
        write_images(flags.tars, flags.images, out / "images")
    data = schema.Data(source="folder", path=str(out / "images"), split=".", workers=flags.workers)
    rules = schema.Curate(difference=flags.difference)
    curate.run(schema.Config(data=data, curate=rules), workdir=str(out / "run"))
    print_table(out)
    used = resource.getrusage(resource.RUSAGE_SELF)
    chunks = -(-flags.images // curation.CHUNK)
    print(f"processor time {used.ru_utime + used.ru_stime:.0f} s, {chunks} chunks, this process")


if __name__ == "__main__":
    main()
