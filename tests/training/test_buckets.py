"""Images of several static sizes for DINO: the canvas of a batch is a function of seed and
position, one step is compiled for each canvas, and a run on them with two composed encoders goes on
exactly where it stopped, is evaluated and loaded."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import chex
import jax
import numpy as np
import pytest

import m3i_jax
from m3i_jax import main as command
from m3i_jax import parallel, schema
from m3i_jax.data import annotated_eval, geometry, pipeline
from m3i_jax.data.annotated_batches import iterate_detect_batches, iterate_segment_batches
from m3i_jax.data.sources import base
from m3i_jax.data.sources.scenes import ScenesSource
from m3i_jax.errors import UserError
from m3i_jax.training import checksums, loop, step
from m3i_jax.training.task import make_task
from tests import toy
from tests.dense_toy import DINO, SHARED, dense_settings, make_trainer

ROOT = pathlib.Path(__file__).parents[2]
CANVASES = ((32, 48), (48, 32), (48, 64))
BUCKETS = {
    "dense__geometry__rule": "buckets",
    "dense__geometry__buckets": "(32,48,48,32,48,64)",
    "dense__geometry__crop_p": "0.5",
    "dense__geometry__crop_short": "(40,60)",
    "dense__geometry__crop_sides": "(24,40)",
    "dense__maps__relative": "none",
    **toy.INTERN,
}
SOURCE = ScenesSource(40, side=40)


def batches_from(config: schema.Config, start: int, count: int, **share: int) -> list[Any]:
    stream = iterate_detect_batches(config, SOURCE, start=start, **share)
    try:
        return [next(stream) for _ in range(count)]
    finally:
        stream.close()


def test_the_canvas_of_a_batch_is_a_function_of_seed_and_position() -> None:
    config = dense_settings("dino", **BUCKETS)
    whole = batches_from(config, 0, 40)
    sizes = [batch["image"].shape[1:3] for batch in whole]
    counts = [sizes.count(canvas) for canvas in CANVASES]
    assert sum(counts) == 40 and min(counts) > 5
    later = batches_from(config, 8 * 37, 3)
    halves = [batches_from(config, 8 * 37, 3, host=host, hosts=2) for host in (0, 1)]
    for i, wanted in enumerate(whole[37:]):
        for name, array in wanted.items():
            np.testing.assert_array_equal(later[i][name], array, err_msg=name)
            parts = np.concatenate([half[i][name] for half in halves])
            np.testing.assert_array_equal(parts, array, err_msg=name)
    other = batches_from(dataclasses.replace(config, seed=config.seed + 1), 0, 40)
    assert [batch["image"].shape[1:3] for batch in other] != sizes


def test_batches_of_all_canvases_take_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`pipeline.iterate` refuses workers by (2 workers + 1) times the largest batch."""
    monkeypatch.setattr(pipeline, "iterate", lambda builder: builder)
    builder: Any = iterate_detect_batches(dense_settings("dino", **BUCKETS), SOURCE, start=0)
    assert len({builder(k)["image"].shape for k in range(12)}) == len(CANVASES)
    assert [len(blocks) for blocks in builder.buffers._free.values()] == [1]


def test_images_fill_their_canvas_and_boxes_follow() -> None:
    config = dense_settings("dino", **BUCKETS)
    seen = 0
    for batch in batches_from(config, 0, 6):
        _, height, width, _ = batch["image"].shape
        for row, (h, w) in enumerate(batch["size"]):
            assert (h == height and w <= width) or (w == width and h <= height)
            assert not batch["image"][row, h:].any() and not batch["image"][row, :, w:].any()
            boxes = batch["boxes"][row][batch["classes"][row] >= 0]
            assert (boxes >= 0).all() and (boxes <= [w, h, w, h]).all()
            seen += len(boxes)
    assert seen > 50
    flips = schema.Geometry(flip_p=1.0)
    placed = geometry.bucket_placement([0.5] * geometry.WIDTH, 30, 60, flips, (800, 1344))
    assert (placed.rows, placed.columns, placed.flip) == (672, 1344, True)
    np.testing.assert_allclose(
        placed.move_boxes(np.array([[0, 0, 15, 30]])), [[1008, 0, 1344, 672]]
    )


def test_evaluation_limits_the_short_side() -> None:
    record = base.Record("a", np.full((40, 60, 3), 7, np.uint8))
    assert annotated_eval.fit_image(record, 96).size == (64, 96)
    assert annotated_eval.fit_image(record, 96, short=48).size == (48, 72)


@pytest.mark.slow
def test_as_many_steps_are_compiled_as_there_are_canvases(monkeypatch: pytest.MonkeyPatch) -> None:
    chex.clear_trace_counter()
    counted = chex.assert_max_traces(step.train_step, n=len(CANVASES))
    monkeypatch.setattr(step, "train_step", counted)
    one = make_trainer(dense_settings("dino", **BUCKETS))
    assert one.task.batch_shapes()["image"].shape == (8, 48, 64, 3)
    state, seen = one.init(), []
    for batch in batches_from(one.config, 0, 9):
        seen.append(batch["image"].shape[1:3])
        state, metrics = one.step(state, parallel.to_global(one.mesh, batch))
        assert np.isfinite(float(metrics["loss"])) and not metrics["skipped/not_finite"]
    assert set(seen) == set(CANVASES)
    assert one._step._jitted._cache_size() == len(CANVASES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dense__geometry__buckets": "()"}, "rule=buckets needs height and width"),
        ({"dense__geometry__buckets": "(32,64,48)"}, "has 3 numbers"),
        ({"dense__geometry__buckets": "(32,40)"}, "32 x 40 are not multiples of 16"),
        ({"model__backbone": "vit"}, "needs an encoder that reads images of any size"),
    ],
)
def test_canvases_that_cannot_be_are_refused(changes: dict, words: str) -> None:
    settings = BUCKETS if "model__backbone" not in changes else {
        key: value for key, value in BUCKETS.items() if key.startswith("dense__geometry")
    }  # fmt: skip
    with pytest.raises(UserError, match=words) as error:
        make_task(dense_settings("dino", **(settings | changes))).batches(SOURCE, None, start=0)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="'buckets' is a rule of detection"):
        changes = {"dense__geometry__rule": "buckets"}
        iterate_segment_batches(dense_settings("segment", **changes), SOURCE, start=0)


STEPS = 4
VALUES = SHARED | DINO | {key.replace("__", "."): value for key, value in BUCKETS.items()} | {
    "model.encoder.drop_path": 0.1,
    "dense.maps.window": 0,
    "dense.maps.global_blocks": "()",
    "dense.maps.composite": 2,
    "dense.maps.image_size": 0,
    "data.size": 24,
    "data.holdout": 0.25,
    "data.image_size": 48,
    "dense.geometry.test_short": 40,
    "model.dtype": "float32",
    "train.steps": STEPS,
    "train.save_every": 2,
    "train.log_every": 1,
    "train.panel_every": 2,
    "train.keep": 3,
    "optim.warmup_steps": 1,
    "evaluate.batch_size": 4,
}  # fmt: skip


def arguments(run: pathlib.Path) -> list[str]:
    left = ("data.classes", "model.encoder.mlp_ratio", "model.encoder.width")
    values = {key: value for key, value in VALUES.items() if key not in left}
    recipe = "configs/transfer/detect.py:head=dino,masks=false,model=internimage_pico"
    texts = [f"--config.{key}={str(value).replace(' ', '')}" for key, value in values.items()]
    return ["--config", recipe, "--workdir", str(run), *texts]


def steps_of(run: pathlib.Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]
    return [row for row in rows if "loss" in row]


@pytest.mark.slow
def test_a_run_of_two_composed_encoders_on_canvases(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command: trains, goes on from the save of step 2 with the same numbers, is evaluated,
    loaded and exported."""
    monkeypatch.chdir(ROOT)
    run, again = tmp_path / "run", tmp_path / "again"
    assert command.main(arguments(run)) == loop.DONE
    rows = steps_of(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "4")
    assert command.main(arguments(again)) == loop.DONE
    resumed = {row["step"]: row for row in steps_of(again)}
    assert [resumed[row["step"]] for row in rows] == rows
    arrays = [checksums.read_checksums(w / "checkpoints" / "4") for w in (run, again)]
    assert all(arrays) and arrays[0]["arrays"] == arrays[1]["arrays"]
    names = list(arrays[0]["arrays"])
    assert any(name.startswith("params/encoder/second/stage3/") for name in names)
    assert any(name.startswith("params/encoder/links/") for name in names)

    assert command.main(["--mode=eval", "--workdir", str(run)]) == 0
    results = json.loads((run / "eval.json").read_text())["results"]
    assert "detection" in results and "eval/box/AP" in results["detection"]
    model = m3i_jax.load(str(run))
    assert model.config.dense.maps.composite == 2
    image = np.asarray(SOURCE[0].image)
    found = model.detect(image)[0]
    assert len(found.boxes) == len(found.names) and (found.boxes <= max(image.shape)).all()

    for kind in ("npz", "stablehlo"):
        assert command.main(["--mode=export", "--workdir", str(run), f"--format={kind}"]) == 0
    with np.load(run / "export" / "npz" / "model.npz") as file:
        assert any(name.startswith("encoder/second/stage3/") for name in file.files)
        assert "encoder/gamma/stage3" in file.files
    program = jax.export.deserialize(
        bytearray((run / "export" / "stablehlo" / "model.stablehlo").read_bytes())
    )
    side = model.config.data.image_size
    images = np.random.default_rng(0).integers(0, 256, (1, side, side, 3)).astype(np.uint8)
    sizes = np.array([[side, side - 8]], np.int32)
    wanted = model.function(model.params, images, sizes)
    for name, value in program.call(images, sizes).items():
        np.testing.assert_allclose(value, wanted[name], atol=1e-4 * side, err_msg=name)
