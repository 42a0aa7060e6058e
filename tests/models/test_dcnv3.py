"""The operator against its definition in float64, written with loops over the four cells around
every sample."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax.models import dcnv3 as op
from m3i_jax.models import dcnv3_cpu

METHODS = ("dense", "band", "kernel", "fused", "gather")
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def reference(
    x,
    offset,
    mask,
    ct,
    *,
    kernel=3,
    stride=1,
    pad=1,
    dilation=1,
    groups,
    offset_scale=1.0,
    remove_center=False,
):
    """(y, dx, doffset, dmask) in float64. Offsets at exact integers are not its business, but those
    that only read padding get nothing."""
    x, offset, mask, ct = (np.asarray(a, np.float64) for a in (x, offset, mask, ct))
    b, h, w, c = x.shape
    d = c // groups
    x, ct = x.reshape(b, h, w, groups, d), ct.reshape(*ct.shape[:3], groups, d)
    y, dx, doffset, dmask = (
        np.zeros(ct.shape),
        np.zeros(x.shape),
        np.zeros(offset.shape),
        np.zeros(mask.shape),
    )
    middle = dilation * (kernel - 1) // 2
    taps = [
        (i, j)
        for i in range(kernel)
        for j in range(kernel)
        if not (remove_center and i == j == kernel // 2)
    ]
    at_b, at_g = np.arange(b)[:, None], np.arange(groups)[None]
    for r, k in itertools.product(range(ct.shape[1]), range(ct.shape[2])):
        for p, (i, j) in enumerate(taps):  # the column is the slow index
            column = (
                stride * k
                - pad
                + middle
                + offset_scale * (i * dilation - middle + offset[:, r, k, :, p, 0])
            )
            row = (
                stride * r
                - pad
                + middle
                + offset_scale * (j * dilation - middle + offset[:, r, k, :, p, 1])
            )
            top, left = np.floor(row).astype(int), np.floor(column).astype(int)
            m, g = mask[:, r, k, :, p], ct[:, r, k]
            for q, s in itertools.product((0, 1), (0, 1)):
                inside = (top + q >= 0) & (top + q < h) & (left + s >= 0) & (left + s < w)
                v = (
                    x[at_b, np.clip(top + q, 0, h - 1), np.clip(left + s, 0, w - 1), at_g]
                    * inside[..., None]
                )
                wy = row - top if q else 1 - (row - top)
                wx = column - left if s else 1 - (column - left)
                y[:, r, k] += (m * wy * wx)[..., None] * v
                along = (v * g).sum(-1)
                dmask[:, r, k, :, p] += wy * wx * along
                doffset[:, r, k, :, p, 0] += np.where(
                    column > -1, offset_scale * m * wy * (2 * s - 1) * along, 0
                )
                doffset[:, r, k, :, p, 1] += np.where(
                    row > -1, offset_scale * m * wx * (2 * q - 1) * along, 0
                )
                np.add.at(
                    dx,
                    (at_b, np.clip(top + q, 0, h - 1), np.clip(left + s, 0, w - 1), at_g),
                    (m * wy * wx * inside)[..., None] * g,
                )
    return y.reshape(*y.shape[:3], c), dx.reshape(b, h, w, c), doffset, dmask


def inputs(size, *, groups=2, width=3, spread=1.5, batch=2, seed=0, **settings):
    rng = np.random.default_rng(seed)
    kernel, rest = (
        settings.get("kernel", 3),
        {k: v for k, v in settings.items() if k in ("stride", "pad", "dilation")},
    )
    out = [op.output_size(n, kernel=kernel, **rest) for n in size]
    p = kernel**2 - settings.get("remove_center", False)
    offset = spread * rng.normal(size=(batch, *out, groups, p, 2))
    offset[rng.random(offset.shape) < 0.1] *= 20  # some leave the image, some by far
    near = (
        np.abs(
            offset * settings.get("offset_scale", 1.0)
            - np.round(offset * settings.get("offset_scale", 1.0))
        )
        < 0.01
    )
    offset += 0.03 * near  # a kink is no place to compare slopes
    mask = rng.dirichlet(np.ones(p), size=(batch, *out, groups))
    arrays = (
        rng.normal(size=(batch, *size, groups * width)),
        offset,
        mask,
        rng.normal(size=(batch, *out, groups * width)),
    )
    return tuple(a.astype(np.float32) for a in arrays)


@functools.cache
def compiled(settings):
    def both(x, offset, mask, ct):
        y, back = jax.vjp(lambda *a: op.dcnv3(*a, **dict(settings)), x, offset, mask)
        return y, *back(ct)

    return jit(both)


def run(x, offset, mask, ct, **settings):
    return compiled(tuple(sorted(settings.items())))(x, offset, mask, ct)


def compare(arrays, methods=METHODS, tolerance=1e-5, **settings):
    wanted = reference(*arrays, **settings)
    for method in methods:
        for name, ours, theirs in zip(
            ("y", "dx", "doffset", "dmask"),
            run(*arrays, method=method, **settings),
            wanted,
            strict=True,
        ):
            assert ours.shape == theirs.shape
            np.testing.assert_allclose(
                ours,
                theirs,
                rtol=0,
                atol=tolerance * np.abs(theirs).max(),
                err_msg=f"{method} {name}",
            )


CASES = [
    {},
    {"offset_scale": 2.0, "remove_center": True, "stride": 2, "pad": 0},
    {"kernel": 2, "dilation": 3, "pad": 2, "groups": 3},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_value_and_gradients(settings):
    settings = {"groups": 2, **settings}
    # The kernel gets the positions of samples and none of these settings.
    methods = [m for m in METHODS if m != "kernel" or len(settings) == 1]
    compare(inputs((7, 9), **settings), methods=methods, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("groups", (1, 4))
@pytest.mark.parametrize("kernel", (1, 2, 3, 5))
@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("dilation", (1, 2))
def test_every_combination(kernel, stride, dilation, groups):
    for pad, scale, without in itertools.product((0, 2), (0.5, 2.0), {False, kernel in (3, 5)}):
        settings = {
            "kernel": kernel,
            "stride": stride,
            "dilation": dilation,
            "groups": groups,
            "pad": pad,
            "offset_scale": scale,
        }
        settings["remove_center"] = without
        # The kernel gets the positions of samples and none of these settings.
        compare(
            inputs((11, 10), **settings),
            methods=tuple(m for m in METHODS if m != "kernel"),
            **settings,
        )


@pytest.mark.slow
@pytest.mark.parametrize("size", ((12, 12), (24, 24), (56, 56)))
def test_maps_of_the_published_sizes(size):
    compare(inputs(size, groups=2, width=16, batch=1), groups=2)


def test_the_largest_offsets_read_nothing_and_stop_nothing():
    x, offset, mask, ct = inputs((7, 9))
    offset[...] = np.array([1e30, -1e30])
    for method in METHODS:
        assert all(
            not np.asarray(a).any() for a in run(x, offset, mask, ct, groups=2, method=method)
        ), method


def test_the_start_is_a_mean_with_zeros_around_and_no_gradient_from_outside():
    x, offset, mask, ct = inputs((7, 9))
    offset[...], mask[...] = 0, 1 / 9
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    mean = sum(padded[:, i : i + 7, j : j + 9] for i in range(3) for j in range(3)) / 9
    seen = {}
    for method in METHODS:
        y, _, seen[method], _ = run(x, offset, mask, ct, groups=2, method=method)
        np.testing.assert_allclose(y, mean, atol=1e-6)
        # Golden: rows of coordinate -1 get no gradient in the published operator. Point 0 is (-1,
        # -1).
        assert (
            not np.asarray(seen[method])[:, 0, :, :, 0, 1].any()
            and not np.asarray(seen[method])[:, :, 0, :, 0, 0].any()
        )
    np.testing.assert_allclose(seen["dense"], seen["gather"], atol=1e-5)
    np.testing.assert_allclose(seen["band"], seen["gather"], atol=1e-5)


def test_a_nan_offset_is_seen_at_the_end():
    x, offset, mask, ct = inputs((7, 9))
    offset[1, 5, 2, 0, 3, 1] = np.nan
    for method in METHODS:
        y = run(x, offset, mask, ct, groups=2, method=method)[0]
        assert np.isnan(y[1, 5, 2, :3]).all(), method


def test_bfloat16_keeps_exact_coordinates():
    x, offset, mask, ct = inputs((40, 3), groups=1, batch=1, spread=0.4)
    wanted = reference(
        *(np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, offset, mask, ct)),
        groups=1,
    )
    for method in METHODS:
        found = run(
            *(jnp.asarray(a, jnp.bfloat16) for a in (x, offset, mask, ct)), groups=1, method=method
        )
        assert all(a.dtype == jnp.bfloat16 for a in found)
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(
                np.asarray(ours, np.float64), theirs, atol=0.02 * np.abs(theirs).max(), rtol=0.02
            )


def test_dense_forms_gather_nothing_on_a_tpu():
    x, offset, mask, ct = inputs((8, 8), groups=2)
    for method in METHODS:
        both = jax.jit(
            lambda *a, m=method: jax.vjp(lambda *b: op.dcnv3(*b, groups=2, method=m), *a[:3])[1](
                a[3]
            )
        )
        text = both.trace(x, offset, mask, ct).lower(lowering_platforms=("tpu",)).as_text()
        assert ("gather" in text or "scatter" in text) == (method in ("fused", "gather"))


def test_flat_offsets_and_masks_are_the_same():
    x, offset, mask, ct = inputs((4, 4), groups=2)
    a = op.dcnv3(x, offset, mask, groups=2)
    b = op.dcnv3(x, offset.reshape(2, 4, 4, -1), mask.reshape(2, 4, 4, -1), groups=2)
    np.testing.assert_array_equal(a, b)


def test_what_does_not_fit_is_refused():
    x, offset, mask, _ = inputs((4, 4), groups=2)
    with pytest.raises(ValueError, match=r"offset has shape .*\(2, 4, 4, 2, 8, 2\)"):
        op.dcnv3(x, offset, mask, groups=2, remove_center=True)
    with pytest.raises(ValueError, match="6 channels.*4 groups"):
        op.dcnv3(x, offset, mask, groups=4)
    with pytest.raises(ValueError, match="even|odd"):
        op.points(4, remove_center=True)
    with pytest.raises(ValueError, match="'sparse'.*dense"):
        op.dcnv3(x, offset, mask, groups=2, method="sparse")


def test_a_processor_looks_up_and_a_tpu_multiplies():
    x, offset, mask, ct = inputs((8, 8), groups=2, width=16)
    step = jax.jit(lambda *a: jax.vjp(lambda *b: op.dcnv3(*b, groups=2), *a[:3])[1](a[3])).trace(
        x, offset, mask, ct
    )
    assert "scatter" not in step.lower(lowering_platforms=("tpu",)).as_text()
    assert "scatter" in step.lower(lowering_platforms=("cpu",)).as_text()
    auto, fused = (
        run(x, offset, mask, ct, groups=2, method=method) for method in ("auto", "fused")
    )
    for ours, theirs in zip(auto, fused, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_innermost_loop_of_the_lookup_is_over_the_channels_of_a_group():
    """Where the compiler fuses the loops with the reshape behind them, the fusion has the shape of
    the whole map, and is slow."""
    x, offset, mask, _ = inputs((10, 10), groups=2, width=16)
    text = jax.jit(functools.partial(op.dcnv3, groups=2)).lower(x, offset, mask).compile().as_text()
    # What has three operands: the map, the cells and their shares. The branch that is never taken
    # has the same shape, of zeros.
    shapes = re.findall(r"= (f32\[[\d,]*\])\S* fusion\([^,)]+,[^,)]+,", text)
    assert "f32[2,100,2,16]" in shapes, shapes


def test_few_images_at_a_time_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch):
    arrays = inputs((5, 5), batch=6)
    whole = run(*arrays, groups=2, method="fused")
    monkeypatch.setattr(dcnv3_cpu, "_BYTES", 2 * 25 * 6 * 16)  # two images
    few = jax.jit(
        lambda *a: jax.vjp(lambda *b: op.dcnv3(*b, groups=2, method="fused"), *a[:3])[1](a[3])
    )
    assert "tensor<3x2x25x2x9xf32>" in few.lower(*arrays).as_text()
    for ours, theirs in zip(few(*arrays), whole[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6 * np.abs(theirs).max())
