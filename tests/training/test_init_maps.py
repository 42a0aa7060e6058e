"""Initial weights of an encoder with maps: of runs and files that were never at a dense task, of
detectron2 and of mmsegmentation."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from m3i_jax import parallel, schema
from m3i_jax.errors import UserError
from m3i_jax.interop import tensor_files
from m3i_jax.models import backbones, relative_bias, vit
from m3i_jax.objective import positions
from m3i_jax.training import init_from
from tests import saved, toy
from tests.interop.published_vit import ENCODERS, weights
from tests.saved import flat

SIZES = {"width": 32, "depth": 2, "heads": 2, "patch": 8, "grid": 4}  # of the toy's encoder
# windows of 3 patches and a global block, on images of 64 pixels after pre-training at 32
VITDET = {
    "dense__maps__window": "3",
    "dense__maps__global_blocks": "(1,)",
    "dense__maps__relative": "decomposed",
    "dense__maps__image_size": "32",
    "data__image_size": "64",
}
BEIT = {"dense__maps__relative": "table", "dense__maps__layer_scale": "1.0"}
LEARNED = {"model__encoder__positions": "learned"}


def take(config: schema.Config) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], str]:
    """(parameters before, after, log)"""
    backbone, maps = backbones.get_backbone(config.model), config.dense.maps
    grid = (maps.image_size or config.data.image_size) // config.model.encoder.patch_size

    def start(key: jax.Array) -> Any:
        params = vit.init(config.model, key, grid=grid)
        return {
            "encoder": backbone.init_maps(config.model, maps, params, size=config.data.image_size)
        }

    shapes, r = jax.eval_shape(start, jax.random.key(0)), np.random.default_rng(5)
    lines: list[str] = []
    before = jax.tree.map(lambda s: r.normal(size=s.shape).astype(np.float32), shapes)
    layout = parallel.tree_shardings(parallel.make_mesh((1, 1, 1), jax.devices()[:1]), before)
    after = init_from.initialize_from(config, jax.device_put(before, layout), layout, lines.append)
    return flat(before), flat(after), "\n".join(lines)


def write(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> str:
    tensor_files.write_safetensors(path, arrays)
    return str(path)


@pytest.mark.parametrize("maps", [VITDET, BEIT], ids=["vitdet", "beit"])
def test_an_encoder_of_a_run_and_what_maps_add(
    maps: dict[str, str], tmp_path: pathlib.Path
) -> None:
    params, _ = saved.run(tmp_path, toy.settings())
    before, after, log = take(toy.settings(init_from=str(tmp_path), **maps))
    there = flat(params)
    assert ("encoder/cls_token" in after) == (maps is BEIT)
    for path, array in after.items():
        added = path.startswith(("encoder/relative/", "encoder/blocks/gamma"))
        np.testing.assert_array_equal(array, before[path] if added else there[path], err_msg=path)
    assert "of maps, at their first values: 4 arrays such as encoder/" in log
    assert "initialized randomly" not in log


def test_the_table_of_a_file_keeps_the_grid_of_its_pre_training(tmp_path: pathlib.Path) -> None:
    """It is resized at every forward pass, or, without maps.image_size, once, here."""
    table = weights(ENCODERS["timm"], **SIZES)
    path = write(tmp_path / "vit.safetensors", table)
    _, after, log = take(toy.settings(init_from=path, **VITDET, **LEARNED))
    np.testing.assert_array_equal(after["encoder/positions"], table["pos_embed"])
    assert "bicubic" not in log
    once = VITDET | {"dense__maps__image_size": "0"}
    _, after, log = take(toy.settings(init_from=path, **once, **LEARNED))
    resized = positions.resize_position_table(table["pos_embed"], 8, cls=True)
    np.testing.assert_array_equal(after["encoder/positions"], resized)
    assert "from 4 x 4 to 8 x 8" in log


def detectron2(grid: int) -> dict[str, np.ndarray]:
    """Random arrays of a ViTDet for a map of so many cells a side."""
    r = np.random.default_rng(3)
    table = weights(ENCODERS["timm"], **SIZES)
    named = {
        f"backbone.net.{name}": array
        for name, array in table.items()
        if name != "cls_token" and not name.startswith("norm.")
    }
    for block, side in ((0, 3), (1, grid)):
        for axis in "hw":
            named[f"backbone.net.blocks.{block}.attn.rel_pos_{axis}"] = r.normal(
                size=(2 * side - 1, 16)
            ).astype(np.float32)
    return named


def test_a_vitdet_of_detectron2(tmp_path: pathlib.Path) -> None:
    table = detectron2(8)
    path = write(tmp_path / "vitdet.safetensors", table)
    config = toy.settings(init_from=path, **VITDET, **LEARNED, model__encoder__cls_token="false")
    before, after, log = take(config)
    for block, axis, name in ((0, "h", "rows"), (1, "w", "columns")):
        np.testing.assert_array_equal(
            after[f"encoder/relative/block{block}/{name}"],
            table[f"backbone.net.blocks.{block}.attn.rel_pos_{axis}"],
        )
    # the row for cls is not used
    np.testing.assert_array_equal(
        after["encoder/positions"], table["backbone.net.pos_embed"][:, 1:]
    )
    assert not any(np.array_equal(after[path], before[path]) for path in after)
    assert "(detectron2): 19 of 19 arrays" in log


def test_relative_tables_of_another_size_are_resized(tmp_path: pathlib.Path) -> None:
    table = detectron2(5)
    path = write(tmp_path / "vitdet.safetensors", table)
    _, after, log = take(toy.settings(init_from=path, **VITDET, **LEARNED))
    small = table["backbone.net.blocks.1.attn.rel_pos_h"]
    at = np.clip((np.arange(15) + 0.5) * 9 / 15 - 0.5, 0, 8)
    wanted = np.stack([np.interp(at, np.arange(9), column) for column in small.T], 1)
    np.testing.assert_allclose(after["encoder/relative/block1/rows"], wanted, atol=1e-6)
    assert "2 tables of relative positions were resized from 9 to 15 rows" in log


def test_a_table_that_the_run_lacks_is_refused(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "vitdet.safetensors", detectron2(8))
    plain = {"init_from": path, "model__encoder__cls_token": "false", **LEARNED}
    with pytest.raises(UserError, match=r"computed with encoder/relative/block0.* \(4 such arrays"):
        take(toy.settings(**plain))


def test_an_mmsegmentation_file(tmp_path: pathlib.Path) -> None:
    """With its layer scale, and its tables resized for another map; BEiT's queries and values have
    biases, its keys none."""
    r = np.random.default_rng(4)
    draw = lambda *shape: np.asarray(r.normal(size=shape), np.float32)
    table = {
        "cls_token": draw(1, 1, 32),
        "pos_embed": draw(1, 17, 32),
        "patch_embed.projection.weight": draw(32, 3, 8, 8),
        "patch_embed.projection.bias": draw(32),
    }
    for n in range(2):
        table |= {
            f"layers.{n}.attn.qkv.weight": draw(96, 32),
            f"layers.{n}.attn.q_bias": draw(32),
            f"layers.{n}.attn.v_bias": draw(32),
            f"layers.{n}.attn.relative_position_bias_table": draw(7 * 7 + 3, 2),
            f"layers.{n}.attn.proj.weight": draw(32, 32),
            f"layers.{n}.attn.proj.bias": draw(32),
            f"layers.{n}.ffn.layers.0.0.weight": draw(128, 32),
            f"layers.{n}.ffn.layers.0.0.bias": draw(128),
            f"layers.{n}.ffn.layers.1.weight": draw(32, 128),
            f"layers.{n}.ffn.layers.1.bias": draw(32),
        }
        for i in (1, 2):
            table |= {
                f"layers.{n}.ln{i}.weight": draw(32),
                f"layers.{n}.ln{i}.bias": draw(32),
                f"layers.{n}.gamma_{i}": draw(32),
            }
    path = write(
        tmp_path / "seg.safetensors", {f"backbone.{name}": array for name, array in table.items()}
    )
    _, after, log = take(toy.settings(init_from=path, **BEIT, **LEARNED))
    np.testing.assert_array_equal(after["encoder/blocks/gamma2"][1], table["layers.1.gamma_2"])
    np.testing.assert_array_equal(
        after["encoder/blocks/attention/qkv/bias"][0],
        np.concatenate(
            [table["layers.0.attn.q_bias"], np.zeros(32), table["layers.0.attn.v_bias"]]
        ),
    )
    bias = "layers.1.attn.relative_position_bias_table"
    np.testing.assert_array_equal(after["encoder/relative/block1/table"], table[bias])
    _, after, log = take(toy.settings(init_from=path, **BEIT, **LEARNED, data__image_size="48"))
    resized = relative_bias.resize_table("table", table[bias], 11 * 11 + 3)
    np.testing.assert_array_equal(after["encoder/relative/block1/table"], resized)
    assert "from 52 to 124 rows" in log and "from 4 x 4 to 6 x 6" in log
