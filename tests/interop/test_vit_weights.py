"""Weights of timm, MAE, SiameseIM, Hugging Face and Google: names and shapes, exact conversion in
both directions, refusals."""

import numpy as np
import pytest

from m3i_jax.errors import UserError
from m3i_jax.interop import vit_layouts, vit_weights
from tests.interop.published_vit import ENCODERS, OTHERS, SIAMESE_DECODER, TINY, weights

# shapes of our ViT with a final norm and a learned position table; D = 16, F = 64, two layers,
# patches of 4, 9 cells and cls
ENCODER = {
    "encoder/cls_token": (1, 1, 16),
    "encoder/positions": (1, 10, 16),
    "encoder/patch_embed/kernel": (48, 16),
    "encoder/patch_embed/bias": (16,),
    "encoder/norm/scale": (16,),
    "encoder/norm/bias": (16,),
    **{f"encoder/blocks/norm{n}/{what}": (2, 16) for n in (1, 2) for what in ("scale", "bias")},
    "encoder/blocks/attention/qkv/kernel": (2, 16, 48),
    "encoder/blocks/attention/qkv/bias": (2, 48),
    "encoder/blocks/attention/out/kernel": (2, 16, 16),
    "encoder/blocks/attention/out/bias": (2, 16),
    "encoder/blocks/mlp/fc1/kernel": (2, 16, 64),
    "encoder/blocks/mlp/fc1/bias": (2, 64),
    "encoder/blocks/mlp/fc2/kernel": (2, 64, 16),
    "encoder/blocks/mlp/fc2/bias": (2, 16),
}
EXTRA = {"clip": {"encoder/embedding_norm/scale": (16,), "encoder/embedding_norm/bias": (16,)}}
WITHOUT_NORM = ("siamese_im",)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("layout", ENCODERS)
def test_a_round_trip_keeps_every_bit(layout: str) -> None:
    theirs = weights(ENCODERS[layout], **TINY)
    others = weights(OTHERS[layout], 1, **TINY) | (
        weights(SIAMESE_DECODER, 2, **TINY) if layout == "siamese_im" else {}
    )
    found = vit_weights.load_vit({**theirs, **others})
    assert found.layout == layout and not found.unknown and not found.notes
    encoder = {path: array for path, array in found.arrays.items() if path.startswith("encoder/")}
    wanted = {
        path: shape
        for path, shape in ENCODER.items()
        if layout not in WITHOUT_NORM or "/norm/" not in path
    } | EXTRA.get(layout, {})
    assert {path: array.shape for path, array in encoder.items()} == wanted
    same(vit_weights.store_vit(encoder, layout, heads=2), theirs)


@pytest.mark.parametrize("layout", ENCODERS)
def test_conversion_between_layouts_keeps_every_bit(layout: str) -> None:
    """A file converted to another layout and back keeps every bit; for CLIP, which has no bias of
    the patch embedding, with a zero bias."""
    theirs = weights(ENCODERS["timm"], **TINY) | (
        {"patch_embed.proj.bias": np.zeros(16, np.float32)} if layout == "clip" else {}
    )
    between = vit_weights.store_vit(vit_weights.load_vit(theirs).arrays, layout, heads=2)
    same(vit_weights.store_vit(vit_weights.load_vit(between).arrays, "timm", heads=2), theirs)


def test_converted_weights_compute_the_same() -> None:
    """By the definitions: a linear layer is x W' + b in PyTorch and x W + b here; a patch embedding
    is a convolution; qkv is [q | k | v]."""
    r = np.random.default_rng(0)
    theirs = weights(ENCODERS["timm"], **TINY)
    here = vit_weights.load_vit(theirs).arrays
    x = r.normal(size=(5, 16)).astype(np.float32)
    for name, path in {
        "mlp.fc1": "mlp/fc1",
        "attn.proj": "attention/out",
        "attn.qkv": "attention/qkv",
    }.items():
        expected = x @ theirs[f"blocks.1.{name}.weight"].T + theirs[f"blocks.1.{name}.bias"]
        np.testing.assert_allclose(
            x @ here[f"encoder/blocks/{path}/kernel"][1] + here[f"encoder/blocks/{path}/bias"][1],
            expected,
            atol=1e-6,
        )
    image = r.normal(size=(4, 4, 3)).astype(np.float32)
    convolved = np.einsum("dcij,ijc->d", theirs["patch_embed.proj.weight"], image)
    np.testing.assert_allclose(
        image.reshape(-1) @ here["encoder/patch_embed/kernel"], convolved, atol=1e-5
    )
    separate = vit_weights.store_vit(here, "hf", heads=2)
    for n, name in enumerate(("query", "key", "value")):
        part = separate[f"encoder.layer.0.attention.attention.{name}.weight"]
        np.testing.assert_array_equal(
            part, theirs["blocks.0.attn.qkv.weight"][16 * n : 16 * n + 16]
        )
    heads = vit_weights.store_vit(here, "google", heads=2)[
        "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/kernel"
    ]
    # rows of k, second head
    np.testing.assert_array_equal(
        heads[:, 1], theirs["blocks.1.attn.qkv.weight"][16 + 8 : 16 + 16].T
    )


def test_the_momentum_copy_of_siamese_im() -> None:
    theirs = weights(
        ENCODERS["siamese_im"] + "|" + OTHERS["siamese_im"] + "|" + SIAMESE_DECODER, **TINY
    )
    online, copy = vit_weights.load_vit(theirs), vit_weights.load_vit(theirs, momentum=True)
    path, name = "encoder/blocks/mlp/fc1/bias", "blocks.1.mlp.fc1.bias"
    np.testing.assert_array_equal(online.arrays[path][1], theirs[name])
    np.testing.assert_array_equal(copy.arrays[path][1], theirs[f"mm_{name}"])
    assert (
        online.unused["momentum copy"] == sum(name.startswith("mm_") for name in theirs)
        and "momentum copy" not in copy.unused
    )
    # a file without a copy
    np.testing.assert_array_equal(copy.arrays["decoder/head/bias"], theirs["decoder_pred.bias"])
    assert online.arrays["decoder/projector/norm2/scale"].shape == (2, 16) and online.arrays[
        "decoder/position_map/kernel"
    ].shape == (
        32,
        16,
    )
    with pytest.raises(UserError, match="no momentum copy"):
        vit_weights.load_vit(weights(ENCODERS["timm"], **TINY), momentum=True)


def test_layer_scale_is_multiplied_into_the_preceding_matrix() -> None:
    theirs, r = weights(ENCODERS["timm"], **TINY), np.random.default_rng(3)
    gamma = {
        f"blocks.{layer}.ls{n}.gamma": r.normal(size=16).astype(np.float32)
        for layer in range(2)
        for n in (1, 2)
    }
    found = vit_weights.load_vit({**theirs, **gamma})
    assert len(found.notes) == 2
    x = r.normal(size=(3, 64)).astype(np.float32)
    expected = (x @ theirs["blocks.1.mlp.fc2.weight"].T + theirs["blocks.1.mlp.fc2.bias"]) * gamma[
        "blocks.1.ls2.gamma"
    ]
    got = (
        x @ found.arrays["encoder/blocks/mlp/fc2/kernel"][1]
        + found.arrays["encoder/blocks/mlp/fc2/bias"][1]
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_small_layer_scale_keeps_its_digits_in_half_precision() -> None:
    """1e-5 times a weight is below the smallest normal number of float16, 6e-5."""
    theirs = weights(ENCODERS["timm"], **TINY)
    theirs |= {f"blocks.{k}.ls{n}.gamma": np.full(16, 1e-5) for k in (0, 1) for n in (1, 2)}
    theirs = {name: array.astype(np.float16) for name, array in theirs.items()}
    got = vit_weights.load_vit(theirs).arrays
    gamma = np.float64(np.float16(1e-5))
    for ours, name in (("attention/out", "attn.proj"), ("mlp/fc2", "mlp.fc2")):
        kernel = theirs[f"blocks.1.{name}.weight"].astype(np.float64).T * gamma
        bias = theirs[f"blocks.1.{name}.bias"].astype(np.float64) * gamma
        np.testing.assert_allclose(got[f"encoder/blocks/{ours}/kernel"][1], kernel, rtol=1e-6)
        np.testing.assert_allclose(got[f"encoder/blocks/{ours}/bias"][1], bias, rtol=1e-6)


def test_the_position_table_of_a_map() -> None:
    """SAM's in timm, [1, h, w, D]: 64 rows are no 128 pixels, and rows come before columns."""
    table = weights(ENCODERS["timm"], **(TINY | {"grid": 8}))
    del table["cls_token"]
    table |= {f"blocks.{k}.attn.rel_pos_{n}": np.ones((15, 8), "f4") for k in (0, 1) for n in "hw"}
    table["pos_embed"] = table["pos_embed"][:, 1:].reshape(1, 8, 8, 16)
    found = vit_weights.load_vit(table)
    assert found.layout == "detectron2" and found.settings["image_size"] == 32
    np.testing.assert_array_equal(
        found.arrays["encoder/positions"][0, 11], table["pos_embed"][0, 1, 3]
    )
    table["pos_embed"] = table["pos_embed"].reshape(1, 4, 16, 16)
    with pytest.raises(UserError, match=r"has shape \(1, 4, 16, 16\)"):
        vit_weights.load_vit(table)


def test_the_patch_embedding_bias_is_added_to_the_positions_for_clip() -> None:
    tree = vit_weights.load_vit(weights(ENCODERS["timm"], **TINY)).arrays
    stored = vit_weights.store_vit(tree, "clip", heads=2)
    assert "embeddings.patch_embedding.bias" not in stored
    moved = stored["embeddings.position_embedding.weight"] - tree["encoder/positions"][0]
    np.testing.assert_allclose(
        moved[1:], np.broadcast_to(tree["encoder/patch_embed/bias"], (9, 16)), atol=1e-6
    )
    np.testing.assert_array_equal(moved[0], 0)


def test_prefixes_and_unused_arrays() -> None:
    hf = {f"vit.{name}": array for name, array in weights(ENCODERS["hf"], **TINY).items()} | {
        "classifier.weight": np.zeros((3, 16))
    }
    found = vit_weights.load_vit(hf)
    assert (
        found.layout == "hf"
        and found.unused == {"classifier and pooler": 1}
        and len(found.arrays) == len(ENCODER)
    )
    clip = {
        f"vision_model.{name}": array for name, array in weights(ENCODERS["clip"], **TINY).items()
    }
    clip |= {
        "text_model.encoder.layers.0.self_attn.q_proj.weight": np.zeros((4, 4)),
        "logit_scale": np.zeros(()),
    }
    found = vit_weights.load_vit({**clip, "surprise": np.zeros(3)})
    assert (
        found.layout == "clip"
        and found.unused == {"text tower and projections": 2}
        and found.unknown == ["surprise"]
    )
    assert vit_weights.store_vit(
        {"encoder/cls_token": np.ones((1, 1, 4))}, "hf", heads=1, prefix="vit."
    ).keys() == {"vit.embeddings.cls_token"}


def test_settings_come_from_shapes_and_config_json() -> None:
    sizes = {"patch_size": 4, "width": 16, "depth": 2, "mlp_ratio": 4.0, "cls_token": True}
    settings = vit_weights.load_vit(weights(ENCODERS["google"], **TINY)).settings
    assert (
        sizes.items() <= settings.items()
        and settings["heads"] == 2
        and settings["activation"] == "gelu_tanh"
        and settings["mean"] == (0.5, 0.5, 0.5)
    )
    clip = {
        "vision_config": {"num_attention_heads": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-3}
    }
    settings = vit_weights.load_vit(weights(ENCODERS["clip"], **TINY), config=clip).settings
    assert (
        settings["heads"],
        settings["activation"],
        settings["norm_eps"],
        settings["embedding_norm"],
    ) == (
        4,
        "gelu",
        1e-3,
        True,
    )
    timm = {
        "model_args": {"num_heads": 8},
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]},
    }
    settings = vit_weights.load_vit(weights(ENCODERS["timm"], **TINY), config=timm).settings
    assert (
        settings["heads"] == 8
        and settings["mean"] == (0.1, 0.2, 0.3)
        and settings["final_norm"]
        and not settings["embedding_norm"]
    )


@pytest.mark.parametrize(
    ("name", "eps", "activation"),
    [
        ("vit_base_patch16_224", 1e-6, "gelu"),
        ("vit_base_patch16_plus_clip_240", 1e-5, "gelu"),
        ("vit_large_patch14_clip_quickgelu_336", 1e-5, "quick_gelu"),
    ],
)
def test_clip_models_of_timm_have_their_own_eps(name: str, eps: float, activation: str) -> None:
    table = weights(ENCODERS["timm"], **TINY)
    settings = vit_weights.load_vit(table, config={"architecture": name}).settings
    assert (settings["norm_eps"], settings["activation"]) == (eps, activation)


def test_refusals() -> None:
    whole = weights(ENCODERS["timm"], **TINY)
    without = {name: array for name, array in whole.items() if name != "blocks.0.mlp.fc2.bias"}
    ragged = {**whole, "blocks.1.norm1.bias": np.zeros(8, np.float32)}
    query = {
        n: a
        for n, a in weights(ENCODERS["hf"], **TINY).items()
        if "layer.1.attention.attention.key.bias" not in n
    }
    for table, words in (
        ({"fc.weight": np.zeros(3)}, ("no known layout", "fc.weight", "timm")),
        (without, ("blocks.0.mlp.fc2.bias is missing",)),
        (query, ("encoder.layer.1.attention.attention.key.bias is missing",)),
        (ragged, ("blocks.{l}.norm1.bias differs in shape",)),
    ):
        with pytest.raises(UserError) as error:
            vit_weights.load_vit(table)
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), (
            str(error.value)
        )
    with pytest.raises(
        UserError,
        match="scales has no name in the layout timm; the nearest are encoder/norm/scale",
    ):
        vit_weights.store_vit({"encoder/norm/scales": np.ones(3)}, "timm", heads=1)


def test_an_intern_image_file_is_recognised() -> None:
    found = vit_weights.load_vit(
        {
            "patch_embed.conv1.weight": np.zeros((32, 3, 3, 3)),
            "levels.0.blocks.0.gamma1": np.zeros(64),
        }
    )
    assert found.layout == "intern_image" and found.arrays[
        "encoder/stage0/layers/gamma1"
    ].shape == (1, 64)
    assert found.settings == {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    beside = {
        "num_attention_heads": 3,
        "image_mean": [0.1, 0.2, 0.3],
        "crop_size": {"height": 384, "width": 384},
    }
    settings = vit_weights.load_vit(
        {"model.patch_embed.conv1.weight": np.zeros((32, 3, 3, 3))}, config=beside
    ).settings
    assert settings == {"mean": (0.1, 0.2, 0.3), "std": (0.229, 0.224, 0.225), "image_size": 384}
    with pytest.raises(UserError, match="InternImage and no momentum copy: take the online ones"):
        vit_weights.load_vit({"patch_embed.conv1.weight": np.zeros((32, 3, 3, 3))}, momentum=True)


def test_the_first_matching_layout_is_used() -> None:
    for name, text in ENCODERS.items():
        extra = SIAMESE_DECODER if name == "siamese_im" else OTHERS[name]
        found = vit_layouts.layout_of(weights(text + "|" + extra, **TINY))
        assert found is not None and found.name == name
