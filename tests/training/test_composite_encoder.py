"""A dense run whose encoder is two composed copies: losses on both, and one set of pre-trained
weights for both."""

import functools

import jax
import numpy as np
import pytest

from m3i_jax import config as configuration
from m3i_jax.errors import UserError
from m3i_jax.parallel.sharding import path_text
from m3i_jax.training import init_from, optimizer
from m3i_jax.training.task import make_task
from m3i_jax.training.weight_source import WeightSource
from tests.dense_toy import dense_batch, dense_settings, make_trainer

CHANGES = {
    "dense__segment__dropout": 0.0,
    "dense__geometry__photometric": False,
    "model__encoder__drop_path": 0.0,
    "train__batch_size": 2,
}
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def settings(**changes):
    return dense_settings("segment", **CHANGES, **changes)


def with_paths(tree):
    return {path_text(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_the_loss_on_the_maps_of_the_first_copy_is_added_with_its_weight():
    plain = settings()
    state = make_trainer(plain).init()
    params, opt = jax.device_get(state.params), jax.device_get(state.opt)
    batch = dense_batch(plain, 3)
    alone = jit(make_task(plain).gradients)(params, opt, batch)
    config = settings(dense__maps__composite=2, dense__maps__composite_weight=0.25)
    task = make_task(config)
    start = jax.device_get(jit(task.init)(jax.random.key(0)))
    encoder = params["encoder"]
    both = {**start["encoder"], **encoder}
    both["second"] = {name: encoder[name] for name in start["encoder"]["second"]}
    assert "patch_embed" not in both["second"]
    out = jit(task.gradients)({**params, "encoder": both}, opt, batch)
    # gamma is 0: both copies are the encoder, and the head has the loss twice
    np.testing.assert_allclose(out.loss, 1.25 * alone.loss, rtol=1e-5)
    ours, theirs = with_paths(out.grads), with_paths(alone.grads)
    scale = max(np.abs(leaf).max() for leaf in theirs.values())
    for path, grad in theirs.items():
        second = path.replace("encoder/", "encoder/second/")
        if second != path and second in ours:
            np.testing.assert_allclose(ours[second], grad, rtol=0, atol=1e-4 * scale)
            wanted = 0.25 * grad
        else:
            wanted = 1.25 * grad  # shared: the stem, the head
        np.testing.assert_allclose(ours[path], wanted, rtol=0, atol=1e-4 * scale, err_msg=path)
    assert np.abs(ours["encoder/gamma/stage1"]).max() > 0


def test_pretrained_weights_are_those_of_both_copies():
    rng = np.random.default_rng(0)
    arrays = {
        "encoder/blocks/kernel": rng.normal(size=(2, 3)),
        "encoder/stem/kernel": rng.normal(size=3),
    }
    asked = []

    def read(layout):
        asked.append(sorted(layout))
        return {path: arrays[path] for path in layout}

    shapes = {path: array.shape for path, array in arrays.items()}
    source = WeightSource("some", shapes, read, {}, {}, [])
    target = dict.fromkeys([*arrays, "encoder/second/blocks/kernel", "encoder/gamma/stage0"])
    found = init_from._for_both_copies(source, target)
    assert found.shapes == {**shapes, "encoder/second/blocks/kernel": (2, 3)}
    read_now = found.read(dict.fromkeys(found.shapes))
    assert asked == [sorted(arrays)]  # each array once
    for path in ("encoder/blocks/kernel", "encoder/second/blocks/kernel"):
        np.testing.assert_allclose(read_now[path], arrays["encoder/blocks/kernel"], rtol=1e-6)
    # a composed run goes on with its own second copy, and a plain run reads none
    shapes["encoder/second/blocks/kernel"] = (2, 3)
    assert init_from._for_both_copies(source, target) is source
    plain = WeightSource("some", {"encoder/blocks/kernel": (2, 3)}, read, {}, {}, [])
    assert init_from._for_both_copies(plain, dict.fromkeys(arrays)) is plain


def test_a_layer_has_the_learning_rate_of_its_depth_in_both_copies():
    config = settings(dense__maps__composite=2, optim__layer_decay=0.5)
    one, two = (
        optimizer.lr_factor(config, f"encoder/{copy}blocks/norm1/scale") for copy in ("", "second/")
    )
    np.testing.assert_array_equal(one, two)
    assert optimizer.lr_factor(config, "encoder/gamma/stage0") == 1


@pytest.mark.parametrize("copies", [0, 3])
def test_other_numbers_of_copies_are_refused(copies):
    with pytest.raises(Exception, match="composite"):
        settings(dense__maps__composite=copies)


@pytest.mark.slow
def test_internimage_h_composed_with_dino_has_the_parameters_of_the_paper():
    config = configuration.load_config("configs/transfer/coco.py:head=dino,model=internimage_h")
    config.dense.maps.composite = 2
    task = make_task(configuration.resolve(config))
    params = jax.eval_shape(task.init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert round(count / 1e9, 2) == 2.18


def test_a_frozen_composition_is_refused():
    """Its gammas would stay 0, and the second copy the first."""
    config = settings(dense__maps__composite=2, model__encoder__freeze=True)
    with pytest.raises(UserError, match="config.model.encoder.freeze=true: .*composite=2") as error:
        make_task(config).pyramid()
    assert "\n" not in str(error.value)
