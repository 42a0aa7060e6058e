"""Writes tests/data/vit/*.npz: tiny encoders of Transformers and timm with random weights, under
the names of their files, normalised images and the tokens that they give.

    python -m tests.data.make_vit_options

Needs torch, transformers and timm. Registers are cut out of the tokens: nothing of ours has them.
"""

import functools
import json
import pathlib
import tempfile
from typing import Any

import numpy as np
import timm
import torch
import transformers
from safetensors.torch import load_file
from timm.layers import RmsNorm, SwiGLUPacked

OUT = pathlib.Path(__file__).parent / "vit"
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 12,
}


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Every parameter N(0, 0.3^2), those of norms and layer scale around 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        near_one = parameter.ndim == 1 and not name.endswith("bias") and "embed" not in name
        noise = 0.3 * torch.randn(parameter.shape, generator=generator)
        parameter.data = noise + float(near_one)


def pixels(seed: int, height: int = 12, width: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, height, width, 3)).astype(np.float32)


def write(
    name: str,
    table: dict[str, Any],
    config: dict[str, Any],
    images: np.ndarray,
    tokens: torch.Tensor,
    **more: np.ndarray,
) -> None:
    OUT.mkdir(exist_ok=True)
    np.savez_compressed(
        OUT / f"{name}.npz",
        images=images,
        tokens=tokens.detach().numpy(),
        config=np.array(json.dumps(config)),
        **more,
        **{f"weights/{key}": np.asarray(value) for key, value in table.items()},
    )
    print(name, tuple(tokens.shape), len(table))


def channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def hugging_face(
    name: str, model: Any, *, registers: int = 0, rectangle: bool = False, seed: int = 0
) -> None:
    randomize(model, seed)
    model = model.eval()
    images, more = pixels(seed), {}
    with torch.no_grad():
        if name == "siglip2":
            rows = images.reshape(2, 3, 4, 3, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 9, 48)
            out = model(
                pixel_values=torch.from_numpy(np.ascontiguousarray(rows)),
                pixel_attention_mask=torch.ones(2, 9, dtype=torch.long),
                spatial_shapes=torch.tensor([[3, 3], [3, 3]]),
            ).last_hidden_state
        elif name == "mae":
            noise = torch.arange(9.0).repeat(2, 1)
            out = model(channels_first(images), noise=noise).last_hidden_state
        else:
            out = model(channels_first(images)).last_hidden_state
        if name == "clip":
            out = getattr(model, "vision_model", model).post_layernorm(out)
        if rectangle:
            other = pixels(seed + 1, 8, 20)
            tokens = model(channels_first(other)).last_hidden_state[:, 1 + registers :]
            more = {"rectangle": other, "map": tokens.numpy().reshape(2, 2, 5, -1)}
    if registers:
        out = torch.cat([out[:, :1], out[:, 1 + registers :]], 1)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        table = load_file(f"{directory}/model.safetensors")
        config = json.loads(pathlib.Path(directory, "config.json").read_text())
    write(name, table, config, images, out, **more)


def of_timm(
    name: str, seed: int, registers: int = 0, kind: Any = timm.models.VisionTransformer, **more: Any
) -> None:
    model = kind(
        img_size=12, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=0, **more
    ).eval()
    randomize(model, seed)
    images = pixels(seed)
    with torch.no_grad():
        out = model.forward_features(channels_first(images))
    if registers:
        out = torch.cat([out[:, :1], out[:, 1 + registers :]], 1)
    config = {"model_args": {"num_heads": 2}, "pretrained_cfg": {"input_size": [3, 12, 12]}}
    write(name, model.state_dict(), config, images, out)


def main() -> None:
    t = transformers
    hugging_face("dinov2", t.Dinov2Model(t.Dinov2Config(**SIZES, mlp_ratio=2)), seed=1)
    registers = t.Dinov2WithRegistersConfig(**SIZES, use_swiglu_ffn=True, num_register_tokens=3)
    hugging_face("dinov2_swiglu", t.Dinov2WithRegistersModel(registers), registers=3, seed=2)
    for name, gated in (("dinov3", False), ("dinov3_gated", True)):
        config = t.DINOv3ViTConfig(
            **SIZES, intermediate_size=24, num_register_tokens=4, use_gated_mlp=gated,
            hidden_act="silu" if gated else "gelu",
        )  # fmt: skip
        hugging_face(name, t.DINOv3ViTModel(config), registers=4, rectangle=True, seed=3 + gated)
    sizes = {**SIZES, "intermediate_size": 24}
    hugging_face("siglip", t.SiglipVisionModel(t.SiglipVisionConfig(**sizes)), seed=5)
    naflex = {k: v for k, v in sizes.items() if k != "image_size"}
    config = t.Siglip2VisionConfig(**naflex, num_patches=9)
    hugging_face("siglip2", t.Siglip2VisionModel(config), seed=6)
    hugging_face("clip", t.CLIPVisionModel(t.CLIPVisionConfig(**sizes)), seed=7)
    hugging_face("mae", t.ViTMAEModel(t.ViTMAEConfig(**sizes, mask_ratio=0.0)), seed=8)
    for name, gated in (("timm_dinov3", False), ("timm_dinov3_gated", True)):
        of_timm(
            name, 12 + gated, registers=4, kind=timm.models.eva.Eva, num_reg_tokens=4, mlp_ratio=2,
            init_values=1e-5, rope_type="dinov3", rope_temperature=100, rope_rotate_half=True,
            use_rot_pos_emb=True, use_abs_pos_emb=False, use_fc_norm=False, qkv_bias=gated,
            swiglu_mlp=gated, swiglu_align_to=8,
            norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-5),
        )  # fmt: skip
    of_timm("timm_qk_norm", 9, qk_norm=True)
    rms = functools.partial(RmsNorm, eps=1e-6)
    of_timm("timm_rms", 10, qk_norm=True, norm_layer=rms, class_token=True)
    of_timm(
        "timm_dinov2", 11, registers=4, reg_tokens=4, init_values=1e-5, mlp_ratio=3,
        mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU, no_embed_class=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
