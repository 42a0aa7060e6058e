"""Writes the built-in scenes as files in COCO's and in ADE20k's form, so that tests
use the readers of real files, with what those are full of."""

import json
import os
from typing import Any

import numpy as np
from PIL import Image

from m3i_jax.data.sources import segmentations
from m3i_jax.data.sources.objects import Objects
from m3i_jax.data.sources.scenes import MAP_CLASSES, UNLABELLED, ScenesSource

CATEGORY_IDS = (1, 2, 5, 17, 18, 44, 67, 90)  # of the eight classes; not contiguous, as in COCO
RUN_LENGTHS_EVERY = 5  # one object in five has run lengths, the others polygons
GRAY, CMYK, NO_WIDTH = 1, 2, 3  # images of a split that are stored as gray, as CMYK; with a bad box


def write_scenes(
    directory: str,
    *,
    images: int = 40,
    held_out: int = 10,
    side: int = 96,
    seed: int = 0,
    lvis: bool = False,
) -> None:
    """Writes scenes with annotations.

    `images/{train,val}/*.jpg`; `annotations/instances_{train,val}.json` in COCO's form: category
    ids with gaps, most masks as polygons, some as run lengths, crowds with uncompressed ones,
    images without an object, one box of no width; `annotations/{train,val}/*.png` in ADE20k's: 0
    where unlabelled, class + 1 elsewhere; `classes.txt`, the names of the classes of the maps.
    Image 1 of a split is gray and image 2 is CMYK.

    Args:
        directory: is created.
        images, held_out: number of scenes in train and in val.
        side, seed: see `ScenesSource`.
        lvis: adds what LVIS has: frequencies and image counts of the categories; of each image, the
            categories that it does not show (a third of them), and those of which objects are
            missing (one object in ten is left out). No crowds.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     write_scenes(root, images=3, held_out=1)
    ...     print(sorted(os.listdir(root)), sorted(os.listdir(f"{root}/annotations")))
    ['annotations', 'classes.txt', 'images'] ['instances_train.json', 'instances_val.json', ...]
    """
    source = ScenesSource(images + held_out, side, seed)
    table = source.object_table().subset(np.arange(images))
    counts = table.records_per_class(len(source.classes))
    for split, rows in (("train", range(images)), ("val", range(images, images + held_out))):
        folders = [os.path.join(directory, part, split) for part in ("images", "annotations")]
        for folder in folders:
            os.makedirs(folder, exist_ok=True)
        document = _Document(counts, lvis)
        for number, i in enumerate(rows):
            record = source[i]
            assert isinstance(record.image, np.ndarray) and isinstance(record.map, np.ndarray)
            stem = f"scene_{i:06d}"
            image = Image.fromarray(record.image)
            image = image.convert({GRAY: "L", CMYK: "CMYK"}.get(number, "RGB"))
            image.save(os.path.join(folders[0], f"{stem}.jpg"), quality=92)
            map_HxW = np.where(record.map == UNLABELLED, 0, record.map + 1).astype(np.uint8)
            Image.fromarray(map_HxW).save(os.path.join(folders[1], f"{stem}.png"))
            assert record.objects is not None
            document.add(f"{stem}.jpg", record.objects)
            if number == NO_WIDTH:
                document.add_box_of_no_width()
        path = os.path.join(directory, "annotations", f"instances_{split}.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(document.content, file)
    with open(os.path.join(directory, "classes.txt"), "w", encoding="utf-8") as file:
        file.write("".join(f"{name}\n" for name in MAP_CLASSES))


class _Document:
    """The content of a file of annotations, scene by scene."""

    def __init__(self, counts: np.ndarray, lvis: bool) -> None:
        self.lvis = lvis
        categories: list[dict[str, Any]] = []
        for number, name in enumerate(MAP_CLASSES[: len(CATEGORY_IDS)]):
            category: dict[str, Any] = {"id": CATEGORY_IDS[number], "name": name}
            if lvis:
                count = int(counts[number])
                category["image_count"] = count
                category["frequency"] = "r" if count <= 10 else "c" if count <= 100 else "f"
            categories.append(category)
        self.content: dict[str, Any] = {
            "info": {"description": "built-in scenes"},
            "images": [],
            "annotations": [],
            "categories": categories[::-1],  # readers sort by id
        }

    def add(self, name: str, objects: Objects) -> None:
        """Adds an image and its objects."""
        image: dict[str, Any] = {
            "id": 100 + 7 * len(self.content["images"]),
            "file_name": name,
            "height": objects.size[0],
            "width": objects.size[1],
        }
        shown, missing = set(objects.classes.tolist()), set()
        for i in range(len(objects)):
            number = len(self.content["annotations"])
            if self.lvis and (objects.crowd[i] or number % 10 == 9 and i):
                missing.add(int(objects.classes[i]))
                continue
            self.content["annotations"].append(self._annotation(image["id"], objects, i, number))
        if self.lvis:
            absent = [c for c in range(len(CATEGORY_IDS)) if c not in shown]
            image["neg_category_ids"] = [CATEGORY_IDS[c] for c in absent[::3]]
            image["not_exhaustive_category_ids"] = [CATEGORY_IDS[c] for c in sorted(missing)]
        self.content["images"].append(image)

    def add_box_of_no_width(self) -> None:
        """Adds an annotation that readers leave out to the last image."""
        number = len(self.content["annotations"])
        self.content["annotations"].append(
            {
                "id": 5000 + number,
                "image_id": self.content["images"][-1]["id"],
                "category_id": CATEGORY_IDS[0],
                "bbox": [8.0, 8.0, 0.0, 12.0],
                "area": 0.0,
                "iscrowd": 0,
                "segmentation": [[8.0, 8.0, 8.0, 20.0, 8.0, 14.0]],
            }
        )

    def _annotation(self, image: int, objects: Objects, i: int, number: int) -> dict[str, Any]:
        x0, y0, x1, y1 = objects.boxes[i].tolist()
        mask = segmentations.decode_mask(objects.segmentations[i], *objects.size)  # type: ignore[arg-type]
        height, width = objects.size
        segmentation: Any = None
        if objects.crowd[i]:
            runs = segmentations.runs_of_mask(mask).tolist()
            segmentation = {"size": [height, width], "counts": runs}
        elif number % RUN_LENGTHS_EVERY and (polygons := segmentations.outline(mask)) is not None:
            segmentation = [polygon.ravel().tolist() for polygon in polygons]
        else:
            counts = segmentations.encode_mask(mask).counts.decode()
            segmentation = {"size": [height, width], "counts": counts}
        return {
            "id": 5000 + number,
            "image_id": image,
            "category_id": CATEGORY_IDS[int(objects.classes[i])],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": float(objects.areas[i]),
            "iscrowd": int(objects.crowd[i]),
            "segmentation": segmentation,
        }
