"""The order of the stream is a closed form: a permutation an epoch, and the same from anywhere."""

import numpy as np
import pytest

from m3i_jax.data import sampler


def test_every_epoch_visits_every_record_once_in_another_order():
    epochs = sampler.sample_index(3, np.arange(5 * 101), 101).reshape(5, 101)
    assert (np.sort(epochs, 1) == np.arange(101)).all()
    assert len({tuple(row) for row in epochs.tolist()}) == 5
    assert not (sampler.sample_index(4, np.arange(101), 101) == epochs[0]).all()


def test_any_part_of_the_stream_is_the_stream():
    full = sampler.sample_index(1, np.arange(1000), 77)
    for start in (0, 1, 76, 77, 500):
        assert (sampler.sample_index(1, np.arange(start, 1000), 77) == full[start:]).all()
    backwards = sampler.sample_index(1, np.arange(1000)[::-1], 77)
    assert (backwards[::-1] == full).all()


def test_attempts_are_other_draws():
    positions = np.arange(2000)
    first, second = (sampler.sample_index(0, positions, 500, attempt) for attempt in (0, 1))
    assert 0 < (first == second).sum() < 20  # one in 500 by chance
    assert second.min() >= 0 and second.max() < 500


def test_a_far_position_needs_no_replay():
    where = sampler.sample_index(0, 10**15 + np.arange(256), 400_000_000)
    assert where.min() >= 0 and where.max() < 400_000_000 and len(np.unique(where)) == 256


@pytest.mark.parametrize(("size", "limit"), [(1000, 500), (1000, 130), (7, 7), (7, 9), (10, 9)])
def test_spread_records_are_one_of_each_part(size: int, limit: int) -> None:
    """Ascending, without repeats, and all of them without a cut."""
    records, count = sampler.spread_records(size, limit), min(size, limit)
    for number, record in enumerate(records):
        assert number * size // count <= record < (number + 1) * size // count
    assert len(records) == count and records == sampler.spread_records(size, limit)
    assert sampler.spread_records(0, limit) == []


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_spread_records_have_all_classes_that_a_source_lists_in_turn(classes: int) -> None:
    """Every second of 100,000 records: a constant stride has half of the classes."""
    found = np.bincount(np.array(sampler.spread_records(100_000, 50_000)) % classes)
    share = found / (50_000 / classes)
    assert len(found) == classes and share.min() > 0.4 and share.max() < 1.6
