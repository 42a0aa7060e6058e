"""--mode=show: the numbers of a folder in place of ImageNet's, and this machine."""

import dataclasses
import pathlib
import re
import tempfile
import types
from typing import Any

import jax
import pytest

from m3i_jax import config as configuration
from m3i_jax import main as command
from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.modes import show
from m3i_jax.modes.setup import open_setup
from m3i_jax.modes.task_views import task_views
from m3i_jax.parallel.chips import CHIPS
from m3i_jax.profiling import this_machine
from m3i_jax.training.task import task_kind
from tests import toy
from tests.quick_show import leave_out_estimates


def show_folder(path: pathlib.Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    sizes = [
        "--config.model.encoder.width=24", "--config.model.encoder.depth=1",
        "--config.model.encoder.heads=3", "--config.model.decoder.depth=1",
        "--config.data.image_size=32", "--config.model.encoder.patch_size=8",
    ]  # fmt: skip
    spec = f"configs/folder.py:path={path},model=vit_tiny,batch_size=8,epochs=3"
    assert command.main(["--mode=show", "--config", spec, *sizes, *more]) == 0
    return capsys.readouterr().out


def test_the_numbers_of_a_folder(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only names of files are read: these are no images."""
    for split, count in (("train", 30), ("val", 6)):
        for i in range(count):
            place = tmp_path / split / f"class {i % 3}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i}.jpg").write_bytes(b"x")
            (place / f"{i}.txt").write_bytes(b"a caption")
    out = show_folder(tmp_path, capsys)
    assert "data.classes = 3" in out and "data.size = 30" in out
    assert "data.captions = 'yes'" in out  # the default objective reads them
    assert "9 of 8 images (3 an epoch" in out and "train/ is trained on, val/ is held out" in out
    assert "6 held out" in out and "assumed" not in out and "1,281,167" not in out
    leave_out_estimates(monkeypatch)
    assert "data.captions = 'no'" in show_folder(tmp_path, capsys, "--config.objective.forms=mim")
    absent = show_folder(tmp_path / "absent", capsys)
    assert "absent' is not on this machine: 1000 categories" in absent


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    machine = this_machine.Machine("2 x cpu", 8 * 2**30, 1e12, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(this_machine, "describe_machine", lambda dtype, peak: machine)
        day = 86_400 * 1e12
        line = show.machine_line(2 * day, 2**30, 0.5, "bfloat16")
        assert line == (
            "this machine: 2 x cpu, 8.00 GiB free a device, 1 TFLOP/s (measured for products of"
            " bfloat16 matrices): 4.0 days at 50% of that"
        )
        assert "does not fit" in show.machine_line(day, 2**34, 0.5, "float32")
    real = this_machine.describe_machine("float32")
    assert real.measured and 1e8 < real.flops < 1e15 and real.memory > 0
    given = this_machine.describe_machine("float32", 3e12)
    assert not given.measured and given.flops == 3e12 * jax.device_count()
    assert re.fullmatch(r"\d+ x cpu", real.devices)


def test_an_unlisted_accelerator_is_measured_with_large_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its time of a small one is that of a launch. Of a listed one the peak is known, of float32
    products, which a GPU computes in TF32, half of it."""
    kind, asked = "NVIDIA Unlisted", []
    device = lambda: types.SimpleNamespace(device_kind=kind, platform="gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device(), device()])
    monkeypatch.setattr(this_machine.parallel, "make_mesh", lambda *_: None)
    monkeypatch.setattr(this_machine.parallel, "device_memory", lambda _: 2.0**30)
    monkeypatch.setattr(this_machine, "measured_flops", lambda *given: asked.append(given) or 4e12)
    found = this_machine.describe_machine("bfloat16")
    assert found.measured and found.flops == 8e12 and asked == [("bfloat16", 4096, 16)]
    assert this_machine.describe_machine("bfloat16", 5e12)[2:] == (10e12, False)
    kind = CHIPS["h100"].device_kind
    assert this_machine.describe_machine("float32")[2:] == (CHIPS["h100"].peak, False)


@pytest.mark.parametrize(
    ("form", "pairing", "unit"),
    [
        ("m3i", "flip", "a mixed view"),
        ("m3i", "halves", "an image"),
        ("mae", "flip", "an image"),
        ("supervised", "flip", "an image"),
    ],
)
def test_the_cost_is_of_what_a_step_has_as_many_of_as_images(
    form: str, pairing: str, unit: str
) -> None:
    config = toy.settings(objective__forms=form, objective__pairing=pairing)
    assert task_views("pretrain").unit(config) == unit


def test_other_sources_are_assumed() -> None:
    config = toy.settings(data__source="tars", data__path="/x/*.tar", data__classes=-1)
    assert show.assume_data(config)[1] == ["1000 categories"]


def test_maps_have_fewer_classes_than_imagenet() -> None:
    """A class map has at most 255."""
    config = configuration.load_config("configs/transfer/segment.py:path=/no/such/maps")
    done, assumed = show.assume_data(configuration.resolve(config))
    assert done.data.classes == 150 and assumed[0] == "150 categories"


def test_a_row_says_that_the_batch_does_not_divide() -> None:
    """Pairs of images: 96 are 3 pairs for each of 16 devices, and 64 devices would share them. Of
    two devices of a tensor axis both have the same images."""
    config = toy.settings(train__batch_size=96)
    assert show._divides(config, 16) and not show._divides(config, 64)
    halved = dataclasses.replace(config, parallel=schema.Parallel(mesh=(-1, 1, 4)))
    assert show._divides(halved, 64)
    assert show._divides(toy.settings(train__batch_size=96, train__round_batch=True), 64)


def test_captions_that_are_only_assumed_to_be_absent_are_asked_for() -> None:
    """Tars may have captions, which no mode knows that does not read them."""
    source = {"data__source": "tars", "data__path": "/x/*.tar", "objective__forms": "clip,coca"}
    with pytest.raises(UserError) as error:
        show.assume_data(toy.settings(**source, data__captions="auto"))
    for words in ("clip, coca", "reads no data and assumes no captions", "data.captions=yes"):
        assert words in str(error.value), error.value
    assert show.assume_data(toy.settings(**source, data__captions="yes"))[0].data.captions == "yes"


@pytest.mark.parametrize(
    ("recipe", "captions"),
    [
        ("configs/transfer/detect.py", "no"),
        ("configs/transfer/segment.py", "no"),
        ("configs/forms.py:form=locca,size=tiny", "yes"),
        ("configs/quickstart.py", "yes"),
    ],
)
def test_built_in_images_are_counted(recipe: str, captions: str) -> None:
    """As the run opens them: without scenes that show no object, and with their own classes."""
    config = configuration.resolve(configuration.load_config(recipe))
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data,
            size=300,
            mixture=("shapes:200", "scenes:100") if config.data.mixture else (),
        ),
    )
    with tempfile.TemporaryDirectory() as workdir:
        kind = task_kind(config.task)
        opened = open_setup(config, workdir, trains=kind.objectives(config)).config.data
    done, assumed = show.assume_data(config)
    found = done.data.size, done.data.classes, done.data.captions
    assert found == (opened.size, opened.classes, captions) and not assumed
    many = dataclasses.replace(config, data=dataclasses.replace(config.data, size=10**9))
    if not config.data.mixture:  # too many to list
        classes = 150 if config.task == "segment" else 1000
        shapes = config.data.source == "shapes"
        assert show.assume_data(many)[1] == ([] if shapes else [f"{classes} categories"])


@pytest.mark.parametrize(
    ("data", "size", "lines"),
    [
        ({"size": 400}, 360, ["data.size=400 with 40 held out (data.holdout=0.1) leaves 360"]),
        ({"size": 400, "holdout": 0.0}, 400, []),
        ({"size": 400, "split": "a*.tar", "holdout_split": "b*.tar"}, 400, []),
        (
            {"size": 400, "holdout": 0.25, "keep": ("keep.parquet",)},
            300,
            ["100 held out (data.holdout=0.25) leaves 300", "data.keep is not read: data.size is"],
        ),
        ({"size": 0, "keep": ("keep.parquet",)}, 1_281_167, ["data.size is 0: give the number"]),
    ],
)
def test_what_is_held_out_of_other_sources_is_not_planned(
    data: dict[str, Any], size: int, lines: list[str]
) -> None:
    """A run on tar files trains on what data.holdout leaves."""
    source = schema.Data(**{"source": "tars", "path": "/x/*.tar", "holdout": 0.1, **data})
    config = dataclasses.replace(toy.settings(data__classes=-1), data=source)
    assert show.assume_data(config)[0].data.size == size
    for line, words in zip(show.size_lines(config), lines, strict=True):
        assert words in line
