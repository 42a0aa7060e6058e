import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from m3i_jax.models import initializers, layers

# compiling is what takes the time here
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def test_blocks_start_xavier_uniform_on_two_dimensional_shapes():
    one = layers.block(768, 12, 4.0, "float32")
    params = jit(lambda key: initializers.init_blocks(one, key, width=768, depth=1))(
        jax.random.key(0)
    )
    golden = {"qkv": 0.02552, "out": 0.03608, "fc1": 0.02282, "fc2": 0.02282}  # bound / sqrt(3)
    for name, std in golden.items():
        part = params["attention" if name in ("qkv", "out") else "mlp"][name]
        kernel = np.asarray(part["kernel"])
        bound = np.sqrt(6 / sum(kernel.shape[1:]))
        assert kernel.std() == pytest.approx(std, rel=3e-3)
        assert np.abs(kernel).max() == pytest.approx(bound, rel=1e-4)
        assert not np.asarray(part["bias"]).any()
    assert (np.asarray(params["norm1"]["scale"]) == 1).all() and not np.asarray(
        params["norm2"]["bias"]
    ).any()


def test_a_parameter_without_a_rule_is_named():
    with pytest.raises(ValueError, match=r"query/token of shape \(2, 3\)"):
        initializers.init_params(jax.random.key(0), {"query": {"token": jnp.zeros((2, 3))}})


def test_normal_rules_go_by_the_end_of_the_path():
    shapes = {
        "a": {"kernel": jnp.zeros((200, 300))},
        "b": {"kernel": jnp.zeros((200, 300))},
        "token": jnp.zeros((100, 100)),
    }
    tree = jit(lambda key: initializers.init_params(key, shapes, {"b/kernel": 0.5, "token": 0.02}))(
        jax.random.key(0)
    )
    assert np.std(tree["a"]["kernel"]) == pytest.approx(np.sqrt(6 / 500 / 3), rel=0.01)
    assert np.std(tree["token"]) == pytest.approx(0.02, rel=0.03)
    values = np.asarray(tree["b"]["kernel"]).ravel() / 0.5
    assert stats.kstest(values, "norm").pvalue > 0.001 and abs(values.mean()) < 0.02


def test_every_block_and_every_matrix_is_drawn_by_itself():
    params = jit(
        lambda key: initializers.init_blocks(
            layers.block(8, 2, 2.0, "float32"), key, width=8, depth=3
        )
    )(jax.random.key(1))
    kernels = [
        np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if "kernel" in str(path)
    ]
    assert params["mlp"]["fc1"]["kernel"].shape == (3, 8, 16) and len(kernels) == 4
    numbers = np.concatenate(
        [kernel.ravel() / np.sqrt(6 / sum(kernel.shape[1:])) for kernel in kernels]
    )
    assert len(np.unique(numbers.round(6))) > 0.99 * numbers.size
