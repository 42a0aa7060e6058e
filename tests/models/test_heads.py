import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.models import heads
from m3i_jax.objective.terms import MlpShape, ProjectionHead

# compiling is what takes the time here
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

MODEL = schema.Model(
    encoder=schema.Encoder(patch_size=2, width=12),
    head=schema.Head(hidden=20, width=6, prototypes=5),
    dtype="float32",
)
X = np.random.default_rng(1).normal(size=(7, 12)).astype(np.float32)
BYOL, MOCO, PLAIN = (
    MlpShape(layers=2),
    MlpShape(layers=3, last_norm=True),
    MlpShape(layers=3, norm="none"),
)


def randomly(init, seed=0):
    """Parameters of the right shapes, all of them random: also the norms and biases, which start at
    one and zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(0.5 * rng.normal(size=s.shape), jnp.float32),
        jax.eval_shape(init, jax.random.key(0)),
    )


def mlp_tree(mlp, width_in=12, width_out=6, seed=0):
    return randomly(lambda key: heads.init_mlp(MODEL, key, mlp, width_in, width_out), seed)


def in_numpy(params, mlp, x):
    """The formula in float64; `batch` over all axes but the last."""
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    rows = tuple(range(x.ndim - 1))
    unit = lambda x: (x - x.mean(rows)) / np.sqrt(x.var(rows) + 1e-5)
    x = x.astype(np.float64)
    for layer in range(mlp.layers):
        x = x @ tree[f"layer_{layer}"]["kernel"] + tree[f"layer_{layer}"].get("bias", 0)
        if layer < mlp.layers - 1:
            if mlp.norm == "batch":
                x = unit(x) * tree[f"norm_{layer}"]["scale"] + tree[f"norm_{layer}"]["bias"]
            x = np.maximum(x, 0)
    return unit(x) if mlp.last_norm else x


@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12)])
@pytest.mark.parametrize("mlp", [BYOL, MOCO, PLAIN, MlpShape(layers=1)])
def test_mlp_equals_numpy(mlp, shape):
    params, x = mlp_tree(mlp), np.random.default_rng(2).normal(size=shape).astype(np.float32)
    got = heads.apply_mlp(MODEL, params, mlp, jnp.asarray(x))
    assert got.shape == (*shape[:-1], 6) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, in_numpy(params, mlp, x), rtol=1e-3, atol=1e-4)


def test_only_a_layer_without_a_batch_norm_behind_it_has_a_bias():
    names = lambda mlp: {name: sorted(part) for name, part in mlp_tree(mlp).items()}
    norm, bare, biased = ["bias", "scale"], ["kernel"], ["bias", "kernel"]
    assert names(BYOL) == {"layer_0": bare, "norm_0": norm, "layer_1": biased}
    assert names(MOCO) == {
        "layer_0": bare,
        "norm_0": norm,
        "layer_1": bare,
        "norm_1": norm,
        "layer_2": bare,
    }
    assert names(PLAIN) == {f"layer_{n}": biased for n in range(3)}


def test_moco_v3_has_the_published_number_of_parameters():
    head = ProjectionHead(projector=MOCO, predictor=dataclasses.replace(MOCO, layers=2))
    shapes = jax.eval_shape(
        lambda key: heads.init_projection(schema.Model(), key, head, False), jax.random.key(0)
    )
    count = {
        name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in shapes.items()
    }
    assert count == {
        "projector": 768 * 4096 + 4096 * 4096 + 4096 * 256 + 2 * 2 * 4096,
        "predictor": 256 * 4096 + 4096 * 256 + 2 * 4096,
    }


def test_precision_of_products_is_the_configured_one_and_of_norms_float32():
    params, model = mlp_tree(MOCO), dataclasses.replace(MODEL, dtype="bfloat16")
    got = heads.apply_mlp(model, params, MOCO, jnp.asarray(X))
    exact = in_numpy(params, MOCO, X)
    assert got.dtype == jnp.float32
    error = np.abs(np.asarray(got) - exact).mean()
    assert 1e-4 < error < 0.05
    # the last norm saw no rounding
    np.testing.assert_allclose(np.asarray(got).mean(0), 0, atol=1e-5)
    assert (
        jax.make_jaxpr(lambda p: heads.apply_mlp(model, p, MOCO, jnp.asarray(X)))(params)
        .pretty_print()
        .count("bf16[20,20]")
        > 0
    )


def test_a_space_has_the_parts_that_its_terms_name():
    make = lambda projection, prototypes: randomly(
        lambda key: heads.init_projection(MODEL, key, projection, prototypes)
    )
    assert make(ProjectionHead(), False) == {}
    both = make(ProjectionHead(projector=BYOL, predictor=BYOL), False)
    assert set(both) == {"projector", "predictor"}
    assert both["projector"]["layer_0"]["kernel"].shape == (12, 20) and both["predictor"][
        "layer_0"
    ]["kernel"].shape == (6, 20)
    # in the space of the features, as the target is
    alone = make(ProjectionHead(predictor=BYOL), True)
    assert alone["predictor"]["layer_1"]["kernel"].shape == (20, 12) and alone[
        "prototypes"
    ].shape == (5, 12)


def test_first_values():
    model = schema.Model(
        encoder=schema.Encoder(width=48), head=schema.Head(hidden=64, width=16, prototypes=400)
    )
    head = ProjectionHead(projector=BYOL, predictor=BYOL)
    params = jit(lambda key: heads.init_projection(model, key, head, True))(jax.random.key(0))
    prototypes = np.asarray(params["prototypes"])
    assert prototypes.dtype == np.float32 and np.abs(prototypes).max() == pytest.approx(
        0.25, rel=1e-2
    )
    assert (
        prototypes.std() == pytest.approx(0.25 / np.sqrt(3), rel=0.02)
        and abs(prototypes.mean()) < 0.01
    )
    assert np.abs(params["projector"]["layer_0"]["kernel"]).max() == pytest.approx(
        np.sqrt(6 / 112), rel=1e-2
    )
    assert (
        not np.asarray(params["projector"]["layer_1"]["bias"]).any()
        and (np.asarray(params["projector"]["norm_0"]["scale"]) == 1).all()
    )
    assert not np.array_equal(
        params["projector"]["layer_1"]["kernel"][:16], params["predictor"]["layer_1"]["kernel"][:16]
    )


def test_the_prediction_is_predictor_of_projection_and_the_target_the_projection():
    head = ProjectionHead(projector=MOCO, predictor=BYOL)
    params = randomly(lambda key: heads.init_projection(MODEL, key, head, False))
    projected = in_numpy(params["projector"], MOCO, X)
    np.testing.assert_allclose(
        heads.apply_projector(MODEL, {"projector": params["projector"]}, head, X),
        projected,
        rtol=1e-3,
        atol=1e-4,
    )
    expected = in_numpy(params["predictor"], BYOL, projected)
    np.testing.assert_allclose(
        heads.apply_predictor(MODEL, params, head, jnp.asarray(X)), expected, rtol=1e-3, atol=1e-3
    )
    assert (
        heads.apply_projector(MODEL, {}, ProjectionHead(), X) is X
        and heads.apply_predictor(MODEL, {}, ProjectionHead(), X) is X
    )


def test_every_parameter_of_a_space_learns():
    head = ProjectionHead(projector=BYOL, predictor=dataclasses.replace(BYOL, last_norm=True))
    params = randomly(lambda key: heads.init_projection(MODEL, key, head, False))
    g = np.random.default_rng(3).normal(size=(7, 6))
    grads = jit(
        jax.grad(lambda p: (heads.apply_predictor(MODEL, p, head, jnp.asarray(X)) * g).sum())
    )(params)
    silent = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
        if np.abs(leaf).max() < 1e-4
    }
    # taken out by the predictor's first norm, as in BYOL
    assert silent == {"['projector']['layer_1']['bias']"}


@pytest.mark.parametrize("of,width", [("tokens", 12), ("pixels", 3 * 2 * 2)])
def test_a_linear_head_is_one_map_of_every_token(of, width):
    params = randomly(lambda key: heads.init_linear(MODEL, key, of))
    x = np.random.default_rng(4).normal(size=(2, 3, 12)).astype(np.float32)
    got = heads.apply_linear(MODEL, params, jnp.asarray(x))
    assert got.shape == (2, 3, width)
    np.testing.assert_allclose(
        got, x @ np.asarray(params["kernel"]) + np.asarray(params["bias"]), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="'category'"):
        heads.init_linear(MODEL, jax.random.key(0), "category")
