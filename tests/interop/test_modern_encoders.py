"""Encoders of Transformers and timm with registers, rotary positions, SwiGLU, layer scale, RMS norm
and norms of queries and keys: read from their files, they give the same tokens
(tests/data/make_vit_options.py)."""

import json
import pathlib

import jax
import numpy as np
import pytest

import m3i_jax
from m3i_jax import parallel, schema
from m3i_jax.errors import UserError
from m3i_jax.evaluation import load
from m3i_jax.interop import export_formats, tensor_files, vit_weights
from m3i_jax.models import vit_maps
from m3i_jax.training import init_from
from m3i_jax.training.task import make_task
from tests import toy
from tests.interop import published_vit

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
    "timm_dinov3": "timm",
    "timm_dinov3_gated": "timm",
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


@pytest.mark.parametrize("name", ["dinov2", "dinov2_swiglu"])
def test_dinov2_reads_images_of_the_size_of_its_processor(name: str, tmp_path) -> None:
    """Its published processors crop 224 pixels, and its tables are of 518: they are resized, with
    antialiasing where there are registers."""
    file, path = directory(tmp_path / name, name)
    square = {"height": 8, "width": 8}
    processor = {"crop_size": square, "size": {"shortest_edge": 10}, "do_center_crop": True}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    model = m3i_jax.load(path)
    assert (model.preprocessing.image_size, model.preprocessing.short_side) == (8, 10)
    table = weights(file)["embeddings.position_embeddings"]
    smooth = model.config.model.encoder.registers > 0
    cells = jax.image.resize(
        table[0, 1:].reshape(3, 3, -1),
        (2, 2, 16),
        "bicubic" if smooth else "bicubic-pytorch",
        antialias=smooth,
    )
    expected = np.concatenate([table[0, :1], np.asarray(cells).reshape(4, -1)])
    np.testing.assert_allclose(model.params["encoder"]["positions"][0], expected, atol=1e-6)
    # fine-tuning has these images too; maps of a dense run are made of the whole table
    settings = load.settings_of_weights(str(path), "from")
    assert (settings.data.image_size, settings.dense.maps.image_size) == (8, 12)


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


def test_dinov3s_own_files() -> None:
    """`storage_tokens`, w1 to w3, one matrix of queries, keys and values, whose bias has a mask,
    and periods: the arrays of Transformers, with the layer scale in the matrices before it."""
    hugging = vit_weights.load_vit(weights(np.load(DATA / "dinov3_gated.npz")))
    theirs = weights(np.load(DATA / "dinov3_gated.npz"))
    own = {
        "cls_token": theirs["embeddings.cls_token"],
        "storage_tokens": theirs["embeddings.register_tokens"],
        "mask_token": theirs["embeddings.mask_token"][0],
        "rope_embed.periods": np.ones(2, np.float32),
    }
    parts = {
        "q_proj": "", "mlp.gate_proj": "mlp.w1", "mlp.up_proj": "mlp.w2", "mlp.down_proj": "mlp.w3",
        "attention.o_proj": "attn.proj", "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma", "norm1": "norm1", "norm2": "norm2",
    }  # fmt: skip
    for name, array in theirs.items():
        new = name.replace("embeddings.patch_embeddings", "patch_embed.proj")
        new = new.replace("layer.", "blocks.", 1) if name.startswith("layer.") else new
        for before, after in parts.items():
            new = new.replace(before, after)
        if "embeddings." not in new and "_proj" not in new and "attention" not in new:
            own[new] = array
    for layer in range(2):
        of = f"layer.{layer}.attention"
        q, k, v = (theirs[f"{of}.{n}_proj.weight"] for n in "qkv")
        own[f"blocks.{layer}.attn.qkv.weight"] = np.concatenate([q, k, v])
        q, v = (theirs[f"{of}.{n}_proj.bias"] for n in "qv")
        own[f"blocks.{layer}.attn.qkv.bias"] = np.concatenate([q, np.full_like(q, np.nan), v])
        mask = np.repeat(np.array([1, 0, 1], np.float32), 16)
        own[f"blocks.{layer}.attn.qkv.bias_mask"] = mask
    found = vit_weights.load_vit(own)
    assert found.layout == "timm" and not found.unknown
    assert found.settings["positions"] == "rope" and found.settings["registers"] == 4
    for path, array in hugging.arrays.items():
        for n, matrix in ((1, "attention/out"), (2, "mlp/fc2")):
            if f"blocks/{matrix}" in path:
                scale = hugging.arrays[f"encoder/blocks/gamma{n}"]
                array = array * (scale[:, None] if array.ndim == 3 else scale)
        if "gamma" not in path:
            np.testing.assert_allclose(found.arrays[path], array, rtol=1e-6, err_msg=path)


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


@pytest.mark.parametrize(
    "change,message",
    [
        ({"model__encoder__registers": "0"}, "encoder/registers.*model.encoder to .*registers=3"),
        ({"model__encoder__activation": "gelu"}, "mlp/gate.*model.encoder to .*activation=swiglu"),
        ({"model__encoder__layer_scale": "0"}, "gamma1.*config.model.encoder to .*layer_scale="),
        ({"model__encoder__positions": "rope"}, "model.encoder.positions=learned"),
        ({}, ""),
    ],
)
def test_a_run_starts_from_them_with_their_options_only(change, message, tmp_path) -> None:
    _, path = directory(tmp_path / "dinov2_swiglu", "dinov2_swiglu")
    options = {
        "registers": "3", "layer_scale": "1e-5", "activation": "swiglu", "mlp_ratio": "3",
        "positions": "learned", "patch_size": "4", "width": "16", "final_norm": "true",
        "freeze_patch_embed": "false",
    }  # fmt: skip
    settings = {f"model__encoder__{name}": value for name, value in options.items()}
    config = toy.settings(
        objective__forms="supervised",
        init_from=str(path),
        data__image_size="12",
        init__only="('^encoder/',)",
        **{**settings, **change},
    )
    task = make_task(config, 0)
    params = jax.eval_shape(task.init, jax.random.key(0))
    layout = parallel.tree_shardings(parallel.make_mesh((1, 1, 1), jax.devices()[:1]), params)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
    lines: list[str] = []
    start = lambda: init_from.initialize_from(config, zeros, layout, lines.append)
    if message:
        with pytest.raises(UserError, match=message):
            start()
    else:
        assert start()["encoder"]["registers"].any() and "encoder (23)" in lines[0]


@pytest.mark.parametrize("width", [1024, 4096])
def test_dinov3_of_satellite_images_has_their_mean(width: int) -> None:
    """The ViT-L with a norm for small views; both 7B models have it."""
    flat = {"encoder/patch_embed/kernel": np.zeros((1, width), np.float32)}
    found = vit_weights._pixels_of_satellites({"local_cls_norm.weight": 0}, flat)
    assert found == (
        {"mean": (0.430, 0.411, 0.296), "std": (0.213, 0.156, 0.143)} if width == 1024 else {}
    )
    assert vit_weights._pixels_of_satellites({"norm.weight": 0}, flat) == {}
    sizes = {"width": 1024, "depth": 1, "heads": 16, "patch": 1, "grid": 1}
    table = published_vit.weights(published_vit.ENCODERS["timm"], **sizes)
    norm = {f"local_cls_norm.{name}": np.ones(1024, np.float32) for name in ("weight", "bias")}
    whole = vit_weights.load_vit(table | norm)
    assert whole.settings["mean"][0] == 0.430 and whole.unused == {"norm of small views": 2}
