"""Images of rare categories come more often, in the batches too, and nothing else changes."""

import dataclasses

import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.data import pipeline, repeated_source, splits
from m3i_jax.data.annotated_batches import drop_without_objects, iterate_detect_batches
from m3i_jax.data.sources.scenes import ScenesSource
from m3i_jax.errors import UserError


def test_factors_against_the_definition() -> None:
    source = drop_without_objects(ScenesSource(200, side=48))
    repeated = repeated_source.repeat_rare(source, 0.3)
    table = source.object_table()
    solid = ~table.crowd
    shares = [
        len(set(table.records[solid & (table.classes == c)].tolist())) / len(source)
        for c in range(8)
    ]
    for i in range(0, len(source), 7):
        shown = set(table.classes[solid & (table.records == i)].tolist())
        wanted = max([1.0, *(np.sqrt(0.3 / shares[c]) for c in shown)])
        assert np.isclose(repeated.factors[i], wanted)
    assert len(repeated) == len(source) and repeated[3].key == source[3].key
    assert repeated.fingerprint() != source.fingerprint()
    assert "images of rare categories are repeated" in repeated.description()


def test_positions_follow_the_factors() -> None:
    source = ScenesSource(50, side=48)
    repeated = repeated_source.repeat_rare(source, 0.5)
    epoch = int(np.ceil(repeated.factors.sum()))
    counts = np.bincount(repeated.locate(0, np.arange(epoch * 40)), minlength=50)
    expected = repeated.factors / repeated.factors.sum() * epoch * 40
    assert np.abs(counts - expected).max() < 41 and np.abs(counts / expected - 1).mean() < 0.05


def test_batches_are_repeated_and_the_stream_is_named_so() -> None:
    source = ScenesSource(40, side=48)
    config = schema.Config(
        data=schema.Data(image_size=48, threads=0), train=schema.Train(batch_size=8)
    )
    geometry = dataclasses.replace(config.dense.geometry, repeat=0.5)
    repeating = dataclasses.replace(
        config, dense=dataclasses.replace(config.dense, geometry=geometry)
    )
    batches = iterate_detect_batches(repeating, source, start=16)
    next(batches)
    wanted = repeated_source.repeat_rare(source, 0.5).locate(repeating.seed, np.arange(16, 24))
    assert batches.record.tolist() == wanted.tolist()
    batches.close()
    one, other = (pipeline.stream_fingerprint(c, source) for c in (config, repeating))
    assert one != other
    assert "repeat 0.5" in pipeline.stream_identity(repeating, source)
    assert "repeat" not in pipeline.stream_identity(config, source)


def test_sources_that_cannot_be_repeated() -> None:
    with pytest.raises(UserError, match=r"dense.geometry.repeat=0.1: shapes.* has no table"):
        repeated_source.repeat_rare(splits.open_source(schema.Data(size=9)), 0.1)
    once = repeated_source.repeat_rare(ScenesSource(9), 0.1)
    with pytest.raises(UserError, match="orders its records itself"):
        repeated_source.repeat_rare(once, 0.1)
