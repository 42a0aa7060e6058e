"""Composes scenes with boxes, masks and class maps from drawings with transparency, in COCO's and
ADE20k's layout.

    python -m tests.data.compose_scenes 'CLIPART/*.tar' SCENES

Reads tar files with KEY.webp (or .png) and KEY.json, where `label` says that `category` is one; a
drawing of several folders has a name like "food/fruit". Categories are the names with a slash that
have at least `--least` drawings. A fifth of the drawings of each category is held out: scenes of
`val` show those alone. A scene has two to six drawings of random categories, turned by up to 15
degrees, before one of four textures of two colours; the longer side of a drawing is a sixth to a
half of the scene. Copies of a drawing, pixel by pixel, count once.
"""

import argparse
import glob
import hashlib
import io
import json
import math
import pathlib
import tarfile
from typing import Any

import numpy as np
from PIL import Image

from m3i_jax.data.sources import segmentations, shapes

TEXTURES = ("shaded", "striped", "checkered", "speckled")
LEAST_PIXELS = 16  # of an annotated drawing; smaller ones are in the map alone
HELD_OUT = 5  # one drawing in so many

Drawings = dict[str, list[Image.Image]]


def read_drawings(pattern: str, least: int) -> dict[str, Drawings]:
    """The drawings of each category: those to train on (`train`), and those held out (`val`).

    Raises:
      ValueError: no category has `least` drawings.
    """
    found: dict[str, dict[str, Image.Image]] = {}
    seen: set[str] = set()
    for file in sorted(glob.glob(pattern)):
        with tarfile.open(file) as tar:
            members = {member.name: member for member in tar}

            def content(name: str, tar: tarfile.TarFile = tar, members: Any = members) -> bytes:
                stream = tar.extractfile(members[name])
                assert stream is not None
                return stream.read()

            for name in sorted(members):
                stem, _, extension = name.rpartition(".")
                if extension not in ("webp", "png") or f"{stem}.json" not in members:
                    continue
                about = json.loads(content(f"{stem}.json"))
                category = about.get("category", "")
                if about.get("label") is None or "/" not in category:
                    continue
                image = Image.open(io.BytesIO(content(name))).convert("RGBA")
                pixels = hashlib.sha256(image.tobytes()).hexdigest()
                if pixels not in seen:
                    seen.add(pixels)
                    found.setdefault(category, {})[hashlib.sha256(stem.encode()).hexdigest()] = (
                        image
                    )
    enough = {name: found[name] for name in sorted(found) if len(found[name]) >= least}
    if not enough:
        raise ValueError(f"{pattern}: no category has {least} drawings")
    split: dict[str, Drawings] = {"train": {}, "val": {}}
    for name, drawings in enough.items():
        ordered = [drawings[digest] for digest in sorted(drawings)]
        last = -(-len(ordered) // HELD_OUT)
        split["val"][name], split["train"][name] = ordered[:last], ordered[last:]
    return split


def ground(r: np.random.Generator, side: int) -> tuple[Image.Image, int]:
    """A textured background with some noise, and the index of its texture."""
    texture = int(r.integers(len(TEXTURES)))
    colors = r.integers(30, 226, (2, 3))
    cells = r.random(shapes.GRAIN**2)
    share = shapes.pattern_mask(TEXTURES[texture], side, *r.random(3).tolist(), cells)
    weight = np.asarray(share, np.float64)[..., None] / 255
    pixels = colors[0] + weight * (colors[1] - colors[0]) + r.normal(0, 5, (side, side, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), texture


def compose(
    r: np.random.Generator, drawings: Drawings, side: int
) -> tuple[Image.Image, np.ndarray, list[tuple[int, np.ndarray]]]:
    """A scene.

    Returns:
      The image; its class map uint8 [side, side], which counts the textures after the categories;
      category and mask of each drawing that is visible, the hindmost first.
    """
    image, texture = ground(r, side)
    names = list(drawings)
    owner = np.full((side, side), -1)
    shown: list[int] = []
    for number in range(int(r.integers(2, 7))):
        category = int(r.integers(len(names)))
        those = drawings[names[category]]
        drawing = those[int(r.integers(len(those)))]
        longer = side / 6 * 3 ** r.random()
        share = longer / max(drawing.size)
        size = [max(1, round(share * length)) for length in drawing.size]
        small = drawing.resize((size[0], size[1]), Image.Resampling.LANCZOS)
        small = small.rotate(r.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
        x, y = (math.floor(side * (0.05 + 0.9 * r.random()) - length / 2) for length in small.size)
        image.paste(small, (x, y), small.getchannel("A"))
        alpha = Image.new("L", (side, side))
        alpha.paste(small.getchannel("A"), (x, y))
        owner[np.asarray(alpha) >= 128] = number
        shown.append(category)
    map_HxW = np.full((side, side), len(names) + texture, np.uint8)
    objects = []
    for number, category in enumerate(shown):
        mask = owner == number
        map_HxW[mask] = category
        if mask.sum() >= LEAST_PIXELS:
            objects.append((category, mask))
    return image, map_HxW, objects


def write_split(
    out: pathlib.Path, split: str, drawings: Drawings, images: int, side: int, seed: int
) -> None:
    """Writes images/SPLIT, annotations/SPLIT and annotations/instances_SPLIT.json."""
    folders = out / "images" / split, out / "annotations" / split
    for folder in folders:
        folder.mkdir(parents=True)
    document: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(drawings)],
    }
    for i in range(images):
        r = np.random.default_rng((seed, ("train", "val").index(split), i))
        image, map_HxW, objects = compose(r, drawings, side)
        stem = f"{split}_{i:06d}"
        image.save(folders[0] / f"{stem}.jpg", quality=92)
        Image.fromarray(map_HxW + 1).save(folders[1] / f"{stem}.png")
        document["images"].append(
            {"id": i + 1, "file_name": f"{stem}.jpg", "height": side, "width": side}
        )
        for category, mask in objects:
            x0, y0, x1, y1 = segmentations.tight_box(mask)
            document["annotations"].append(
                {
                    "id": len(document["annotations"]) + 1,
                    "image_id": i + 1,
                    "category_id": category + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {
                        "size": [side, side],
                        "counts": segmentations.encode_mask(mask).counts.decode(),
                    },
                }
            )
    (out / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))


def main() -> None:
    """Writes a training and a held-out split, and classes.txt, the names of the map's classes."""
    flags = argparse.ArgumentParser()
    flags.add_argument("drawings", help="glob of tar files")
    flags.add_argument("out", type=pathlib.Path, help="a directory that does not exist yet")
    flags.add_argument("--images", type=int, default=3000)
    flags.add_argument("--held-out", type=int, default=300)
    flags.add_argument("--side", type=int, default=96)
    flags.add_argument("--least", type=int, default=40, help="drawings of a category")
    flags.add_argument("--seed", type=int, default=0)
    args = flags.parse_args()
    drawings = read_drawings(args.drawings, args.least)
    args.out.mkdir(parents=True)
    for split, images in (("train", args.images), ("val", args.held_out)):
        write_split(args.out, split, drawings[split], images, args.side, args.seed)
        count = sum(map(len, drawings[split].values()))
        print(
            f"{split}: {images:,} scenes of {count:,} drawings, {len(drawings[split])} categories"
        )
    names = [*drawings["train"], *(f"{texture} ground" for texture in TEXTURES)]
    (args.out / "classes.txt").write_text("".join(f"{name}\n" for name in names))


if __name__ == "__main__":
    main()
