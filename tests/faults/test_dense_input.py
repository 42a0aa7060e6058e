"""Bad input of runs of detection and segmentation, with every head: images and annotations that
cannot be used are replaced and counted, always in the same order, and the rest is trained on."""

import json
import pathlib
import signal

import numpy as np
import pytest
from PIL import Image

from m3i_jax import main as command
from m3i_jax.training import loop, trainer
from tests import scene_files
from tests.training.test_dense_resume import (
    HEADS,
    ROOT,
    SEGMENTERS,
    STEPS,
    arguments,
    logged,
    same,
    traced_once,  # noqa: F401
)

SCENES, SIDE = 24, 40


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Of 24 scenes, three images are damaged and one is lost; two maps do not fit; annotations have
    damaged masks and boxes of no number, outside of the image and of no size."""
    root = tmp_path_factory.mktemp("bad") / "scenes"
    scene_files.write_scenes(str(root), images=SCENES, held_out=4, side=SIDE, seed=5)
    images = sorted((root / "images" / "train").glob("*.jpg"))
    images[3].write_bytes(images[3].read_bytes()[:400])
    images[4].write_bytes(b"<html>no image</html>")
    images[5].write_bytes(b"")
    images[6].unlink()
    maps = sorted((root / "annotations" / "train").glob("*.png"))
    Image.fromarray(np.zeros((7, 9), np.uint8)).save(maps[7])
    Image.fromarray(np.full_like(np.asarray(Image.open(maps[8])), 99)).save(maps[8])
    path = root / "annotations" / "instances_train.json"
    document = json.loads(path.read_text())
    rows = [row for row in document["annotations"] if not row["iscrowd"]]
    for row, box in zip(
        rows[10:], ([float("nan")] * 4, [900, 900, 5, 5], [3, 3, -2, 4], [1e9] * 4), strict=False
    ):
        row["bbox"] = box
    for row, mask in zip(
        rows[20:], ({"size": [SIDE, SIDE], "counts": "~~"}, [[1, 2]], [], "none"), strict=False
    ):
        row["segmentation"] = mask
    rows[30]["category_id"] = 12345
    path.write_text(json.dumps(document))
    return root


def _arguments(files: pathlib.Path, run: pathlib.Path, head: str, **changes: object) -> list[str]:
    """The command of `test_dense_resume` on the files."""
    values: dict[str, object] = {"data__max_bad_share": 0.9, "data__size": 0, **changes}
    if head in SEGMENTERS:
        values |= {"data__source": "maps", "data__path": files, "data__split": "train"}
    else:
        values |= {
            "data__source": "coco",
            "data__path": files / "images",
            "data__annotations": files / "annotations" / "instances_train.json",
        }
    return arguments(run, head, **values)


@pytest.mark.slow
@pytest.mark.row("C1")
@pytest.mark.parametrize("head", HEADS)
def test_bad_images_and_annotations_are_counted_in_the_same_order(
    head: str,
    files: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also by a run that is preempted and goes on with worker processes."""
    monkeypatch.chdir(ROOT)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command.main(_arguments(files, whole, head, data__threads=1)) == loop.DONE
    rows = logged(whole)
    assert len(rows) == STEPS and all(np.isfinite(row["loss"]) for row in rows)
    assert not any(row["skipped/not_finite"] for row in rows)
    counted = {name: value for name, value in rows[-1].items() if name.startswith("data/skipped/")}
    assert sum(counted.values()) > 0, rows[-1]

    calls, step = [], trainer.Trainer.step

    def stopped(self, state, batch):
        calls.append(len(calls))
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(self, state, batch)

    monkeypatch.setattr(trainer.Trainer, "step", stopped)
    assert command.main(_arguments(files, parts, head)) == loop.PREEMPTED
    more = {"data__threads": 2, "data__workers": 2}
    assert command.main(_arguments(files, parts, head, **more)) == loop.DONE
    assert same(parts, whole)
