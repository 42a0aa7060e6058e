"""Files of annotations: found images, and everything that is wrong in real ones, counted by its
reason or refused in one line."""

import copy
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3i_jax import schema
from m3i_jax.data import annotated_batches, splits
from m3i_jax.data.sources import coco, coco_index, mixture, registry, segmentations
from m3i_jax.data.sources.coco import CocoSource
from m3i_jax.errors import UserError

SQUARE = [2.0, 3.0, 12.0, 3.0, 12.0, 9.0, 2.0, 9.0]


def annotation(number: int, image: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image,
        "category_id": 3,
        "bbox": [2.0, 3.0, 10.0, 6.0],
        "area": 60.0,
        "iscrowd": 0,
        "segmentation": [SQUARE],
    } | changes


DOCUMENT: dict[str, Any] = {
    "images": [{"id": n, "file_name": f"{n}.png", "height": 20, "width": 30} for n in (1, 2, 4)],
    "annotations": [annotation(11), annotation(12, 4)],
    "categories": [{"id": 9, "name": "dog"}, {"id": 3, "name": "cat"}],
}


def write(root: pathlib.Path, document: Any, *, images: int = 5, raw: bytes | None = None) -> str:
    (root / "images").mkdir(exist_ok=True)
    for n in range(images):
        Image.new("RGB", (30, 20), (n, n, n)).save(root / "images" / f"{n}.png")
    path = root / "objects.json"
    path.write_bytes(json.dumps(document).encode() if raw is None else raw)
    return str(path)


def opened(root: pathlib.Path, document: Any, **more: Any) -> CocoSource:
    return CocoSource(str(root / "images"), write(root, document, **more))


def changed(**lists: list[Any]) -> dict[str, Any]:
    """The document with more images, annotations or categories."""
    document = copy.deepcopy(DOCUMENT)
    for name, more in lists.items():
        document[name] += more
    return document


def test_objects_and_classes(tmp_path) -> None:
    source = opened(tmp_path, DOCUMENT)
    assert source.classes == ("cat", "dog") and source.category_ids.tolist() == [3, 9]
    assert [source.key(i) for i in range(3)] == ["1.png", "2.png", "4.png"]
    objects = source[2].objects
    assert objects.boxes.tolist() == [[2.0, 3.0, 12.0, 9.0]] and objects.boxes.dtype == np.float32
    assert (objects.ids.tolist(), objects.image, objects.size) == ([12], 4, (20, 30))
    assert segmentations.decode_mask(objects.segmentations[0], 20, 30).sum() == 60
    assert len(source[1].objects) == 0
    assert source.image_counts.tolist() == [2, 0] and source.frequencies == ("", "")
    assert "1 images without an object" in source.description()
    table = source.object_table()
    assert table.records.tolist() == [0, 2] and table.classes.tolist() == [0, 0]


RLE = {"size": [20, 30], "counts": segmentations.encode_mask(np.eye(20, 30) > 0).counts.decode()}
LEFT_OUT = {
    "annotations of an image that is not listed": annotation(20, 3),
    "annotations of a category that is not listed": annotation(20, category_id=4),
    "annotations that are not JSON objects": 7,
    "annotations without a box": annotation(20, bbox=None, segmentation=None),
    "boxes of no area": annotation(20, bbox=[5, 5, 0, 9]),
    "boxes outside of the image": annotation(20, bbox=[31, 2, 5, 5]),
}
ODD = {
    "annotations without an id of their own": annotation(11),
    "objects without a mask": annotation(20, segmentation=None),
    "masks of an unknown form": annotation(20, segmentation="mask.png"),
    "polygons without three points": annotation(20, segmentation=[SQUARE[:4], SQUARE]),
    "polygons outside of the image": annotation(20, segmentation=[[-9, -9, -2, -9, -2, -3]]),
    "run lengths of an image of another size": annotation(
        20, segmentation={**RLE, "size": [30, 20]}
    ),
    "run lengths without a size": annotation(20, segmentation={"counts": [600]}),
    "damaged run lengths": annotation(20, segmentation={"size": [20, 30], "counts": [599]}),
    "boxes taken from the mask": annotation(20, bbox=None),
    "boxes that reach out of the image by more than a pixel": annotation(20, bbox=[20, 2, 15, 5]),
}


@pytest.mark.parametrize("reason", LEFT_OUT)
def test_annotations_that_are_left_out_are_counted(tmp_path, reason) -> None:
    source = opened(tmp_path, changed(annotations=[LEFT_OUT[reason]]))
    assert source.ignored[reason] == 1 and sum(source.ignored.values()) == 1
    assert f"1 {reason}" in source.description()
    assert len(source.object_table().classes) == 2


@pytest.mark.parametrize("reason", ODD)
def test_odd_annotations_are_used_and_counted(tmp_path, reason) -> None:
    source = opened(tmp_path, changed(annotations=[ODD[reason]]))
    assert source.noted[reason] == 1 and not sum(source.ignored.values())
    assert f"1 {reason}" in source.description()
    assert len(source.object_table().classes) == 3


@pytest.mark.parametrize(
    "box", [[1, 2, float("nan"), 4], [1, 2, "3", 4], [1, 2, 3], [10**400, 1, 2, 3], {}]
)
def test_boxes_that_are_no_numbers_are_taken_from_the_mask(tmp_path, box) -> None:
    source = opened(tmp_path, changed(annotations=[annotation(20, bbox=box)]))
    assert source.noted["boxes taken from the mask"] == 1
    assert source[0].objects.boxes[1].tolist() == [2, 3, 12, 9]
    run_lengths = annotation(20, bbox=box, segmentation=RLE)
    assert opened(tmp_path, changed(annotations=[run_lengths]))[0].objects.boxes[1].tolist() == [
        0,
        0,
        20,
        20,
    ]


@pytest.mark.parametrize(
    "segmentation",
    [RLE, {"size": [20, 30], "counts": segmentations.runs_of_mask(np.eye(20, 30) > 0).tolist()}],
    ids=["compressed", "list"],
)
def test_run_lengths_and_crowds(tmp_path, segmentation) -> None:
    crowd = annotation(20, iscrowd=1, segmentation=segmentation)
    objects = opened(tmp_path, changed(annotations=[crowd]))[0].objects
    assert objects.crowd.tolist() == [False, True]
    mask = segmentations.decode_mask(objects.segmentations[1], 20, 30)
    assert (mask == (np.eye(20, 30) > 0)).all()


def test_objects_that_are_all_crowds_are_refused_as_such(tmp_path) -> None:
    runs = {"size": [20, 30], "counts": [0, 60, 540]}
    crowds = [annotation(n, n - 10, iscrowd=1, segmentation=runs) for n in (11, 12)]
    for annotations, words in (
        (crowds, "its 2 objects all have iscrowd=1, as CVAT"),
        ([], "check"),
    ):
        source = opened(tmp_path, DOCUMENT | {"annotations": annotations})
        with pytest.raises(UserError, match=f"has an object to train on: {words}"):
            annotated_batches.drop_without_objects(source)


def test_boxes_alone_are_refused_where_masks_are_predicted(tmp_path) -> None:
    """Every object would be left out, and all images be background."""
    config = schema.Config(data=schema.Data(image_size=32), train=schema.Train(batch_size=2))
    runs = {"size": [20, 30], "counts": [0, 60, 540]}
    crowd = annotation(15, 4, iscrowd=1, segmentation=runs)
    boxes = [annotation(n, n - 10, segmentation=[]) for n in (11, 12, 14)]
    source = opened(tmp_path, DOCUMENT | {"annotations": [*boxes, crowd]})
    assert source.object_table().masked.tolist() == [False, False, False, True]
    twice = mixture.Mixture([source, source], [None, None])
    for given, count in ((source, 3), (twice, 6)):
        with pytest.raises(UserError, match=f"masks: true, and none of the {count} objects of"):
            annotated_batches.iterate_detect_batches(config, given, start=0)
    runs = annotation(16, 4, segmentation=runs)
    some = opened(tmp_path, DOCUMENT | {"annotations": [boxes[0], runs, annotation(17, 2)]})
    assert some.object_table().subset(np.array([2, 0])).masked.tolist() == [True, False]
    assert some.object_table().relabel(np.array([-1, 0])).masked.tolist() == []
    annotated_batches.iterate_detect_batches(config, some, start=0).close()


def test_coordinates_are_kept_to_the_last_bit(tmp_path) -> None:
    for points in (
        [10.1, 3.07, 12.33, 3.0, 12.0, 9.99],
        [10.123456789, 3.0, 12.333333333333, 3.0, 12, 9.1],
    ):
        source = opened(tmp_path, changed(annotations=[annotation(20, segmentation=[points])]))
        assert source[0].objects.segmentations[1].parts[0].ravel().tolist() == points


def test_images_that_cannot_be_used(tmp_path) -> None:
    more = [{"id": 77, "height": 5, "width": 5}, {"id": 1, "file_name": "1.png"}]
    missing = [{"id": 78, "file_name": "gone.png", "height": 20, "width": 30}]
    source = opened(tmp_path, changed(images=more + missing, annotations=[annotation(20, 78)]))
    assert len(source) == 3 and source.ignored == {
        "images without a file name": 1,
        "images that are listed twice": 1,
        "images whose file is missing": 1,
    }
    assert len(source.object_table().classes) == 2


def test_names_with_half_of_a_character(tmp_path) -> None:
    more = [{"id": 77, "file_name": "\ud800.png", "height": 20, "width": 30}]
    source = opened(tmp_path, changed(images=more, categories=[{"id": 1, "name": "\udfff"}]))
    assert source.ignored["images without a file name"] == 1
    assert source.classes == ("?", "cat", "dog")


def test_an_image_without_a_stated_size(tmp_path) -> None:
    document = changed(images=[{"id": 3, "file_name": "3.png"}], annotations=[annotation(20, 3)])
    source = opened(tmp_path, document)
    assert source[3].objects.size == (0, 0) and len(source[3].objects) == 1


@pytest.mark.parametrize("sides", [{}, {"height": 20.0, "width": "30"}, {"width": 30.5}])
def test_run_lengths_of_an_image_without_a_plain_size(tmp_path, sides) -> None:
    odd = annotation(20, 3, segmentation={"size": [9, 9], "counts": [600]})
    runs = [
        annotation(n, 3, segmentation=RLE, bbox=box)
        for n, box in ((21, [0, 0, 20, 20]), (22, None))
    ]
    image = {"id": 3, "file_name": "3.png", **sides}
    source = opened(tmp_path, changed(images=[image], annotations=[odd, *runs]))
    objects = source[3].objects
    assert sum(source.noted[kind] for kind in coco_index.REPAIRED) == 1
    assert objects.size == (20, 30) and objects.boxes[1:].tolist() == [[0, 0, 20, 20]] * 2
    for mask in objects.segmentations[1:]:
        assert (segmentations.decode_mask(mask, 20, 30) == (np.eye(20, 30) > 0)).all()


def deep(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"\xff\xfe{}", "is not UTF-8 text (byte 0); save it as UTF-8"),
        (b'{"images": [', "is not JSON (Expecting value"),
        (b"", "is not JSON"),
        (deep(100_000), "is nested too deep"),
        (b'{"images": ' + b"9" * 5000 + b"}", "is not JSON (Exceeds the limit"),
        ([], "holds a JSON list, not an object"),
        ({"info": 1}, "has no list 'images' (it has: 'info')"),
        ({**DOCUMENT, "categories": {}}, "has no list 'categories'"),
        ({**DOCUMENT, "images": []}, "lists no image"),
        ({**DOCUMENT, "categories": []}, "lists no category"),
        (changed(categories=[{"id": "x"}]), "{'id': 'x'} is not a category"),
        (changed(categories=[{"id": 3, "name": "cow"}]), "'cat' and 'cow' have the same id 3"),
        (changed(images=[{"file_name": "7.png"}]), "is not an image: it needs a whole number 'id'"),
        (changed(images=[{"id": 2**70, "file_name": "7.png"}]), "is not an image"),
        (changed(images=[{"id": 1, "file_name": "7.png"}]), "'1.png' and '7.png' have the same id"),
        ({**DOCUMENT, "images": [{"id": 1}]}, "no image has a 'file_name'"),
    ],
    ids=range(16),
)
def test_files_that_are_refused(tmp_path, document, message) -> None:
    raw = document if isinstance(document, bytes) else None
    path = write(tmp_path, document if raw is None else {}, raw=raw)
    with pytest.raises(UserError) as error:
        CocoSource(str(tmp_path / "images"), path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_file_that_is_too_large(tmp_path, monkeypatch) -> None:
    path = write(tmp_path, DOCUMENT)
    monkeypatch.setattr(coco_index, "JSON_LIMIT", 100)
    with pytest.raises(UserError, match="GiB of annotations, at most"):
        CocoSource(str(tmp_path / "images"), path)


def test_no_image_is_there(tmp_path) -> None:
    path = write(tmp_path, DOCUMENT)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"lists 3 images, such as '1.png', of which none is in"):
        CocoSource(str(tmp_path / "empty"), path)
    with pytest.raises(
        UserError, match=r"data.path='/no/dir' is not a directory: there is no 'no'"
    ):
        CocoSource("/no/dir", path)
    with pytest.raises(UserError, match=r"data.annotations='/no/file.json' is not a file"):
        CocoSource(str(tmp_path), "/no/file.json")


@pytest.mark.parametrize(
    ("files", "name", "strip", "prefix"),
    [
        (["1.png"], "1.png", 0, ""),
        (["train2017/1.png", "val2017/2.png"], "1.png", 0, "train2017"),  # COCO
        (["patch3/1.png"], "images/v1/patch3/1.png", 2, ""),  # Objects365
        (["a/train2017/1.png"], "train2017/1.png", 0, "a"),
        (["train/1.png", "val/1.png"], "1.png", 0, "train"),  # named by the file of annotations
    ],
)
def test_where_images_are_found(tmp_path, files, name, strip, prefix) -> None:
    for file in files:
        path = tmp_path / "root" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20)).save(path)
    document = {**DOCUMENT, "images": [{"id": 1, "file_name": name}]}
    annotations = tmp_path / "instances_train.json"
    annotations.write_text(json.dumps(document))
    source = CocoSource(str(tmp_path / "root"), str(annotations))
    place = source._place
    assert (place.strip, place.prefix, source.key(0)) == (strip, prefix, name)
    assert source[0].image[:4] == b"\x89PNG"


def test_a_few_of_many_images_are_found(tmp_path) -> None:
    """The folder is found by the images that are there, not by a sample of all that are listed."""
    images = [{"id": n, "file_name": f"v/{n:05}.png"} for n in range(2000)]
    path = write(tmp_path, {**DOCUMENT, "images": images, "annotations": []}, images=0)
    (tmp_path / "images/val").mkdir()
    (tmp_path / "images/val/00777.png").write_bytes(b"")
    source = CocoSource(str(tmp_path / "images"), path)
    assert [source.key(i) for i in range(len(source))] == ["v/00777.png"]
    assert source.ignored["images whose file is missing"] == 1999


def test_folders_with_the_same_names_are_refused(tmp_path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (30, 20)).save(tmp_path / folder / "1.png")
    path = write(tmp_path, DOCUMENT, images=0)
    with pytest.raises(UserError, match="several folders with images of the names"):
        CocoSource(str(tmp_path), path)


def test_linked_images_are_counted_where_none_is_found(tmp_path) -> None:
    path = write(tmp_path, DOCUMENT)
    (tmp_path / "linked").mkdir()
    for file in (tmp_path / "images").iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    words = r"0 files; ignored: 5 links out of the folder\): give the directory .*, not links"
    with pytest.raises(UserError, match=words):
        CocoSource(str(tmp_path / "linked"), path)


def exported(folder: pathlib.Path, names: list[str], *, present: int) -> str:
    """Roboflow's form: the annotations beside the images, here of equal names in all folders."""
    folder.mkdir()
    for name in names[:present]:
        (folder / name).write_bytes(folder.name.encode())
    images = [{"id": n, "file_name": name} for n, name in enumerate(names)]
    path = folder / "_annotations.coco.json"
    path.write_text(json.dumps({**DOCUMENT, "images": images, "annotations": []}))
    return str(path)


def test_images_beside_their_annotations_go_before_others(tmp_path, caplog) -> None:
    names = [f"{n}.jpg" for n in range(4)]
    exported(tmp_path / "train", names, present=4)
    for folder, present in (("valid", 4), ("test", 3)):
        source = CocoSource(str(tmp_path), exported(tmp_path / folder, names, present=present))
        assert [source[i].image for i in range(len(source))] == [folder.encode()] * present
    assert not caplog.text


def test_images_beside_their_annotations_are_read_where_data_path_has_none(
    tmp_path, caplog
) -> None:
    train = exported(tmp_path / "train", ["1.jpg", "2.jpg"], present=2)
    held_out = exported(tmp_path / "valid", ["3.jpg"], present=1)
    data = schema.Data(
        source="coco",
        path=str(tmp_path / "train"),
        annotations=train,
        holdout_annotations=held_out,
    )
    parts = splits.open_splits(data)
    assert [[part[i].image for i in range(len(part))] for part in parts] == [
        [b"train", b"train"],
        [b"valid"],
    ]
    assert "those beside the file are read" in caplog.text


def test_names_that_are_addresses(tmp_path) -> None:
    files = ["a b.png", "c%20d.png", "f/g h.png"]
    for file in files:
        (tmp_path / "images" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / file).write_bytes(file.encode())
    names = ["a%20b.png", "c%20d.png", "/data/local-files/?d=f/g%20h.png"]
    images = [{"id": n, "file_name": name} for n, name in enumerate(names)]
    for chosen in ([0, 1], [2]):
        document = {**DOCUMENT, "images": [images[i] for i in chosen], "annotations": []}
        source = opened(tmp_path, document, images=0)
        assert [source[i].image for i in range(len(source))] == [files[i].encode() for i in chosen]
        assert [source.key(i) for i in range(len(source))] == [names[i] for i in chosen]


def test_addresses_of_lvis(tmp_path) -> None:
    (tmp_path / "images" / "train2017").mkdir(parents=True)
    Image.new("RGB", (30, 20)).save(tmp_path / "images" / "train2017" / "9.jpg")
    entry = {
        "id": 9,
        "coco_url": "http://images.cocodataset.org/train2017/9.jpg",
        "height": 20,
        "width": 30,
        "neg_category_ids": [9, 5],
        "not_exhaustive_category_ids": [3],
    }
    document = {**DOCUMENT, "images": [entry], "annotations": []}
    source = opened(tmp_path, document, images=0)
    objects = source[0].objects
    assert source.key(0) == "train2017/9.jpg"
    assert objects.negative.tolist() == [1] and objects.inexhaustive.tolist() == [0]
    assert source.noted["entries of LVIS's lists of unknown categories"] == 1


def test_the_index_is_kept_and_made_again(tmp_path, monkeypatch) -> None:
    path, cache = write(tmp_path, DOCUMENT), str(tmp_path / "cache")
    first = CocoSource(str(tmp_path / "images"), path, cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(coco_index, "build_index", lambda _: pytest.fail("it was parsed again"))
        second = CocoSource(str(tmp_path / "images"), path, cache=cache)
        assert "_index" not in second.__getstate__()  # a worker process reads the file
        third = copy.copy(second)  # as pickle does
    assert first.fingerprint() == second.fingerprint() == third.fingerprint()
    assert third[2].objects.ids.tolist() == [12] and third.description() == first.description()
    write(tmp_path, changed(annotations=[annotation(30, 2)]))
    fourth = CocoSource(str(tmp_path / "images"), path, cache=cache)
    assert fourth.fingerprint() != first.fingerprint() and len(fourth[1].objects) == 1
    (file,) = pathlib.Path(cache).iterdir()
    file.write_bytes(file.read_bytes()[:-700])
    assert len(CocoSource(str(tmp_path / "images"), path, cache=cache)[1].objects) == 1


def test_a_missing_image_changes_the_fingerprint(tmp_path) -> None:
    first = opened(tmp_path, DOCUMENT).fingerprint()
    (tmp_path / "images" / "2.png").unlink()
    source = CocoSource(str(tmp_path / "images"), str(tmp_path / "objects.json"))
    assert source.fingerprint() != first and len(source) == 2


def test_splits_by_files_of_annotations(tmp_path) -> None:
    write(tmp_path, DOCUMENT)
    held_out = {
        "images": [dict(DOCUMENT["images"][0], file_name=f"{n}.png", id=n) for n in (0, 3)],
        "annotations": [annotation(n + 20, n) for n in (0, 3)],
        "categories": DOCUMENT["categories"][1:],
    }
    (tmp_path / "other.json").write_text(json.dumps(held_out))
    data = schema.Data(
        source="coco",
        path=str(tmp_path),
        annotations="objects.json",
        holdout_annotations="other.json",
    )
    train, other = splits.open_splits(data)
    assert train.classes == other.classes == ("cat", "dog")
    assert other[0].objects.classes.tolist() == [0]
    assert other.object_table().classes.tolist() == [0, 0]
    (tmp_path / "link.json").symlink_to(tmp_path / "objects.json")
    held_out["images"].append(DOCUMENT["images"][1])
    (tmp_path / "shared.json").write_text(json.dumps(held_out))
    for name, file in (("shared.json", "2.png"), ("./objects.json", "1.png"), ("link.json", "1")):
        with pytest.raises(UserError, match=rf"={name!r} holds out images .*/images/{file}"):
            splits.open_splits(dataclasses.replace(data, holdout_annotations=name))
    for name in ("link.json", "shared.json"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"data.path=.* has several files of annotations"):
        splits.open_splits(schema.Data(source="coco", path=str(tmp_path)))
    whole = splits.open_source(
        schema.Data(source="coco", path=str(tmp_path), annotations="objects.json")
    )
    assert len(whole) == 3
    (tmp_path / "other.json").unlink()
    train, other = splits.open_splits(schema.Data(source="coco", path=str(tmp_path), holdout=0.4))
    assert len(train) + len(other) == 3


def test_the_settings_that_name_a_split_are_refused_beside_it() -> None:
    reasons = mixture.unread(schema.Data(source="coco"), counted=True)
    assert {"data.split", "data.holdout_split"} <= set(reasons)
    assert "data.annotations" not in reasons
    assert registry.source_kind("coco").find_splits is coco.annotation_files
