"""Pyramids and UperNet against torch, transformers and torchvision
(`tests/data/make_segmentation_heads.py`)."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.models.dense import pixel_heads, pyramid, task_heads, upernet
from m3i_jax.models.dense.map_sampling import resize_bilinear
from m3i_jax.models.dense.pyramid import PyramidConfig
from m3i_jax.models.dense.upernet import convolve_resized
from m3i_jax.models.intern_image_layer import convolve
from m3i_jax.profiling.flops import count_flops

FILE = pathlib.Path(__file__).parents[2] / "data" / "dense" / "segmentation_heads.npz"
STRIDES, CHANNELS = (4, 8, 16, 32), (3, 5, 4, 8)
HEAD = schema.Segment(width=6, aux_width=4, dropout=0.3)
PYRAMIDS = {
    "simple_16": ("simple", (4, 8, 16, 32, 64), ((16, 12),)),
    "simple_8": ("simple", (4, 8, 16, 32), ((8, 8),)),
    "rescale_16": ("rescale", STRIDES, ((16, 6),) * 4),
    "rescale_8": ("rescale", STRIDES, ((8, 6),)),
    "lateral": ("lateral", (*STRIDES, 64), tuple(zip(STRIDES, CHANNELS, strict=True))),
}


def config_of(name: str) -> PyramidConfig:
    kind, strides, sources = PYRAMIDS[name]
    return PyramidConfig(kind=kind, strides=strides, sources=sources, width=6)


@functools.cache
def stored() -> dict[str, np.ndarray]:
    with np.load(FILE) as file:
        return dict(file)


def tree(prefix: str) -> dict:
    """The arrays below a name, as nested dicts."""
    made: dict = {}
    for path, value in stored().items():
        if path.startswith(prefix + "/"):
            *parts, last = path.removeprefix(prefix + "/").split("/")
            node = made
            for part in parts:
                node = node.setdefault(part, {})
            node[last] = value
    return made


def listed(prefix: str) -> list[np.ndarray]:
    found = tree(prefix)
    return [found[str(i)] for i in range(len(found))]


def run_upernet(params, statistics, maps, train):
    by_stride = dict(zip(STRIDES, maps, strict=True))
    *outputs, new = upernet.apply(
        HEAD, params, statistics, by_stride, train=train, uniform_BxC=stored()["uniform"]
    )
    return [y for y in outputs if y is not None], new


def run_pyramid(name, params, statistics, maps, train):
    made, new = pyramid.apply(config_of(name), params, statistics, maps, train=train)
    return list(made.values()), new


RUNS = {"upernet": run_upernet} | {name: functools.partial(run_pyramid, name) for name in PYRAMIDS}


@functools.cache
def results(name: str):
    """Outputs in evaluation; outputs, statistics and gradients in training."""
    run = RUNS[name]

    @jax.jit
    def both(params, statistics, maps, grads):
        evaluated, kept = run(params, statistics, maps, False)
        outputs, back, new = jax.vjp(
            lambda params, maps: run(params, statistics, maps, True), params, maps, has_aux=True
        )
        return evaluated, kept, outputs, new, back(grads)

    given = tree(f"{name}/params"), tree(f"{name}/before"), listed(f"{name}/map")
    return both(*given, listed(f"{name}/g"))


def close(ours, wanted, atol):
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=atol), ours, wanted)


@pytest.mark.parametrize("name", RUNS)
def test_values_and_statistics_in_evaluation(name):
    evaluated, kept, *_ = results(name)
    wanted = listed(f"{name}/eval")
    close(evaluated, wanted[: len(evaluated)], 1e-5)
    assert len(evaluated) == (1 if name == "upernet" else len(wanted))
    close(kept, tree(f"{name}/before"), 0)


@pytest.mark.parametrize("name", RUNS)
def test_values_and_statistics_in_training(name):
    _, _, outputs, new, _ = results(name)
    close(outputs, listed(f"{name}/train"), 1e-5)
    close(new, tree(f"{name}/after"), 1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_gradients(name):
    dparams, dmaps = results(name)[-1]
    close(dmaps, listed(f"{name}/dmap"), 1e-4)
    close(dparams, tree(f"{name}/dparams"), 1e-4)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(dmaps))


@pytest.mark.parametrize("name", PYRAMIDS)
def test_a_new_pyramid_has_the_tree_of_the_reference(name):
    params, statistics = jax.jit(lambda key: pyramid.init(config_of(name), key))(jax.random.key(0))
    same = lambda a, b: jax.tree.map(jnp.shape, a) == jax.tree.map(jnp.shape, b)
    assert same(params, tree(f"{name}/params")) and same(statistics, tree(f"{name}/before"))
    assert list(config_of(name).channels.values()) == [y.shape[-1] for y in listed(f"{name}/eval")]


def test_first_values():
    """Bounds and standard deviations of the references, on layers of a width that shows them."""
    wide = PyramidConfig(kind="simple", strides=(4, 8, 16, 32), sources=((16, 64),), width=32)
    params, _ = pyramid.init(wide, jax.random.key(0))
    fine = params["stride_4"]
    for layer, fan in (("deconv_0", 4 * 32), ("deconv_1", 4 * 16), ("conv_0", 16), ("conv_1", 288)):
        for values in fine[layer].values():
            bound = fan**-0.5
            assert 0.7 * bound < np.abs(values).max() <= bound * (1 + 1e-6), layer
    settings = schema.Segment(width=32, aux_width=16)
    params, statistics = upernet.init(settings, dict.fromkeys(STRIDES, 32), 40, jax.random.key(1))
    stds = {"fuse": (2 / (9 * 32)) ** 0.5, "lateral_4": (2 / 32) ** 0.5, "classifier": 0.01}
    for layer, std in (stds | {"aux": (2 / (9 * 16)) ** 0.5}).items():
        assert np.std(params[layer]["kernel"]) == pytest.approx(std, rel=0.1), layer
    assert not np.any(params["classifier"]["bias"]) and np.all(params["fuse"]["scale"] == 1)
    assert not np.any(statistics["pool_1"]["mean"]) and np.all(statistics["aux"]["variance"] == 1)


def count(*trees) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(trees))


def as_written(kernel, x, size):
    return convolve({"kernel": kernel}, resize_bilinear(x, size), 1)


@pytest.mark.parametrize("size", [(7, 12), (8, 8), (3, 24), (4, 6)])
def test_the_convolution_of_an_enlarged_map(size):
    """Larger by any factor, smaller and of the same size: value and gradients."""
    rng = np.random.default_rng(2)
    x, kernel, g = (
        rng.normal(size=shape).astype("float32")
        for shape in ((2, 4, 6, 5), (3, 3, 5, 3), (2, *size, 3))
    )

    @jax.jit
    def both(x, kernel, g):
        runs = []
        for form in (convolve_resized, as_written):
            y, back = jax.vjp(lambda kernel, x, form=form: form(kernel, x, size), kernel, x)
            runs.append((y, *back(g)))
        return runs

    for ours, wanted in zip(*both(x, kernel, g), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=2e-5, rtol=1e-5)


def test_parameters_and_flops_of_vit_b(monkeypatch):
    """At 512 pixels, 150 categories: neck 7.1 M and 29 GFLOP, head 68.0 M and, with convolutions of
    enlarged maps, 967, aux 1.8 M and 4; the simple pyramid at 1024: 143 GFLOP, and with ViTDet's
    encoder 91 449 024 parameters."""
    key, image = jax.random.key(0), jnp.float32
    neck = PyramidConfig(kind="rescale", strides=STRIDES, sources=((16, 768),) * 4)
    params, statistics = jax.eval_shape(lambda key: pyramid.init(neck, key), key)
    assert count(params) == 7_081_728
    maps = [jax.ShapeDtypeStruct((1, 32, 32, 768), image)] * 4
    call = lambda *given: pyramid.apply(neck, *given, train=False)[0]
    assert count_flops(call, params, statistics, maps).total == pytest.approx(29e9, rel=0.01)

    settings, channels = schema.Segment(), neck.channels
    params, statistics = jax.eval_shape(lambda k: upernet.init(settings, channels, 150, k), key)
    aux = count(params["aux"], params["aux_classifier"])
    assert aux == pytest.approx(1.8e6, rel=0.01)
    assert count(params) - aux == pytest.approx(68.0e6, rel=1e-3)
    maps = {s: jax.ShapeDtypeStruct((1, 512 // s, 512 // s, 768), image) for s in STRIDES}

    def flops(train):
        call = lambda *given: upernet.apply(settings, *given, train=train)[:2]
        return count_flops(call, params, statistics, maps).total

    assert flops(True) - flops(False) == pytest.approx(3.7e9, rel=0.05)  # without padding: 3.6
    assert flops(False) == pytest.approx(507e9, rel=0.01)
    monkeypatch.setattr(upernet, "convolve_resized", as_written)
    assert flops(False) == pytest.approx(967e9, rel=0.01)

    simple = PyramidConfig(kind="simple", strides=(*STRIDES, 64), sources=((16, 768),), width=256)
    params, statistics = jax.eval_shape(lambda key: pyramid.init(simple, key), key)
    blocks = 12 * (3 * 768 + 768 + 2 * 3072) * 768 + 12 * (3 * 768 + 768 + 3072 + 768 + 4 * 768)
    tables = 2 * 64 * (4 * 127 + 8 * 27)
    encoder = blocks + tables + 768 * 768 + 768 + 197 * 768
    assert count(params) + encoder == 91_449_024
    map_ = {16: jax.ShapeDtypeStruct((1, 64, 64, 768), image)}
    call = lambda *given: pyramid.apply(simple, *given, train=False)[0]
    assert count_flops(call, params, statistics, map_).total == pytest.approx(143e9, rel=0.01)


def test_the_linear_head_reads_the_coarsest_map():
    settings = schema.Segment(head="linear")
    channels = {8: 3, 16: 4}
    params, statistics = task_heads.segmentation_head(settings).init(
        settings, channels, 5, jax.random.key(0)
    )
    maps = {
        s: np.random.default_rng(s).normal(size=(2, 3, 2, c)).astype("f")
        for s, c in channels.items()
    }
    logits, aux, new = pixel_heads.linear_cell_logits(
        settings, params, statistics, maps, train=True
    )
    wanted = maps[16] @ np.asarray(params["classifier"]["kernel"])
    np.testing.assert_allclose(logits, wanted, atol=1e-6)
    assert logits.dtype == jnp.float32 and aux is None and new == {}


def test_bfloat16_maps_give_float32_logits_and_statistics():
    given = tree("upernet/params"), tree("upernet/before"), listed("upernet/map")
    maps = [jnp.asarray(x, jnp.bfloat16) for x in given[2]]
    (logits, _), new = jax.jit(run_upernet, static_argnums=3)(given[0], given[1], maps, True)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype("float32")}
    error = np.abs(logits - stored()["upernet/train/0"]).mean()
    assert error < 0.05 * np.abs(stored()["upernet/train/0"]).mean()


@pytest.mark.parametrize(
    ("kind", "strides", "sources", "words"),
    [
        ("plain", (4,), ((4, 8),), "'plain'; it must be one of simple"),
        ("simple", (4, 8), ((14, 8),), "stride 4 cannot be made from one of 14"),
        ("simple", (4, 8), ((8, 8), (16, 8)), "reads 1 maps of one stride"),
        ("lateral", (4, 8, 64), ((4, 8), (8, 8)), "no maps of the strides .64."),
        ("none", (4, 8), ((4, 8),), "no maps of the strides .8."),
        ("simple", (4, 8, 32), ((8, 8),), "twice the one before, and 32 follows 8"),
        ("lateral", (4, 16), ((4, 8), (8, 8), (16, 8)), "twice the one before, and 16 follows 4"),
        ("lateral", (4, 8, 32), ((4, 8), (8, 8), (16, 8)), "twice the one before, and 32 follows"),
    ],
)
def test_strides_that_do_not_follow(kind, strides, sources, words):
    with pytest.raises(ValueError, match=words):
        PyramidConfig(kind=kind, strides=strides, sources=sources)
