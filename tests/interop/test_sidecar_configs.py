"""The JSON files beside published weights: how images are resized, mean and deviation, activation,
read as their libraries use them, and written back."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from m3i_jax import schema
from m3i_jax.data import crops
from m3i_jax.data.preprocessing import Preprocessing, with_evaluation
from m3i_jax.errors import UserError
from m3i_jax.evaluation import load
from m3i_jax.interop import export_formats, sidecar_configs, tensor_files, vit_weights
from m3i_jax.interop.layout_entries import HALVES, IMAGENET
from m3i_jax.training import weight_source
from tests import toy
from tests.interop.published_vit import ENCODERS, TINY, weights

SIDE = 12  # pixels of an image of TINY
SQUARE = {"height": SIDE, "width": SIDE}
# what a file says -> (interpolation, squash, short side); "processor" is of Hugging Face
PROCESSORS = {
    "ViT": ({"size": SQUARE, "resample": 2}, ("bilinear", True, 12)),
    "an old ViT": (
        {"size": SIDE, "feature_extractor_type": "ViTFeatureExtractor"},
        ("bilinear", True, 12),
    ),
    "SigLIP": (
        {"size": SQUARE, "resample": 3, "do_center_crop": None, "crop_size": None},
        ("bicubic", True, 12),
    ),
    "DeiT": (
        {
            "size": 14,
            "crop_size": SIDE,
            "resample": 3,
            "feature_extractor_type": "DeiTFeatureExtractor",
        },
        ("bicubic", True, 14),
    ),
    "CLIP": (
        {"size": {"shortest_edge": 14}, "crop_size": SQUARE, "resample": 3},
        ("bicubic", False, 14),
    ),
    "an old CLIP": (
        {"size": 14, "crop_size": SIDE, "feature_extractor_type": "CLIPFeatureExtractor"},
        ("bicubic", False, 14),
    ),
    "NaFlex": (
        {"image_processor_type": "Siglip2ImageProcessor", "resample": 2, "patch_size": 4},
        ("bilinear", True, 12),
    ),
    "nearest": ({"size": SQUARE, "resample": 0}, ("nearest", True, 12)),
    "lanczos": ({"size": SQUARE, "resample": 1}, ("lanczos", True, 12)),
    "box": ({"size": SQUARE, "resample": 4}, ("box", True, 12)),
    "hamming": ({"size": SQUARE, "resample": 5}, ("hamming", True, 12)),
    "no crop": (
        {"size": SQUARE, "do_center_crop": False, "crop_size": 10, "resample": 3},
        ("bicubic", True, 12),
    ),
}
# of a pretrained_cfg of timm: 12 / 0.9 = 13.3 and 12 / 0.875 = 13.7 are rounded down
TIMM = {
    "center": ({"crop_pct": 0.9, "interpolation": "bilinear"}, ("bilinear", False, 13)),
    "squash": ({"crop_pct": 1.0, "crop_mode": "squash"}, ("bicubic", True, 12)),
    "squash and crop": ({"crop_pct": 0.9, "crop_mode": "squash"}, ("bicubic", True, 13)),
    "no crop_pct": ({}, ("bicubic", False, 13)),
    "nearest": ({"crop_pct": 0.9, "interpolation": "nearest"}, ("nearest", False, 13)),
    "lanczos": ({"crop_pct": 0.9, "interpolation": "lanczos"}, ("lanczos", False, 13)),
    "hamming": (
        {"crop_pct": 1.0, "interpolation": "hamming", "crop_mode": "squash"},
        ("hamming", True, 12),
    ),
}
NOISE = np.random.default_rng(0).integers(0, 256, (48, 24, 3), np.uint8)


def published(directory: pathlib.Path, layout: str, **files: dict) -> Preprocessing:
    """Writes tiny weights of a layout with JSON files beside them; the preprocessing they have."""
    tensor_files.write_safetensors(
        directory / "model.safetensors", weights(ENCODERS[layout], **TINY)
    )
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return load.load(str(directory), heads=2).preprocessing


def resized(preprocessing: Preprocessing) -> tuple[str, bool, int]:
    return preprocessing.interpolation, preprocessing.squash, preprocessing.short_side


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processor_of_hugging_face(name: str) -> None:
    config, expected = PROCESSORS[name]
    # beside a model with parts, whose processor is not part of `vision_config`
    for model in ({}, {"vision_config": {"num_attention_heads": 2, "image_size": SIDE}}):
        found = sidecar_configs.sidecar_settings({**config, **model})
        found = {key: found[key] for key in ("crop", "interpolation", "squash") if key in found}
        assert resized(Preprocessing(image_size=SIDE, **found)) == expected


def test_a_processor_of_images_and_texts(tmp_path: pathlib.Path) -> None:
    """Transformers 5 saves it in processor_config.json, which comes before the older file; older
    versions have other things there."""
    processor = {"image_processor": PROCESSORS["SigLIP"][0] | {"image_mean": [0.1, 0.2, 0.3]}}
    older = {"preprocessor_config": PROCESSORS["CLIP"][0]}
    for files in ({}, older):
        found = published(tmp_path, "clip", processor_config=processor, **files)
        assert resized(found) == ("bicubic", True, 12) and found.mean == (0.1, 0.2, 0.3)
    found = published(tmp_path, "clip", processor_config={"processor_class": "X"}, **older)
    assert resized(found) == ("bicubic", False, 14)


@pytest.mark.parametrize("name", TIMM)
def test_a_file_of_timm(name: str, tmp_path: pathlib.Path) -> None:
    config, expected = TIMM[name]
    cfg = {"input_size": [3, SIDE, SIDE], **config}
    preprocessing = published(tmp_path, "timm", config={"pretrained_cfg": cfg})
    assert resized(preprocessing) == expected
    timm = pytest.importorskip("timm")
    see = timm.data.create_transform(**timm.data.resolve_data_config({}, pretrained_cfg=cfg))
    # The range of the levels is kept from the ends, at which Pillow clips between its two passes.
    image = NOISE // 4 + 96
    theirs = see.transforms[1](see.transforms[0](Image.fromarray(image)))
    difference = preprocessing.view(image).astype(int) - np.asarray(theirs)
    assert np.abs(difference).max() <= 2


@pytest.mark.parametrize("layout", ["clip", "timm"])
def test_images_with_more_pixels_than_their_patches(layout: str, tmp_path: pathlib.Path) -> None:
    """SigLIP's of 384 have 27 patches of 14; here 14 pixels have 3 of 4, and are resized to 14."""
    square = {"height": 14, "width": 14}
    files = {
        "clip": {"config": {"image_size": 14}, "preprocessor_config": {"size": square}},
        "timm": {"config": {"pretrained_cfg": {
            "input_size": [3, 14, 14], "crop_pct": 1.0, "crop_mode": "squash",
        }}},
    }  # fmt: skip
    found = published(tmp_path, layout, **files[layout])
    assert (found.image_size, found.short_side, found.squash) == (12, 14, True)
    image = np.random.default_rng(0).integers(0, 256, (14, 14, 3), np.uint8)
    np.testing.assert_array_equal(found.view(image), image[1:-1, 1:-1])
    notes = weight_source.open_weights(str(tmp_path)).notes
    assert any("14 pixels, of which patches of 4 cover 12" in note for note in notes)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"resample": 6}, "resample=6"),
        ({"size": {"longest_edge": 64}}, "size={'longest_edge': 64}"),
        ({"size": {"shortest_edge": 64}, "do_resize": False}, "do_resize=false"),
        ({"size": {"shortest_edge": 64}, "do_rescale": False}, "do_rescale=false"),
        ({"size": {"height": 64, "width": 32}}, "'width': 32"),
        ({"pretrained_cfg": {"interpolation": "random"}}, "interpolation='random'"),
        (
            {"pretrained_cfg": {"input_size": [3, SIDE, SIDE], "crop_mode": "border"}},
            "crop_mode='border'",
        ),
    ],
)
def test_preprocessing_that_is_none_of_ours_is_refused(config: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        sidecar_configs.sidecar_settings(config)
    assert "\n" not in str(error.value)


def test_numbers_of_every_channel_and_other_scales() -> None:
    found = sidecar_configs.preprocessing_settings({"image_mean": 0.2, "image_std": [0.1] * 3})
    assert found == {"mean": (0.2,) * 3, "std": (0.1,) * 3}
    assert sidecar_configs.preprocessing_settings({"rescale_factor": 0.00392156862745098}) == {}
    with pytest.raises(UserError, match="rescale_factor=0.0078"):
        sidecar_configs.preprocessing_settings({"rescale_factor": 1 / 127.5})


def test_filters_have_one_name_everywhere() -> None:
    """Pillow's numbers, those of files, and the values of the setting."""
    assert [Image.Resampling(i).name.lower() for i in range(6)] == list(sidecar_configs.RESAMPLE)
    assert crops.FILTERS.keys() == set(sidecar_configs.RESAMPLE)
    for name in sidecar_configs.RESAMPLE:
        assert toy.settings(evaluate__interpolation=name).evaluate.interpolation == name


def test_a_processor_that_does_not_normalize() -> None:
    config = {"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    found = sidecar_configs.sidecar_settings(config)
    assert (found["mean"], found["std"]) == ((0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize("squash", [False, True])
def test_transformers_see_what_is_written(squash: bool, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    preprocessing = Preprocessing(
        image_size=SIDE, crop=SIDE / 14, interpolation="bilinear", squash=squash
    )
    content = export_formats._processor(preprocessing.described())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    see = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    image = NOISE // 4 + 96
    seen = see(Image.fromarray(image), return_tensors="pt")["pixel_values"][0].numpy()
    theirs = 255 * (seen.transpose(1, 2, 0) * preprocessing.std + preprocessing.mean)
    assert np.abs(preprocessing.view(image) - theirs).max() < 2.1


def test_squashed_and_bilinear_views() -> None:
    """The reference is Pillow's resize of the whole image to a square."""
    preprocessing = Preprocessing(image_size=SIDE, crop=1.0, interpolation="bilinear", squash=True)
    expected = np.asarray(
        Image.fromarray(NOISE).resize((SIDE, SIDE), Image.Resampling.BILINEAR), int
    )
    assert (preprocessing.view(NOISE) == expected).all()
    assert np.abs(preprocessing.view(NOISE / np.float32(255)) * 255 - expected).max() < 1.6
    usual = Preprocessing(image_size=SIDE, crop=1.0)
    assert np.abs(usual.view(NOISE).astype(int) - expected).max() > 16


def test_a_run_keeps_its_rounding_and_timm_has_its_own() -> None:
    """384 / 0.875 = 438.86: a run's evaluation rounds, timm rounds down."""
    cfg = {"input_size": [3, 384, 384], "crop_pct": 0.875}
    found = sidecar_configs.sidecar_settings({"pretrained_cfg": cfg})
    assert Preprocessing(**found).short_side == 438
    assert Preprocessing(image_size=384, crop=0.875).short_side == 439


@pytest.mark.parametrize("format", ["timm", "hf", "npz"])
@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(image_size=SIDE, crop=1.0, interpolation="bilinear", squash=True),
        Preprocessing(image_size=SIDE, crop=SIDE / 14, squash=True, mean=(0.5, 0.4, 0.3)),
        Preprocessing(image_size=SIDE, crop=SIDE / 14, interpolation="bilinear"),
    ],
)
def test_what_is_written_is_read_back(
    preprocessing: Preprocessing, format: str, tmp_path: pathlib.Path
) -> None:
    found = vit_weights.load_vit(weights(ENCODERS["timm"], **TINY))
    encoder = {**found.settings, "heads": 2}
    described = preprocessing.described()
    if format == "timm":
        export_formats.timm_config(tmp_path, found.arrays, encoder, described)
    elif format == "hf":
        export_formats.hugging_face_config(tmp_path, found.arrays, encoder, described)
    else:
        export_formats.description(tmp_path, described, None)
    settings = sidecar_configs.sidecar_settings(sidecar_configs.read_sidecar_configs(str(tmp_path)))
    names = ("image_size", "crop", "interpolation", "squash", "mean", "std")
    again = Preprocessing(**{name: settings[name] for name in names if name in settings})
    assert {**again.described(), "crop": 0} == {**described, "crop": 0}


def test_evaluations_of_a_file_see_what_it_describes(tmp_path: pathlib.Path) -> None:
    """With its crop, unless the settings have another than the default."""
    published(tmp_path, "hf", preprocessor_config=PROCESSORS["ViT"][0])
    model = load.load(str(tmp_path), heads=2)
    for crop, expected in ((0.875, 12), (0.75, 16)):
        evaluate = schema.Evaluate(crop=crop)
        config = toy.settings()
        config = dataclasses.replace(config, evaluate=evaluate, init_from=str(tmp_path))
        fitted = load.fit_config_to_weights(config, str(tmp_path), "--checkpoint")
        for found in (with_evaluation(model.config, config, keep=True), fitted):
            assert resized(Preprocessing.of(found)) == ("bilinear", True, expected)
    config = dataclasses.replace(config, evaluate=schema.Evaluate(interpolation="lanczos"))
    fitted = load.fit_config_to_weights(config, str(tmp_path), "--checkpoint")
    assert resized(Preprocessing.of(fitted)) == ("lanczos", True, 12)


@pytest.mark.parametrize("layout", ["timm", "clip"])
def test_an_encoder_of_the_sizes_of_the_run_is_evaluated_as_it_is(
    layout: str, tmp_path: pathlib.Path
) -> None:
    """With its own cls token, norms, activation and pixels, as `m3i_jax.load` has it, and with the
    heads of the run, which the file does not state."""
    processor = PROCESSORS["ViT"][0] | {"image_mean": [0.1, 0.2, 0.3]}
    published(tmp_path, layout, preprocessor_config=processor)
    loaded = load.load(str(tmp_path), heads=2)
    sizes = {"patch_size": 4, "width": 16, "heads": 2}
    sizes["mlp_ratio"] = loaded.config.model.encoder.mlp_ratio
    changes = {f"model__encoder__{name}": value for name, value in sizes.items()}
    run = toy.settings(**changes, data__image_size=16)
    fitted = load.fit_config_to_weights(run, str(tmp_path), "--checkpoint")
    differ = {
        field.name
        for field in dataclasses.fields(schema.Encoder)
        if getattr(fitted.model.encoder, field.name)
        != getattr(loaded.config.model.encoder, field.name)
    }
    assert not differ - {"drop_path"} and fitted.model.encoder.final_norm
    found = Preprocessing.of(fitted)
    assert found == loaded.preprocessing and found.mean == (0.1, 0.2, 0.3)


def test_an_old_description_is_read() -> None:
    """preprocessing.json of version 0.1 has no interpolation and no squash."""
    old = {"resample": "bicubic", "image_size": SIDE, "crop": 1.0, "short_side": SIDE}
    found = sidecar_configs.sidecar_settings({tensor_files.PREPROCESSING: old})
    assert resized(Preprocessing(**found)) == ("bicubic", False, SIDE)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "vit"}, HALVES),
        ({"model_type": "vit_mae"}, IMAGENET),
        ({"model_type": "deit"}, IMAGENET),
        ({"architectures": ["DeiTForImageClassification"]}, IMAGENET),
        ({"model_type": "vit_mae", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, HALVES),
    ],
)
def test_mean_and_deviation_of_families_of_hugging_face(config: dict, expected: dict) -> None:
    settings = vit_weights.load_vit(weights(ENCODERS["hf"], **TINY), config=config).settings
    assert {name: settings[name] for name in ("mean", "std")} == expected


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("vit_base_patch16_siglip_224", "gelu"),
        ("vit_so400m_patch14_siglip_384", "gelu"),
        ("vit_base_patch32_siglip_256", "gelu_tanh"),
        ("vit_large_patch16_siglip_512", "gelu_tanh"),
        ("vit_so400m_patch16_siglip_gap_384", "gelu_tanh"),
        ("vit_giantopt_patch16_siglip_256", "gelu_tanh"),
    ],
)
def test_a_siglip_of_timm(name: str, activation: str) -> None:
    """Its pooling head is known and left out; the form of GELU is that of its entry point."""
    table = weights(ENCODERS["timm"], **TINY)
    del table["cls_token"]
    table["pos_embed"] = table["pos_embed"][:, 1:]
    table |= {"attn_pool.latent": np.zeros((1, 1, 16)), "attn_pool.q.weight": np.zeros((16, 16))}
    found = vit_weights.load_vit(table, config={"architecture": name})
    assert found.unused == {"pooling head": 2} and not found.unknown
    assert found.settings["activation"] == activation and not found.settings["cls_token"]
