"""Bad records in the stream: replaced deterministically and counted exactly; too many of them stop
the run."""

import dataclasses

import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.data import pipeline
from m3i_jax.data.sources.folder import FolderSource
from m3i_jax.errors import TransientError, UnreachableError, UserError


def test_bad_records_are_replaced_and_counted_exactly(fill, make):
    """With 20 % bad files of every kind, the counts are exact and every row shows a good record."""
    bad = make.bad_files()
    files = {f"bad_{name}": content for name, (content, _) in bad.items()}
    files |= {
        f"good_{i:03}.png": make.encode(np.full((20, 20, 3), i, np.uint8), "PNG")
        for i in range(4 * len(bad))
    }
    source = FolderSource(str(fill(files)))
    reasons = {
        i: bad[key.removeprefix("bad_")][1]
        for i in range(len(source))
        if (key := source.key(i)).startswith("bad_")
    }
    assert len(reasons) == len(bad) and len(source) == 5 * len(bad)
    batches = pipeline.iterate_batches(make.settings(batch=20), source, None, start=0)
    views = np.concatenate([next(batches)["views"] for _ in range(16)])
    used, skipped = make.expected_stream(source, reasons, 320)
    assert batches.skipped == skipped and [reason for reason, n in skipped.items() if not n] == [
        "unreadable",
        "unreachable",
    ]
    colours = [int(source.key(i).removeprefix("good_")[:3]) for i in used]
    assert (views == np.array(colours)[:, None, None, None, None]).all()


@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_no_image_is_mixed_with_itself(make, count):
    """With few records and an odd number of them, epochs end between partners."""
    batch = make.joined(make.stream(make.settings(batch=30), make.ColorImages(count), None, 10))
    record = batch["views"][:, 0, 0, 0, 0].reshape(-1, 2)
    assert (record[:, 0] != record[:, 1]).all()
    assert set(record.ravel()) == set(range(count))
    used, _ = make.expected_stream(make.ColorImages(count), {}, 300)
    assert record.ravel().tolist() == used


def test_too_many_bad_records_stop_the_run(make):
    config = make.settings(batch=100, max_bad_share=0.05)
    batches = pipeline.iterate_batches(config, make.ColorImages(200, bad=100), None, start=0)
    count = 0
    with pytest.raises(UserError) as caught:
        while count < 2 * pipeline.WINDOW:
            count += len(next(batches)["label"])
    assert count + 100 < 1500  # as soon as 500 bad ones make it certain
    assert str(caught.value).startswith(f"{sum(batches.skipped.values()):,} of the last ")
    assert " records of images were bad, more than data.max_bad_share=0.05 of 10,000: " in str(
        caught.value
    )
    assert f"{batches.skipped['undecodable']:,} undecodable (such as 'p" in str(caught.value)
    assert str(caught.value).endswith("); repair or remove them, or raise the limit")


@pytest.mark.parametrize(("bad", "stops"), [(11, False), (30, True)])
def test_the_share_is_over_the_last_ten_thousand(make, bad, stops):
    """5 % of 300 records are 15: 11 bad ones never stop the run; 30 do, after 500 bad draws."""
    config = make.settings(batch=500, max_bad_share=0.05, image_size=8, crop_scale=(0.9, 1.0))
    config = dataclasses.replace(config, model=schema.Model(encoder=schema.Encoder(patch_size=4)))
    batches = pipeline.iterate_batches(config, make.ColorImages(300, bad=bad), None, start=0)
    count = 0
    try:
        for _ in range(25):
            count += len(next(batches)["label"])
    except UserError as error:
        assert stops and "of 10,000: " in str(error) and 500 < sum(batches.skipped.values()) < 600
    assert (count == 12_500) != stops


def test_a_window_forgets(make):
    """Bad records beyond the window do not stop the run."""
    config = make.settings(batch=500, max_bad_share=0.05)
    batches = pipeline.iterate_batches(config, make.ColorImages(10), None, start=0)
    for _ in range(40):
        batches._check_bad_share(500, np.array([20, 0, 0, 0, 0, 0, 0]))
    for _ in range(20):
        batches._check_bad_share(500, np.zeros(7, np.int64))
    assert batches._bad.sum() == 0 and pipeline.WINDOW <= batches._samples < pipeline.WINDOW + 520
    with pytest.raises(UserError, match="^501 of the last") as refusal:
        batches._check_bad_share(500, np.array([0, 501, 0, 0, 0, 0, 0]))
    assert refusal.value.status == 2
    # of a store that does not answer, among good ones: a scheduler starts the run again
    batches = pipeline.iterate_batches(config, make.ColorImages(10), None, start=0)
    with pytest.raises(UserError, match="^501 of the last .* 401 unreachable") as refusal:
        batches._check_bad_share(500, np.array([0, 100, 0, 0, 0, 0, 401]))
    assert refusal.value.status == 1


def test_a_source_without_a_pair_of_good_images(make):
    for source, last in (
        (
            make.ColorImages(6, bad=6),
            (
                r"partner: 100 undecodable \(such as 'p\d', 'p\d', 'p\d'\); the last is 'p\d'"
                r" \(undecodable: cannot identify the format\)"
            ),
        ),
        (make.ColorImages(6, bad=5), r"the last is 'p\d' "),
    ):
        with pytest.raises(
            UserError,
            match=(
                r"^100 draws in a row at position \d of images gave no image that could be used"
                rf" .*{last}"
            ),
        ):
            make.stream(make.settings(batch=4), source, None, 1)


def test_a_store_that_stays_away_is_no_mistake(make, monkeypatch):
    """Also where its records are replaced: the exit code lets a scheduler start the run again."""

    def away(self, index):
        raise UnreachableError("'gs://bucket/0.tar' cannot be read (503): check the address")

    source, config = make.ColorImages(6), make.settings(batch=4)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, missing="replace"))
    monkeypatch.setattr(make.ColorImages, "__getitem__", away)
    with pytest.raises(TransientError, match="^100 draws in a row .* 100 unreachable ") as refusal:
        make.stream(config, source, None, 1)
    assert refusal.value.status == 1
