"""Makes vitdet_backbone.npz and beit.npz: outputs and gradients of transformers' VitDet and Beit,
in float64, with random weights under the names that detectron2 and mmsegmentation give them.

    python tests/data/make_vitdet.py tests/data/dense

Needs torch and transformers (5.24), which the tests do not."""

import pathlib
import re
import sys

import numpy as np
import torch
from transformers import BeitConfig, BeitModel, VitDetConfig, VitDetModel

VITDET = dict(
    hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, patch_size=4,
    image_size=32, pretrain_image_size=16, window_size=3, window_block_indices=[0, 1, 3],
    use_absolute_position_embeddings=True, use_relative_position_embeddings=True,
    layer_norm_eps=1e-6, hidden_act="gelu", drop_path_rate=0.0,
)  # fmt: skip
BEIT = dict(
    hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, patch_size=4,
    image_size=16, use_absolute_position_embeddings=True, use_relative_position_bias=True,
    layer_scale_init_value=0.5, layer_norm_eps=1e-6, hidden_act="gelu", drop_path_rate=0.0,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
BEIT_BLOCKS = (0, 2, 3)
DETECTRON2 = (
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.projection", "patch_embed.proj"),
    (r"^encoder\.layer\.(\d+)\.attention", r"blocks.\1.attn"),
    (r"^encoder\.layer\.(\d+)", r"blocks.\1"),
)
MMSEG = (
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.projection"),
    (r"^layers\.(\d+)\.relative_position_bias\.", r"layers.\1.attn."),
    (r"^layers\.(\d+)\.lambda_", r"layers.\1.gamma_"),
    (r"^layers\.(\d+)\.layernorm_before", r"layers.\1.ln1"),
    (r"^layers\.(\d+)\.layernorm_after", r"layers.\1.ln2"),
    (r"^layers\.(\d+)\.mlp\.fc1", r"layers.\1.ffn.layers.0.0"),
    (r"^layers\.(\d+)\.mlp\.fc2", r"layers.\1.ffn.layers.1"),
    (r"^layers\.(\d+)\.attention\.o_proj", r"layers.\1.attn.proj"),
)


def randomized(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            scale = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            value.copy_((scale + 0.3 * drawn).float())
    return model.double().eval()


def renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    return next((re.sub(a, b, name) for a, b in rules if re.search(a, name)), name)


def joined(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Query, key and value of Beit as mmsegmentation has them: one matrix, no bias of the key."""
    out = {}
    for name, value in arrays.items():
        match = re.match(r"layers\.(\d+)\.attention\.([qkv])_proj\.(weight|bias)$", name)
        if match is None:
            out[name] = value
        elif match[2] == "q":
            get = lambda n: arrays.get(f"layers.{match[1]}.attention.{n}_proj.{match[3]}")
            parts = [get("q"), get("k"), get("v")]
            parts[1] = np.zeros_like(parts[0]) if parts[1] is None else parts[1]
            out[f"layers.{match[1]}.attn.qkv.{match[3]}"] = np.concatenate(parts)
    return out


def reference(model, sizes, outputs, rename):
    generator = np.random.default_rng(7)
    saved = {}
    arrays = lambda values: rename({n: v.detach().numpy() for n, v in values.items()})
    weights = arrays(dict(model.named_parameters()))
    saved |= {f"weights/{name}": value for name, value in weights.items()}
    for case, (height, width) in enumerate(sizes):
        image = generator.normal(size=(2, 3, height, width))
        model.zero_grad()
        maps = outputs(model, torch.from_numpy(image))
        noise = [generator.normal(size=m.shape) for m in maps]
        sum((m * torch.from_numpy(n)).sum() for m, n in zip(maps, noise, strict=True)).backward()
        saved[f"case{case}/image"] = image.transpose(0, 2, 3, 1)
        for i, (m, n) in enumerate(zip(maps, noise, strict=True)):
            saved[f"case{case}/map{i}"] = m.detach().numpy().transpose(0, 2, 3, 1)
            saved[f"case{case}/noise{i}"] = n.transpose(0, 2, 3, 1)
        gradients = {
            n: v.grad if v.grad is not None else torch.zeros_like(v)
            for n, v in model.named_parameters()
        }
        saved |= {f"case{case}/gradients/{n}": v for n, v in arrays(gradients).items()}
    return {name: value.astype(np.float32) for name, value in saved.items()}


def vitdet(folder: pathlib.Path) -> None:
    rename = lambda values: {
        f"backbone.net.{renamed(name, DETECTRON2)}": value for name, value in values.items()
    }
    outputs = lambda model, image: [model(image).last_hidden_state]
    model = randomized(VitDetModel(VitDetConfig(**VITDET)), 1)
    np.savez_compressed(
        folder / "vitdet_backbone.npz", **reference(model, [(32, 32), (24, 40)], outputs, rename)
    )


def beit(folder: pathlib.Path) -> None:
    def outputs(model: torch.nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
        taken = []
        hooks = [
            model.layers[i].register_forward_hook(
                lambda *call: taken.append(call[2][0] if isinstance(call[2], tuple) else call[2])
            )
            for i in BEIT_BLOCKS
        ]
        model(image)
        for hook in hooks:
            hook.remove()
        height, width = image.shape[2] // 4, image.shape[3] // 4
        return [x[:, 1:].transpose(1, 2).reshape(len(x), -1, height, width) for x in taken]

    rename = lambda values: {
        f"backbone.{renamed(name, MMSEG)}": value for name, value in joined(values).items()
    }
    # the last norm is of image classification
    model = randomized(BeitModel(BeitConfig(**BEIT), add_pooling_layer=False), 2)
    model.layernorm = torch.nn.Identity()
    np.savez_compressed(
        folder / "beit.npz", **reference(model, [(16, 16), (16, 24)], outputs, rename)
    )


if __name__ == "__main__":
    target = pathlib.Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    vitdet(target)
    beit(target)
