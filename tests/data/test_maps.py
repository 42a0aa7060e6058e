"""Directories of images and class maps: layouts, class names, damaged and foreign maps; and maps of
annotated objects."""

import io
import json
import pathlib
import types

import numpy as np
import pytest
from PIL import Image

from m3i_jax import schema
from m3i_jax.data import annotated_batches, decode, decode_map, rendered_maps, splits
from m3i_jax.data.sources import base, maps, segmentations
from m3i_jax.data.sources.objects import Objects
from m3i_jax.data.sources.relabelled import RelabelledMaps
from m3i_jax.data.sources.scenes import ScenesSource
from m3i_jax.errors import UserError


def png(array: np.ndarray, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, "PNG")
    return buffer.getvalue()


def numbers(highest: int) -> np.ndarray:
    return (np.arange(20 * 30) % (highest + 1)).reshape(20, 30).astype(np.uint8)


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    """ADE20k's layout: three images to train on with maps of 0..4, one held out with 0..2."""
    for split, count, highest in (("training", 3, 4), ("validation", 1, 2)):
        for part in ("images", "annotations"):
            (tmp_path / part / split).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (30, 20)).save(tmp_path / "images" / split / f"{split}_{i}.jpg")
            (tmp_path / "annotations" / split / f"{split}_{i}.png").write_bytes(
                png(numbers(highest))
            )
    return tmp_path


def data(root: pathlib.Path, **more: object) -> schema.Data:
    return schema.Data(source="maps", path=str(root), **more)


def test_the_layout_of_ade20k(root) -> None:
    train, held_out = splits.open_splits(data(root))
    assert [len(train), len(held_out)] == [3, 1]
    # without a file of names, from the highest class of all splits
    assert train.classes == held_out.classes == train.map_classes == ("1", "2", "3", "4")
    decoded = decode_map.decode_map(train[0].map, 4)
    expected = np.where(numbers(4) == 0, 255, numbers(4).astype(int) - 1)
    assert (decoded == expected).all() and decoded.dtype == np.uint8
    assert "training/ is trained on, validation/ is held out" in train.description()
    assert "no file names the classes" in train.description()
    named, _ = splits.open_splits(data(root, split="validation", holdout=0.0))
    assert [named.key(0), len(named)] == ["validation_0.jpg", 1]


def test_a_directory_without_splits(root, tmp_path) -> None:
    for part in ("images", "annotations"):
        (root / part / "training").rename(root / part / "street")
        (root / part / "validation").rename(root / part / "field")
    train, held_out = splits.open_splits(data(root, holdout=0.5))
    assert len(train) + len(held_out) == 4
    assert {s.key(i).split("/")[0] for s in (train, held_out) for i in range(len(s))} == {
        "street",
        "field",
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.txt", "wall\nsky\ntree\nroad\n\n \n"),
        ("classes.txt", "\ufeffwall\nsky\ntree\nroad\n"),
        (
            "objectInfo150.txt",
            "Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t9\t1\twall\n2\t.1\t9\t1\tsky, heaven\n"
            "3\t.1\t9\t1\ttree\n4\t.1\t9\t1\troad, route\n",
        ),
        ("names.json", json.dumps(["wall", "sky", "tree", "road"])),
    ],
)
def test_names_of_classes(root, name, text) -> None:
    (root / name).write_text(text, encoding="utf-8")
    more = {"class_names": str(root / name)} if name == "names.json" else {}
    train, _ = splits.open_splits(data(root, **more))
    assert train.classes == ("wall", "sky", "tree", "road")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("classes.txt", "", "names no class"),
        ("classes.txt", "wall\nsky\n\ntree\n", "line 3 is blank, and line k names the k-th class"),
        ("classes.txt", "\n".join(map(str, range(255))), "255 classes, at most 254 fit"),
        ("classes.json", "{}", "not a list of class names"),
        ("classes.json", "[", "not a list of class names"),
    ],
)
def test_files_of_names_that_are_refused(root, name, text, message) -> None:
    (root / name).write_text(text)
    with pytest.raises(UserError, match=message):
        splits.open_splits(data(root, class_names=str(root / name)))


def test_a_held_out_path_is_another_directory_of_images_and_maps(root, tmp_path) -> None:
    other = tmp_path / "other"
    for part in ("images", "annotations"):
        (other / part).mkdir(parents=True)
        (root / part / "validation").rename(other / part / "validation")
    (root / "classes.txt").write_text("wall\nsky\ntree\nroad\n")
    for names in ("", "wall\nsky\ntree\nroad\n"):  # with those of data.path, or its own
        if names:
            (other / "classes.txt").write_text(names)
        source = maps.MapsSource(str(root), str(other))
        assert source.classes == ("wall", "sky", "tree", "road")
    train, held_out = splits.open_splits(data(root, split="training", holdout_split=str(other)))
    assert [len(train), len(held_out)] == [3, 1]
    assert held_out[0].image == (other / "images/validation/validation_0.jpg").read_bytes()
    assert (held_out[0].map == maps.shift_classes(png(numbers(2)))).all()


def test_a_split_in_which_images_and_maps_are_one_folder_is_refused(root) -> None:
    (root / "held").mkdir()
    with pytest.raises(UserError, match=r"'\.\./held' of images/ and that of annotations/ are the"):
        maps.MapsSource(str(root), "../held")


def test_images_and_maps_that_lack_the_other(root) -> None:
    (root / "annotations/training/training_0.png").unlink()
    (root / "images/training/training_1.jpg").unlink()
    (root / "images/training/note.md").write_text("")
    Image.new("RGB", (30, 20)).save(root / "images/training/training_2.png")
    train, _ = splits.open_splits(data(root))
    text = train.description()
    assert len(train) == 1
    for kind in (
        "1 images without a map",
        "1 maps without an image",
        "1 other files",
        "1 files of the same name with another extension",
    ):
        assert kind in text


def test_layouts_that_are_refused(root, tmp_path) -> None:
    with pytest.raises(UserError, match="there is no 'nothing'"):
        splits.open_splits(data(root, split="nothing"))
    with pytest.raises(UserError, match=r"there is no 'images'.*reads images/ and annotations/"):
        splits.open_source(data(root / "images"))
    (root / "images/train").mkdir()
    with pytest.raises(UserError, match="train and training for one split"):
        splits.open_splits(data(root))
    for file in (root / "annotations/validation").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"no image in .* has a map of its name"):
        maps.MapsSource(str(root), "validation")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no_map"),
        (b"<html>", "no_map"),
        (png(np.zeros((9, 9, 3), np.uint8)), "no_map"),
        (png(numbers(7))[:-30], "no_map"),
        (png(np.full((9, 9), 300, np.uint16)), "map_class"),
        (png(np.full((9, 9), 6, np.uint8)), "map_class"),
    ],
)
def test_maps_that_are_bad_records(content, reason) -> None:
    shifted = maps.shift_classes(content)
    with pytest.raises(decode.BadRecord) as error:
        decode_map.decode_map(shifted, 5)
    assert error.value.reason == reason


def test_kinds_of_maps() -> None:
    grid = numbers(3)
    palette = Image.fromarray(grid, "P")
    palette.putpalette(bytes(range(255, 255 - 12, -1)))
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    for content in (png(grid), buffer.getvalue(), png(grid.astype(np.uint16))):
        assert (decode_map.read_map(content) == grid).all()
    shifted = maps.shift_classes(png(np.array([[0, 1, 150, 255]], np.uint8)))
    assert isinstance(shifted, np.ndarray) and shifted.tolist() == [[255, 0, 149, 255]]


def test_maps_in_which_0_is_a_class(root) -> None:
    folder = root / "annotations/training"
    (folder / "training_0.png").write_bytes(png(np.array([[0, 1, 4, 255]], np.uint8)))
    train, held_out = splits.open_splits(data(root, map_unlabelled=255))
    assert train.classes == held_out.classes == ("0", "1", "2", "3", "4")
    assert train[0].map.tolist() == [[0, 1, 4, 255]]
    assert (train[1].map == numbers(4)).all()
    shifted, _ = splits.open_splits(data(root))
    assert shifted[0].map.tolist() == [[255, 0, 3, 255]]
    assert shifted.fingerprint() != train.fingerprint()
    names = [f"class {n}" for n in range(255)]
    (root / "classes.txt").write_text("\n".join(names))
    train, _ = splits.open_splits(data(root, map_unlabelled=255))
    assert train.classes == tuple(names)
    (root / "classes.txt").write_text("\n".join([*names, "class 255"]))
    with pytest.raises(UserError, match="256 classes, at most 255 fit in a map beside 255"):
        splits.open_splits(data(root, map_unlabelled=255))


def test_a_first_class_that_is_background_is_a_warning_where_0_is_unlabelled(root, caplog) -> None:
    (root / "classes.txt").write_text("_background_\nwall\nsky\ntree\n")
    splits.open_splits(data(root, map_unlabelled=255))
    assert not caplog.text
    splits.open_splits(data(root))
    assert "'_background_', is number 1 of the maps" in caplog.text


def test_a_single_class_is_refused_by_segmentation(root) -> None:
    """Its softmax is 1 everywhere, so that mIoU was 1.0 before the first step."""
    for file in (root / "annotations").rglob("*.png"):
        file.write_bytes(png(numbers(1)))
    geometry = schema.DensePrediction(geometry=schema.Geometry(rule="range", long=40, short=20))
    for unlabelled in (0, 255):
        config = schema.Config(
            data=data(root, image_size=32, map_unlabelled=unlabelled),
            dense=geometry,
            train=schema.Train(batch_size=2),
        )
        train, _ = splits.open_splits(config.data)
        if unlabelled:
            batches = annotated_batches.iterate_segment_batches(config, train, start=0)
            assert set(np.unique(next(batches)["map"])) == {0, 1, 255}
            batches.close()
        else:
            with pytest.raises(UserError, match=r"has 1 classes \(1\).*data.map_unlabelled=255"):
                annotated_batches.iterate_segment_batches(config, train, start=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(255 * numbers(1)), "annotations: all pixels are 0 or 255, both unlabelled; write one"),
        (
            png(np.zeros((9, 9, 3), np.uint8)),
            "annotations: 4 of 4 maps cannot be read, as 'training/training_0.png': its map has the"
            " mode RGB instead of one channel; write one channel with classes from 1, or set",
        ),
    ],
)
def test_maps_without_a_class_are_refused(root, tmp_path, content, message) -> None:
    files = sorted((root / "annotations").rglob("*.png"))
    for file in files:
        file.write_bytes(content)
    for _ in range(2):  # no class is not kept as a result
        with pytest.raises(UserError, match=message):
            maps.MapsSource(str(root), "training", cache=str(tmp_path / "cache"))
    files[0].write_bytes(png(np.full((9, 9), 255, np.uint8)))
    with pytest.raises(UserError, match="3 of 4 maps|all pixels are 0 or 255"):
        maps.MapsSource(str(root), "training")
    if "mode" in message:
        with pytest.raises(UserError, match="all pixels are 255, unlabelled; 3 of 4 maps"):
            maps.MapsSource(str(root), "training", unlabelled=255)


def test_the_number_of_classes_is_kept(root, tmp_path, monkeypatch) -> None:
    cache = str(tmp_path / "cache")
    first = maps.MapsSource(str(root), "training", cache=cache)
    monkeypatch.setattr(maps, "_highest", lambda path: pytest.fail("a map was read again"))
    assert maps.MapsSource(str(root), "training", cache=cache).classes == first.classes
    assert (
        first.fingerprint() != maps.MapsSource(str(root), "validation", cache=cache).fingerprint()
    )


def test_a_directory_for_indices_that_cannot_be_written_is_a_warning(root, tmp_path, caplog):
    (tmp_path / "cache").write_bytes(b"")
    source = maps.MapsSource(str(root), "training", cache=str(tmp_path / "cache"))
    assert source.classes == maps.MapsSource(str(root), "training").classes
    assert "the number of classes cannot be kept" in caplog.text


def test_maps_of_objects() -> None:
    square = segmentations.Polygons((np.array([[1, 1], [4, 1], [4, 3], [1, 3.0]]),))
    rest = segmentations.encode_mask(np.ones((5, 6), bool))
    objects = Objects(
        boxes=np.array([[1, 1, 4, 3], [0, 0, 6, 5], [4, 3, 6, 5], [5, 0, 6, 1]], np.float32),
        classes=np.array([1, 0, 0, 2], np.int32),
        crowd=np.zeros(4, bool),
        segmentations=(square, rest, None, segmentations.RunLengths(b"~", (5, 6))),
        areas=np.array([6, 30, 4, 1.0]),
        ids=np.arange(4),
        size=(5, 6),
    )
    expected = np.ones((5, 6), int)
    expected[1:3, 1:4] = 2
    expected[3:, 4:] = expected[0, 5] = 255
    assert (rendered_maps.render_map(objects, 5, 6) == expected).all()


def test_a_source_of_objects_gets_maps(tmp_path) -> None:
    class Objectified(ScenesSource):
        """Scenes without their maps."""

        map_classes = ()

        def __init__(self) -> None:
            super().__init__(10, side=48)
            self.map_classes = ()

        def __getitem__(self, index):
            record = super().__getitem__(index)
            return base.Record(record.key, record.image, objects=record.objects)

    source, whole = rendered_maps.with_maps(Objectified()), ScenesSource(10, side=48)
    assert source.map_classes == ("background", *whole.classes) and len(source) == 10
    for i in range(10):
        ours, theirs = source[i].map, whole[i].map
        known = theirs != 255
        things = known & (theirs < 8)
        assert (ours[things] == theirs[things] + 1).mean() > 0.95 if things.any() else True
        assert (ours[known & (theirs >= 8)] == 0).all()
    assert rendered_maps.with_maps(whole) is whole

    class Many(Objectified):
        def __init__(self) -> None:
            super().__init__()
            self.classes = tuple(map(str, range(300)))

    with pytest.raises(UserError, match="300 classes, at most 254 fit"):
        rendered_maps.with_maps(Many())
    shapes_source = splits.open_source(schema.Data(size=9))
    with pytest.raises(UserError, match="neither class maps nor objects"):
        rendered_maps.with_maps(shapes_source)


def test_maps_of_all_numbers_are_not_renumbered() -> None:
    """With 255 classes, 254 is a class and cannot stand for numbers without one."""
    source = types.SimpleNamespace(name="a", classes=("x",), map_classes=("x",), captions=False)
    names = ["x", *map(str, range(254))]
    with pytest.raises(UserError, match="at most 254 leave a number"):
        RelabelledMaps(source, names)
