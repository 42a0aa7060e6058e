"""--mode=index: several hosts build the index of tar files that a training reads."""

import io
import pathlib
import tarfile
from typing import Any

import pytest

from m3i_jax import schema
from m3i_jax.data import engines, splits
from m3i_jax.data.sources import tar_index, tars
from m3i_jax.errors import UserError
from m3i_jax.modes import index as mode


def write_tars(folder: pathlib.Path, count: int, images: int) -> None:
    folder.mkdir()
    for number in range(count):
        with tarfile.open(folder / f"{number:03d}.tar", "w") as tar:
            for image in range(images):
                member = tarfile.TarInfo(f"{number}-{image}.jpg")
                member.size = 1
                tar.addfile(member, io.BytesIO(b"x"))


def test_shares_build_one_index(tmp_path: pathlib.Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(tar_index, "PART", 2)
    write_tars(tmp_path / "data", 7, 3)
    fingerprint = tars.TarSource(str(tmp_path / "data")).fingerprint()
    data = schema.Data(
        source="tars", path=str(tmp_path / "data"), workers=1, index=str(tmp_path / "index")
    )
    for number in (1, 0):
        config = schema.Config(data=data)
        assert mode.run(config, workdir=str(tmp_path / str(number)), shard=f"{number}/2") == 0
        out = capsys.readouterr().out
        assert ("2 of 4 parts are still to be written" in out) == (number == 1)
    assert "21 records in " in out
    assert mode.run(config, workdir=str(tmp_path / "0")) == 0
    assert "is complete" in capsys.readouterr().out
    monkeypatch.setattr(tar_index, "_scan", None)  # a training of another directory reads no header
    source = splits.open_source(data, cache=data.index)
    assert len(source) == 21 and source.fingerprint() == fingerprint
    with pytest.raises(UserError, match="data.source='shapes' holds no tar files"):
        mode.run(schema.Config(), workdir=str(tmp_path))


def test_the_parts_that_another_share_joined_are_not_missing(
    tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
    """It may write the index and remove the parts while this share looks for both."""
    write_tars(tmp_path / "data", 2, 1)
    builder = tars.index_builder(str(tmp_path / "data"), cache=str(tmp_path / "cache"))
    builder.build()
    load, late = tar_index.IndexBuilder.load, [None]
    monkeypatch.setattr(
        tar_index.IndexBuilder,
        "load",
        lambda self, **options: late.pop() if late else load(self, **options),
    )
    assert builder.missing() == [0] and builder.finish() and not late


def test_processes_write_parts(tmp_path: pathlib.Path) -> None:
    write_tars(tmp_path / "data", tar_index.PART + 1, 1)
    builder = tars.index_builder(str(tmp_path / "data"), cache=str(tmp_path / "cache"))
    assert list(engines.map_items("local", builder, [0, 1], workers=2)) == [tar_index.PART, 1]
    assert builder.finish() and len(builder.load()["shard"]) == tar_index.PART + 1
