"""Writes dense/segmentation_heads.npz: values, gradients and running statistics of pyramids and of
UperNet, written in torch from the description of the networks alone, for the tests of
`m3i_jax.models.dense.pyramid` and `upernet`. UperNet's own are compared with transformers', the
lateral pyramid with torchvision's. Run it once, with torch, torchvision and transformers installed;
the tests need only the file.

    python -m tests.data.make_segmentation_heads
"""

import pathlib

import numpy as np

PLACE = pathlib.Path(__file__).parent / "dense" / "segmentation_heads.npz"
BATCH, WIDTH, AUX, CLASSES, RATE, MOMENTUM = 3, 6, 4, 5, 0.3, 0.1
POOL = (1, 2, 3, 6)
STRIDES = (4, 8, 16, 32)
CHANNELS = (3, 5, 4, 8)
SIDES = ((24, 20), (12, 10), (6, 5), (3, 3))
# name -> kind, strides, sources (stride, channels), size of the source of stride 16 or 8
PYRAMIDS = {
    "simple_16": ("simple", (4, 8, 16, 32, 64), ((16, 12),), (4, 6)),
    "simple_8": ("simple", (4, 8, 16, 32), ((8, 8),), (6, 4)),
    "rescale_16": ("rescale", (4, 8, 16, 32), ((16, 6),) * 4, (4, 2)),
    "rescale_8": ("rescale", (4, 8, 16, 32), ((8, 6),), (4, 8)),
    "lateral": ("lateral", (4, 8, 16, 32, 64), tuple(zip(STRIDES, CHANNELS, strict=True)), None),
}


def to_kernel(name: str, kernel: np.ndarray):
    """A stored kernel as torch's."""
    import torch

    if "deconv" in name:
        n = kernel.shape[0]
        kernel = kernel.reshape(n, 2, 2, -1).transpose(0, 3, 1, 2)
    elif kernel.ndim == 2:
        kernel = kernel.T[:, :, None, None]
    else:
        kernel = kernel.transpose(3, 2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(kernel))


def from_kernel(name: str, kernel: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if "deconv" in name:
        return kernel.transpose(0, 2, 3, 1).reshape(shape)
    return kernel.transpose(2, 3, 1, 0).reshape(shape)


class Weights:
    """Random parameters by name, as stored and as torch's leaves; and running statistics."""

    def __init__(self, rng: np.random.Generator):
        self.rng, self.stored, self.leaves, self.before, self.after = rng, {}, {}, {}, {}

    def get(self, name: str, *shape: int):
        if name not in self.leaves:
            last = name.rsplit("/", 1)[-1]
            fan = np.prod(shape[:-1])
            value = self.rng.normal(size=shape) * (fan**-0.5 if last == "kernel" else 0.2)
            value = (value + (last == "scale")).astype(np.float32)
            self.stored[name] = value
            leaf = to_kernel(name, value) if last == "kernel" else torch_of(value)
            self.leaves[name] = leaf.requires_grad_()
        return self.leaves[name]

    def statistics(self, name: str, channels: int):
        for last in ("mean", "variance"):
            value = self.rng.normal(size=channels) * 0.1 + 1.2 * (last == "variance")
            self.before.setdefault(f"{name}/{last}", value.astype(np.float32))
        self.after |= {
            f"{name}/{k}": self.before[f"{name}/{k}"].copy() for k in ("mean", "variance")
        }
        return [torch_of(self.after[f"{name}/{k}"]) for k in ("mean", "variance")]


def torch_of(x: np.ndarray):
    import torch

    return torch.from_numpy(x)


def conv(w: Weights, name: str, x, kernel: tuple[int, ...], *, bias: bool = False):
    from torch.nn import functional

    return functional.conv2d(
        x,
        w.get(f"{name}/kernel", *kernel),
        w.get(f"{name}/bias", kernel[-1]) if bias else None,
        padding=kernel[0] // 2 if len(kernel) == 4 else 0,
    )


def batch_norm(w: Weights, name: str, x, train: bool):
    from torch.nn import functional

    c = x.shape[1]
    scale, bias = w.get(f"{name}/scale", c), w.get(f"{name}/bias", c)
    return functional.batch_norm(x, *w.statistics(name, c), scale, bias, train, MOMENTUM, 1e-5)


def channel_norm(w: Weights, name: str, x):
    c = x.shape[1]
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    scale, bias = w.get(f"{name}/scale", c), w.get(f"{name}/bias", c)
    unit = (x - mean) / (variance + 1e-6).sqrt()
    return unit * scale[:, None, None] + bias[:, None, None]


def deconv(w: Weights, name: str, x, out: int):
    from torch.nn import functional

    kernel = w.get(f"{name}/kernel", x.shape[1], 4 * out)
    return functional.conv_transpose2d(x, kernel, w.get(f"{name}/bias", out), stride=2)


def upernet(w: Weights, maps: list, uniform, train: bool):
    import torch
    from torch.nn import functional

    def layer(name, x, *kernel):
        return batch_norm(w, name, conv(w, name, x, kernel), train).relu()

    def resize(x, like):
        size = like.shape[2:]
        return functional.interpolate(x, size=size, mode="bilinear", align_corners=False)

    def drop(x, uniform):
        return x * (uniform >= RATE)[:, :, None, None] / (1 - RATE) if train else x

    top, c = maps[-1], CHANNELS
    pools = [
        resize(layer(f"pool_{n}", functional.adaptive_avg_pool2d(top, n), c[-1], WIDTH), top)
        for n in POOL
    ]
    pooled = torch.cat([top, *pools], 1)
    lateral = [
        layer(f"lateral_{stride}", x, n, WIDTH)
        for stride, n, x in zip(STRIDES[:-1], c[:-1], maps[:-1], strict=True)
    ]
    lateral.append(layer("pooled", pooled, 3, 3, pooled.shape[1], WIDTH))
    for i in (2, 1, 0):
        lateral[i] = lateral[i] + resize(lateral[i + 1], lateral[i])
    outputs = [
        layer(f"output_{stride}", x, 3, 3, WIDTH, WIDTH)
        for stride, x in zip(STRIDES[:-1], lateral[:-1], strict=True)
    ]
    outputs.append(lateral[-1])
    joined = torch.cat([resize(x, outputs[0]) for x in outputs], 1)
    x = drop(layer("fuse", joined, 3, 3, 4 * WIDTH, WIDTH), uniform[:, :WIDTH])
    logits = conv(w, "classifier", x, (WIDTH, CLASSES), bias=True)
    x = drop(layer("aux", maps[-2], 3, 3, c[-2], AUX), uniform[:, WIDTH:])
    return logits, conv(w, "aux_classifier", x, (AUX, CLASSES), bias=True)


def pyramid(w: Weights, kind: str, strides, sources, maps: list, train: bool) -> list:
    from torch.nn import functional

    gelu = functional.gelu
    made: list = []
    if kind == "lateral":
        above = None
        for (stride, c), x in reversed(list(zip(sources, maps, strict=True))):
            y = conv(w, f"stride_{stride}/lateral", x, (c, WIDTH), bias=True)
            if above is not None:
                y = y + functional.interpolate(above, size=y.shape[2:], mode="nearest")
            above = y
            name = f"stride_{stride}/output"
            made.insert(0, conv(w, name, y, (3, 3, WIDTH, WIDTH), bias=True))
        return [*made, made[-1][:, :, ::2, ::2]]
    for i, stride in enumerate(strides):
        name, x = f"stride_{stride}", maps[i % len(maps)]
        ratio = sources[0][0] / stride
        if kind == "simple" and stride == strides[-1]:
            made.append(made[-1][:, :, ::2, ::2])
            continue
        width = x.shape[1]
        if ratio < 1:
            x = functional.max_pool2d(x, round(1 / ratio))
        if ratio == 4:
            first = width // 2 if kind == "simple" else width
            x = deconv(w, f"{name}/deconv_0", x, first)
            norm = f"{name}/scale_norm_0"
            x = channel_norm(w, norm, x) if kind == "simple" else batch_norm(w, norm, x, train)
            x = deconv(w, f"{name}/deconv_1", gelu(x), width // 4 if kind == "simple" else width)
        if ratio == 2:
            x = deconv(w, f"{name}/deconv_0", x, width // 2 if kind == "simple" else width)
        if kind == "simple":
            x = conv(w, f"{name}/conv_0", x, (x.shape[1], WIDTH))
            x = channel_norm(w, f"{name}/norm_0", x)
            x = conv(w, f"{name}/conv_1", x, (3, 3, WIDTH, WIDTH))
            x = channel_norm(w, f"{name}/norm_1", x)
        made.append(x)
    return made


def nhwc(x) -> np.ndarray:
    return np.ascontiguousarray(x.detach().movedim(1, -1).numpy())


def record(made: dict, name: str, rng, maps: list[np.ndarray], function) -> Weights:
    """Values in evaluation and training, gradients in training, and the statistics after."""
    import torch

    w = Weights(rng)
    leaves = [torch_of(x).movedim(-1, 1).contiguous().requires_grad_() for x in maps]
    with torch.no_grad():
        for i, y in enumerate(function(w, leaves, False)):
            made[f"{name}/eval/{i}"] = nhwc(y)
    outputs = function(w, leaves, True)
    grads = [rng.normal(size=nhwc(y).shape).astype(np.float32) for y in outputs]
    total = sum((y * torch_of(g).movedim(-1, 1)).sum() for y, g in zip(outputs, grads, strict=True))
    names = list(w.leaves)
    found = torch.autograd.grad(total, [*leaves, *w.leaves.values()])
    for i, (y, g) in enumerate(zip(outputs, grads, strict=True)):
        made |= {f"{name}/train/{i}": nhwc(y), f"{name}/g/{i}": g}
    for i, (x, dx) in enumerate(zip(maps, found, strict=False)):
        made |= {f"{name}/map/{i}": x, f"{name}/dmap/{i}": nhwc(dx)}
    for key, dw in zip(names, found[len(maps) :], strict=True):
        value, grad = w.stored[key], dw.numpy()
        made[f"{name}/params/{key}"] = value
        made[f"{name}/dparams/{key}"] = (
            from_kernel(key, grad, value.shape) if key.endswith("/kernel") else grad
        )
    made |= {f"{name}/before/{key}": value for key, value in w.before.items()}
    made |= {f"{name}/after/{key}": value for key, value in w.after.items()}
    return w


def compare_with_transformers(w: Weights, maps: list, made: dict) -> None:
    """The head above against transformers' modules with the same weights."""
    import torch
    from transformers import UperNetConfig
    from transformers.models.upernet import modeling_upernet

    config = UperNetConfig(
        hidden_size=WIDTH,
        pool_scales=list(POOL),
        num_labels=CLASSES,
        auxiliary_channels=AUX,
        auxiliary_num_convs=1,
        backbone_config={"model_type": "convnext"},
    )
    head = modeling_upernet.UperNetHead(config, CHANNELS)
    aux = modeling_upernet.UperNetFCNHead(config, CHANNELS)
    ours = {f"psp_modules.{i}.1": f"pool_{n}" for i, n in enumerate(POOL)}
    ours |= {f"lateral_convs.{i}": f"lateral_{n}" for i, n in enumerate(STRIDES[:-1])}
    ours |= {f"fpn_convs.{i}": f"output_{n}" for i, n in enumerate(STRIDES[:-1])}
    ours |= {"bottleneck": "pooled", "fpn_bottleneck": "fuse", "convs.0": "aux"}
    for module, last in ((head, "classifier"), (aux, "aux_classifier")):
        for name, part in module.named_modules():
            if isinstance(part, modeling_upernet.UperNetConvModule):
                key = ours[name]
                part.conv.weight.data = w.leaves[f"{key}/kernel"].detach()
                part.batch_norm.weight.data = w.leaves[f"{key}/scale"].detach()
                part.batch_norm.bias.data = w.leaves[f"{key}/bias"].detach()
                part.batch_norm.running_mean = torch_of(w.before[f"{key}/mean"])
                part.batch_norm.running_var = torch_of(w.before[f"{key}/variance"])
        module.classifier.weight.data = w.leaves[f"{last}/kernel"].detach()
        module.classifier.bias.data = w.leaves[f"{last}/bias"].detach()
        module.eval()
    leaves = [torch_of(x).movedim(-1, 1) for x in maps]
    with torch.no_grad():
        for i, module in enumerate((head, aux)):
            np.testing.assert_allclose(
                nhwc(module(leaves)), made[f"upernet/eval/{i}"], atol=1e-5, rtol=1e-5
            )


def compare_with_torchvision(w: Weights, maps: list, made: dict) -> None:
    import torch
    import torchvision

    pyramid = torchvision.ops.FeaturePyramidNetwork(
        list(CHANNELS), WIDTH, torchvision.ops.feature_pyramid_network.LastLevelMaxPool()
    )
    for i, stride in enumerate(STRIDES):
        for blocks, name in ((pyramid.inner_blocks, "lateral"), (pyramid.layer_blocks, "output")):
            blocks[i][0].weight.data = w.leaves[f"stride_{stride}/{name}/kernel"].detach()
            blocks[i][0].bias.data = w.leaves[f"stride_{stride}/{name}/bias"].detach()
    leaves = {str(i): torch_of(x).movedim(-1, 1) for i, x in enumerate(maps)}
    with torch.no_grad():
        for i, y in enumerate(pyramid(leaves).values()):
            np.testing.assert_allclose(nhwc(y), made[f"lateral/eval/{i}"], atol=1e-5, rtol=1e-5)


def main() -> None:
    import torch
    import transformers

    rng = np.random.default_rng(5)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    uniform = rng.uniform(size=(BATCH, WIDTH + AUX)).astype(np.float32)
    made: dict[str, np.ndarray] = {
        "versions": np.array([torch.__version__, transformers.__version__]),
        "uniform": uniform,
    }
    maps = [normal(BATCH, *side, c) for side, c in zip(SIDES, CHANNELS, strict=True)]
    head = lambda w, maps, train: upernet(w, maps, torch_of(uniform), train)
    compare_with_transformers(record(made, "upernet", rng, maps, head), maps, made)
    for name, (kind, strides, sources, size) in PYRAMIDS.items():
        if size:
            maps = [normal(2, *size, c) for _, c in sources]
        else:
            maps = [normal(2, 96 // stride, 64 // stride, c) for stride, c in sources]
        make = lambda w, maps, train, some=(kind, strides, sources): pyramid(w, *some, maps, train)
        w = record(made, name, rng, maps, make)
        if kind == "lateral":
            compare_with_torchvision(w, maps, made)
    np.savez_compressed(PLACE, **made)


if __name__ == "__main__":
    main()
