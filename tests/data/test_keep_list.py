"""A keep-list selects, weighs and relabels records; the stream depends on what it says alone."""

import pathlib
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.data import pipeline, sampler, splits
from m3i_jax.data.sources import base, keep_list, mixture
from m3i_jax.data.sources.base import Record
from m3i_jax.errors import UserError

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


class Numbers:
    """Records without images; key i is "k<i>"."""

    name, classes, captions = "numbers", ("a", "b", "c"), False

    def __len__(self) -> int:
        return 100

    def __getitem__(self, i: int) -> Record:
        return Record(f"k{i}", b"", i % 3, None)

    def key(self, i: int) -> str:
        return f"k{i}"

    def fingerprint(self) -> str:
        return "numbers 1"

    def description(self) -> str:
        return "100 images in numbers"


class Unnamed(Numbers):
    key = None  # type: ignore[assignment]


def write(path: pathlib.Path, **columns: Any) -> str:
    """A keep-list in the format of its ending."""
    table = arrow.table(columns)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=7)
    else:
        new = arrow.ipc.new_stream if path.suffix == ".feather" else arrow.ipc.new_file
        with arrow.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table)
    return str(path)


def test_the_set_is_that_of_the_list_whatever_its_format_and_order(tmp_path: pathlib.Path) -> None:
    keys = [f"k{i}" for i in (9, 3, 50, 51, 2)]
    one = keep_list.keep_records(Numbers(), write(tmp_path / "a.parquet", key=keys))
    shards = tmp_path / "shards"
    shards.mkdir()
    write(shards / "0.arrow", key=arrow.array(keys[:1:-1]).dictionary_encode())
    write(shards / "1.feather", key=[*keys[:2], "absent"], ignored=[1, 2, 3])
    other = keep_list.keep_records(Numbers(), str(shards))
    assert [one.key(i) for i in range(len(one))] == ["k2", "k3", "k9", "k50", "k51"]
    assert one.fingerprint() == other.fingerprint() != Numbers().fingerprint()
    assert "(kept by 'a.parquet': 5.0%)" in one.description() and one.missing == 0
    assert "1 of its 6 keys are not in the source" in other.description()
    views = arrow.array(keys, arrow.string_view())
    viewed = write(tmp_path / "polars.arrow", key=views, caption=views)
    assert [record.caption for record in keep_list.keep_records(Numbers(), viewed)][:2] == [
        b"k2",
        b"k3",
    ]
    fewer = keep_list.keep_records(Numbers(), write(tmp_path / "b.arrow", key=keys[1:]))
    assert fewer.fingerprint() != one.fingerprint()
    # the keys of a source without others are its indices
    numbered = keep_list.keep_records(Unnamed(), write(tmp_path / "c.parquet", key=[4, 2]))
    assert numbered.indices.tolist() == [2, 4]


def test_captions_and_labels_replace_those_of_the_source(tmp_path: pathlib.Path) -> None:
    columns = {
        "key": ["k7", "k1", "k4"],
        "caption": ["seven \u00e9", None, ""],
        "label": arrow.array([0, None, -1], arrow.int16()),
    }
    path = write(tmp_path / "a.parquet", **columns)
    kept = keep_list.keep_records(Numbers(), path, cache=str(tmp_path))
    one, four, seven = kept.__getitems__([0, 1, 2])
    assert (one.label, one.caption) == (1, None) and (four.label, four.caption) == (-1, b"")
    assert kept.caption_list(2) == ("seven \u00e9".encode(),) and seven.other_captions == ()
    assert (seven.label, seven.caption) == (0, "seven \u00e9".encode()) == (0, kept.caption(2))
    assert kept.captions and "its captions for 67%; its labels for 67%" in kept.description()
    assert base.split_by_hash(kept, 0.0, "train").captions
    sent = ForkingPickler.dumps(kept)
    moved = ForkingPickler.loads(sent)
    assert len(sent) < 2000 and moved[2] == seven and moved.indices.tolist() == [1, 4, 7]


def test_what_was_found_is_read_again(tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    path = write(tmp_path / "a.parquet", key=["k1", "k2"], weight=[0.5, 2.0])
    first = keep_list.keep_records(Numbers(), path, cache=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(keep_list, "_read", None)
        again = keep_list.keep_records(Numbers(), path, cache=str(tmp_path))
    assert again.fingerprint() == first.fingerprint() and again.record_weights.tolist() == [
        0.5,
        2.0,
    ]
    write(tmp_path / "a.parquet", key=["k1"])
    assert len(keep_list.keep_records(Numbers(), path, cache=str(tmp_path))) == 1


def test_weights_are_occurrences_in_an_epoch(tmp_path: pathlib.Path) -> None:
    weights = [2.0, 0.5, 0.0, 1.0, 1.5]
    path = write(tmp_path / "a.parquet", key=[f"k{i}" for i in range(5)], weight=weights)
    kept = keep_list.keep_records(Numbers(), path)
    assert [kept.key(i) for i in range(4)] == ["k0", "k1", "k3", "k4"]
    assert sampler.epoch_size(kept) == 5 and "weights 0.5 to 2, 5 samples" in kept.description()
    stream = sampler.records_at(kept, 3, np.arange(4000))
    counts = np.bincount(stream, minlength=4) / 800
    assert counts == pytest.approx([2, 0.5, 1, 1.5], abs=0.05)
    epochs = np.stack([np.bincount(epoch, minlength=4) for epoch in stream.reshape(800, 5)])
    assert (epochs[:, [0, 2]] == [2, 1]).all() and set(epochs[:, 1]) == {0, 1}
    assert sampler.records_at(kept, 3, np.arange(1234, 1240)).tolist() == stream[1234:1240].tolist()
    # alone, in a part and in a mixture
    part = base.split_by_hash(kept, 0.0, "train")
    assert sampler.records_at(part, 3, np.arange(50)).tolist() == stream[:50].tolist()
    alone = mixture.Mixture([kept], [None])
    assert alone.locate(3, np.arange(50)).tolist() == stream[:50].tolist()
    both = mixture.Mixture([Numbers(), kept], [None, None])
    assert both.shares == (20, 1) and both.epochs(105) == [1.0, 1.0]
    assert sampler.epoch_size(both) == 105 and "(1 epochs in one pass)" in both.description()
    emptied = base.split_by_hash(kept, 1.0, "train")
    assert (
        sampler.epoch_size(emptied) == sampler.epoch_size(mixture.Mixture([emptied], [None])) == 0
    )
    drawn = both.locate(3, np.arange(105 * 200))
    assert np.bincount(drawn[drawn < 100]).tolist() == [200] * 100
    assert np.bincount(drawn[drawn >= 100] - 100) / 200 == pytest.approx([2, 0.5, 1, 1.5], abs=0.1)


def test_a_run_on_a_kept_set_resumes_exactly(tmp_path: pathlib.Path) -> None:
    whole = splits.open_source(schema.Data(size=60))
    keys = [base.source_key(whole, i) for i in range(0, 60, 2)]
    path = write(tmp_path / "a.parquet", key=keys, weight=[3.0, *[1.0] * 29])
    data = schema.Data(size=60, keep=(path,), image_size=16, threads=0, captions="no", holdout=0.2)
    config = schema.Config(data=data, train=schema.Train(batch_size=8))
    train, held_out = splits.open_splits(data)
    assert len(train) + len(held_out) == 30 and "kept by 'a.parquet': 50.0%" in train.description()
    every = pipeline.iterate_batches(config, train, None, start=0)
    batches = [(next(every), every.record)[1].tolist() for _ in range(6)]
    later = pipeline.iterate_batches(config, train, None, start=24)
    assert [(next(later), later.record)[1].tolist() for _ in range(3)] == batches[3:]
    every.close(), later.close()
    plain, _ = splits.open_splits(schema.Data(size=60, image_size=16, holdout=0.2))
    one, other = (pipeline.stream_fingerprint(config, source) for source in (train, plain))
    assert one != other and "kept by 'a.parquet'" in pipeline.stream_identity(config, train)


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"id": ["k1"]}, "has no column `key`, its columns are 'id'"),
        ({"key": ["k1", "k2", "k1"]}, "has the key 'k1' twice, in rows 0 and 2; 1 rows repeat"),
        ({"key": ["k1", None]}, r"a row has no `key` \(row 1\)"),
        ({"key": [0.5]}, "the column `key` is of type double, not text or whole numbers"),
        ({"key": ["k1", "k2"], "weight": [1.0, np.nan]}, "the weight of 'k2' is nan, not a number"),
        ({"key": ["k1", "k2"], "weight": [1.0, None]}, "the weight of 'k2' is nan"),
        ({"key": ["k1"], "weight": [-1]}, "the weight of 'k1' is -1, not a number from 0"),
        ({"key": ["k1"], "weight": ["1"]}, "the column `weight` is of type string, not numbers"),
        ({"key": ["k1"], "weight": [0]}, "keeps nothing of numbers: all its weights there are 0"),
        (
            {"key": ["x/k1.jpg"]},
            "none of its keys is there; its keys are such as 'x/k1.jpg', those",
        ),
        ({"key": arrow.array([], arrow.string())}, "none of its keys is there"),
        ({"key": ["k1"], "label": [3]}, "the label 3 is not one of the 3 categories of numbers"),
        ({"key": ["k1"], "label": [-5]}, "the label of 'k1' is -5, not the number of a category"),
        ({"key": ["k1"], "caption": [3]}, "the column `caption` is of type int64, not text"),
    ],
)
def test_lists_that_are_refused(columns: Any, why: str, tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "a.parquet", **columns)
    with pytest.raises(UserError, match=f"^data.keep=.*{why}") as error:
        keep_list.keep_records(Numbers(), path)
    assert "\n" not in str(error.value)


def test_what_was_left_out_is_not_kept(tmp_path: pathlib.Path) -> None:
    """The directory of --mode=curate holds both lists."""
    keep = write(tmp_path / "keep.parquet", key=["k1", "k2"])
    columns = {"key": ["k3"], "reason": ["equal file"], "copy_of": ["k1"]}
    left_out = write(tmp_path / "left_out.parquet", **columns)
    with pytest.raises(UserError, match="'left_out.parquet' lists what .* give the keep-list"):
        keep_list.keep_records(Numbers(), str(tmp_path))
    assert len(keep_list.keep_records(Numbers(), keep)) == 2
    assert len(keep_list.keep_records(Numbers(), left_out)) == 1  # by its name it is meant


def test_files_that_are_refused(tmp_path: pathlib.Path) -> None:
    good = pathlib.Path(write(tmp_path / "a.parquet", key=["k1"])).read_bytes()
    for name, content, why in (
        ("list.csv", b"key\nk1\n", "is neither Parquet nor Arrow: a keep-list is a"),
        ("cut.parquet", good[:-9], "is damaged"),
        ("cut.arrow", b"ARROW1\0\0", "is damaged"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=why):
            keep_list.keep_records(Numbers(), str(tmp_path / name))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="without a file of .parquet"):
        keep_list.keep_records(Numbers(), str(tmp_path / "empty"))
    with pytest.raises(UserError, match="does not exist: there is no 'no.parquet'"):
        keep_list.keep_records(Numbers(), str(tmp_path / "no.parquet"))
    with pytest.raises(UserError, match="data.keep names 2 lists, and there are 1 sources"):
        splits.open_source(schema.Data(size=9, keep=("a", "b")))
