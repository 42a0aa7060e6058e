"""Scenes that tests/data/compose_scenes.py makes of drawings: what is annotated is what is drawn,
and nothing held out is trained on."""

import io
import json
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

from m3i_jax.data.sources import segmentations
from tests.data import compose_scenes

COLORS = {"food/fruit": (255, 0, 0), "tools/saw": (0, 255, 0)}


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ten drawings of each category, one of them twice, and three that are not for scenes."""
    path = tmp_path_factory.mktemp("drawings") / "00000.tar"
    rows = [(name, 8 + i, 0) for name in COLORS for i in range(10)]
    rows += [("food/fruit", 8, 0), ("rare/one", 9, 0), ("animals", 9, 0), ("food/fruit", 30, None)]
    with tarfile.open(path, "w") as file:
        for number, (name, side, label) in enumerate(rows):
            image = Image.new("RGBA", (20, 20))
            image.paste((*COLORS.get(name, (0, 0, 255)), 255), (0, 0, side, 20))
            stream = io.BytesIO()
            image.save(stream, "png")
            about = {"category": name} | ({} if label is None else {"label": label})
            for suffix, content in ((".png", stream.getvalue()), (".json", json.dumps(about))):
                raw = content if isinstance(content, bytes) else content.encode()
                member = tarfile.TarInfo(f"key{number}{suffix}")
                member.size = len(raw)
                file.addfile(member, io.BytesIO(raw))
    return str(path)


def test_drawings_are_split_by_category(tar: str) -> None:
    found = compose_scenes.read_drawings(tar, 10)
    assert {name: len(those) for name, those in found["train"].items()} == dict.fromkeys(COLORS, 8)
    assert {name: len(those) for name, those in found["val"].items()} == dict.fromkeys(COLORS, 2)
    pixels = [{d.tobytes() for those in found[s].values() for d in those} for s in found]
    assert len(pixels[0]) == 16 and not pixels[0] & pixels[1]
    with pytest.raises(ValueError, match="no category has 11 drawings"):
        compose_scenes.read_drawings(tar, 11)


def test_annotations_are_what_is_drawn(tar: str, tmp_path: pathlib.Path) -> None:
    drawings, side = compose_scenes.read_drawings(tar, 10)["val"], 48
    compose_scenes.write_split(tmp_path, "val", drawings, 4, side, 0)
    document = json.loads((tmp_path / "annotations/instances_val.json").read_text())
    assert [c["name"] for c in document["categories"]] == list(COLORS)
    assert len(document["annotations"]) >= 8
    for image in document["images"]:
        stem = image["file_name"].removesuffix(".jpg")
        pixels = np.asarray(Image.open(tmp_path / f"images/val/{stem}.jpg"), int)
        map_HxW = np.asarray(Image.open(tmp_path / f"annotations/val/{stem}.png"))
        assert pixels.shape == (side, side, 3) and map_HxW.min() >= 1 and map_HxW.max() <= 6
        left = map_HxW <= 2
        for each in (a for a in document["annotations"] if a["image_id"] == image["id"]):
            counts = each["segmentation"]["counts"].encode()
            mask = segmentations.decode_mask(
                segmentations.RunLengths(counts, (side, side)), side, side
            )
            x0, y0, x1, y1 = segmentations.tight_box(mask)
            assert each["bbox"] == [x0, y0, x1 - x0, y1 - y0] and each["area"] == mask.sum()
            assert (map_HxW[mask] == each["category_id"]).all()
            color = COLORS[document["categories"][each["category_id"] - 1]["name"]]
            assert pixels[mask].mean(0).argmax() == np.argmax(color)  # at least half of it
            left &= ~mask
        assert left.sum() < 6 * compose_scenes.LEAST_PIXELS  # drawings that are almost hidden
