"""Reading maps at places against torch and torchvision (`tests/data/make_map_sampling.py`)."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.models.dense import map_sampling
from m3i_jax.models.dense.mask_points import read_maps
from m3i_jax.profiling.flops import count_flops

FILE = pathlib.Path(__file__).parents[2] / "data" / "dense" / "map_sampling.npz"
STRIDES, OUT = (4, 8, 16, 32), (7, 3)
CANONICAL = (24, 8)


@functools.cache
def stored() -> dict[str, np.ndarray]:
    with np.load(FILE) as file:
        return dict(file)


@jax.jit(static_argnums=0)
def value_and_pullback(function, x, g):
    y, back = jax.vjp(function, x)
    return y, back(g)[0]


def agrees(name, function, x):
    wanted = stored()
    y, dx = value_and_pullback(function, x, wanted[f"{name}/g"])
    np.testing.assert_allclose(y, wanted[f"{name}/y"], atol=1e-5)
    np.testing.assert_allclose(dx, wanted[f"{name}/dx"], atol=1e-4)


def trace_anew():
    for function in (
        *(map_sampling.roi_align, map_sampling.multilevel_roi_align),
        jax.jit(batch_by_vmap),
    ):
        function.clear_cache()


@pytest.fixture(params=["windows", "products", "parts"])
def form(request, monkeypatch):
    """How RoIAlign is computed: on one CPU, where the partitioner splits it, or some boxes at a
    time."""
    if request.param == "windows":  # the mesh is part of the key of a program
        with jax.set_mesh(parallel.make_mesh((1, 1, 1), jax.devices()[:1])):
            yield request.param
    elif request.param == "parts":  # the number is not
        monkeypatch.setattr(map_sampling, "_AT_ONCE", 7000)
        trace_anew()
        yield request.param
        trace_anew()
    else:
        yield request.param


def test_roi_align(form):
    """For each stride and number of bins, in one program."""
    wanted = stored()
    names = {(stride, out): f"roi/{stride}/{out}" for stride in STRIDES for out in OUT}

    @jax.jit
    def run(maps, boxes, grads):
        found = {}
        for (stride, out), g in grads.items():
            align = functools.partial(map_sampling.roi_align, out=out, stride=stride)
            y, back = jax.vjp(lambda x, align=align: align(x, boxes), maps[stride])
            found[stride, out] = y, back(g)[0]
        return found

    maps = {stride: wanted[f"map/{stride}"] for stride in STRIDES}
    found = run(maps, wanted["boxes"], {at: wanted[f"{name}/g"] for at, name in names.items()})
    for at, name in names.items():
        y, dx = found[at]
        np.testing.assert_allclose(y, wanted[f"{name}/y"], atol=1e-5, err_msg=name)
        np.testing.assert_allclose(dx, wanted[f"{name}/dx"], atol=1e-4, err_msg=name)


def test_forms_are_those_that_their_names_say(form):
    data = stored()
    traced = jax.make_jaxpr(lambda x: map_sampling.roi_align(x, data["boxes"], 7, 4))
    program = str(traced(data["map/4"]))
    assert ("while[" in program) == (form == "windows")
    assert ("scan[" in program) == (form != "products")


def batch():
    """Maps of eight images of 96 x 128 pixels, boxes, and gradients of what is read in 3 bins."""
    rng = np.random.default_rng(3)
    maps = {s: rng.normal(size=(8, 96 // s, 128 // s, 2)).astype("float32") for s in (8, 16)}
    boxes = np.stack([stored()["boxes"][rng.permutation(12)[:7]] for _ in range(8)])
    return maps, boxes, rng.normal(size=(8, 7, 3, 3, 2)).astype("float32")


def batch_by_vmap(maps, boxes, grad):
    align = lambda maps, boxes: map_sampling.multilevel_roi_align(maps, boxes, 3, CANONICAL)
    y, back = jax.vjp(lambda maps: jax.vmap(align)(maps, boxes), maps)
    return y, back(grad)[0]


def test_images_of_a_batch(form):
    """As each by itself, under one jax.vmap and under two."""
    maps, boxes, grad = batch()
    y, dmaps = jax.jit(batch_by_vmap)(maps, boxes, grad)

    @jax.jit
    def one(maps, boxes, grad):
        align = lambda maps: map_sampling.multilevel_roi_align(maps, boxes, 3, CANONICAL)
        y, back = jax.vjp(align, maps)
        return y, back(grad)[0]

    for i in (0, 5):
        alone, dalone = one({s: x[i] for s, x in maps.items()}, boxes[i], grad[i])
        np.testing.assert_allclose(y[i], alone, atol=1e-5)
        for stride, dx in dalone.items():
            np.testing.assert_allclose(dmaps[stride][i], dx, atol=1e-5)
    in_pairs = lambda x: x.reshape(4, 2, *x.shape[1:])
    pairs = jax.tree.map(in_pairs, (maps, boxes, grad))
    align = lambda maps, boxes: map_sampling.multilevel_roi_align(maps, boxes, 3, CANONICAL)
    nested = jax.jit(jax.vmap(jax.vmap(align)))(*pairs[:2])
    np.testing.assert_allclose(nested.reshape(y.shape), y, atol=1e-5)


def test_images_on_eight_devices():
    maps, boxes, grad = batch()
    wanted = jax.jit(batch_by_vmap)(maps, boxes, grad)
    mesh = parallel.make_mesh((8, 1, 1))
    with jax.set_mesh(mesh):
        split = jax.device_put((maps, boxes, grad), parallel.data_sharding(mesh))
        program = jax.jit(batch_by_vmap).lower(*split).compile()
        ours = program(*split)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, wanted)
    text = program.as_text()
    assert "while(" in text and not any(word in text for word in ("all-gather", "all-reduce"))


def test_the_products_of_reading_are_no_work_of_the_model(form):
    assert count_flops(batch_by_vmap, *batch()).total == 0


@pytest.mark.parametrize(
    "form",
    ["windows", *(pytest.param(n, marks=pytest.mark.slow) for n in ("products", "parts"))],
    indirect=True,
)
def test_a_program_for_any_number_of_images(form):
    maps, boxes, grad = batch()
    (b,) = jax.export.symbolic_shape("b")
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype), (maps, boxes, grad)
    )
    exported = jax.export.export(jax.jit(batch_by_vmap), platforms=["cpu"])(*shapes)
    wanted = jax.jit(batch_by_vmap)(maps, boxes, grad)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        exported.call(maps, boxes, grad),
        wanted,
    )


def test_a_box_has_no_gradient_and_none_without_area_breaks_that_of_the_map(form):
    data = stored()
    total = lambda x, boxes: jnp.square(map_sampling.roi_align(x, boxes, 3, 8)).sum()
    dx, dboxes = jax.jit(jax.grad(total, (0, 1)))(data["map/8"], data["boxes"])
    assert np.isfinite(dx).all() and np.abs(dx).max() > 0.1 and not np.any(dboxes)


def test_long_boxes_take_all_their_samples(form):
    """A row of 300 cells in 2 bins has 150 samples a bin: here each cell is hit at its centre."""
    map_HxWxC = np.random.default_rng(0).normal(size=(1, 300, 1)).astype(np.float32)
    y = map_sampling.roi_align(map_HxWxC, jnp.array([[0.0, 0, 300, 1]]), 2, 1)
    halves = map_HxWxC.reshape(2, 150).mean(1)
    np.testing.assert_allclose(y[0, 0, :, 0], halves, atol=1e-6)


def test_each_box_is_read_from_the_map_of_its_area(form):
    data = stored()
    boxes, levels = data["boxes"], data["levels"]
    assert set(levels) == {0, 1, 2, 3}
    shares = map_sampling.level_shares(boxes, STRIDES, CANONICAL)
    np.testing.assert_array_equal(shares.argmax(1), levels)
    np.testing.assert_array_equal(shares.sum(1), 1)
    maps = {stride: data[f"map/{stride}"] for stride in STRIDES}
    read = map_sampling.multilevel_roi_align(maps, boxes, 7, CANONICAL)
    for i, level in enumerate(levels):
        wanted = data[f"roi/{STRIDES[level]}/7/y"][i]
        np.testing.assert_allclose(read[i], wanted, atol=1e-5)


@pytest.mark.parametrize("side", [7, 28, 56, 112, 224, 448, 896])
def test_a_box_on_the_limit_is_read_from_the_coarser_map(side):
    """As by floor(4 + log2(side / 224 + 1e-8)) in exact arithmetic."""
    boxes = jnp.array([[8.0, 16, 8 + side, 16 + side], [8, 16, 7.99 + side, 16 + side]])
    level = map_sampling.level_shares(boxes, STRIDES).argmax(1)
    exact = int(np.clip(np.log2(side / 7) - 3, 0, 3))
    assert level.tolist() == [exact, int(np.clip(np.ceil(np.log2(side / 7)) - 4, 0, 3))]


@pytest.mark.parametrize("size", [(5, 5), (3, 16), (7, 7)])
def test_resize(size):
    agrees(
        f"resize/{size[0]}x{size[1]}",
        lambda x: map_sampling.resize_bilinear(x, size),
        stored()["x"],
    )


@pytest.mark.parametrize("out", [1, 2, 3, 6])
def test_adaptive_mean(out):
    agrees(f"mean/{out}", lambda x: map_sampling.adaptive_mean(x, out), stored()["x"])


def test_points():
    data = stored()
    y, back = jax.vjp(map_sampling.sample_points, data["x"][0], data["points"])
    dx, dpoints = back(data["points/g"])
    np.testing.assert_allclose(y, data["points/y"], atol=1e-5)
    np.testing.assert_allclose(dx, data["points/dx"], atol=1e-4)
    np.testing.assert_allclose(dpoints, data["points/dpoints"], atol=1e-4)


def test_every_map_at_points_of_its_own():
    """Inside, outside, on the border and on centres of cells: `sample_points` of each map."""
    r = np.random.default_rng(4)
    maps, g = r.normal(size=(3, 5, 7)).astype("f4"), r.normal(size=(3, 60)).astype("f4")
    points = r.uniform(-0.6, 1.6, (3, 60, 2)).astype("f4")
    points[:, :20] = r.integers(-2, 18, (3, 20, 2)) / np.array([14, 10], "f4")
    each = jax.vmap(lambda x, at: map_sampling.sample_points(x[..., None], at)[:, 0])

    @jax.jit
    def both(x):
        return [jax.vjp(lambda x, f=f: f(x, points), x) for f in (read_maps, each)]

    (y, back), (wanted, wanted_back) = both(maps)
    assert np.any(wanted == 0) and np.any(wanted != 0)
    np.testing.assert_allclose(y, wanted, atol=1e-6)
    np.testing.assert_allclose(back(g)[0], wanted_back(g)[0], atol=1e-5)


def test_pasted_masks():
    data = stored()
    pasted = map_sampling.paste_masks(data["masks"], data["boxes"], (96, 128))
    np.testing.assert_allclose(pasted, data["pasted"], atol=1e-4)
    assert (data["pasted"].max((1, 2)) > 0).sum() >= 9


def test_mask_targets():
    data = stored()
    targets = map_sampling.mask_targets(data["stored"], data["boxes"], data["proposals"])
    decided = np.abs(data["targets"] - 0.5) > 1e-4
    assert decided.mean() > 0.98 and 0.1 < targets.mean() < 0.9
    np.testing.assert_array_equal(targets[decided], data["targets"][decided] >= 0.5)


def test_bfloat16_maps_give_bfloat16(form):
    data = stored()
    x = jnp.asarray(data["map/8"], jnp.bfloat16)
    y = map_sampling.roi_align(x, data["boxes"], 7, 8)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), data["roi/8/7/y"], atol=0.05)


def test_the_rule_outside_is_named():
    with pytest.raises(ValueError, match="'edge'.*zero, border"):
        map_sampling.interpolation_matrix(jnp.zeros(1), 2, outside="edge")
