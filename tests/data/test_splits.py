"""Training and held-out parts, by hash or by name, with the same classes."""

import dataclasses
import os

import pytest

from m3i_jax import schema
from m3i_jax.data import splits
from m3i_jax.data.sources import base
from m3i_jax.errors import UserError


def keys(source) -> list[str]:
    return [source.key(i) for i in range(len(source))]


@pytest.fixture
def data(fill) -> str:
    train = {f"train/{name}/{i}.jpg": b"x" for name in ("ant", "bee", "cat") for i in range(10)}
    return str(fill(train | {"val/bee/0.jpg": b"v", "val/cat/1.jpg": b"v", "val/eel/2.jpg": b"v"}))


def test_a_named_split_is_held_out(data):
    train, held = splits.open_splits(
        schema.Data(source="folder", path=data, split="train", holdout_split="val")
    )
    assert len(train) == 30 and train.classes == held.classes == ("ant", "bee", "cat")
    # bee and cat have other labels in the folder of the held-out split; eel is unknown to the run
    assert [(r.key, r.label) for r in (held[i] for i in range(3))] == [
        ("bee/0.jpg", 1),
        ("cat/1.jpg", 2),
        ("eel/2.jpg", -1),
    ]
    train_again, held_again = splits.open_splits(
        schema.Data(source="folder", path=f"{data}/train", holdout_split=f"{data}/val")
    )
    assert keys(train_again) == keys(train) and keys(held_again) == keys(held)


def test_a_hash_holds_out_a_share(data):
    train, held = splits.open_splits(
        schema.Data(source="folder", path=data, split="train", holdout=0.3)
    )
    assert (
        len(train) + len(held) == 30
        and 0 < len(held) < 20
        and not set(keys(train)) & set(keys(held))
    )


def test_both_splits_of_tars(tmp_path, make):
    for name in ("train-0", "train-1", "val-0"):
        (tmp_path / f"{name}.tar").write_bytes(make.tar_bytes([(f"{name}.jpg", b"x")]))
    train, held = splits.open_splits(
        schema.Data(
            source="tars", path=str(tmp_path), split="train-*.tar", holdout_split="val-*.tar"
        )
    )
    assert keys(train) == ["train-0", "train-1"] and keys(held) == ["val-0"]


def test_a_split_takes_the_place_of_a_pattern(tmp_path, make):
    """The commands of a large set have a pattern as the path."""
    for name in ("000-a", "000-b", "001-a"):
        (tmp_path / f"{name}.tar").write_bytes(make.tar_bytes([(f"{name}.jpg", b"x")]))
    data = schema.Data(source="tars", path=str(tmp_path / "*.tar"))
    some = splits.open_source(dataclasses.replace(data, split="000*.tar"))
    assert keys(some) == ["000-a", "000-b"] and len(splits.open_source(data)) == 3
    named = dataclasses.replace(data, split="000*.tar", holdout_split="001*.tar")
    train, held = splits.open_splits(named)
    assert keys(train) == ["000-a", "000-b"] and keys(held) == ["001-a"]


def test_a_folder_with_brackets_is_no_pattern(fill):
    path = fill({"train/1.jpg": b"x", "2.jpg": b"x"}, "images [new]")
    assert keys(
        splits.open_source(schema.Data(source="folder", path=str(path), split="train"))
    ) == ["1.jpg"]


def test_a_split_is_below_the_directories_of_a_pattern_and_replaces_one_of_files(tmp_path):
    for name in ("set-1.0", "set-2.0"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}-of-2").touch()
    below, beside = (f"{tmp_path}/{pattern}" for pattern in ("set-*.0", "set-*-of-2"))
    assert base.split_path(below, "train") == f"{below}/train"
    assert base.split_path(beside, "val-*") == f"{tmp_path}/val-*"


@pytest.mark.parametrize(
    ("split", "holdout_split"),
    [(".", "val"), ("train", "."), ("", "DATA/val"), ("train/ant", "DATA/link/ant")],
)
def test_a_held_out_folder_is_not_trained_on(data, split, holdout_split):
    """One folder in the other, by its name, its path or a link."""
    os.symlink(f"{data}/train", f"{data}/link")
    names = dict(split=split, holdout_split=holdout_split.replace("DATA", data))
    with pytest.raises(UserError, match="holds out images that data.split='.*' trains on"):
        splits.open_splits(schema.Data(source="folder", path=data, **names))
    splits.open_splits(schema.Data(source="folder", path=data, split="train/ant"))
    near = dict(split="train/ant", holdout_split="train/bee")
    assert len(splits.open_splits(schema.Data(source="folder", path=data, **near))[1]) == 10


def test_a_held_out_tar_is_not_trained_on(tmp_path, make):
    for name in ("a", "b"):
        (tmp_path / f"{name}.tar").write_bytes(make.tar_bytes([(f"{name}.jpg", b"x")]))
    overlapping = dict(split="*.tar", holdout_split="b.tar")
    with pytest.raises(UserError, match="those of '.*/b.tar'"):
        splits.open_splits(schema.Data(source="tars", path=str(tmp_path), **overlapping))
    mixed = (f"tars:{tmp_path}@[ab].tar|b.tar",)
    with pytest.raises(UserError, match="those of '.*/b.tar'"):
        splits.open_splits(schema.Data(source="mixture", mixture=mixed))


def test_parts_of_a_mixture(data):
    entries = (f"folder:{data}@train|val=3", "shapes:50=1")
    train, held = splits.open_splits(schema.Data(source="mixture", mixture=entries, holdout=0.2))
    assert (
        train.classes == held.classes
        and train.classes[:4] == ("ant", "bee", "cat", "circle")
        and train.shares == (3, 1)
    )
    assert keys(train)[:30] == [
        f"{name}/{i}.jpg" for name in ("ant", "bee", "cat") for i in range(10)
    ]
    assert len(train) + len(held) == 30 + 3 + 50
    assert held[2].label == -1 and held[0].label == 1 and held.captions


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            {"source": "folder", "holdout_split": "val"},
            "without data.split all of that would be trained on",
        ),
        (
            {"source": "folder", "split": "val", "holdout_split": "val"},
            "is also the training split",
        ),
        ({"source": "folder", "split": "trian"}, "did you mean '.*/train'"),
        ({"source": "shapes", "size": 9, "holdout_split": "val"}, "has no splits"),
        ({"source": "shapes", "size": 9, "path": "", "split": "val"}, "no splits, and 'val'"),
    ],
)
def test_refusals(data, settings, why):
    with pytest.raises(UserError, match=why):
        splits.open_splits(schema.Data(**{"path": data} | settings))


@pytest.mark.parametrize("open_data", [splits.open_splits, splits.open_source])
@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"source": "folder", "mixture": ("shapes:1",)}, "set data.source='mixture'"),
        ({"source": "mixture"}, "needs data.mixture, which is empty"),
        ({"source": "mixture", "mixture": ("shapes:ten",)}, "give their number"),
        ({"source": "folder", "split": "trian"}, "did you mean '.*/train'"),
    ],
)
def test_refusals_of_both_functions(data, open_data, settings, why):
    with pytest.raises(UserError, match=why):
        open_data(schema.Data(**{"path": data} | settings))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            {"source": "folder", "split": "train", "holdout_split": "val"},
            "^data.holdout_split names 'val', which would be left out here",
        ),
        (
            {"source": "mixture", "mixture": ("folder:D@train|val",)},
            r"^the part of data.mixture after '\|' names 'val'",
        ),
    ],
)
def test_open_source_refuses_a_named_held_out_split(data, settings, why):
    """`--mode=convert` opens its source this way."""
    with pytest.raises(UserError, match=why):
        splits.open_source(schema.Data(**{"path": data} | settings))
    full = splits.open_source(
        schema.Data(source="mixture", mixture=(f"folder:{data}@train", f"folder:{data}@val"))
    )
    assert len(full) == 33 and full.classes == ("ant", "bee", "cat", "eel")
