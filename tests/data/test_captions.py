"""Several captions of a record: kept by conversions, by sources of sources and by their wrappers;
training has the first."""

import json
import pathlib

import numpy as np
import pytest

from m3i_jax.data.sources import base, captions, mixture, tar_shards
from m3i_jax.data.sources.tars import TarSource

TEXTS = [("a cat", "one cat", "a \u00e9 pet"), ("a dog",), ()]


class Records(list):
    """A source of records in a list."""

    name, classes, captions = "records", ("x",), True

    def fingerprint(self) -> str:
        return "records"

    def description(self) -> str:
        return "records"


def records() -> Records:
    made = Records()
    for number, texts in enumerate(TEXTS):
        caption, others = captions.first_and_others(texts)
        made.append(base.Record(f"k{number}", b"\xff\xd8", 0, caption, other_captions=others))
    return made


def texts_of(source: base.DataSource, index: int) -> tuple[str, ...]:
    found = captions.source_captions(source, index)
    record, caption = source[index], captions.source_caption(source, index)
    assert found == (() if caption is None else (caption, *record.other_captions))
    return tuple(x.decode() if isinstance(x, bytes) else x for x in found)


def test_tar_files_keep_all_captions(tmp_path: pathlib.Path, make) -> None:
    tar_shards.write_shard(str(tmp_path / "0.tar"), records())
    source = TarSource(str(tmp_path))
    assert [texts_of(source, i) for i in range(3)] == TEXTS
    content = json.dumps({"captions": ["two", 3, "", "three"]}).encode()
    (tmp_path / "0.tar").write_bytes(make.tar_bytes([("1.jpg", b"one"), ("1.json", content)]))
    assert texts_of(TarSource(str(tmp_path)), 0) == ("two", "three")


def test_array_record_files_keep_all_captions(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("array_record.python.array_record_module")
    from m3i_jax.data.sources import array_record

    array_record.write_shard(str(tmp_path / "x-00000-of-00001.array_record"), records())
    array_record.write_shard_index(str(tmp_path))
    source = array_record.ArrayRecordSource(str(tmp_path))
    assert [texts_of(source, i) for i in range(3)] == TEXTS


def test_wrappers_pass_all_captions_on(tmp_path: pathlib.Path) -> None:
    subset = base.SubsetSource(records(), np.array([1, 0]), "half", "half")
    joined = mixture.Mixture([records(), subset], [None, None])
    assert [texts_of(subset, i) for i in range(2)] == [TEXTS[1], TEXTS[0]]
    assert [texts_of(joined, i) for i in range(5)] == [*TEXTS, TEXTS[1], TEXTS[0]]
