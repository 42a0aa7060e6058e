"""Batches with small views: a pure function of (seed, position), and nothing of the two large views
moves."""

import numpy as np

from m3i_jax import schema
from m3i_jax.data import batch_builder, pipeline
from m3i_jax.data.sources import base

GROUPS = ("2 x 16 at .05-.3", "1x8 at 0.1-0.2")


class Noise:
    name, classes, captions = "noise", (), False

    def __len__(self) -> int:
        return 9

    def __getitem__(self, i: int) -> base.Record:
        pixels = np.random.default_rng(i).integers(0, 256, (40, 30, 3))
        return base.Record(str(i), pixels.astype(np.uint8))

    def fingerprint(self) -> str:
        return "noise"


class Ramp(Noise):
    def __getitem__(self, i: int) -> base.Record:
        y, x = np.mgrid[:40, :30] * 6
        return base.Record(str(i), np.stack([y, x, x], -1).astype(np.uint8))


def first_batch(
    small: tuple[str, ...] = (),
    start: int = 0,
    host: int = 0,
    hosts: int = 1,
    source: base.DataSource | None = None,
):
    data = schema.Data(image_size=32, small_views=small, resizer="pillow")
    config = schema.Config(data=data, train=schema.Train(batch_size=4))
    views = tuple(range(2 + len(config.small_views)))
    made = pipeline.iterate_batches(
        config, source or Noise(), None, start=start, host=host, hosts=hosts, views=views
    )
    try:
        return next(made)
    finally:
        made.close()


def test_the_two_large_views_are_those_of_a_batch_without_small_ones() -> None:
    plain, more = first_batch(), first_batch(GROUPS)
    assert more["views_16"].shape == (4, 2, 16, 16, 3) and more["views_8"].shape == (4, 1, 8, 8, 3)
    assert (more["box"].shape, more["flip"].shape) == ((4, 5, 4), (4, 5))
    assert set(more) - set(plain) == {"views_16", "views_8"}
    for name, array in plain.items():
        np.testing.assert_array_equal(
            more[name][:, :2] if name in ("box", "flip") else more[name], array, err_msg=name
        )


def test_small_views_depend_on_seed_and_position_alone() -> None:
    whole = first_batch(GROUPS)
    later, second = first_batch(GROUPS, start=2), first_batch(GROUPS, host=1, hosts=2)
    for name in ("views_16", "views_8", "box", "flip"):
        np.testing.assert_array_equal(whole[name][2:], later[name][:2], err_msg=name)
        np.testing.assert_array_equal(whole[name][2:], second[name], err_msg=name)
    # a view more or less moves no other
    fewer = first_batch(GROUPS[:1])
    np.testing.assert_array_equal(whole["views_16"], fewer["views_16"])
    assert len(np.unique(whole["views_16"].reshape(8, -1), axis=0)) == 8


def test_boxes_have_the_shares_of_their_group_and_show_what_is_there() -> None:
    batch = first_batch(("8 x 8 at 0.1-0.2", "4 x 16 at 0.5-0.9"))
    share = batch["box"][..., 2] * batch["box"][..., 3] / 1200
    assert share[:, 2:10].min() > 0.08 and share[:, 2:10].max() < 0.23
    assert share[:, 10:].min() > 0.45 and share[:, 10:].max() < 0.95
    assert (batch["box"][..., :2] >= 0).all()
    assert (batch["box"][..., 0] + batch["box"][..., 2] <= 40).all()
    assert (batch["box"][..., 1] + batch["box"][..., 3] <= 30).all()
    # a pixel of a ramp says where it is: the mean of a view, where the centre of its box is
    ramp = first_batch(("4 x 16 at 0.5-0.9",), source=Ramp())
    centre = ramp["box"][:, 2:, :2] + ramp["box"][:, 2:, 2:] / 2 - 0.5
    np.testing.assert_allclose(ramp["views_16"].mean((2, 3))[..., :2], 6 * centre, atol=1.5)


def test_a_row_draws_small_boxes_from_a_stream_of_its_own() -> None:
    assert batch_builder.rng.SMALL_CROP not in {
        value
        for name, value in vars(batch_builder.rng).items()
        if name.isupper() and name not in ("SMALL_CROP", "SPARE")
    }
    assert batch_builder.rng.SMALL_CROP not in batch_builder.rng.SPARE
