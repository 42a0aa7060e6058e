"""Equal numbers from one device and from eight, and no communication where none is needed."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from m3i_jax.objective import balance, collapse, ema, losses, masks, mixing, positions


def test_eight_devices_agree_with_one():
    assert jax.device_count() == 8
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    p, t, x, mask = (
        normal(16, 4, 8),
        normal(16, 4, 8),
        normal(16, 16, 3),
        masks.blockwise(0, 0, 16, grid=4, hidden=8),
    )
    label, where = rng.integers(-1, 5, 16), (rng.random((16, 4)) < 0.7)
    box, flip = np.abs(normal(2, 16, 4)) * 50 + 10, rng.random((2, 16)) < 0.5
    relative = lambda a, f, b, g: positions.relative_positions(a, f, b, g, grid=4, width=8)
    gaussian = lambda p, t, where: losses.gaussian(p, t, where, second_moment=0.1)[0]
    contrast = lambda u, v, where, chunk=0: losses.text(u, v, 1.0, where, chunk=chunk)[0]
    chunked = lambda u, v, where: contrast(u, v, where, 6)
    # name: function, arguments; all arguments sharded over rows. These move nothing between
    # devices.
    free = {
        "partner": (mixing.partner, (x,)),
        "mix": (mixing.mix, (x, mask)),
        "split": (lambda m: mixing.split(m, 8), (mask,)),
        "unmix": (lambda x, m: mixing.unmix(x, m, 8), (x, mask)),
        "unmix gradient": (
            jax.grad(lambda x, m: jnp.sin(mixing.unmix(x, m, 8)[0]).sum()),
            (x, mask),
        ),
        "relative": (relative, (box[0], flip[0], box[1], flip[1])),
        "gradient of gaussian": (
            jax.grad(lambda p, t, w: losses.gaussian(p, t, w)[0]),
            (p, t, where),
        ),
    }
    summed = {
        "gaussian": (jax.value_and_grad(gaussian), (p, t, where)),
        "second_moment": (losses.second_moment, (t, where)),
        "boltzmann": (
            lambda p, k: losses.boltzmann(p, k, jnp.arange(16), temperature=0.2),
            (p[:, 0], t[:, 0]),
        ),
        "category": (losses.category, (p[:, 0], label)),
        "text": (jax.value_and_grad(contrast, (0, 1)), (p[:, 0], t[:, 0], where[:, 0])),
        "text in chunks": (jax.value_and_grad(chunked, (0, 1)), (p[:, 0], t[:, 0], where[:, 0])),
        "norms": (lambda t: (balance.feature_norm(t), collapse.target_std(t)), (t,)),
    }
    for name, (function, arguments) in (free | summed).items():
        one = jax.jit(function)(*arguments)
        compiled = jax.jit(function).lower(*(jax.device_put(a, rows) for a in arguments)).compile()
        eight = compiled(*(jax.device_put(a, rows) for a in arguments))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), eight, one
        )
        text = compiled.as_text()
        moved = [
            word
            for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute")
            if word in text
        ]
        assert bool(moved) == (name in summed), (name, moved)

    tx = ema.track_target(0.5)
    params = jax.device_put(normal(8, 4), rows)
    state = jax.jit(lambda p: tx.update(p, tx.init(p), p)[1])(params)
    assert state.params.sharding.is_equivalent_to(rows, 2)
    np.testing.assert_allclose(state.params, 1.5 * np.asarray(params), rtol=1e-6)
    assert len(free | summed) == 14
