"""Encoders of Transformers and timm with registers, rotary positions, SwiGLU, layer scale, RMS norm
and norms of queries and keys: read from their files, they give the same tokens
(tests/data/make_vit_options.py)."""

import json
import pathlib

import jax
import numpy as np
import pytest

import m3i_jax
from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.interop import export_formats, tensor_files, vit_weights
from m3i_jax.models import vit_maps

DATA = pathlib.Path(__file__).parent.parent / "data" / "vit"
LAYOUTS = {
    "dinov2": "dinov2",
    "dinov2_swiglu": "dinov2",
    "dinov3": "dinov3",
    "dinov3_gated": "dinov3",
    "siglip": "siglip",
    "siglip2": "siglip",
    "clip": "clip",
    "mae": "hf",
    "timm_qk_norm": "timm",
    "timm_rms": "timm",
    "timm_dinov2": "timm",
}
OPTIONS = {
    "dinov2_swiglu": {"registers": 3, "activation": "swiglu", "layer_scale": 1e-5},
    "dinov3": {"registers": 4, "positions": "rope", "norm_eps": 1e-5, "layer_scale": 1e-5},
    "siglip": {"cls_token": False, "activation": "gelu_tanh", "final_norm": True},
    "timm_rms": {"norm": "rms", "qk_norm": True},
    "timm_dinov2": {"registers": 4, "activation": "swiglu", "layer_scale": 0.0},
}


def weights(file) -> dict[str, np.ndarray]:
    return {
        name.removeprefix("weights/"): file[name]
        for name in file.files
        if name.startswith("weights/")
    }


def directory(path: pathlib.Path, name: str):
    """The file of reference values, and a directory as the other project writes it."""
    file = np.load(DATA / f"{name}.npz")
    path.mkdir(exist_ok=True)
    tensor_files.write_safetensors(path / "model.safetensors", weights(file), {"format": "pt"})
    (path / "config.json").write_text(str(file["config"]))
    return file, path


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_encoder_gives_its_tokens(name: str, tmp_path) -> None:
    file, path = directory(tmp_path / name, name)
    model = m3i_jax.load(path, pool="tokens")
    assert f"({LAYOUTS[name]})" in model.name and model.config.data.image_size == 12
    encoder = model.config.model.encoder
    for key, value in OPTIONS.get(name, {}).items():
        assert getattr(encoder, key) == value, key
    tokens = jax.jit(model.network)(model.params["encoder"], file["images"])
    np.testing.assert_allclose(tokens, file["tokens"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["dinov3", "dinov3_gated"])
def test_maps_of_a_rectangle_are_those_of_dinov3(name: str, tmp_path) -> None:
    """Rotary positions are those of the map, and registers are no part of it."""
    file, path = directory(tmp_path / name, name)
    model = m3i_jax.load(path)
    images = file["rectangle"]
    (found,) = jax.jit(lambda params: vit_maps.stages(model.config.model, params, images, size=12))(
        model.params["encoder"]
    )
    np.testing.assert_allclose(found, file["map"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["dinov2", "dinov2_swiglu", "dinov3_gated", "siglip"])
def test_a_round_trip_keeps_every_bit(name: str) -> None:
    theirs = weights(np.load(DATA / f"{name}.npz"))
    found = vit_weights.load_vit(theirs)
    assert not found.unknown and not found.notes
    back = vit_weights.store_vit(found.arrays, LAYOUTS[name], heads=2)
    lost = {"embeddings.mask_token"} | {key for key in theirs if key.startswith("head.")}
    assert back.keys() == theirs.keys() - lost
    for key, array in back.items():
        assert array.tobytes() == np.ascontiguousarray(theirs[key]).tobytes(), key


def test_layers_in_chunks_and_packed_matrices() -> None:
    """DINOv2's own files: `blocks.chunk.layer`, w12 and w3."""
    theirs = weights(np.load(DATA / "timm_dinov2.npz"))
    renamed = {}
    for name, array in theirs.items():
        new = name.replace("reg_token", "register_tokens").replace("mlp.fc1", "mlp.w12")
        new = new.replace("mlp.fc2", "mlp.w3")
        layer = name.split(".")[1] if name.startswith("blocks.") else ""
        renamed[new.replace(f"blocks.{layer}", f"blocks.0.{layer}") if layer else new] = array
    plain, chunked = vit_weights.load_vit(theirs), vit_weights.load_vit(renamed)
    assert not chunked.unknown and chunked.settings == plain.settings
    for path, array in plain.arrays.items():
        np.testing.assert_array_equal(chunked.arrays[path], array)


def test_a_processor_says_which_images_an_encoder_without_table_reads() -> None:
    theirs = weights(np.load(DATA / "dinov3.npz"))
    config = {"crop_size": {"height": 32, "width": 32}, "rope_theta": 50.0, "image_size": 224}
    settings = vit_weights.load_vit(theirs, config=config).settings
    assert settings["image_size"] == 32 and settings["rope_base"] == 50.0
    assert vit_weights.load_vit(theirs).settings["image_size"] == 224


@pytest.mark.parametrize("option", [{"registers": 2}, {"positions": "rope"}, {"qk_norm": True}])
def test_formats_without_names_for_an_option_refuse_it(option) -> None:
    encoder = schema.Encoder(**option)
    (name, value), settings = next(iter(option.items())), json.loads(json.dumps(vars(encoder)))
    with pytest.raises(UserError, match=f"--format=timm: .*model.encoder.{name}={value}; use"):
        export_formats.refuse_options("timm", settings)
