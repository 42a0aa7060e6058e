"""The heads of dense tasks in PyTorch, as their papers describe them: UperNet, the simple feature
pyramid, and RoIAlign on several maps by torchvision. Layers have the names that they have here."""

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn


def conv_norm(*kernel):
    """Convolution without bias, batch norm, ReLU; the kernel as (height, width, in, out)."""
    side = kernel[0] if len(kernel) == 4 else 1
    conv = nn.Conv2d(kernel[-2], kernel[-1], side, padding=side // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(kernel[-1]), nn.ReLU())


def resize(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class UperNet(nn.Module):
    """Logits of the head and of the auxiliary head for maps [B, C, H, W] by stride."""

    def __init__(self, settings, channels, classes):
        super().__init__()
        self.strides, self.pool, d = settings.strides, settings.pool_scales, settings.width
        *fine, top = settings.strides
        layers = {f"pool_{n}": conv_norm(channels[top], d) for n in self.pool}
        layers["pooled"] = conv_norm(3, 3, channels[top] + len(self.pool) * d, d)
        for stride in fine:
            layers[f"lateral_{stride}"] = conv_norm(channels[stride], d)
            layers[f"output_{stride}"] = conv_norm(3, 3, d, d)
        layers["fuse"] = conv_norm(3, 3, len(self.strides) * d, d)
        layers["classifier"] = nn.Conv2d(d, classes, 1)
        layers["aux"] = conv_norm(3, 3, channels[fine[-1]], settings.aux_width)
        layers["aux_classifier"] = nn.Conv2d(settings.aux_width, classes, 1)
        self.layers = nn.ModuleDict(layers)

    def forward(self, maps):
        *fine, top = self.strides
        x, layer = maps[top], self.layers
        pools = [layer[f"pool_{n}"](F.adaptive_avg_pool2d(x, n)) for n in self.pool]
        x = layer["pooled"](torch.cat([x, *(resize(y, x.shape[2:]) for y in pools)], 1))
        outputs = [x]
        for stride in reversed(fine):
            lateral = layer[f"lateral_{stride}"](maps[stride])
            x = lateral + resize(x, lateral.shape[2:])
            outputs.insert(0, layer[f"output_{stride}"](x))
        size = outputs[0].shape[2:]
        x = layer["fuse"](torch.cat([resize(y, size) for y in outputs], 1))
        return layer["classifier"](x), layer["aux_classifier"](layer["aux"](maps[fine[-1]]))


class ChannelNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        norm = F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, 1e-6)
        return norm.movedim(-1, 1)


class SimplePyramid(nn.Module):
    """Maps of all strides but the coarsest, which is every second cell of the last."""

    def __init__(self, config):
        super().__init__()
        (source, channels), width = config.sources[0], config.width
        self.levels = nn.ModuleDict()
        for stride in config.strides[:-1]:
            part, c, steps = nn.ModuleDict(), channels, round(np.log2(source / stride))
            for i in range(max(steps, 0)):
                part[f"deconv_{i}"] = nn.ConvTranspose2d(c, c // 2, 2, 2)
                c //= 2
                if i < steps - 1:
                    part[f"scale_norm_{i}"] = nn.Sequential(ChannelNorm(c), nn.GELU())
            if steps < 0:
                part["pool"] = nn.MaxPool2d(2**-steps)
            part["conv_0"] = nn.Conv2d(c, width, 1, bias=False)
            part["norm_0"] = ChannelNorm(width)
            part["conv_1"] = nn.Conv2d(width, width, 3, padding=1, bias=False)
            part["norm_1"] = ChannelNorm(width)
            self.levels[f"stride_{stride}"] = part

    def forward(self, x):
        made = []
        for part in self.levels.values():
            y = x
            for layer in part.values():
                y = layer(y)
            made.append(y)
        return [*made, made[-1][:, :, ::2, ::2]]


def roi_align(maps, boxes_BxRx4, out, canonical):
    """[B R, C, out, out] of maps [B, C, H, W] by stride."""
    strides, (b, r, _) = sorted(maps), boxes_BxRx4.shape
    image = torch.arange(b).repeat_interleave(r)[:, None].to(boxes_BxRx4.dtype)
    boxes = torch.cat([image, boxes_BxRx4.reshape(-1, 4)], 1)
    side = ((boxes[:, 3] - boxes[:, 1]) * (boxes[:, 4] - boxes[:, 2])).sqrt() / canonical[0]
    level = torch.floor(np.log2(canonical[1]) + torch.log2(side + 1e-8))
    level = level.clamp(np.log2(strides[0]), np.log2(strides[-1])).long() - round(
        np.log2(strides[0])
    )
    y = torch.zeros(b * r, maps[strides[0]].shape[1], out, out)
    for i, stride in enumerate(strides):
        rows = torch.nonzero(level == i)[:, 0]
        some = torchvision.ops.roi_align(
            maps[stride], boxes[rows], out, 1 / stride, sampling_ratio=-1, aligned=True
        )
        y = y.index_put((rows,), some)
    return y


def load(module, params):
    """Sets the weights of a module from a tree of this package's."""
    for name, tree in params.items():
        part = getattr(module, "layers", None) or module.levels
        if isinstance(module, SimplePyramid):
            for layer, leaves in tree.items():
                _set(part[name][layer], leaves)
        else:
            _set(part[name], tree)


def _set(layer, leaves):
    parts = list(layer) if isinstance(layer, nn.Sequential) else [layer]
    for part in parts:
        if isinstance(part, nn.ConvTranspose2d):
            n = leaves["kernel"].shape[0]
            kernel = leaves["kernel"].reshape(n, 2, 2, -1).transpose(0, 3, 1, 2)
        elif isinstance(part, nn.Conv2d):
            kernel = leaves["kernel"]
            kernel = kernel[None, None] if kernel.ndim == 2 else kernel
            kernel = kernel.transpose(3, 2, 0, 1)
        elif hasattr(part, "weight"):
            kernel = leaves["scale"]
        else:
            continue
        part.weight.data = torch.from_numpy(np.ascontiguousarray(kernel))
        if part.bias is not None:
            part.bias.data = torch.from_numpy(np.ascontiguousarray(leaves["bias"]))
