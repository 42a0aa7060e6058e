"""Pyramid and heads of ViTDet's Mask R-CNN under detectron2's names, both ways. That values mean
the same is shown by tests/models/dense/test_mask_rcnn.py."""

import jax
import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.interop.dense_weights import load_mask_rcnn, store_mask_rcnn
from m3i_jax.models.dense import mask_rcnn, pyramid
from tests.models.dense import vitdet


def test_every_weight_of_detectron2_has_a_place_and_goes_back() -> None:
    state = vitdet.state("state/")
    tree = load_mask_rcnn({"model": state | {"pixel_mean": np.zeros((3, 1, 1))}})
    back = store_mask_rcnn(tree)
    wanted = {name: value for name, value in state.items() if "backbone.net." not in name}
    assert back.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(back[name], value)


@pytest.mark.parametrize("patch", [8, 16])
def test_trees_are_those_that_training_makes(patch: int) -> None:
    """Also where the pyramid doubles its map less often than detectron2's presets do."""
    settings = schema.Detect(width=8, box_hidden=12, box_convs=1, rpn_convs=1)
    config = pyramid.PyramidConfig(
        kind="simple", strides=settings.strides, sources=((patch, 32),), width=8
    )
    tree = {
        "pyramid": jax.eval_shape(lambda key: pyramid.init(config, key)[0], jax.random.key(0)),
        "head": jax.eval_shape(
            lambda key: mask_rcnn.init(settings, config.channels, 3, key), jax.random.key(0)
        ),
    }
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), tree)
    table = store_mask_rcnn(tree)
    # detectron2 gives no number to the only convolution
    conv = "proposal_generator.rpn_head.conv."
    table = {name.replace(conv + "conv0.", conv): value for name, value in table.items()}
    assert conv + "weight" in table
    again = load_mask_rcnn(table)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_other_weights_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="unknown names fc.weight; give"):
        load_mask_rcnn({"fc.weight": np.zeros((2, 2))})
    with pytest.raises(UserError, match="head/rpn/extra is not a parameter"):
        store_mask_rcnn({"head": {"rpn": {"extra": np.zeros(1)}}})
