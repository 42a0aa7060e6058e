"""Batches of centre crops for evaluators."""

import numpy as np
import pytest
from PIL import Image

from m3i_jax.data import decode, eval_batches, image_inputs
from m3i_jax.data.preprocessing import Preprocessing
from m3i_jax.data.sources import base
from m3i_jax.data.sources.folder import FolderSource
from m3i_jax.errors import UnreadableError

PREPROCESSING = Preprocessing(image_size=28)


def some(make):
    images = [make.smooth(60 + 7 * i, 90 - 5 * i) for i in range(7)]
    images[3] = b"<html>"  # type: ignore[call-overload]

    class Some(make.ColorImages):
        def __getitem__(self, index: int) -> base.Record:
            self.read.append(index)
            return base.Record(str(index), images[index], index * 10)

    source = Some(7)
    source.read = []
    return source, images


@pytest.mark.parametrize(("crop", "short"), [(224 / 256, 32), (1.0, 28)])
def test_evaluation_views(make, crop: float, short: int):
    """The reference is a resize, then a centre crop. Rows are in the given order; a bad record has
    an invalid row."""
    source, images = some(make)
    batches = eval_batches.evaluation_batches(
        source,
        np.array([6, 3, 0, 1, 5, 3, 2]),
        Preprocessing(image_size=28, crop=crop),
        3,
        threads=3,
    )
    first, second, third = batches
    assert batches.skipped == dict.fromkeys(decode.REASONS, 0) | {"undecodable": 2}
    assert [b["valid"].tolist() for b in (first, second, third)] == [
        [True, False, True],
        [True, True, False],
        [True, False, False],
    ]
    assert [b["label"].tolist() for b in (first, second, third)] == [
        [60, -1, 0],
        [10, 50, -1],
        [20, -1, -1],
    ]
    assert [b["index"].tolist() for b in (first, second, third)] == [
        [6, -1, 0],
        [1, 5, -1],
        [2, -1, -1],
    ]
    assert (
        first["views"].shape == third["views"].shape == (3, 28, 28, 3)
        and third["views"][1:].max() == first["views"][1].max() == 0
    )
    shown = [(first, 0, 6), (first, 2, 0), (second, 0, 1), (second, 1, 5), (third, 0, 2)]
    for batch, row, index in shown:
        height, width, _ = images[index].shape
        h, w = (
            (short, int(short * width / height))
            if height <= width
            else (int(short * height / width), short)
        )
        resized = Image.fromarray(images[index]).resize((w, h), Image.Resampling.BICUBIC)
        top, left = round((h - 28) / 2), round((w - 28) / 2)
        view = batch["views"][row].astype(int)
        assert np.abs(view - np.asarray(resized)[top : top + 28, left : left + 28]).max() <= 1


def test_large_jpegs_are_decoded_at_full_size(tmp_path, make):
    """The views are those that `load` cuts of the same file. A JPEG can be decoded at a smaller
    scale, faster and with other pixels."""
    noisy = np.random.default_rng(0).integers(0, 256, (1600, 1700, 3), np.uint8)
    raw, file = make.encode(noisy, "JPEG"), tmp_path / "a.jpg"
    file.write_bytes(raw)
    (batch,) = eval_batches.evaluation_batches([base.Record("a", raw, 5)], [0], PREPROCESSING, 1)
    expected = PREPROCESSING.view(image_inputs.rgb_pixels(file))
    np.testing.assert_array_equal(batch["views"][0], expected)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_the_rows_and_read_nothing_twice(make, hosts: int):
    """The concatenated parts are the batches of one host. All hosts build the same number of
    batches, and each opens only its own records."""
    order = [6, 3, 0, 1, 5, 3]
    full = list(eval_batches.evaluation_batches(some(make)[0], order, PREPROCESSING, 4))
    sources, parts = [], []
    for host in range(hosts):
        source, _ = some(make)
        sources.append(source)
        parts.append(
            list(
                eval_batches.evaluation_batches(
                    source, order, PREPROCESSING, 4, host=host, hosts=hosts
                )
            )
        )
    assert len(full) == 2 and {len(part) for part in parts} == {2}
    for k, batch in enumerate(full):
        for name, array in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[k][name] for part in parts]), array)
    assert sorted(index for source in sources for index in source.read) == sorted(order)
    with pytest.raises(ValueError, match="3 hosts"):
        eval_batches.evaluation_batches(some(make)[0], order, PREPROCESSING, 4, hosts=3)


def test_evaluation_of_nothing(make):
    assert list(eval_batches.evaluation_batches(make.ColorImages(3), [], PREPROCESSING, 4)) == []
    (only,) = eval_batches.evaluation_batches(
        make.ColorImages(3, bad=3), range(3), PREPROCESSING, 4
    )
    assert not only["valid"].any()


def test_a_missing_file_is_a_bad_record_with_missing_replace(fill, make):
    """The file is removed after the source was opened. The others keep their rows; those of the
    same read are read again one by one."""
    folder = fill({f"{i}.png": make.encode(make.smooth(20 + i, 30), "PNG") for i in range(4)})
    source = FolderSource(str(folder))
    full = list(
        eval_batches.evaluation_batches(source, [3, 1, 0, 1, 2], Preprocessing(image_size=16), 3)
    )
    (folder / "1.png").unlink()
    with pytest.raises(UnreadableError, match="1.png' cannot be read"):
        list(
            eval_batches.evaluation_batches(
                source, [3, 1, 0, 1, 2], Preprocessing(image_size=16), 3
            )
        )
    batches = eval_batches.evaluation_batches(
        source, [3, 1, 0, 1, 2], Preprocessing(image_size=16), 3, missing="replace", threads=2
    )
    with_bad = list(batches)
    assert batches.skipped == dict.fromkeys(decode.REASONS, 0) | {"unreadable": 2}
    assert [b["index"].tolist() for b in with_bad] == [[3, -1, 0], [-1, 2, -1]]
    assert [b["valid"].tolist() for b in with_bad] == [[True, False, True], [False, True, False]]
    for before, after in zip(full, with_bad, strict=True):
        assert (
            before["views"].shape == after["views"].shape
            and not after["views"][~after["valid"]].any()
        )
        np.testing.assert_array_equal(
            before["views"][after["valid"]], after["views"][after["valid"]]
        )
