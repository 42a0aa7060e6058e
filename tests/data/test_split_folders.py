"""train/, val/ and test/ are splits and not classes; if they may be both, the user decides."""

import os

import pytest

from m3i_jax import schema
from m3i_jax.data import splits
from m3i_jax.data.sources.base import DataSource
from m3i_jax.data.sources.folder import find_split_folders
from m3i_jax.errors import UserError


def images(*folders: str, count: int = 3) -> dict[str, bytes]:
    return {f"{folder}/{i}.jpg": b"x" for folder in folders for i in range(count)}


def opened(path, **settings) -> tuple[DataSource, DataSource]:
    return splits.open_splits(schema.Data(source="folder", path=str(path), **settings))


def keys(source) -> list[str]:
    return [source.key(i) for i in range(len(source))]


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("train", "test"),
        ("training", "testing"),
        ("Train", "VAL"),
        ("train", "valid"),
        ("TRAINING", "validation"),
    ],
)
def test_splits_are_recognised_by_name(fill, train, held_out):
    path = fill(images(f"{train}/cat", f"{train}/dog", f"{held_out}/dog", f"{held_out}/eel"))
    train_part, held = opened(path)
    assert train_part.classes == held.classes == ("cat", "dog") and keys(train_part) == keys(
        opened(path / train, holdout=0.0)[0]
    )
    assert [(r.key.split("/")[0], r.label) for r in (held[i] for i in range(len(held)))] == [
        ("dog", 1)
    ] * 3 + [("eel", -1)] * 3
    assert train_part.description().endswith(
        f"splits by the names of sub-folders: {train}/ is trained on, {held_out}/ is held out"
    )


def test_the_test_split_is_left_alone_where_there_is_a_validation_split(fill):
    train, held = opened(
        fill(
            images("train/a", "train/b", "val/a", "test/a")
            | images("notes", count=0)
            | {
                "notes/x.txt": b"",
                "cover.png": b"",
            }
        )
    )
    assert keys(held) == ["a/0.jpg", "a/1.jpg", "a/2.jpg"] and len(train) == 6
    assert train.note.endswith(
        "val/ is held out, test/ is not read, 1 images beside them are not read"
    )


def test_splits_without_categories(fill):
    train, held = opened(fill(images("train", "test", count=5)))
    assert train.classes == () and keys(train) == keys(held) == [f"{i}.jpg" for i in range(5)]


def test_a_split_without_labels_cannot_judge_categories(fill):
    """Test images as of a competition: a share of train/ is held out instead."""
    train, held = opened(fill(images("train/a", "train/b", count=30) | images("test")), holdout=0.3)
    assert len(train) + len(held) == 60 and len(held) and not set(keys(train)) & set(keys(held))
    assert (
        "data.holdout of it is held out, test/ is not read (none of the categories of train/)"
        in train.description()
    )


def test_one_category_is_held_out(fill):
    """Its images have the label that the training part gives to their folder."""
    train, held = opened(fill(images("train/ant", "train/bee", "val/bee")))
    assert train.classes == held.classes == ("ant", "bee")
    assert [held[i].label for i in range(len(held))] == [1, 1, 1]
    # a training part with one category has none
    train, held = opened(fill(images("train/bee", "val/ant", "val/bee"), "one"))
    assert train.classes == held.classes == ()
    assert {source[i].label for source in (train, held) for i in range(3)} == {-1}


def test_one_wordnet_id_is_held_out(fill):
    """Readable names are searched for a single category, too."""
    files = images("train/n01440764", "train/n02012849", "val/n02012849")
    path = fill(files | {"words.txt": b"n01440764 tench\nn02012849 crane\n"})
    train, held = opened(path)
    assert train.classes == held.classes == ("tench", "crane") and held[0].label == 1
    (path / "names.txt").write_text("n01440764 Tinca\nn02012849 Grus\n")
    train, held = opened(path, class_names=str(path / "names.txt"))
    assert train.classes == held.classes == ("Tinca", "Grus") and held[0].label == 1


def test_train_alone(fill):
    train, held = opened(fill(images("train/a", "train/b", count=30)), holdout=0.3)
    assert train.classes == ("a", "b") and len(train) + len(held) == 60 and len(held)


def test_a_category_of_vehicles(fill):
    assert opened(fill(images("bus", "car", "train")))[0].classes == ("bus", "car", "train")


BESIDE = "beside other folders with images "


@pytest.mark.parametrize(
    ("folders", "why"),
    [
        (
            ("train/a", "test/a", "extra"),
            BESIDE + r"\(extra/\): set data.split=train and data.holdout_split=test, or",
        ),
        (
            ("cat", "dog", "test"),
            BESIDE + r"\(cat/, dog/\): move test/ elsewhere, or set data.split=\. to",
        ),
        (("bus", "train/a", "train/b"), BESIDE + r"\(bus/\): set data.split=train, or"),
        (("train/a", "training/a"), "two folders for one split: set data.split=train$"),
        (
            ("train/a", "val/a", "valid/a"),
            "for one split: set data.split=train and data.holdout_split=val$",
        ),
        (("test/a", "val/a"), "test/, val/ and no train/: set data.split=test to train on test/"),
        (
            ("web/train/a", "web/val/a"),
            "web/ holds the splits train/, val/, .*: set data.path='.*/web'",
        ),
        (("cup/train/a", "cup/test/b", "hat/train/a"), "its sub-folder cup/ holds the splits"),
    ],
)  # fmt: skip
def test_ambiguous_folders_are_refused(fill, folders, why):
    path = fill(images(*folders))
    for open_data in (splits.open_splits, splits.open_source):
        with pytest.raises(UserError, match=why) as caught:
            open_data(schema.Data(source="folder", path=str(path)))
        assert "\n" not in str(caught.value)
    everything, _ = opened(path, split=".", holdout=0.0)  # what the refusal offers
    assert len(everything) == 3 * len(folders)


def test_one_source_of_everything_wants_one_split(fill):
    """What `--mode=convert` opens."""
    path = fill(images("train/a", "train/b", "test/a"))
    with pytest.raises(
        UserError,
        match=(
            r"set data.split=train and read each by itself, or data.split=\. to read every"
            r" sub-folder"
        ),
    ):
        splits.open_source(schema.Data(source="folder", path=str(path)))
    assert splits.open_source(schema.Data(source="folder", path=str(path), split=".")).classes == (
        "test",
        "train",
    )


def test_a_source_of_a_mixture_has_its_splits(fill):
    path = fill(images("train/a", "train/b", "test/a"))
    train, held = splits.open_splits(
        schema.Data(source="mixture", mixture=(f"folder:{path}", "shapes:20"), holdout=0.0)
    )
    assert len(train) == 6 + 20 and len(held) == 3 and "test/ is held out" in train.description()


def test_links_out_and_hidden_folders_are_no_splits(fill, tmp_path):
    outside = fill(images("a", "b"), "outside")
    path = fill(images("cat", "dog", ".test"))
    os.symlink(outside, path / "train")
    assert (
        find_split_folders(str(path)) is None
        and find_split_folders(str(tmp_path / "missing")) is None
    )
