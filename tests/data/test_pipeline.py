"""The stream has the same bytes for any number of hosts, threads, workers and restarts; contents of
a batch."""

import dataclasses
import os
import subprocess
import sys
import types
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from m3i_jax import schema
from m3i_jax.augment import photometric
from m3i_jax.data import pipeline, sampler, shared_buffers, tokenizer
from m3i_jax.data.sources import base
from m3i_jax.data.sources.folder import FolderSource
from m3i_jax.errors import UserError
from m3i_jax.objective import masks

SIZE, LENGTH = 32, 12


def same(a: pipeline.Batch, b: pipeline.Batch) -> None:
    assert list(a) == list(b) or set(a) == set(b)
    for name in a:
        assert (
            a[name].dtype == b[name].dtype
            and a[name].shape == b[name].shape
            and a[name].tobytes() == b[name].tobytes()
        ), name


@pytest.fixture
def mixed(fill: Callable, make: types.SimpleNamespace) -> FolderSource:
    """Two classes with captions, 20 good images of many kinds and 4 bad ones."""
    files = {f"a/{name}": content for name, content in make.good_files().items()}
    files |= {f"b/{i}.png": make.encode(make.smooth(40 + i, 50), "PNG") for i in range(3)}
    files |= {
        f"b/{name}": make.bad_files()[name][0]
        for name in ("cut.jpg", "bomb.png", "page.jpg", "dot.png")
    }
    files |= {"b/0.txt": b"number nought", "a/plain.txt": b"number " * 20}
    return FolderSource(str(fill(files)))


def test_arrays_of_a_batch(make, bpe):
    config = make.settings(batch=6)
    (batch,) = make.stream(config, make.ColorImages(50), bpe, 1, start=2**33)
    expected = {
        "views": ((6, 2, SIZE, SIZE, 3), np.uint8),
        "box": ((6, 2, 4), np.float32),
        "flip": ((6, 2), np.bool_),
        "mask": ((6, 16), np.bool_),
        "label": ((6,), np.int32),
        "tokens": ((6, LENGTH), np.int32),
        "length": ((6,), np.int32),
        "position": ((6, 2), np.uint32),
    }
    assert {name: (a.shape, a.dtype.type) for name, a in batch.items()} == expected
    assert batch["position"].tolist() == [[2, i] for i in range(6)]
    assert (~batch["mask"]).sum(1).tolist() == [8] * 6
    (bare,) = make.stream(config, make.ColorImages(50), None, 1)
    assert set(bare) == set(expected) - {"tokens", "length"}


def test_a_row_shows_its_record(make, bpe):
    source, config = make.ColorImages(200), make.settings(batch=64)
    batch = make.joined(make.stream(config, source, bpe, 4))
    record = sampler.sample_index(0, np.arange(256), 200)
    assert (batch["views"] == record[:, None, None, None, None]).all()
    for row, index in enumerate(record):
        expected = source[int(index)]
        assert batch["label"][row] == expected.label
        ids, length = bpe.encode(expected.caption) if expected.caption else (np.zeros(LENGTH), 0)
        assert batch["length"][row] == length and (batch["tokens"][row] == ids).all()


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
@pytest.mark.row("A10")
def test_hosts_share_one_batch(make, mixed, bpe, hosts):
    config = make.settings(batch=16)
    full = make.stream(config, mixed, bpe, 6)
    shares = [make.stream(config, mixed, bpe, 6, host=host, hosts=hosts) for host in range(hosts)]
    for k in range(6):
        same(make.joined([share[k] for share in shares]), full[k])


@pytest.mark.parametrize("start", [2, 8, 14, 40])
@pytest.mark.row("A10")
def test_a_restart_continues_with_the_same_bytes(make, mixed, bpe, start):
    full = make.joined(make.stream(make.settings(batch=8), mixed, bpe, 8))
    # with another batch size too, since the position is the only state
    rest = make.joined(make.stream(make.settings(batch=4), mixed, bpe, 4, start=start))
    same(rest, {name: array[start : start + 16] for name, array in full.items()})


def test_threads_change_nothing(make, mixed, bpe):
    alone, threaded = (
        make.stream(make.settings(threads=threads), mixed, bpe, 8) for threads in (0, 2)
    )
    for a, b in zip(alone, threaded, strict=True):
        same(a, b)


@pytest.mark.row("A10")
def test_worker_processes_change_nothing(make, mixed, bpe):
    alone = pipeline.iterate_batches(make.settings(), mixed, bpe, start=4)
    expected = [next(alone) for _ in range(5)]
    batches = pipeline.iterate_batches(make.settings(workers=2), mixed, bpe, start=4)
    for batch in expected:
        same(next(batches), batch)
    assert (
        batches.skipped == alone.skipped
        and sum(batches.skipped.values()) > 0
        and batches.noted == alone.noted
    )
    batches.close()


def test_workers_outside_an_absl_app_and_their_errors(fill, tmp_path):
    """In a plain script Grain's flags are not parsed. An error of a worker must be one line."""
    fill({f"{i}.png": b"not an image" for i in range(4)})
    script = tmp_path / "script.py"
    script.write_text(
        "from m3i_jax import schema, errors\nfrom m3i_jax.data import pipeline\n"
        "from m3i_jax.data.sources import folder\nif"
        " __name__ == '__main__':\n    data = schema.Data(image_size=32, workers=1)\n    config ="
        " schema.Config(data=data, train=schema.Train(batch_size=4))\n    batches ="
        f" pipeline.iterate_batches(config, folder.FolderSource({str(tmp_path / 'images')!r}),"
        " None, start=0)\n"
        "    try:\n        next(batches)\n    except errors.UserError as error:\n       "
        " print('refused:', error)\n    batches.close()\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(pipeline.__file__)))
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
        check=False,
    )
    assert done.stdout.startswith("refused: 100 draws in a row at position 0 of folder "), (
        done.stderr
    )
    assert "leaked" not in done.stderr


@pytest.mark.row("D8")
def test_a_far_position_needs_no_replay(make, bpe):
    (far,) = make.stream(make.settings(), make.ColorImages(100), bpe, 1, start=10**9)
    near = make.joined(
        make.stream(make.settings(batch=2), make.ColorImages(100), bpe, 4, start=10**9)
    )
    same(far, near)


def test_epochs_differ_in_augmentation(make, bpe):
    batch = make.joined(make.stream(make.settings(batch=50), make.ColorImages(50), bpe, 2))
    record = batch["views"][:, 0, 0, 0, 0]
    first, second = np.argsort(record[:50]), 50 + np.argsort(record[50:])
    assert (record[first] == record[second]).all()
    assert (batch["box"][first] != batch["box"][second]).any((1, 2)).all()
    assert (batch["mask"][first] != batch["mask"][second]).any(1).mean() > 0.9


def test_seeds_differ(make, bpe):
    a, b = (
        make.stream(
            dataclasses.replace(make.settings(batch=32), seed=seed), make.ColorImages(100), bpe, 1
        )[0]
        for seed in (0, 1)
    )
    assert (a["views"][:, 0, 0, 0, 0] != b["views"][:, 0, 0, 0, 0]).mean() > 0.8
    assert (a["box"] != b["box"]).any((1, 2)).all() and (a["mask"] != b["mask"]).any(1).all()


def coordinate_image(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, np.full_like(x, 7)], -1).astype(np.uint8)


@pytest.mark.parametrize(
    "kind", ["array", "png", "png turned by EXIF", "large jpeg turned by EXIF"]
)
def test_box_and_flip_describe_the_pixels(make, kind):
    """The colours of the image are its coordinates: a view must show the pixels of its box,
    mirrored on the device if its flip is set."""
    height, width, steps = (200, 120, 1) if kind != "large jpeg turned by EXIF" else (1600, 960, 8)
    upright = coordinate_image(height // steps, width // steps).repeat(steps, 0).repeat(steps, 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.rot90(upright, 1).copy()
    image = {
        "array": lambda: upright,
        "png": lambda: make.encode(upright, "PNG"),
        "png turned by EXIF": lambda: make.encode(turned, "PNG", exif=exif),
        "large jpeg turned by EXIF": lambda: make.encode(
            turned, "JPEG", quality=98, subsampling=0, exif=exif
        ),
    }[kind]()

    class One(make.ColorImages):
        def __getitem__(self, index: int) -> base.Record:
            return base.Record(str(index), image)

    batch = make.joined(make.stream(make.settings(batch=32), One(100), None, 2))
    top, left, h, w = (batch["box"][..., i, None] for i in range(4))
    assert (
        (top + h <= height).all() and (left + w <= width).all() and 0.3 < batch["flip"].mean() < 0.7
    )
    pixel = np.arange(SIZE)
    column = np.where(batch["flip"][..., None], pixel[::-1], pixel)
    # A coordinate is `steps` pixels wide and exact in its middle.
    x = (left + (column + 0.5) * w / SIZE) / steps - 0.5
    y = (top + (pixel + 0.5) * h / SIZE) / steps - 0.5
    inner = slice(2, -2)
    shown = [
        photometric.mirror(batch["views"][:, view], batch["flip"][:, view]) for view in range(2)
    ]
    views = np.stack(shown, 1).astype(float)[:, :, inner, inner]
    tolerance = 1 if steps == 1 else 4
    assert np.abs(views[..., 0] - x[:, :, None, inner]).max() <= tolerance
    assert np.abs(views[..., 1] - y[:, :, inner, None]).max() <= tolerance


def test_options_of_the_crop(make, bpe):
    full = make.stream(
        make.settings(batch=32, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip_p=0.0),
        make.ColorImages(90, size=(40, 40)),
        None,
        1,
    )[0]
    assert (full["box"] == [0, 0, 40, 40]).all() and not full["flip"].any()
    assert make.stream(make.settings(batch=32, flip_p=1.0), make.ColorImages(90), None, 1)[0][
        "flip"
    ].all()
    small = make.stream(
        make.settings(batch=64, crop_scale=(0.1, 0.2)),
        make.ColorImages(90, size=(400, 400)),
        None,
        1,
    )[0]["box"]
    share = small[..., 2] * small[..., 3] / 160_000
    assert share.min() > 0.097 and share.max() < 0.203


def test_masks_are_those_of_the_objective(make, bpe):
    for kind in ("blockwise", "uniform"):
        (batch,) = make.stream(
            make.settings(mask=kind, mask_ratio=0.25), make.ColorImages(90), None, 1, start=6
        )
        assert (batch["mask"] == getattr(masks, kind)(0, 6, 8, grid=4, hidden=4)).all()


def test_transparency_takes_the_background(fill, make):
    folder = fill(
        {f"{i}.png": make.encode(np.zeros((20, 20, 4), np.uint8), "PNG") for i in range(4)}
    )
    assert (
        make.stream(make.settings(batch=4, background=77), FolderSource(str(folder)), None, 1)[0][
            "views"
        ]
        == 77
    ).all()


@pytest.mark.parametrize(
    ("classes", "kept", "dropped"), [(-1, 7, 0), (0, 0, 0), (3, 3, 112), (99, 7, 0)]
)
def test_labels_beyond_the_classes_are_dropped_and_counted(make, classes, kept, dropped):
    source, config = make.ColorImages(224), make.settings(batch=224, classes=classes)
    batches = pipeline.iterate_batches(config, source, None, start=0)
    label = next(batches)["label"]
    assert set(label) == set(range(-1, kept))
    assert {note: n for note, n in batches.noted.items() if n} == (
        {"label_dropped": dropped} if dropped else {}
    )
    assert pipeline.count_classes(config.data, source) == (7 if classes < 0 else classes)


def test_long_captions_are_cut_and_counted(make, bpe):
    class Talkative(make.ColorImages):
        def __getitem__(self, index: int) -> base.Record:
            return dataclasses.replace(
                super().__getitem__(index), caption="number one " * (index % 2 * 50) + "number"
            )

    batches = pipeline.iterate_batches(make.settings(batch=100), Talkative(100), bpe, start=0)
    batch = next(batches)
    assert batches.noted["caption_cut"] == 50 == (batch["length"] == LENGTH).sum()
    assert (batch["tokens"][np.arange(100), batch["length"] - 1] == bpe.end).all()


def test_captions_that_are_no_text_are_counted(make, bpe):
    """A run of an earlier version, which did not count them, goes on."""
    captions = (b"caf\xe9", b"caf\xc3\xa9", "café", "café".encode("utf-16"), None)

    class Encoded(make.ColorImages):
        def __getitem__(self, index: int) -> base.Record:
            return dataclasses.replace(super().__getitem__(index), caption=captions[index % 5])

    batches = pipeline.iterate_batches(make.settings(batch=100), Encoded(100), bpe, start=0)
    batches.go_on({"noted": {"caption_cut": 3, "label_dropped": 0, "region_too_long": 0}})
    next(batches)
    assert batches.counted() == {"data/caption_cut": 3, "data/caption_undecodable": 20}


def test_refusals(make):
    with pytest.raises(
        UserError,
        match="^images has 1 images to train on, mixing needs 2: add images or lower data.holdout$",
    ):
        pipeline.iterate_batches(make.settings(), make.ColorImages(1), None, start=0)
    for wrong in ({"start": 1}, {"start": -2}, {"start": 0, "hosts": 3}, {"start": 0, "hosts": 8}):
        with pytest.raises(ValueError, match="must be a multiple of 2 x"):
            pipeline.iterate_batches(make.settings(), make.ColorImages(9), None, **wrong)
    with pytest.raises(ValueError, match="pads captions to 5 ids, but data.caption_length is 12"):
        pipeline.iterate_batches(
            make.settings(), make.ColorImages(9), tokenizer.train_tokenizer(["a"], 259, 5), start=0
        )


def test_shared_memory_is_checked_before_a_bus_error(make, monkeypatch):
    usage = type("Usage", (), {"free": 64 << 20})
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda path: usage)
    config = make.settings(batch=512, workers=2, image_size=224)
    config = dataclasses.replace(config, model=schema.Model(encoder=schema.Encoder(patch_size=16)))
    with pytest.raises(
        UserError,
        match=(
            "^data.workers=2 needs 735 MiB of shared memory for its batches, and /dev/shm has 64"
            " free: use data.workers=0"
        ),
    ):
        pipeline.iterate_batches(config, make.ColorImages(9), None, start=0)


def test_captions_on_demand(make):
    silent = make.ColorImages(5)
    silent.captions = False
    assert pipeline.uses_captions(
        schema.Data(), make.ColorImages(5)
    ) and not pipeline.uses_captions(schema.Data(), silent)
    assert not pipeline.uses_captions(schema.Data(captions="no"), make.ColorImages(5))
    with pytest.raises(
        UserError,
        match=(
            "^data.captions='yes', but images has no captions: use 'auto', or put NAME.txt beside"
            " the images$"
        ),
    ):
        pipeline.uses_captions(schema.Data(captions="yes"), silent)


def test_the_levels_that_rand_augment_fills_with_identify_the_stream(make):
    """They follow the mean. A stream without RandAugment, or with ImageNet's mean, keeps its
    fingerprint."""
    config, source = make.settings(), make.ColorImages(50)

    def settings(ops: int, mean: float) -> schema.Config:
        augment = dataclasses.replace(config.data.augment, mean=(mean,) * 3)
        rand_augment = dataclasses.replace(config.data.rand_augment, ops=ops)
        data = dataclasses.replace(config.data, rand_augment=rand_augment)
        return dataclasses.replace(
            config, data=dataclasses.replace(data, augment=augment) if mean else data
        )

    plain, imagenet, other, halves, third = (
        pipeline.stream_fingerprint(settings(*of), source)
        for of in ((0, 0), (2, 0), (0, 0.5), (2, 0.5), (2, 0.4))
    )
    assert plain == imagenet == other and len({plain, halves, third}) == 3
    assert "fill 128 128 128" in pipeline.stream_identity(settings(2, 0.5), source)


def test_the_fingerprint_identifies_the_stream(make):
    config, source = make.settings(), make.ColorImages(50)
    full = pipeline.stream_fingerprint(config, source)
    assert len(full) == 16 and int(full, 16) >= 0
    assert (
        pipeline.stream_fingerprint(
            make.settings(batch=64, threads=2, image_size=64), make.ColorImages(50)
        )
        == full
    )
    others = [
        pipeline.stream_fingerprint(dataclasses.replace(config, seed=1), source),
        pipeline.stream_fingerprint(config, make.ColorImages(51)),
        *(
            pipeline.stream_fingerprint(config, base.split_by_hash(source, 0.1, part))
            for part in ("train", "held_out")
        ),
    ]
    assert len({full, *others}) == 5


def test_batches_are_never_reused(make, bpe):
    """The device may read a batch long after the iterator returned it."""
    batches = make.stream(make.settings(threads=2), make.ColorImages(50), bpe, 4)
    for name in batches[0]:
        assert not any(
            np.shares_memory(a[name], b[name]) for i, a in enumerate(batches) for b in batches[:i]
        )


def test_the_memory_of_batches_is_recycled(make, bpe):
    batch = make.stream(make.settings(threads=2), make.ColorImages(50), bpe, 1)[0]
    assert isinstance(batch["views"].base, shared_buffers._TrackedArray)


def test_unread_views_are_not_cut(make):
    """They are black; everything else is unchanged."""
    config, source = make.settings(batch=8), make.ColorImages(50)
    both, first = (
        next(pipeline.iterate_batches(config, source, None, start=8, views=views))
        for views in ((0, 1), (0,))
    )
    assert not first["views"][:, 1].any() and both["views"][:, 1].any()
    np.testing.assert_array_equal(first["views"][:, 0], both["views"][:, 0])
    for name in ("box", "flip", "mask", "label", "position"):
        np.testing.assert_array_equal(first[name], both[name])


def test_rand_augment_is_keyed_by_position(make):
    """Every view has its own draws, which a restart repeats; the crops do not change."""
    plain, source = make.settings(batch=8), make.ColorImages(50)
    strong = schema.RandAugment(ops=2, p=1.0)
    config = dataclasses.replace(plain, data=dataclasses.replace(plain.data, rand_augment=strong))
    stream = pipeline.iterate_batches(config, source, None, start=0)
    next(stream)
    second, again, without = (
        next(stream),
        *(next(pipeline.iterate_batches(c, source, None, start=8)) for c in (config, plain)),
    )
    np.testing.assert_array_equal(second["views"], again["views"])
    np.testing.assert_array_equal(second["box"], without["box"])
    changed = (second["views"] != without["views"]).any((2, 3, 4))
    assert (
        changed.mean() > 0.5 and len({row.tobytes() for row in second["views"].reshape(16, -1)}) > 8
    )
