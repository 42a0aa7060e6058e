"""Files whose names are those of a supported layout, but whose encoders compute something else are
refused where an encoder of ours would run, and named where only their arrays are read."""

import json
import pathlib
from collections.abc import Callable

import numpy as np
import pytest

import m3i_jax
from m3i_jax.errors import UserError
from m3i_jax.interop import tensor_files, vit_weights
from m3i_jax.training import teachers, weight_source
from tests.interop.published_vit import ENCODERS, TINY, weights

Table = dict[str, np.ndarray]
_ONES = np.ones(16, np.float32)


def _beit(table: Table) -> None:
    """timm's BEiT: no table, biases of queries and values, layer scale, relative biases."""
    del table["pos_embed"]
    for layer in (0, 1):
        del table[f"blocks.{layer}.attn.qkv.bias"]
        for name in ("attn.q_bias", "attn.v_bias", "gamma_1", "gamma_2"):
            table[f"blocks.{layer}.{name}"] = _ONES
        table[f"blocks.{layer}.attn.relative_position_bias_table"] = np.ones((28, 2), np.float32)


def _shared_biases(table: Table) -> None:
    """BEiT as it is pre-trained: one table of relative biases, outside the layers."""
    _beit(table)
    for layer in (0, 1):
        del table[f"blocks.{layer}.attn.relative_position_bias_table"]
    table["rel_pos_bias.relative_position_bias_table"] = np.ones((28, 2), np.float32)


def _rope(table: Table) -> None:
    """timm's ViT with RoPE and registers, without cls."""
    del table["pos_embed"], table["cls_token"]
    table["reg_token"] = np.ones((1, 4, 16), np.float32)


def _eva02(table: Table) -> None:
    for layer in (0, 1):
        for part in ("weight", "bias"):
            array = table.pop(f"blocks.{layer}.mlp.fc1.{part}")
            table |= {f"blocks.{layer}.mlp.{name}.{part}": array for name in ("fc1_g", "fc1_x")}


def _normed_mlp(table: Table) -> None:
    table |= {f"blocks.{layer}.mlp.norm.weight": np.ones(64, np.float32) for layer in (0, 1)}


def _lambdas(table: Table) -> None:
    table |= {f"encoder.layer.{layer}.lambda_1": _ONES for layer in (0, 1)}


def _same(table: Table) -> None:
    del table


CASES: dict[str, tuple[str, Callable[[Table], None], dict, str]] = {
    "BEiT": ("timm", _beit, {}, r"relative_position_bias_table"),
    "pre-trained BEiT": ("timm", _shared_biases, {}, "neither a table of positions nor"),
    "RoPE": ("timm", _rope, {}, "neither a table of positions nor"),
    "EVA-02": ("timm", _eva02, {}, "EVA-02"),
    "norm of the MLP": ("timm", _normed_mlp, {}, r"blocks\.\d\.mlp\.norm\.weight"),
    "Perception Encoder": (
        "timm",
        _same,
        {"architecture": "vit_pe_core_base_patch16_224"},
        "rotary positions",
    ),
    "norms after": ("timm", _same, {"architecture": "vit_base_patch16_rpn_224"}, "norms"),
    "layer scale": ("hf", _lambdas, {}, r"encoder\.layer\.\d\.lambda_1"),
    "activation": ("hf", _same, {"hidden_act": "relu"}, "activation is 'relu'"),
}


@pytest.mark.parametrize("case", CASES)
def test_encoders_that_are_none_of_ours(case: str, tmp_path: pathlib.Path) -> None:
    layout, change, config, words = CASES[case]
    table = weights(ENCODERS[layout], **TINY)
    change(table)
    tensor_files.write_safetensors(tmp_path / "model.safetensors", table)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for refuse in (m3i_jax.load, teachers.open_teacher):
        with pytest.raises(UserError, match=words):
            refuse(str(tmp_path))
    source = weight_source.open_weights(str(tmp_path))
    assert source.notes[-1].startswith("its features are others here")
    assert source.settings.get("positions") != "rope"


@pytest.mark.parametrize(
    ("layout", "token", "table"),
    [
        ("timm", "dist_token", "pos_embed"),
        ("hf", "embeddings.distillation_token", "embeddings.position_embeddings"),
    ],
)
def test_distilled_deit(layout: str, token: str, table: str, tmp_path: pathlib.Path) -> None:
    """It has a second token and, in its table of positions, a row for it."""
    arrays = weights(ENCODERS[layout], **TINY)
    arrays[token] = np.ones((1, 1, 16), np.float32)
    arrays[table] = np.concatenate([arrays[table][:, :1], arrays[table]], 1)
    tensor_files.write_safetensors(tmp_path / "model.safetensors", arrays)
    for refuse in (m3i_jax.load, teachers.open_teacher, weight_source.open_weights):
        with pytest.raises(UserError, match=rf"{token} is a second class token.*DeiT III"):
            refuse(str(tmp_path))


def test_eva_clip_has_the_usual_eps(tmp_path: pathlib.Path) -> None:
    """Of timm's architectures with clip in their names, those of ViT alone have 1e-5."""
    table = weights(ENCODERS["timm"], **TINY)
    tensor_files.write_safetensors(tmp_path / "model.safetensors", table)
    for name, eps in (("vit_base_patch16_clip_224", 1e-5), ("eva_giant_patch14_clip_224", 1e-6)):
        (tmp_path / "config.json").write_text(json.dumps({"architecture": name}))
        assert weight_source.open_weights(str(tmp_path)).settings["norm_eps"] == eps


def test_heads_of_the_two_giants_of_one_width() -> None:
    assert weight_source.encoder_heads({"width": 1536, "activation": "gelu_tanh"}) == 16
    assert weight_source.encoder_heads({"width": 1536, "activation": "swiglu"}) == 24


@pytest.mark.parametrize("shape", [(16, 12, 4, 4), (16, 1, 4, 4), (16, 3, 4, 2), (16, 3, 2, 4, 4)])
def test_patches_that_are_not_square_or_not_of_rgb(shape: tuple[int, ...]) -> None:
    """Twelve channels would pass for patches of twice the side."""
    table = weights(ENCODERS["timm"], **TINY)
    table["patch_embed.proj.weight"] = np.ones(shape, np.float32)
    with pytest.raises(UserError, match=rf"of {shape[1]} channels and patches of"):
        vit_weights.load_vit(table)
    if len(shape) == 4:
        google = weights(ENCODERS["google"], **TINY)
        google["embedding/kernel"] = np.ones(shape, np.float32).transpose(2, 3, 1, 0)
        with pytest.raises(UserError, match="square patches of RGB"):
            vit_weights.load_vit(google)


def test_values_that_load_does_not_have(tmp_path: pathlib.Path) -> None:
    table = weights(ENCODERS["timm"], **TINY)
    tensor_files.write_safetensors(tmp_path / "model.safetensors", table)
    for values, words in (
        ({"heads": 3}, "3 attention heads do not divide its width, 16"),
        ({"weights": "teacher"}, "not one of online, ema"),
        ({"dtype": "float16"}, "not one of bfloat16, float32"),
    ):
        with pytest.raises(UserError, match=words):
            m3i_jax.load(str(tmp_path), **values)


@pytest.mark.parametrize("option", ["relative biases", "layer scale"])
def test_options_of_dense_tasks_are_not_dropped(option: str, tmp_path: pathlib.Path) -> None:
    """mmsegmentation's BEiT, with a table for every token: only maps have what it adds."""
    arrays = vit_weights.load_vit(weights(ENCODERS["timm"], **TINY)).arrays
    if option == "layer scale":
        arrays |= {f"encoder/blocks/gamma{n}": np.ones((2, 16), np.float32) for n in (1, 2)}
        first = r"encoder/blocks/gamma\d \(2 such arrays\)"
    else:
        table = np.ones((28, 2), np.float32)
        arrays |= {f"encoder/relative/block{block}/table": table for block in (0, 1)}
        first = r"encoder/relative/block0/table \(2 such arrays\)"
    stored = vit_weights.store_vit(arrays, "mmseg", heads=2, prefix="backbone.")
    path = tmp_path / "model.safetensors"
    tensor_files.write_safetensors(path, stored)
    for refuse in (m3i_jax.load, teachers.open_teacher):
        with pytest.raises(UserError, match=f"features are computed with {first}"):
            refuse(str(path))
    assert weight_source.open_weights(str(path)).settings["depth"] == 2  # init_from reads it
