"""Maps of the ViT for dense tasks against transformers' VitDet and Beit, in float64, whose weights
are read under the names of detectron2 and mmsegmentation (tests/data/make_vitdet.py); and what
those do not show: compile time, scan, chunks, first values, paths."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.interop import vit_weights
from m3i_jax.models import backbones, vit, vit_maps
from m3i_jax.profiling import flops
from m3i_jax.training import optimizer
from tests import toy

DENSE = pathlib.Path(__file__).parent.parent / "data" / "dense"
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
ENCODER = schema.Encoder(
    patch_size=4,
    width=16,
    depth=4,
    heads=2,
    mlp_ratio=2.0,
    positions="learned",
    freeze_patch_embed=False,
)
MODEL = schema.Model(encoder=ENCODER, dtype="float32")
# window sides that do not divide the map, and no regular pattern
VITDET = schema.Maps(window=3, global_blocks=(2,), relative="decomposed", image_size=16)
BEIT = schema.Maps(relative="table", blocks=(0, 2, 3), layer_scale=0.5)
KINDS = {"vitdet_backbone": (VITDET, 32), "beit": (BEIT, 16)}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.removeprefix("encoder/").split("/")
        functools.reduce(lambda node, part: node.setdefault(part, {}), parents, tree)[name] = value
    return tree


def converted(file: Any, prefix: str) -> dict[str, Any]:
    arrays = {
        name.removeprefix(prefix): file[name] for name in file.files if name.startswith(prefix)
    }
    found = vit_weights.load_vit(arrays)
    assert not found.unknown and not found.notes
    return found.arrays


@functools.cache
def reference(kind: str) -> tuple[Any, dict[str, Any]]:
    file = np.load(DENSE / f"{kind}.npz")
    return file, nested(converted(file, "weights/"))


def close(got: Any, wanted: Any, tolerance: float) -> None:
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * max(1, np.abs(wanted).max()))


SETTINGS = [("none", False), ("full", True)]
# Each kind with either case, and with either setting.
BRIEF = (
    ("vitdet_backbone", 0, "none"),
    ("vitdet_backbone", 1, "full"),
    ("beit", 0, "full"),
)


@pytest.mark.parametrize(
    ("kind", "case", "remat", "scan"),
    [
        pytest.param(
            kind, case, *chosen, marks=() if (kind, case, chosen[0]) in BRIEF else pytest.mark.slow
        )
        for kind in KINDS
        for case in (0, 1)
        for chosen in SETTINGS
    ],
)
def test_maps_and_gradients_are_those_of_the_reference(
    kind: str, case: int, remat: str, scan: bool
) -> None:
    """Case 1 is not square and of another size than the tables, which are resized."""
    file, params = reference(kind)
    maps, size = KINDS[kind]
    cls = kind == "beit"
    model = dataclasses.replace(MODEL, remat=remat, scan=scan)
    names = [name for name in file.files if name.startswith(f"case{case}/map")]
    noise = [file[f"case{case}/noise{i}"] for i in range(len(names))]

    def total(params: Any) -> tuple[jax.Array, Any]:
        outputs = vit_maps.stages(model, params, file[f"case{case}/image"], maps=maps, size=size)
        return sum((m * n).sum() for m, n in zip(outputs, noise, strict=True)), outputs

    # ViTDet's table has a row for cls and no token
    assert ("cls_token" in params) == cls
    (_, outputs), gradients = jit(jax.value_and_grad(total, has_aux=True))(params)
    for name, output in zip(names, outputs, strict=True):
        np.testing.assert_allclose(output, file[name], rtol=0, atol=1e-5)
    wanted = converted(file, f"case{case}/gradients/")
    paths = {
        "encoder/" + "/".join(k.key for k in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
    }
    assert paths.keys() == wanted.keys()
    for path, gradient in wanted.items():
        if kind == "beit" and path.endswith("qkv/bias"):  # Beit's keys have no bias
            gradient = gradient.reshape(4, 3, 16)[:, ::2]
            close(np.asarray(paths[path]).reshape(4, 3, 16)[:, ::2], gradient, 1e-4)
        else:
            close(paths[path], gradient, 1e-4)


def of_reference(name: str) -> tuple[Any, dict[str, Any]]:
    """The encoder in a whole system of detectron2 or mmsegmentation, and its settings."""
    file = np.load(DENSE / f"{name}.npz")
    state = {k.removeprefix("state/"): file[k] for k in file.files if k.startswith("state/")}
    found = vit_weights.load_vit(state)
    assert not found.unknown and found.unused
    return found.settings, nested(found.arrays)


def normalised(images: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    augment = schema.Config().data.augment
    x = (images / 255 - np.asarray(augment.mean)) / np.asarray(augment.std)
    for image, (height, width) in zip(x, sizes, strict=True):
        image[height:], image[:, width:] = 0, 0
    return x.astype(np.float32)


def test_the_backbone_of_detectron2_itself() -> None:
    """In two windowed and two global blocks, for a square and for another image."""
    settings, params = of_reference("vitdet")
    assert settings["image_size"] == 64 and not settings["cls_token"]
    inputs, wanted = (np.load(DENSE / f"{name}.npz") for name in ("vitdet", "vitdet_maps"))
    maps = schema.Maps(window=3, global_blocks=(1, 3), relative="decomposed", image_size=64)
    sizes = {name: settings[name] for name in ("patch_size", "width", "depth", "mlp_ratio")}
    encoder = schema.Encoder(**sizes, heads=2, positions="learned")
    model = schema.Model(encoder=encoder, dtype="float32", scan=True)
    call = jit(lambda p, x: vit_maps.stages(model, p, x, maps=maps, size=128)[0])
    other = wanted["other_size/image"][None]
    for images, size, there in (
        (inputs["image"], inputs["size"], wanted["backbone"]),
        (other, np.array([other.shape[1:3]]), wanted["other_size/backbone"]),
    ):
        got = call(params, normalised(images, size)).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(got, there, rtol=0, atol=1e-5)


def test_the_backbone_of_mmsegmentation_itself() -> None:
    settings, params = of_reference("upernet")
    inputs, wanted = (np.load(DENSE / f"{name}.npz") for name in ("upernet", "upernet_values"))
    maps = schema.Maps(relative="table", layer_scale=1.0, blocks=(0, 1, 2, 3))
    names = ("patch_size", "width", "depth", "mlp_ratio", "cls_token", "final_norm")
    encoder = schema.Encoder(**{k: settings[k] for k in names}, heads=2, positions="learned")
    model = schema.Model(encoder=encoder, dtype="float32")
    x = normalised(inputs["image"], np.full((4, 2), 96))
    outputs = jit(lambda p, x: vit_maps.stages(model, p, x, maps=maps, size=96))(params, x)
    for i, got in enumerate(outputs):
        there = wanted[f"blocks/{i}"]
        np.testing.assert_allclose(got.transpose(0, 3, 1, 2), there, rtol=0, atol=1e-5)


def init(model: schema.Model, maps: schema.Maps, size: int, grid: int = 0) -> Any:
    start = lambda key: vit_maps.init_maps(model, maps, vit.init(model, key, grid=grid), size=size)
    return start


@functools.cache
def tiny() -> Any:
    model = dataclasses.replace(
        MODEL, encoder=dataclasses.replace(ENCODER, positions="sincos", final_norm=True)
    )
    return model, jit(lambda key: vit.init(model, key))(jax.random.key(0))


IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 20, 3)), jnp.float32)


@pytest.mark.parametrize("relative", ["table", "decomposed"])
def test_what_maps_add_starts_without_effect(relative: str) -> None:
    """On a pre-trained encoder: tables of zeros, and a layer scale of 1. Outputs of several blocks
    are those of encoders that end there, and the final norm is the last block's."""
    model, params = tiny()
    maps = schema.Maps(relative=relative, layer_scale=1.0, blocks=(1, 3))
    dense = vit_maps.init_maps(model, maps, params, size=16)
    assert ("cls_token" in dense) == (relative == "table")
    first, last = jit(lambda p, x: vit_maps.stages(model, p, x, maps=maps, size=16))(dense, IMAGES)
    if relative == "decomposed":  # its cls token takes no part
        model = dataclasses.replace(
            model, encoder=dataclasses.replace(model.encoder, cls_token=False)
        )
    (whole,) = jit(lambda p, x: vit_maps.stages(model, p, x, size=16))(params, IMAGES)
    np.testing.assert_allclose(last, whole, rtol=1e-5, atol=1e-5)
    short = dataclasses.replace(
        model, encoder=dataclasses.replace(model.encoder, depth=2, final_norm=False)
    )
    two = {**params, "blocks": jax.tree.map(lambda leaf: leaf[:2], params["blocks"])}
    (half,) = jit(lambda p, x: vit_maps.stages(short, p, x, size=16))(two, IMAGES)
    np.testing.assert_allclose(first, half, rtol=1e-5, atol=1e-5)


def test_maps_have_the_precision_of_the_model_and_a_frozen_patch_embedding_no_gradient() -> None:
    model, params = tiny()
    model = dataclasses.replace(
        model,
        dtype="bfloat16",
        encoder=dataclasses.replace(model.encoder, freeze_patch_embed=True),
    )
    dense = vit_maps.init_maps(model, VITDET, params, size=32)

    def total(params: Any) -> tuple[jax.Array, jax.Array]:
        (y,) = vit_maps.stages(model, params, IMAGES, maps=VITDET, size=32)
        return y.astype(jnp.float32).sum(), y

    gradients, y = jit(jax.grad(total, has_aux=True))(dense)
    assert y.dtype == jnp.bfloat16 and y.shape == (2, 3, 5, 16)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients["patch_embed"]))
    assert all(
        np.isfinite(np.asarray(leaf, np.float32)).all() and np.any(leaf)
        for leaf in jax.tree.leaves(gradients["relative"])
    )


def test_rates_and_decay_of_what_maps_add() -> None:
    """dense.md 2.9, 3.6: tables and layer scale count with their block; tables are decayed."""
    config = toy.settings(model__encoder__depth="4", optim__layer_decay="0.5")
    for path, above in {
        "relative/block0/rows": 4,
        "relative/block3/table": 1,
        "blocks/gamma1": [4, 3, 2, 1],
    }.items():
        np.testing.assert_array_equal(backbones.VIT.layers_above(config.model, path), above)
        np.testing.assert_array_equal(
            optimizer.lr_factor(config, f"encoder/{path}"), 0.5 ** np.asarray(above)
        )
    tree = jax.eval_shape(
        init(config.model, schema.Maps(relative="table", layer_scale=1.0), 32), jax.random.key(0)
    )
    mask = optimizer.decay_mask({"encoder": tree})["encoder"]
    assert mask["relative"]["block1"]["table"] and not mask["blocks"]["gamma1"]


def test_settings_that_do_not_fit() -> None:
    for changes, match in (
        ({"dense__maps__blocks": "(0,2)"}, "dense.maps.blocks: block 2 is beyond the last, 1"),
        ({"dense__maps__global_blocks": "(5,)"}, "global_blocks: block 5"),
        (
            {**toy.INTERN, "dense__maps__window": "7"},
            "dense.maps.window: 7 is a setting of the ViT",
        ),
    ):
        with pytest.raises(UserError, match=match):
            backbones.validate_backbone(toy.settings(**changes))


# ---- cost ----


@pytest.mark.parametrize("scan", [False, True])
def test_vit_b_of_vitdet_and_of_mmsegmentation(scan: bool) -> None:
    """Parameters and FLOPs of dense.md 2.8, 2.12 and 3.8, forward, without pyramid and heads; the
    size of the program in a scan does not grow with depth."""
    model = schema.Model(
        encoder=schema.Encoder(positions="learned", freeze_patch_embed=False), scan=scan
    )
    vitdet = schema.Maps(
        window=14, global_blocks=(2, 5, 8, 11), relative="decomposed", image_size=224
    )
    mmseg = schema.Maps(relative="table", layer_scale=1.0, blocks=(3, 5, 7, 11))
    for maps, size, parameters, gflop in (
        (vitdet, 1024, 91_449_024 - 5_560_000, 966),
        (mmseg, 512, 87_023_424, 214),
    ):
        start = init(model, maps, size, (maps.image_size or size) // 16)
        tree = jax.eval_shape(start, jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == parameters
        call = functools.partial(vit_maps.stages, model, maps=maps, size=size)
        images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        counted = flops.count_flops(call, tree, images).total / 1e9
        assert abs(counted / gflop - 1) < 0.01


def test_the_program_does_not_grow_with_depth() -> None:
    def equations(depth: int) -> int:
        model = dataclasses.replace(
            MODEL, scan=True, encoder=dataclasses.replace(ENCODER, depth=depth)
        )
        maps = schema.Maps(window=3, global_blocks=tuple(range(2, depth, 3)))
        tree = jax.eval_shape(init(model, maps, 32, 4), jax.random.key(0))
        call = functools.partial(vit_maps.stages, model, maps=maps, size=32)
        return str(jax.make_jaxpr(call)(tree, IMAGES)).count(" = ")

    assert equations(12) == equations(6)


def test_the_less_is_kept_the_less_memory() -> None:
    """A block's weights of attention, 4 heads of 144 x 144 an image: kept of four blocks, or
    computed again of one."""
    encoder = dataclasses.replace(ENCODER, positions="sincos", depth=4, heads=4)
    maps, used = schema.Maps(relative="decomposed"), {}
    images = jax.ShapeDtypeStruct((6, 48, 48, 3), jnp.float32)
    for remat in ("none", "full"):
        model = dataclasses.replace(MODEL, encoder=encoder, remat=remat, scan=True)
        tree = jax.eval_shape(init(model, maps, 48), jax.random.key(0))

        def total(params: Any, images: Any, model: schema.Model = model) -> jax.Array:
            (y,) = vit_maps.stages(model, params, images, maps=maps, size=48)
            return jnp.square(y).sum()

        memory = jit(jax.grad(total)).lower(tree, images).compile().memory_analysis()
        assert memory is not None
        used[remat] = memory.temp_size_in_bytes
    assert used["none"] > used["full"] + 2 * 6 * 4 * 144**2 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_images_may_be_a_symbol(kind: str) -> None:
    """As in exported programs, which serve any batch."""
    file, params = reference(kind)
    maps, size = KINDS[kind]
    (rows,) = jax.export.symbolic_shape("b")
    image = file["case0/image"]
    call = functools.partial(vit_maps.stages, MODEL, maps=maps, size=size)
    abstract = jax.ShapeDtypeStruct((rows, *image.shape[1:]), jnp.float32)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    exported = jax.export.export(jit(call))(shapes, abstract)
    got = jit(exported.call)(params, image)
    np.testing.assert_allclose(got[-1], file[f"case0/map{len(got) - 1}"], rtol=0, atol=1e-5)
