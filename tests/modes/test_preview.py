"""--mode=preview: the original next to the views is the record of the row, also where a bad record
was replaced."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from m3i_jax import schema
from m3i_jax.augment import mixup, photometric
from m3i_jax.data import crops, decode, pipeline
from m3i_jax.data.sources import base
from m3i_jax.data.sources.folder import FolderSource
from m3i_jax.modes import preview as show
from m3i_jax.modes import setup as jobs
from m3i_jax.modes.task_views import TaskViews
from m3i_jax.reporting import image_grid, preview_sheet
from tests import broken, toy
from tests.dense_toy import dense_settings


def test_the_views_of_a_row_are_cut_from_its_record(tmp_path):
    broken.fill(tmp_path, good=20, kinds=10)
    source = FolderSource(str(tmp_path))
    data = schema.Data(image_size=32, threads=0, max_bad_share=1.0, resizer="pillow")
    config = schema.Config(data=data, train=schema.Train(batch_size=40))
    batches = pipeline.iterate_batches(config, source, None, start=0)
    try:
        batch = next(batches)
    finally:
        batches.close()
    assert sum(batches.skipped.values()) > 3 and batches.record.shape == (40,)
    for row, record in enumerate(base.read_items(source, batches.record.tolist())):
        image = decode.decode_image(record.image)
        for view in range(2):
            height, width = image.shape[:2]
            box = batch["box"][row, view].astype(int).tolist()
            made = crops.cut_view(Image.fromarray(image), box, 32, height=height, width=width)
            np.testing.assert_array_equal(made.reshape(32, 32, 3), batch["views"][row, view])


def test_frames_are_drawn_at_the_boxes():
    original = np.full((50, 100, 3), 200, np.uint8)
    boxes, side = np.array([[0, 0, 50, 40], [10, 50, 30, 50]]), 100
    tile = np.asarray(preview_sheet.frame_boxes(original, boxes, np.array([False, True]), side))
    # letterboxed, and untouched between the frames
    assert (tile[0, 50] == image_grid.PAPER).all() and (tile[50, 45] == 200).all()
    for (top, left, height, width), colour in zip(boxes, preview_sheet.BOXES, strict=True):
        top += 25
        for y, x in (
            (top, left),
            (top + height - 1, left),
            (top, left + width - 1),
            (top + height - 1, left + width - 1),
        ):
            assert (tile[y, x] == colour).all(), (y, x)
    # the notch is on the left of the plain view and on the right of the flipped one
    assert (tile[50, 4] == preview_sheet.BOXES[0]).all() and (
        tile[50, 95] == preview_sheet.BOXES[1]
    ).all()
    assert (tile[50, 36] == 200).all() and (tile[50, 55] == 200).all()


def test_a_sheet_with_originals_has_another_column(tmp_path):
    rng = np.random.default_rng(0)
    batch = {
        "views": rng.integers(0, 256, (2, 2, 32, 32, 3), np.uint8),
        "mask": rng.random((2, 16)) < 0.5,
        "label": np.array([0, -1], np.int32),
        "box": np.array([[[0, 0, 10, 10]] * 2] * 2, np.float32),
        "flip": np.zeros((2, 2), bool),
    }
    originals = [rng.integers(0, 256, (40, 60, 3), np.uint8) for _ in range(2)]
    sizes = []
    for shown in ([], originals):
        preview_sheet.write_preview(
            tmp_path / "p.png", batch, captions=["", ""], classes=("cat",), originals=shown
        )
        with Image.open(tmp_path / "p.png") as image:
            sizes.append(image.size)
            pixels = np.asarray(image.convert("RGB"))
    side = image_grid.side_of_tile(32, 4)
    assert sizes[1][0] - sizes[0][0] == 2 * (side + image_grid.GAP) and sizes[1][1] == sizes[0][1]
    top, left = image_grid.MARGIN + preview_sheet.HEAD, image_grid.MARGIN
    wanted = np.asarray(
        preview_sheet.frame_boxes(originals[0], batch["box"][0], batch["flip"][0], side)
    )
    np.testing.assert_array_equal(pixels[top : top + side, left : left + side], wanted)


def test_the_preview_of_a_fine_tuning_shows_blended_inputs(tmp_path):
    """The blended input of the step, without a mask, which it does not use; both views are cut even
    if the objective reads one."""
    changes = {
        "data__size": 40,
        "data__classes": -1,
        "data__captions": "no",
        "train__batch_size": 16,
        "data__augment__mixup": 0.8,
    }
    config = toy.settings(**changes, objective__forms="finetune")
    assert show.run(config, workdir=str(tmp_path)) == 0
    job = jobs.open_setup(config, str(tmp_path))
    data = job.batches(0)
    batch = {name: value[:8] for name, value in next(data).items()}
    data.close()
    assert not batch["views"][:, 1].any()
    side = image_grid.side_of_tile(32, 4)
    with Image.open(tmp_path / "preview.png") as image:
        assert image.width == 2 * image_grid.MARGIN + preview_sheet.BETWEEN + 2 * (
            3 * (side + image_grid.GAP) - image_grid.GAP
        )
        pixels = np.asarray(image.convert("RGB"))
    share = mixup.draw_mixup(
        batch["position"], seed=config.seed, size=32, settings=config.data.augment
    ).share[0]
    clean = np.asarray(photometric.mirror(batch["views"][:2, 0], batch["flip"][:2, 0])) / 255
    wanted = (share * clean[0] + (1 - share) * clean[1]) * 255
    left, top = (
        image_grid.MARGIN + 2 * (side + image_grid.GAP),
        image_grid.MARGIN + preview_sheet.HEAD,
    )
    shown = pixels[top : top + side, left : left + side]
    zoom = side // 32
    np.testing.assert_allclose(shown[zoom // 2 :: zoom, zoom // 2 :: zoom], wanted, atol=2.5)


@pytest.mark.parametrize("task", ["pretrain", "detect"])
def test_a_few_rows_are_those_of_the_first_batch_of_a_pod(task, tmp_path, monkeypatch):
    """Of a mesh of 64 devices, more than there are. Scenes have one of three canvases a batch."""
    if task == "detect":
        rule = {"rule": "buckets", "buckets": (64, 64, 64, 128, 128, 128)}
        changes: dict[str, object] = {f"dense__geometry__{k}": v for k, v in rule.items()}
        changes |= {"data__source": "scenes", "model__encoder__mlp_ratio": 4.0}
        config = dense_settings("detect", **toy.INTERN, **changes)
        dense = dataclasses.replace(config.dense, maps=schema.Maps())  # of the ViT
        config = dataclasses.replace(config, dense=dense)
    else:
        config = toy.settings(data__classes=-1, objective__forms="m3i", data__captions="auto")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, size=200, classes=-1),
        train=dataclasses.replace(config.train, batch_size=24),
    )
    whole = jobs.open_setup(config, str(tmp_path), alone=True)
    batches = whole.batches(0, views=(0, 1))
    expected, records = next(batches), batches.record.tolist()
    batches.close()
    shown = []
    drawn = lambda setup, path, batch, records: shown.append((batch, records))
    monkeypatch.setattr(show, "task_views", lambda _: TaskViews(draw_preview=drawn))
    pod = dataclasses.replace(config, parallel=schema.Parallel(mesh=(64, 1, 1)))
    assert show.run(pod, workdir=str(tmp_path)) == 0
    ((batch, items),) = shown
    assert {name: len(value) for name, value in batch.items()} == dict.fromkeys(expected, show.ROWS)
    for name, value in batch.items():
        np.testing.assert_array_equal(value, expected[name][: show.ROWS], err_msg=name)
    assert [item.key for item in items] == [
        base.source_key(whole.train, i) for i in records[: show.ROWS]
    ]


@pytest.mark.parametrize(("form", "tiles"), [("supervised", 2), ("mae", 3), ("sim", 4), ("m3i", 5)])
def test_a_sheet_has_only_the_inputs_of_the_objective(tmp_path, form, tiles):
    """The original, the input view, then the other view, the mask and the mixed input if the
    objective uses them."""
    config = toy.settings(
        data__size=40, data__classes=-1, train__batch_size=16, objective__forms=form
    )
    assert show.run(config, workdir=str(tmp_path)) == 0
    with Image.open(tmp_path / "preview.png") as image:
        assert image.width == 2 * image_grid.MARGIN + preview_sheet.BETWEEN + 2 * (
            tiles * (image_grid.side_of_tile(32, 4) + image_grid.GAP) - image_grid.GAP
        )
        left = np.asarray(image.convert("RGB"))[:, : image.width // 2]
    # only a mixed input has cells of the partner
    assert (left == image_grid.PARTNER).all(-1).any() == (form == "m3i")
    assert (left == image_grid.HIDDEN).all(-1).any() == (form in ("mae", "sim"))
