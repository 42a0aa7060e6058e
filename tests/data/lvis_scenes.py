"""Built-in scenes in LVIS's layout: 1,203 categories of falling frequency, addresses instead of
file names, categories that are known to be absent of an image, and some that are not annotated in
full. Images of the held-out file are in both folders, as LVIS's are in COCO's."""

import json
import pathlib
from typing import Any

import numpy as np

from tests import scene_files

CLASSES = 1203


def write_lvis(
    directory: pathlib.Path,
    *,
    classes: int = CLASSES,
    images: int = 24,
    held_out: int = 8,
    side: int = 48,
    seed: int = 0,
) -> None:
    """Writes train2017/, val2017/ and annotations/lvis_v1_{train,val}.json. Every shape has some of
    the categories, the first of them the most often."""
    scene_files.write_scenes(
        str(directory), images=images, held_out=held_out, side=side, seed=seed, lvis=True
    )
    r = np.random.default_rng(seed)
    files = {split: directory / "annotations" / f"instances_{split}.json" for split in SPLITS}
    content = {split: json.loads(file.read_text()) for split, file in files.items()}
    shapes = {id_: row for row, id_ in enumerate(scene_files.CATEGORY_IDS)}
    for split, document in content.items():
        (directory / "images" / split).rename(directory / f"{split}2017")
        for annotation in document["annotations"]:
            own = np.arange(shapes[annotation["category_id"]], classes, len(shapes))
            weight = 1 / np.arange(1, len(own) + 1)
            annotation["category_id"] = int(r.choice(own, p=weight / weight.sum())) + 1
        for row, image in enumerate(document["images"]):
            _describe(image, document["annotations"], row, classes, r)
            folder, name = f"{split}2017", image.pop("file_name")
            if split == "val" and row < 2:
                (directory / folder / name).rename(directory / "train2017" / name)
                folder = "train2017"
            image["coco_url"] = f"http://images.invalid/{folder}/{name}"
    categories = _categories(content["train"]["annotations"], classes)
    for split, document in content.items():
        path = directory / "annotations" / f"lvis_v1_{split}.json"
        path.write_text(json.dumps(document | {"categories": categories}))
        files[split].unlink()


SPLITS = ("train", "val")


def _describe(
    image: dict[str, Any],
    annotations: list[dict[str, Any]],
    row: int,
    classes: int,
    r: np.random.Generator,
) -> None:
    shown = sorted({a["category_id"] for a in annotations if a["image_id"] == image["id"]})
    some = r.choice(classes, 12, replace=False) + 1
    image["neg_category_ids"] = [int(k) for k in some if k not in shown]
    image["not_exhaustive_category_ids"] = shown[:1] if row % 3 == 0 else []


def _categories(annotations: list[dict[str, Any]], classes: int) -> list[dict[str, Any]]:
    pairs = {(a["category_id"], a["image_id"]) for a in annotations}
    out = []
    for k in range(1, classes + 1):
        count = sum(category == k for category, _ in pairs)
        out.append(
            {
                "id": k,
                "name": f"thing_{k:04d}",
                "synset": f"thing.n.{k:04d}",
                "image_count": count,
                "instance_count": sum(a["category_id"] == k for a in annotations),
                "frequency": "r" if count <= 1 else "c" if count <= 3 else "f",
            }
        )
    return out
