"""Dense runs that go on from a dense run of other categories, as the chains of the paper's Table 2:
encoder, pyramid and head are taken, layers of categories restart, and the log says so."""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from m3i_jax import config as configuration
from m3i_jax import main as command
from m3i_jax.run_files import write_text_atomic
from m3i_jax.training import loop
from m3i_jax.training.checkpoint import Checkpoints
from tests import dense_toy, scene_files
from tests.saved import flat
from tests.training.test_dense_resume import ROOT, arguments

NAMES = ("disc", "square", "ring")
OF_CATEGORIES = {
    "detect": {
        f"head/{layer}/{part}"
        for layer in ("box/classes", "box/deltas", "mask/masks")
        for part in ("kernel", "bias")
    },
    "segment": {
        f"head/{layer}/{part}"
        for layer in ("classifier", "aux_classifier")
        for part in ("kernel", "bias")
    },
    "mask2former": {"head/decoder/classes/kernel", "head/decoder/classes/bias"},
}
HEAD = {
    "detect": {},
    "segment": {"dense__segment__head": "upernet"},
    "mask2former": dense_toy.MASK2FORMER,
}


def save(directory: pathlib.Path, task: str) -> dict[str, np.ndarray]:
    """A run of `task` at its first step; its parameters."""
    config = dense_toy.dense_settings(
        "segment" if task == "mask2former" else task,
        seed=7,
        data__image_size=dense_toy.SIDE,
        **HEAD[task],
    )
    trainer = dense_toy.make_trainer(config)
    state = trainer.init()
    checkpoints = Checkpoints(directory / "checkpoints", 1)
    checkpoints.save(1, state, {"samples_seen": 0, "fingerprint": "none"})
    checkpoints.wait()
    checkpoints.close()
    (directory / "config.txt").write_text(configuration.config_to_text(config))
    names = json.dumps({"classes": NAMES}) + "\n"
    write_text_atomic(directory / "classes.json", names, noted=True)
    return flat(state.params)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[pathlib.Path, dict]]:
    """(directory, parameters) of a run of a task, saved once."""

    @functools.cache
    def one(task: str) -> tuple[pathlib.Path, dict]:
        directory = tmp_path_factory.mktemp(task)
        return directory, save(directory, task)

    return one


OTHERS = {
    "same": NAMES,
    "order": ("disc", "ring", "square"),
    "number": ("cat", "dog", "cow", "hen"),
}
REPEATED = (
    ("same", "detect"),
    ("same", "mask2former"),
    ("same", "segment"),
    ("order", "segment"),
    ("order", "mask2former"),
    ("number", "detect"),
    ("number", "mask2former"),
)


@pytest.mark.parametrize(
    ("names", "restarts", "task"),
    [
        pytest.param(
            names,
            names != NAMES,
            task,
            id=f"{other}-{task}",
            marks=pytest.mark.slow if (other, task) in REPEATED else (),
        )
        for other, names in OTHERS.items()
        for task in ("detect", "segment", "mask2former")
    ],
)
def test_heads_restart_for_other_categories(
    task: str, names: tuple[str, ...], restarts: bool, saved: Callable
) -> None:
    """Through the recipe, which takes maps and sizes of the head from the run."""
    directory, there = saved(task)
    recipe = f"configs/transfer/{task}.py:from={directory},image_size=32,batch_size=8"
    if task == "mask2former":
        recipe = recipe.replace("/mask2former.py", "/segment.py") + ",head=mask2former"
    config = configuration.load_config(recipe)
    assert config.dense[config.task].width == 8 and config.dense.maps.image_size == dense_toy.SIDE
    config.data.update({"size": 64, "classes": len(names), "captions": "no"})
    config.dense.geometry.update({"max_objects": 3, "mask_size": 14})
    config.model.dtype = "float32"
    lines: list[str] = []
    trainer = dense_toy.make_trainer(configuration.resolve(config))
    params = flat(trainer.init(lines.append, classes=names).params)
    for path, array in params.items():
        fresh = restarts and path in OF_CATEGORIES[task]
        # biases start at 0 in both
        same = path in there and np.array_equal(array, there[path])
        assert same != fresh or (fresh and path.endswith("bias")), path
    assert params.keys() == there.keys()
    line = [line for line in lines if "restart at random for other categories (3 in" in line]
    assert len(line) == restarts and not any("of another shape" in line for line in lines)
    if restarts:
        assert any(path in line[0] for path in OF_CATEGORIES[task]), line


def test_the_encoder_alone_is_taken_by_another_task(saved: Callable) -> None:
    directory, there = saved("detect")
    spec = f"configs/transfer/segment.py:from={directory},image_size=64,head=linear"
    config = configuration.load_config(spec)
    assert tuple(config.init.only) == ("^encoder/",)
    # the grid of its positions is that of the run, not of its larger images
    assert config.dense.maps.image_size == dense_toy.SIDE
    config.dense.maps.update(
        {"relative": "decomposed", "window": 2, "global_blocks": (1,), "layer_scale": 0.0}
    )
    config.data.update({"size": 64, "classes": 4, "captions": "no"})
    trainer = dense_toy.make_trainer(configuration.resolve(config))
    params: dict[str, Any] = flat(trainer.init(lambda line: None, classes=tuple("abcd")).params)
    blocks = [path for path in params if path.startswith("encoder/blocks/")]
    assert blocks
    for path in blocks:
        np.testing.assert_array_equal(params[path], there[path])


@pytest.mark.slow
def test_a_detector_goes_on_to_other_categories(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two commands: scenes in memory, and then three categories of scenes in a file."""
    monkeypatch.chdir(ROOT)
    first, second, scenes = (tmp_path / name for name in ("first", "second", "scenes"))
    assert command.main(arguments(first, "mask_rcnn", train__steps=2)) == loop.DONE
    scene_files.write_scenes(str(scenes), images=24, held_out=6, side=40)
    file = next((scenes / "annotations").glob("*train*.json"))
    content = json.loads(file.read_text())
    kept = {category["id"] for category in content["categories"][:3]}
    content["categories"] = [c for c in content["categories"] if c["id"] in kept]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] in kept]
    own = tmp_path / "three.json"
    own.write_text(json.dumps(content))
    recipe = f"configs/transfer/detect.py:annotations={own},images={scenes},from={first}"
    line = arguments(second, "mask_rcnn", train__steps=2, data__size=0, data__holdout=0.3)
    line[line.index("--config") + 1] = recipe
    # what the run before has is not given again
    line = [text for text in line if ".model." not in text and ".maps." not in text]
    capsys.readouterr()
    assert command.main(line) == loop.DONE
    out = capsys.readouterr().out
    assert "heads restart at random for other categories (8 in the source)" in out
    rows = [json.loads(text) for text in (second / "metrics.jsonl").read_text().splitlines()]
    assert any("loss/mask" in row for row in rows)
