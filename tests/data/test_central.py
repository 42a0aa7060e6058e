"""Clean views for evaluators."""

import numpy as np
from PIL import Image

from m3i_jax.data import central, records, sources


def test_evaluation_views(make):
    """Against resize and centre crop done one after the other, in the order asked for, bad ones left out and counted."""
    pictures = [make.smooth(60 + 7 * i, 90 - 5 * i) for i in range(7)]
    pictures[3] = b"<html>"  # type: ignore[call-overload]

    class Some(make.Pictures):
        def __getitem__(self, index: int) -> sources.Record:
            return sources.Record(str(index), pictures[index], index * 10)

    batches = central.evaluation_batches(Some(7), np.array([6, 3, 0, 1, 5, 3]), 28, 3)
    first, second = batches
    assert batches.skipped == dict.fromkeys(records.REASONS, 0) | {"undecodable": 2}
    assert first["valid"].tolist() == [True] * 3 and second["valid"].tolist() == [True, False, False]
    assert first["label"].tolist() == [60, 0, 10] and second["label"].tolist() == [50, -1, -1]
    assert first["index"].tolist() == [6, 0, 1] and second["index"].tolist() == [5, -1, -1]
    assert first["views"].shape == second["views"].shape == (3, 28, 28, 3) and second["views"][1:].max() == 0
    for view, index in zip([*first["views"], second["views"][0]], (6, 0, 1, 5), strict=True):
        height, width, _ = pictures[index].shape
        short = 32  # 28 * 256 / 224
        h, w = (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
        resized = Image.fromarray(pictures[index]).resize((w, h), Image.Resampling.BICUBIC)
        top, left = round((h - 28) / 2), round((w - 28) / 2)
        assert np.abs(view.astype(int) - np.asarray(resized)[top : top + 28, left : left + 28]).max() <= 1


def test_evaluation_of_nothing(make):
    assert list(central.evaluation_batches(make.Pictures(3), [], 28, 4)) == []
    assert list(central.evaluation_batches(make.Pictures(3, bad=3), range(3), 28, 4)) == []
