"""Data sets saved by the library `datasets`: original bytes, class names, captions, splits."""

import pathlib
from multiprocessing.reduction import ForkingPickler

import pytest

from m3i_jax import schema
from m3i_jax.data import splits
from m3i_jax.data.sources import base
from m3i_jax.data.sources.hugging_face import HuggingFaceSource
from m3i_jax.errors import UserError

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()


def table(content: list[bytes], **columns: tuple[list, object]):
    features = {"image": datasets.Image(), **{name: kind for name, (_, kind) in columns.items()}}
    values = {
        "image": [{"bytes": c, "path": None} for c in content],
        **{name: v for name, (v, _) in columns.items()},
    }
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


@pytest.fixture
def files(make) -> list[bytes]:
    return [make.encode(make.smooth(20 + i, 30), "PNG") for i in range(4)]


def test_original_bytes_and_names(files, tmp_path):
    saved = table(
        files,
        label=([1, 0, None, 1], datasets.ClassLabel(names=["ant", "bee"])),
        text=(["a bee", "an ant", None, "two bees"], datasets.Value("string")),
        id=(["w", "x", "y", "z"], datasets.Value("string")),
        weight=([0.5] * 4, datasets.Value("float32")),
    )
    saved.save_to_disk(str(tmp_path / "x"))
    source = splits.open_source(schema.Data(source="hugging_face", path=str(tmp_path / "x")))
    assert (
        isinstance(source, base.DataSource) and source.classes == ("ant", "bee") and source.captions
    )
    captions = ["a bee", "an ant", None, "two bees"]
    expected = [
        base.Record(*one) for one in zip("wxyz", files, [1, 0, -1, 1], captions, strict=True)
    ]
    assert [source[i] for i in range(4)] == expected and base.read_items(source, [3, 0, 3]) == [
        expected[i] for i in (3, 0, 3)
    ]
    assert (
        [source.key(i) for i in range(4)] == list("wxyz")
        and source.caption(3) == "two bees"
        and source.caption(2) is None
    )
    assert base.source_key_hashes(source).tolist() == [base.key_hash(k) for k in "wxyz"]
    again = ForkingPickler.loads(ForkingPickler.dumps(source))
    assert (
        again[1] == expected[1]
        and again.fingerprint() == HuggingFaceSource(str(tmp_path / "x")).fingerprint()
    )
    assert (
        source.description()
        == f"4 images in hugging_face {str(tmp_path / 'x')!r}, 2 classes, captions"
    )


def test_splits_and_bare_columns(files, tmp_path):
    captions = (
        [["first", "second"], [], ["third"], ["x"]],
        datasets.List(datasets.Value("string")),
    )
    train = table(files, label=([3, 0, 1, -1], datasets.Value("int64")), captions=captions)
    datasets.DatasetDict(train=train, test=train.select([2])).save_to_disk(str(tmp_path / "x"))
    source = HuggingFaceSource(str(tmp_path / "x"), "train")
    assert source.classes == ("0", "1", "2", "3") and [source[i].label for i in range(4)] == [
        3,
        0,
        1,
        -1,
    ]
    assert [source[i].caption for i in range(4)] == ["first", None, "third", "x"] and source.key(
        2
    ) == "2" == source[2].key
    assert [source.caption_list(i) for i in range(2)] == [("first", "second"), ()]
    assert source[0].other_captions == ("second",)
    assert len(HuggingFaceSource(str(tmp_path / "x"), "test")) == 1
    for split in ("", "val"):
        with pytest.raises(
            UserError, match=f"has the splits test, train, data.split='{split}' is not one of them"
        ):
            HuggingFaceSource(str(tmp_path / "x"), split)


@pytest.mark.parametrize("kind", ["int64", "uint8"])
def test_a_column_named_label_goes_before_other_categories(files, tmp_path, kind):
    saved = table(
        files,
        domain=([0, 1, 0, 1], datasets.ClassLabel(names=["day", "night"])),
        label=([2, 0, 1, 2], datasets.Value(kind)),
    )
    saved.save_to_disk(str(tmp_path / "x"))
    source = HuggingFaceSource(str(tmp_path / "x"))
    assert [source[i].label for i in range(4)] == [2, 0, 1, 2] and source.classes == tuple("012")


@pytest.mark.parametrize("columns", [None, ["image"]])
def test_a_format_that_was_saved_changes_no_record(files, tmp_path, columns):
    saved = table(files, label=([2, 0, 1, 2], datasets.Value("int64")))
    saved.save_to_disk(str(tmp_path / "plain"))
    saved.with_format("numpy", columns=columns).save_to_disk(str(tmp_path / "numpy"))
    plain, source = (HuggingFaceSource(str(tmp_path / name)) for name in ("plain", "numpy"))
    assert [source[i] for i in range(4)] == [plain[i] for i in range(4)]
    assert source.classes == plain.classes == tuple("012")


def test_refusals(files, tmp_path):
    datasets.Dataset.from_dict({"a": [1]}).save_to_disk(str(tmp_path / "bare"))
    table(files).save_to_disk(str(tmp_path / "x"))
    (tmp_path / "other").mkdir()
    cases: list[tuple[pathlib.Path, str, str]] = [
        (tmp_path / "bare", "", r"has no image: its columns are a \(Value\)"),
        (tmp_path / "x", "train", "has no splits"),
        (tmp_path / "other", "", "is not a data set that `datasets` saved with save_to_disk"),
        (tmp_path / "ohter", "", "did you mean .*other"),
    ]
    for path, split, why in cases:
        with pytest.raises(UserError, match=why):
            HuggingFaceSource(str(path), split)
