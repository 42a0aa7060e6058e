"""Writes dense/upernet*.npz: what mmsegmentation itself makes of a tiny UperNet on its MAE backbone
(that of BEiT with relative position tables). Run by hand; the tests need only the files, which
dense/README.md describes.

    pip install torch torchvision "setuptools<70" ftfy scipy prettytable packaging matplotlib \\
        mmengine==0.10.7 mmcv-lite==2.1.0 mmsegmentation==1.2.2              # Apache-2.0
    python -m tests.data.make_mmseg

The compiled operations of mmcv are not needed, and are replaced by names that nothing calls. Batch
norm is the plain one: the batch of a step is the whole batch, which is what synchronised batch norm
sees. No dropout and no drop path.
"""

import importlib.machinery
import sys
import types
from typing import Any

import numpy as np

from tests.data import dense_scenes
from tests.data.dense_writing import numpy, report, save

SIDE, WIDTH, LAYERS, CLASSES = 96, 24, 4, 5
SEED, RATE, STEPS = 0, 1e-3, 8
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def without_compiled_part() -> None:
    class Names(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return lambda *_: None

    module = Names("mmcv._ext")
    module.__spec__ = importlib.machinery.ModuleSpec("mmcv._ext", None)
    sys.modules["mmcv._ext"] = module


def build(every: bool = True) -> Any:
    """The model; `every`: the loss divides by all pixels, ignored ones included."""
    import mmseg.engine  # noqa: F401
    import mmseg.models  # noqa: F401
    from mmengine.config import ConfigDict
    from mmseg.registry import MODELS

    norm = {"type": "BN", "requires_grad": True}
    loss = {"type": "CrossEntropyLoss", "use_sigmoid": False, "avg_non_ignore": not every}
    head = {
        "num_classes": CLASSES,
        "dropout_ratio": 0.0,
        "norm_cfg": norm,
        "align_corners": False,
    }
    return MODELS.build(
        {
            "type": "EncoderDecoder",
            "backbone": {
                "type": "MAE",
                "img_size": (SIDE, SIDE),
                "patch_size": 16,
                "embed_dims": WIDTH,
                "num_layers": LAYERS,
                "num_heads": 2,
                "mlp_ratio": 4,
                "init_values": 1.0,
                "drop_path_rate": 0.0,
                "norm_cfg": {"type": "LN", "eps": 1e-6},
                "out_indices": [0, 1, 2, 3],
            },
            "neck": {
                "type": "Feature2Pyramid",
                "embed_dim": WIDTH,
                "rescales": [4, 2, 1, 0.5],
                "norm_cfg": norm,
            },
            "decode_head": {
                "type": "UPerHead",
                "in_channels": [WIDTH] * 4,
                "in_index": [0, 1, 2, 3],
                "pool_scales": (1, 2, 3, 6),
                "channels": 16,
                "loss_decode": loss | {"loss_weight": 1.0},
            }
            | head,
            "auxiliary_head": {
                "type": "FCNHead",
                "in_channels": WIDTH,
                "in_index": 2,
                "channels": 8,
                "num_convs": 1,
                "concat_input": False,
                "loss_decode": loss | {"loss_weight": 0.4},
            }
            | head,
            "train_cfg": {},
            "test_cfg": ConfigDict(mode="slide", crop_size=(SIDE, SIDE), stride=(48, 48)),
        }
    )


def spread(model: Any, seed: int) -> None:
    """Fills parameters and running statistics with values at which everything counts."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1:
                scale = name.endswith("weight") or "gamma" in name
                value.copy_(0.1 * noise + (1.0 if scale else 0.0))
            elif any(key in name for key in ("pos_embed", "cls_token", "bias_table")):
                value.copy_(0.5 * noise)
            else:
                turned = "upsample" in name
                value.copy_(noise / (value.shape[0] if turned else value[0].numel()) ** 0.5)
        for name, value in model.named_buffers():
            if name.endswith("running_mean"):
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
            if name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))


def labelled_batch(seed: int = 3) -> dict[str, np.ndarray]:
    """image uint8 [4, SIDE, SIDE, 3] and map uint8 [4, SIDE, SIDE] (255: not labelled)."""
    rng = np.random.default_rng(seed)
    images = np.stack([dense_scenes.texture(rng, SIDE, SIDE) for _ in range(4)])
    maps = np.zeros((4, SIDE, SIDE), np.uint8)
    y, x = np.mgrid[:SIDE, :SIDE]
    for i in range(4):
        for category in (1, 2, 3, 4, 255):
            cy, cx, ry, rx = (*rng.uniform(10, 86, 2), *rng.uniform(10, 34, 2))
            inside = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
            maps[i][inside] = category
            images[i][inside] = 0.4 * images[i][inside] + 0.6 * rng.uniform(0, 255, 3)
    return {"image": images.astype(np.uint8), "map": maps}


def normalised(images: np.ndarray, double: bool) -> Any:
    import torch

    values = torch.as_tensor(images.transpose(0, 3, 1, 2).astype(np.float64))
    values = (values - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)
    return values.double() if double else values.float()


def samples(maps: np.ndarray) -> list[Any]:
    import torch
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    made = []
    for labels in maps:
        sample = SegDataSample()
        sample.gt_sem_seg = PixelData(data=torch.as_tensor(labels[None].astype(np.int64)))
        made.append(sample)
    return made


def statistics(model: Any) -> dict[str, np.ndarray]:
    return {
        k: numpy(v).copy()
        for k, v in model.named_buffers()
        if k.split(".")[-1].startswith("running_")
    }


def whole(state: dict[str, Any], double: bool) -> Any:
    model = build()
    model.load_state_dict(state)
    return model.double() if double else model


def forward_values(state: dict, batch: dict, double: bool = False) -> dict[str, np.ndarray]:
    """Maps and logits in evaluation (running statistics) and in training (those of the batch), the
    losses, the gradients, the running statistics after one training step."""
    import torch

    model = whole(state, double)
    images = normalised(batch["image"], double)
    made: dict[str, np.ndarray] = {}
    for mode in ("eval", "train"):
        model.train(mode == "train")
        with torch.no_grad():
            blocks = model.backbone(images)
            maps = model.neck(blocks)
            if mode == "eval":
                made |= {f"blocks/{i}": numpy(b) for i, b in enumerate(blocks)}
            made |= {f"{mode}/neck/{i}": numpy(m)[:1] for i, m in enumerate(maps)}
            if mode == "eval":
                made["eval/logits"] = numpy(model.decode_head(maps))
                made["eval/aux_logits"] = numpy(model.auxiliary_head(maps))
    model = whole(state, double).train()
    losses = model.loss(images, samples(batch["map"]))
    total = losses["decode.loss_ce"] + losses["aux.loss_ce"]
    total.backward()
    made |= {f"after/{k}": v for k, v in statistics(model).items()}
    made["losses/all"] = np.stack([numpy(losses[k]) for k in ("decode.loss_ce", "aux.loss_ce")])
    for key, value in model.named_parameters():
        gradient = numpy(value.grad)
        made[f"gradient_norm/{key}"] = np.float32(np.linalg.norm(gradient.astype(float)))
        if gradient.size <= 1300:
            made[f"gradient/{key}"] = gradient
    model = build(every=False)
    model.load_state_dict(state)
    model = (model.double() if double else model).train()
    with torch.no_grad():
        losses = model.loss(images, samples(batch["map"]))
    made["losses/labelled"] = np.stack(
        [numpy(losses[k]) for k in ("decode.loss_ce", "aux.loss_ce")]
    )
    model = whole(state, double).train()
    with torch.no_grad():
        made["train/logits"] = numpy(model.decode_head(model.neck(model.backbone(images))))
    return made


def sliding_values(state: dict, double: bool = False) -> dict[str, np.ndarray]:
    """Sliding windows over an image of 120 x 150: logits at every tenth pixel, and the map."""
    import torch

    image = dense_scenes.texture(np.random.default_rng(9), 120, 150).astype(np.uint8)
    model = whole(state, double).eval()
    with torch.no_grad():
        logits = model.slide_inference(
            normalised(image[None], double), [{"img_shape": (120, 150), "pad_shape": (120, 150)}]
        )
    return {
        "slide/image": image,
        "slide/logits": numpy(logits)[0, :, ::10, ::10],
        "slide/map": numpy(logits)[0].argmax(0).astype(np.uint8),
    }


def trajectory(state: dict, batch: dict, double: bool = False) -> dict[str, np.ndarray]:
    """Both losses before each of eight AdamW steps by mmseg's layer decay, and what is then."""
    from mmseg.engine.optimizers import LearningRateDecayOptimizerConstructor

    model = whole(state, double).train()
    wrapper = LearningRateDecayOptimizerConstructor(
        {
            "type": "OptimWrapper",
            "optimizer": {
                "type": "AdamW",
                "lr": RATE,
                "betas": (0.9, 0.999),
                "weight_decay": 0.05,
            },
        },
        {"num_layers": LAYERS, "decay_rate": 0.65, "decay_type": "layer_wise"},
    )(model)
    names = {id(v): k for k, v in model.named_parameters()}
    before = {k: numpy(v).copy() for k, v in model.named_parameters()}
    made: dict[str, np.ndarray] = {"rate": np.float32(RATE)}
    for group in wrapper.optimizer.param_groups:
        for value in group["params"]:
            made[f"group/{names[id(value)]}"] = np.array(
                [group["lr"] / RATE, group["weight_decay"]], np.float32
            )
    rows = []
    for _ in range(STEPS):
        losses = model.loss(normalised(batch["image"], double), samples(batch["map"]))
        rows.append(np.stack([numpy(losses[k]) for k in ("decode.loss_ce", "aux.loss_ce")]))
        wrapper.update_params(losses["decode.loss_ce"] + losses["aux.loss_ce"])
    made["losses"] = np.stack(rows)
    for key, value in model.named_parameters():
        after = numpy(value)
        moved = (after.astype(float) - before[key]).ravel()
        made[f"moved/{key}"] = np.array(
            [np.linalg.norm(moved), moved @ np.cos(np.arange(moved.size))], np.float32
        )
        if after.size <= 1000:
            made[f"after/{key}"] = after
    made |= {f"after/{k}": v for k, v in statistics(model).items()}
    return made


def main() -> None:
    without_compiled_part()
    import torch

    torch.set_num_threads(1)
    batch = labelled_batch()
    model = build()
    spread(model, SEED)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    kept = {
        f"state/{k}": numpy(v)
        for k, v in state.items()
        if not k.endswith(("relative_position_index", "num_batches_tracked"))
    }
    save("upernet", kept | batch)
    values = forward_values(state, batch) | sliding_values(state)
    report("values", values, forward_values(state, batch, True) | sliding_values(state, True))
    save("upernet_values", values)
    steps = trajectory(state, batch)
    report("steps", steps, trajectory(state, batch, True))
    save("upernet_steps", steps)


if __name__ == "__main__":
    main()
