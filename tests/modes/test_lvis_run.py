"""LVIS with all of its 1,203 categories, through configs/transfer/lvis.py on small images: a few
steps, the evaluation by LVIS's rules, and the size of what depends on the categories."""

import collections
import json
import math
import pathlib
import re

import jax
import numpy as np
import pytest

from m3i_jax import main as command
from m3i_jax.data.sources.coco import CocoSource
from m3i_jax.training import loop
from tests.data import lvis_scenes
from tests.dense_toy import DETECT, dense_batch, dense_settings, make_trainer

ROOT = pathlib.Path(__file__).parents[2]
SIDE = 48
VALUES = DETECT | {
    "model.encoder.width": 16,
    "model.encoder.mlp_ratio": 2.0,
    "model.encoder.patch_size": 8,
    "model.encoder.depth": 2,
    "model.encoder.heads": 2,
    "model.dtype": "float32",
    "model.scan": "false",
    "model.remat": "none",
    "data.threads": 1,
    "dense.maps.window": 3,
    "dense.geometry.scale": (0.5, 1.5),
    "dense.detect.test_proposals": (12, 40),
    "dense.detect.candidates": 700,
    "dense.detect.detections": 300,
    "train.steps": 3,
    "train.log_every": 1,
    "train.panel_every": 0,
    "optim.warmup_steps": 1,
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("lvis")
    lvis_scenes.write_lvis(directory, side=SIDE)
    return directory


def test_what_the_file_says_of_categories_and_images(scenes: pathlib.Path) -> None:
    val = CocoSource(str(scenes), str(scenes / "annotations" / "lvis_v1_val.json"))
    assert len(val.classes) == 1203 and set(val.frequencies) == {"r", "c", "f"}
    assert len(val) == 8 and val.ignored["images whose file is missing"] == 0
    shown = val.objects(0)
    assert not set(shown.negative.tolist()) & set(shown.classes.tolist())
    assert set(shown.inexhaustive.tolist()) <= set(shown.classes.tolist())


@pytest.mark.slow
def test_a_run_of_all_categories(
    scenes: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faster_coco_eval")
    monkeypatch.chdir(ROOT)
    recipe = f"configs/transfer/lvis.py:path={scenes},model=vit_tiny,image_size={SIDE},batch_size=8"
    texts = [f"--config.{key}={str(value).replace(' ', '')}" for key, value in VALUES.items()]
    line = ["--config", recipe, "--workdir", str(tmp_path), *texts]
    assert command.main(line) == loop.DONE
    rows = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row for row in rows if "loss/cls" in row]
    # 49 columns of ln 2 for every region, before the first step has changed anything
    assert losses[0]["loss/cls"] == pytest.approx(49 * math.log(2), rel=0.02)
    assert all(math.isfinite(row["loss"]) for row in losses) and losses[0]["loss/mask"] > 0
    scores = [row for row in rows if "eval/box/AP" in row][-1]
    assert {"eval/box/APr", "eval/box/AR300", "eval/mask/AP"} <= scores.keys()
    assert "eval/box/AP50_agnostic" not in scores  # COCO's
    found = json.loads((tmp_path / "detections-bbox.json").read_text())
    per_image = collections.Counter(row["image_id"] for row in found)
    assert len(per_image) == 8 and max(per_image.values()) == 300
    assert {row["category_id"] for row in found} <= set(range(1, 1204))
    assert len({row["category_id"] for row in found}) > 100


def test_no_mask_and_no_map_has_an_axis_of_categories() -> None:
    """1,203 categories cost box logits and box deltas; the mask of a region is of one category."""
    config = dense_settings("detect", data__classes=1203, dense__detect__loss="federated")
    trainer, batch = make_trainer(config), dense_batch(config)
    step = str(jax.make_jaxpr(trainer.trace)(trainer.template, batch))
    predicted = str(
        jax.make_jaxpr(lambda state: trainer.task.panel_outputs(state, batch))(trainer.template)
    )
    for text in (step, predicted):
        shapes = {
            tuple(map(int, found.split(","))) for found in re.findall(r"\w\[((?:\d+,)*\d+)\]", text)
        }
        wide = {shape for shape in shapes if 1203 in shape or 4 * 1203 in shape}
        assert wide
        # regions x categories x 4, of the images of a batch, are the largest
        largest = max(np.prod(shape) for shape in wide)
        images, regions = config.train.batch_size, config.dense.detect.rois
        assert largest <= images * max(regions, 8) * 4 * 1204
        assert not any(14 in shape or 28 in shape for shape in wide), wide
