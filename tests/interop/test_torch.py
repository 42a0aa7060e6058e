"""Compared with timm and Transformers: their weights give the same features here, and exported
weights give the same features there. Skipped without torch, timm and Transformers (the extra
`torch`)."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.evaluation import load
from m3i_jax.interop import export_formats, tensor_files, vit_weights
from m3i_jax.modes import export as mode
from m3i_jax.training import init_from, weight_source
from tests import saved, toy
from tests.interop.published_vit import ENCODERS, OTHERS, shapes

torch, timm, transformers = (
    pytest.importorskip(name) for name in ("torch", "timm", "transformers")
)

SIZES = {"width": 32, "depth": 2, "heads": 2, "patch": 8, "grid": 4}
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
HF = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}
BASE = {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
HF_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
}


@pytest.fixture(autouse=True)
def exact():
    torch.manual_seed(0)
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        yield


def shaken(model):
    """An encoder with random values, norms and biases too, of the magnitude of trained ones."""
    for parameter in model.parameters():
        parameter.add_(
            0.3 * parameter.std(correction=0).clamp(min=0.1) * torch.randn_like(parameter)
        )
    return model.eval()


def images(side: int, count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def close(got: np.ndarray, expected, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` times the largest value: tokens reach a hundred, and float32 has
    seven digits."""
    expected = expected.numpy() if hasattr(expected, "numpy") else expected
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance * max(1.0, np.abs(expected).max()), np.abs(
        got - expected
    ).max()


def normal(model: load.LoadedEncoder, raw: np.ndarray):
    augment = model.config.data.augment
    pixels = (raw / np.float32(255) - np.array(augment.mean, np.float32)) / np.array(
        augment.std, np.float32
    )
    return torch.from_numpy(pixels.astype(np.float32).transpose(0, 3, 1, 2).copy())


def from_timm(
    directory: pathlib.Path,
    arguments: dict,
    name: str = "vit_base_patch16_224",
    suffix: str = ".safetensors",
) -> None:
    model = shaken(timm.create_model(name, pretrained=False, num_classes=3, **arguments))
    path = directory / f"model{suffix}"
    if suffix == ".safetensors":
        tensor_files.write_safetensors(
            path, {name: value.numpy() for name, value in model.state_dict().items()}
        )
    else:
        torch.save({"model": model.state_dict(), "epoch": 3}, path)
    ours = load.load(str(path), pool="tokens", heads=arguments["num_heads"])
    # not stored in a timm file without config.json
    ours.config = with_encoder(ours.config, activation=arguments.get("act_layer", "gelu"))
    raw = images(arguments["img_size"])
    close(ours.features(raw, ready=True), model.forward_features(normal(ours, raw)))


def with_encoder(config: schema.Config, **changes) -> schema.Config:
    encoder = dataclasses.replace(config.model.encoder, **changes)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, encoder=encoder))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"init_values": 0.1},
        {"no_embed_class": True},
        {"class_token": False, "global_pool": "avg"},
        {"final_norm": False},
        {"pre_norm": True, "act_layer": "quick_gelu"},
    ],
    ids=str,
)
def test_features_of_timm_weights_equal_timm(tmp_path: pathlib.Path, arguments: dict) -> None:
    if arguments.get("class_token") is False:
        arguments = arguments | {"fc_norm": False}
    from_timm(tmp_path, SMALL | arguments)


def test_a_pytorch_file(tmp_path: pathlib.Path) -> None:
    from_timm(tmp_path, SMALL, suffix=".pth")


def hugging_face(directory: pathlib.Path, kind: str, sizes: dict) -> None:
    config = {"ViTModel": transformers.ViTConfig, "CLIPVisionModel": transformers.CLIPVisionConfig}[
        kind
    ](**sizes)
    model = shaken(getattr(transformers, kind)(config))
    model.save_pretrained(directory)
    ours = load.load(str(directory), pool="tokens")
    raw = images(sizes["image_size"])
    out = model(pixel_values=normal(ours, raw), output_hidden_states=True)
    if kind == "ViTModel":
        # the file has the norm, so our model has it too
        close(ours.features(raw, ready=True), out.last_hidden_state)
    else:
        close(
            ours.features(raw, ready=True),
            getattr(model, "vision_model", model).post_layernorm(out.last_hidden_state),
        )
    without = load.load(str(directory), pool="tokens")
    without.config = with_encoder(without.config, final_norm=False)
    close(
        without.features(raw, ready=True),
        out.hidden_states[-1] if kind == "ViTModel" else out.last_hidden_state,
    )


@pytest.mark.parametrize("kind", ["ViTModel", "CLIPVisionModel"])
def test_features_of_transformers_weights_equal_transformers(
    tmp_path: pathlib.Path, kind: str
) -> None:
    hugging_face(tmp_path, kind, HF)


def test_masked_autoencoders_of_transformers_are_recognised(tmp_path: pathlib.Path) -> None:
    sizes = {
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
    }
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**HF, **sizes))
    model.save_pretrained(tmp_path)
    found = vit_weights.load_vit(tensor_files.read_tensors(tmp_path))
    assert found.layout == "hf" and not found.unknown and set(found.unused) == {"pixel decoder"}
    ours = weight_source.open_weights(str(tmp_path))
    assert ours.shapes[init_from.TABLE] == (1, 17, 32)


def random_encoder(directory: pathlib.Path, width: int = 32, **changes) -> load.LoadedEncoder:
    settings = {f"model__encoder__{name}": value for name, value in changes.items()}
    saved.run(
        directory, toy.settings(model__encoder__width=width, objective__forms="mim", **settings)
    )
    return load.load(str(directory), pool="tokens")


VARIANTS = [
    {},
    {"final_norm": "true"},
    {"positions": "learned", "norm_eps": 1e-5},
    {"embedding_norm": "true", "activation": "quick_gelu", "final_norm": "true"},
    {"embedding_norm": "true"},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("library", ["timm", "hf"])
def test_exported_weights_give_equal_features(
    tmp_path: pathlib.Path, library: str, changes: dict
) -> None:
    both_ways(tmp_path, library, random_encoder(tmp_path / "run", **changes))


def both_ways(directory: pathlib.Path, library: str, ours: load.LoadedEncoder) -> None:
    described, preprocessing = mode._described(ours)
    size = preprocessing["image_size"]
    raw = images(size)
    shown = normal(ours, raw).numpy().transpose(0, 2, 3, 1)
    out = directory / "out"
    if library == "timm":
        export_formats.timm_config(out, mode.tree_of(ours), described, preprocessing)
        got = export_formats.timm_output(out, described, size, shown)
    else:
        kind = export_formats.hugging_face_config(out, mode.tree_of(ours), described, preprocessing)
        got = export_formats.hugging_face_output(out, kind, described["final_norm"], shown)
    assert got is not None
    close(got, ours.features(raw, ready=True))


def test_timms_own_loader_reads_our_npz(tmp_path: pathlib.Path) -> None:
    ours = random_encoder(tmp_path / "run", final_norm="true")
    tensor_files.write_npz(
        tmp_path / "vit.npz", vit_weights.store_vit(mode.tree_of(ours), "google", heads=2)
    )
    name, arguments = export_formats.timm_arguments(mode._described(ours)[0], 32)
    model = timm.create_model(name, pretrained=False, **arguments).eval()
    model.load_pretrained(str(tmp_path / "vit.npz"))
    raw = images(32)
    close(ours.features(raw, ready=True), model.forward_features(normal(ours, raw)))


def test_the_tables_of_names_equal_the_libraries(tmp_path: pathlib.Path) -> None:
    model = timm.create_model("vit_base_patch16_224", num_classes=10, **SMALL)
    real = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert real == shapes(f"{ENCODERS['timm']} | {OTHERS['timm']}", **SIZES)
    transformers.ViTModel(transformers.ViTConfig(**HF)).save_pretrained(tmp_path / "hf")
    assert tensor_files.read_tensors(tmp_path / "hf").shapes == shapes(
        f"{ENCODERS['hf']} | {OTHERS['hf']}", **SIZES
    )
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**HF)).save_pretrained(
        tmp_path / "clip"
    )
    files = {
        name.removeprefix("vision_model."): shape
        for name, shape in tensor_files.read_tensors(tmp_path / "clip").shapes.items()
    }
    assert files == shapes(ENCODERS["clip"], **SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["timm", "ViTModel", "CLIPVisionModel"])
def test_vit_base_of_the_libraries(tmp_path: pathlib.Path, library: str) -> None:
    from_timm(tmp_path, BASE) if library == "timm" else hugging_face(tmp_path, library, HF_BASE)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["timm", "hf"])
@pytest.mark.parametrize("final_norm", ["false", "true"])
def test_exported_vit_base(tmp_path: pathlib.Path, library: str, final_norm: str) -> None:
    sizes = {"width": 768, "patch_size": 16, "depth": 12, "heads": 12, "final_norm": final_norm}
    config = toy.settings(
        data__image_size=224,
        objective__forms="mim",
        **{f"model__encoder__{name}": n for name, n in sizes.items()},
    )
    saved.run(tmp_path / "run", config)
    both_ways(tmp_path, library, load.load(str(tmp_path / "run"), pool="tokens"))
