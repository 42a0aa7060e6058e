"""InternImage in PyTorch with the published names and DCNv3 as one `grid_sample`, which runs
without the CUDA operator.

Written from the paper's description, to compare numbers and time. It returns the four maps and
omits the classifier of T to XL.
"""

import torch
import torch.nn.functional as F
from torch import nn


def sample(value, offset, mask, groups, scale):
    """DCNv3 with 3 x 3 points, stride 1 and pad 1 on [B, H, W, C]."""
    b, h, w, c = value.shape
    line = torch.arange(-1, 2, dtype=value.dtype)
    base = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(1, 1, 1, 1, 9, 2)
    rows, columns = torch.meshgrid(
        torch.arange(h, dtype=value.dtype), torch.arange(w, dtype=value.dtype), indexing="ij"
    )
    points = torch.stack([columns, rows], -1)[None, :, :, None, None] + scale * (
        base + offset.reshape(b, h, w, groups, 9, 2)
    )
    unit = (2 * points + 1) / torch.tensor([w, h], dtype=value.dtype) - 1
    grid = unit.permute(0, 3, 1, 2, 4, 5).reshape(b * groups, h * w, 9, 2)
    v = (
        value.reshape(b, h, w, groups, c // groups)
        .permute(0, 3, 4, 1, 2)
        .reshape(b * groups, c // groups, h, w)
    )
    samples = F.grid_sample(v, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    weight = mask.reshape(b, h * w, groups, 9).transpose(1, 2).reshape(b * groups, 1, h * w, 9)
    return (samples * weight).sum(-1).reshape(b, c, h, w).permute(0, 2, 3, 1)


class First(nn.Module):
    """Channels first to channels last; the wrappers give the published names their indices."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1)


class Last(nn.Module):
    def forward(self, x):
        return x.permute(0, 3, 1, 2)


def norm(c, before=None):
    parts = [nn.LayerNorm(c, eps=1e-6)]
    return nn.Sequential(*([before] if before else []), *parts)


class Dcn(nn.Module):
    def __init__(self, c, groups, scale, kernel, center):
        super().__init__()
        self.groups, self.scale, self.center = groups, scale, center
        depthwise = nn.Conv2d(c, c, kernel, padding=kernel // 2, groups=c)
        self.dw_conv = nn.Sequential(depthwise, norm(c, First()), nn.GELU())
        self.offset, self.mask = nn.Linear(c, groups * 18), nn.Linear(c, groups * 9)
        self.input_proj, self.output_proj = nn.Linear(c, c), nn.Linear(c, c)
        if center:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(groups, c))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(groups))

    def forward(self, x):
        b, h, w, c = x.shape
        v, features = self.input_proj(x), self.dw_conv(x.permute(0, 3, 1, 2))
        mask = self.mask(features).reshape(b, h, w, self.groups, 9).softmax(-1)
        y = sample(v, self.offset(features), mask, self.groups, self.scale)
        if self.center:
            share = F.linear(
                features, self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
            ).sigmoid()
            share = share[..., None].expand(-1, -1, -1, -1, c // self.groups).reshape(b, h, w, c)
            y = y * (1 - share) + v * share
        return self.output_proj(y)


class Mlp(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, net, c, groups):
        super().__init__()
        self.kind = net.norm
        self.dcn, self.mlp = Dcn(c, groups, net.offset_scale, net.kernel, net.center), Mlp(c)
        self.norm1, self.norm2 = norm(c), norm(c)
        if net.norm == "res_post":
            self.res_post_norm1, self.res_post_norm2 = norm(c), norm(c)
        self.gamma1, self.gamma2 = (
            nn.Parameter(torch.ones(c)) if net.scale else None for _ in range(2)
        )

    def forward(self, x):
        branches = (
            (self.dcn, self.norm1, self.gamma1, "res_post_norm1"),
            (
                self.mlp,
                self.norm2,
                self.gamma2,
                "res_post_norm2",
            ),
        )
        for branch, own, gamma, after in branches:
            y = own(branch(x)) if self.kind == "post" else branch(own(x))
            if self.kind == "res_post":
                y = getattr(self, after)(y)
            x = x + (y if gamma is None else gamma * y)
        return x


class Down(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(c, 2 * c, 3, 2, 1, bias=False), norm(2 * c, First())

    def forward(self, x):
        return self.norm(self.conv(x.permute(0, 3, 1, 2)))


class Level(nn.Module):
    def __init__(self, net, i):
        super().__init__()
        c = net.width * 2**i
        self.blocks = nn.ModuleList(Layer(net, c, net.groups[i]) for _ in range(net.depths[i]))
        self.posts = net.posts if i == 2 else ()
        self.post_norms = nn.ModuleList(norm(c) for _ in self.posts)
        self.norm = norm(c) if net.trailing else nn.Identity()
        self.downsample = Down(c) if i < 3 else None

    def forward(self, x):
        for j, block in enumerate(self.blocks):
            x = block(x)
            if j in self.posts:
                x = self.post_norms[self.posts.index(j)](x)
        x = self.norm(x)
        return x, self.downsample(x) if self.downsample else x


class Stem(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, c // 2, 3, 2, 1), nn.Conv2d(c // 2, c, 3, 2, 1)
        self.norm1, self.norm2 = norm(c // 2, First()), norm(c, First())

    def forward(self, x):
        x = F.gelu(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(x.permute(0, 3, 1, 2)))


class InternImage(nn.Module):
    """`net` is a `tests.interop.published.Net`; images [B, 3, H, W], maps [B, H, W, C]."""

    def __init__(self, net):
        super().__init__()
        self.patch_embed = Stem(net.width)
        self.levels = nn.ModuleList(Level(net, i) for i in range(4))

    def forward(self, images):
        x, maps = self.patch_embed(images), []
        for level in self.levels:
            features, x = level(x)
            maps.append(features)
        return maps
