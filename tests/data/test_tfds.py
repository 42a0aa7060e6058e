"""Data sets of tensorflow-datasets, prepared here by hand: random access, original bytes, and no
import of TensorFlow."""

import json
import os
import pathlib
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest

from m3i_jax import schema
from m3i_jax.data import splits
from m3i_jax.data.sources import base, tf_example
from m3i_jax.data.sources.tfds import TfdsSource
from m3i_jax.errors import UserError

pytest.importorskip("tensorflow_datasets")
array_record = pytest.importorskip("array_record.python.array_record_module")
FEATURES = "tensorflow_datasets.core.features."


def prepare(
    root: pathlib.Path,
    splits: dict[str, list[bytes]],
    kind: str = "array_record",
    has_image: bool = True,
    several: bool = False,
) -> pathlib.Path:
    """Writes the files of `tfds build tiny --file_format=array_record`."""
    directory = root / "tiny" / "1.0.0"
    directory.mkdir(parents=True)
    infos = []
    for split, content in splits.items():
        writer = array_record.ArrayRecordWriter(
            str(directory / f"tiny-{split}.{kind}-00000-of-00001"), "group_size:1"
        )
        for i, image in enumerate(content):
            caption: dict[str, Any] = {"caption": f"number {i}".encode()}
            if several:  # as in coco_captions
                texts = (f"number {i}".encode(), b"another")
                caption = {"captions/id": i, "captions/text": texts}
            writer.write(
                tf_example.encode_example({"image": image, "label": i % 3, "extra": i, **caption})
            )
        writer.close()
        pattern = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        infos.append(
            {
                "name": split,
                "shardLengths": [str(len(content))],
                "numBytes": "1",
                "filepathTemplate": pattern,
            }
        )
    metadata = {
        "name": "tiny",
        "version": "1.0.0",
        "fileFormat": kind,
        "splits": infos,
        "moduleName": "x",
        "description": "x",
    }
    shape = {"shape": {"dimensions": ["-1", "-1", "3"]}, "dtype": "uint8", "encodingFormat": "png"}
    features = {
        "label": {
            "pythonClassName": FEATURES + "class_label_feature.ClassLabel",
            "classLabel": {"numClasses": "3"},
        },
        "caption": {"pythonClassName": FEATURES + "text_feature.Text", "text": {}},
        "extra": {
            "pythonClassName": FEATURES + "tensor_feature.Tensor",
            "tensor": {"shape": {}, "dtype": "int64", "encoding": "none"},
        },
    }
    if several:
        columns = {"id": features["extra"], "text": features.pop("caption")}
        inner = {
            "pythonClassName": FEATURES + "features_dict.FeaturesDict",
            "featuresDict": {"features": columns},
        }
        features["captions"] = {
            "pythonClassName": FEATURES + "sequence_feature.Sequence",
            "sequence": {"feature": inner, "length": "-1"},
        }
    if has_image:
        features["image"] = {"pythonClassName": FEATURES + "image_feature.Image", "image": shape}
    (directory / "dataset_info.json").write_text(json.dumps(metadata))
    (directory / "features.json").write_text(
        json.dumps(
            {
                "pythonClassName": FEATURES + "features_dict.FeaturesDict",
                "featuresDict": {"features": features},
            }
        )
    )
    (directory / "label.labels.txt").write_text("ant\nbee\ncat\n")
    return directory


@pytest.fixture
def files(make) -> list[bytes]:
    return [make.encode(make.smooth(20 + i, 30), "PNG") for i in range(5)]


def test_records(files, tmp_path):
    version_dir = prepare(tmp_path, {"train": files, "test": files[:2]})
    for name, directory in (
        ("tiny", str(tmp_path)),
        ("tiny:1.0.0", str(tmp_path)),
        (str(version_dir), ""),
    ):
        source = splits.open_source(schema.Data(source="tfds", path=name, directory=directory))
        assert (
            isinstance(source, base.DataSource)
            and len(source) == 5
            and source.classes == ("ant", "bee", "cat")
            and source.captions
        )
        expected = [
            base.Record(f"train-{i}", f, i % 3, f"number {i}".encode()) for i, f in enumerate(files)
        ]
        assert [source[i] for i in range(5)] == expected and base.read_items(source, [4, 0, 4]) == [
            expected[i] for i in (4, 0, 4)
        ]
        assert (
            ForkingPickler.loads(ForkingPickler.dumps(source))[2] == expected[2]
            and source.key(2) == "train-2"
        )
    train, held = splits.open_splits(
        schema.Data(source="tfds", path="tiny", directory=str(tmp_path), holdout_split="test")
    )
    assert len(train) == 5 and len(held) == 2 and train.fingerprint() != held.fingerprint()
    assert len(TfdsSource("tiny", "train[:3]", directory=str(tmp_path))) == 3


@pytest.mark.parametrize(
    ("split", "holdout_split", "shared"),
    [
        ("", "train[3:]", True),
        ("train[:4]", "train[3:]", True),
        ("train[:3]", "train[3:]", False),
        ("train+test", "test", True),
        ("train[:2]+train[4:]", "train[2:4]", False),
    ],
)
def test_no_slice_is_trained_on_and_held_out(files, tmp_path, split, holdout_split, shared):
    prepare(tmp_path, {"train": files, "test": files[:2]})
    names = dict(path="tiny", directory=str(tmp_path), split=split, holdout_split=holdout_split)
    settings = schema.Data(source="tfds", **names)
    if shared:
        with pytest.raises(UserError, match="holds out images that data.split='train.* trains on"):
            splits.open_splits(settings)
    else:
        assert all(map(len, splits.open_splits(settings)))


def test_captions_with_other_columns(files, tmp_path):
    """Those of coco_captions are a table of numbers and texts."""
    prepare(tmp_path, {"train": files}, several=True)
    source = TfdsSource("tiny", directory=str(tmp_path))
    assert source.captions and source[2].caption == b"number 2"
    assert source[2].other_captions == (b"another",)


def test_refusals(files, tmp_path):
    records = prepare(tmp_path / "a", {"train": files}, kind="tfrecord")
    prepare(tmp_path / "b", {"train": files})
    prepare(tmp_path / "c", {"train": files}, has_image=False)
    cases = [
        (
            str(records),
            "train",
            "",
            (
                rf"no random access: run `tfds convert_format --dataset_version_dir={records}"
                r" --out_file_format=array"
            ),
        ),
        (
            "tiny",
            "train",
            str(tmp_path / "a"),
            "or remove '.*' and run `tfds build tiny --file_format=array_record --data_dir=",
        ),
        ("tiny", "val", str(tmp_path / "b"), r"has no split 'val' .* it has train$"),
        ("tinny", "train", str(tmp_path / "b"), r"^tfds has no data set 'tinny'"),
        (
            "mnist",
            "train",
            str(tmp_path / "b"),
            "^tfds 'mnist' is not prepared in .*run `tfds build mnist --file_format=array_record",
        ),
        (
            "tiny",
            "train",
            str(tmp_path / "c"),
            r"has no image: its features are caption \(Text\), ",
        ),
    ]
    for path, split, directory, why in cases:
        with pytest.raises(UserError, match=why):
            TfdsSource(path, split, directory=directory)


def test_no_tensorflow(files, tmp_path):
    """Not even if it is installed: its import takes seconds, memory, and on some machines the
    GPU."""
    prepare(tmp_path, {"train": files})
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text(
        "raise AssertionError('TensorFlow was imported')"
    )
    code = (
        "import sys\nfrom m3i_jax import schema\nfrom m3i_jax.data import splits\nsource ="
        " splits.open_source(schema.Data(source='tfds', path='tiny',"
        f" directory={str(tmp_path)!r}))\nprint(len(source.__getitems__([0, 3])), 'tensorflow' in"
        " sys.modules, 'torch' in sys.modules)"
    )
    path = os.pathsep.join([str(pathlib.Path(base.__file__).parents[3]), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )
    assert done.stdout.split() == ["2", "False", "False"], done.stderr
