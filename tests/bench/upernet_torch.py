"""The training losses of UperNet on a plain ViT with relative position tables in plain PyTorch, on
dicts of parameters and statistics with the names of mmsegmentation. Written from the specification,
to compare numbers and time."""

from typing import Any

import torch
import torch.nn.functional as F

from tests.bench.dense_torch import Params, deconv, linear, mlp, norm, normalised


class UperNet:
    """Parameters, running statistics, and the losses of a batch in training."""

    def __init__(self, p: Params, statistics: Params, shape: dict[str, Any]) -> None:
        self.p, self.statistics, self.shape = p, statistics, shape
        side = shape["grid"]
        line = torch.arange(side * side)
        row, column = line // side, line % side
        width = 2 * side - 1
        index = torch.empty(side * side + 1, side * side + 1, dtype=torch.long)
        index[1:, 1:] = (
            (row[:, None] - row + side - 1) * width + column[:, None] - column + side - 1
        )
        index[0], index[:, 0], index[0, 0] = width**2, width**2 + 1, width**2 + 2
        self.index = index

    def batch_norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        s = self.statistics
        return F.batch_norm(
            x,
            s[f"{name}.running_mean"],
            s[f"{name}.running_var"],
            self.p[f"{name}.weight"],
            self.p[f"{name}.bias"],
            training=True,
            momentum=0.1,
        )

    def unit(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Convolution, batch norm, ReLU."""
        kernel = self.p[f"{name}.conv.weight"]
        x = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
        return F.relu(self.batch_norm(f"{name}.bn", x))

    def attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        heads = self.shape["heads"]
        q, k, v = (
            linear(self.p, f"{name}.qkv", x)
            .reshape(b, n, 3, heads, c // heads)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        bias = self.p[f"{name}.relative_position_bias_table"][self.index].permute(2, 0, 1)
        weight = ((q * (c // heads) ** -0.5) @ k.mT + bias).softmax(-1)
        return linear(self.p, f"{name}.proj", (weight @ v).transpose(1, 2).reshape(b, n, c))

    def maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        p, net = self.p, "backbone"
        x = F.conv2d(
            x,
            p[f"{net}.patch_embed.projection.weight"],
            p[f"{net}.patch_embed.projection.bias"],
            stride=self.shape["patch"],
        )
        b, c, h, w = x.shape
        x = torch.cat([p[f"{net}.cls_token"].expand(b, -1, -1), x.flatten(2).mT], 1)
        x = x + p[f"{net}.pos_embed"]
        out = []
        for i in range(self.shape["depth"]):
            block = f"{net}.layers.{i}"
            y = self.attention(f"{block}.attn", norm(p, f"{block}.ln1", x))
            x = x + p[f"{block}.gamma_1"] * y
            y = norm(p, f"{block}.ln2", x)
            y = mlp(p, f"{block}.ffn.layers.0.0", f"{block}.ffn.layers.1", y)
            x = x + p[f"{block}.gamma_2"] * y
            if i in self.shape["blocks"]:
                out.append(x[:, 1:].mT.reshape(b, c, h, w))
        y = self.batch_norm("neck.upsample_4x.1", deconv(p, "neck.upsample_4x.0", out[0]))
        return [
            deconv(p, "neck.upsample_4x.3", F.gelu(y)),
            deconv(p, "neck.upsample_2x.0", out[1]),
            out[2],
            F.max_pool2d(out[3], 2),
        ]

    def logits(self, maps: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        p, head = self.p, "decode_head"
        top, parts = maps[3], [maps[3]]
        for i, side in enumerate(self.shape["pool_scales"]):
            y = self.unit(f"{head}.psp_modules.{i}.1", F.adaptive_avg_pool2d(top, side))
            parts.append(resized(y, top.shape[2:]))
        sides = [self.unit(f"{head}.lateral_convs.{i}", maps[i]) for i in range(3)]
        sides.append(self.unit(f"{head}.bottleneck", torch.cat(parts, 1)))
        for i in (2, 1, 0):
            sides[i] = sides[i] + resized(sides[i + 1], sides[i].shape[2:])
        fine = [self.unit(f"{head}.fpn_convs.{i}", sides[i]) for i in range(3)]
        fine = [resized(y, sides[0].shape[2:]) for y in [*fine, sides[3]]]
        y = self.unit(f"{head}.fpn_bottleneck", torch.cat(fine, 1))
        y = F.conv2d(y, p[f"{head}.conv_seg.weight"], p[f"{head}.conv_seg.bias"])
        aux = self.unit("auxiliary_head.convs.0", maps[2])
        name = "auxiliary_head.conv_seg"
        return y, F.conv2d(aux, p[f"{name}.weight"], p[f"{name}.bias"])

    def losses(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """[2]: the head's, and 0.4 times the auxiliary head's; over all pixels."""
        labels = batch["map"].long()
        size = torch.full((len(labels), 2), labels.shape[1])
        both = self.logits(self.maps(normalised(batch["image"], size)))
        costs = [
            F.cross_entropy(resized(y, labels.shape[1:]), labels, ignore_index=255, reduction="sum")
            for y in both
        ]
        return torch.stack(costs) * torch.tensor([1.0, 0.4]) / labels.numel()


def resized(x: torch.Tensor, size: Any) -> torch.Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear")
