"""Maps of the ViT for dense tasks against transformers' VitDet and Beit, in float64, whose weights
are read under the names of detectron2 and mmsegmentation (tests/data/make_vitdet.py); and what
those do not show: compile time, scan, chunks, first values, paths."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.interop import vit_weights
from m3i_jax.models import vit_maps

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
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


SETTINGS = [("none", False), ("full", True)]


@pytest.mark.parametrize("remat,scan", SETTINGS)
@pytest.mark.parametrize("kind,case", [(kind, case) for kind in KINDS for case in (0, 1)])
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
        close(output, file[name], 1e-5)
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
