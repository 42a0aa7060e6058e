"""InternImage as published, in float64 numpy and with its published names: forward pass and files.
Written from the paper and the description of the project; shares no code with the package."""

import math
from typing import NamedTuple

import numpy as np
from scipy.special import erf, expit, softmax


class Net(NamedTuple):
    width: int
    depths: tuple[int, ...]
    groups: tuple[int, ...]
    norm: str
    scale: bool = False  # layer scale
    offset_scale: float = 1.0
    kernel: int = 3
    center: bool = False
    posts: tuple[int, ...] = ()  # layers of level 2 that a norm follows
    fused: int = 0
    pooled: int = 0
    classes: int = 10
    stem: tuple[int, int] = (2, 2)  # strides; other values in our smallest preset

    @property
    def trailing(self) -> bool:
        return self.norm != "post" or self.center


PICO = Net(32, (1, 1, 2, 1), (2, 4, 8, 16), "pre", stem=(2, 1))  # the smallest preset


def shapes(net: Net) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a file."""
    found: dict[str, tuple[int, ...]] = {}

    def linear(name, n, m):
        found[f"{name}.weight"], found[f"{name}.bias"] = (m, n), (m,)

    def norm(name, c):
        found[f"{name}.weight"] = found[f"{name}.bias"] = (c,)

    def conv(name, n, m, k, bias=True):
        found[f"{name}.weight"] = (m, n, k, k)
        if bias:
            found[f"{name}.bias"] = (m,)

    c = net.width
    conv("patch_embed.conv1", 3, c // 2, 3)
    norm("patch_embed.norm1.1", c // 2)
    conv("patch_embed.conv2", c // 2, c, 3)
    norm("patch_embed.norm2.1", c)
    for i, (depth, groups) in enumerate(zip(net.depths, net.groups, strict=True)):
        w = c * 2**i
        for j in range(depth):
            at = f"levels.{i}.blocks.{j}"
            for n in (1, 2):
                norm(f"{at}.norm{n}.0", w)
                if net.norm == "res_post":
                    norm(f"{at}.res_post_norm{n}.0", w)
                if net.scale:
                    found[f"{at}.gamma{n}"] = (w,)
            linear(f"{at}.mlp.fc1", w, 4 * w)
            linear(f"{at}.mlp.fc2", 4 * w, w)
            conv(f"{at}.dcn.dw_conv.0", 1, w, net.kernel)
            norm(f"{at}.dcn.dw_conv.1.1", w)
            linear(f"{at}.dcn.offset", w, groups * 18)
            linear(f"{at}.dcn.mask", w, groups * 9)
            linear(f"{at}.dcn.input_proj", w, w)
            linear(f"{at}.dcn.output_proj", w, w)
            if net.center:
                found[f"{at}.dcn.center_feature_scale_proj_weight"] = (groups, w)
                found[f"{at}.dcn.center_feature_scale_proj_bias"] = (groups,)
        if i == 2:
            for n in range(len(net.posts)):
                norm(f"levels.2.post_norms.{n}.0", w)
        if net.trailing:
            norm(f"levels.{i}.norm.0", w)
        if i < 3:
            conv(f"levels.{i}.downsample.conv", w, 2 * w, 3, bias=False)
            norm(f"levels.{i}.downsample.norm.1", 2 * w)
    if net.fused:
        conv("dcnv3_head_x4.0", 8 * c, 4 * net.fused, 1)
        conv("dcnv3_head_x3", 4 * c, net.fused, 1)
        for a in "qkv":
            norm(f"clip_projector.norm1_{a}.0", net.fused)
            found[f"clip_projector.cross_dcn.{a}.weight"] = (net.fused, net.fused)
            found[f"clip_projector.cross_dcn.{a}_bias"] = (net.fused,)
        linear("clip_projector.cross_dcn.proj", net.fused, net.pooled)
        norm("fc_norm.0", net.pooled)
        linear("head", net.pooled, net.classes)
    else:
        found["conv_head.0.weight"] = (12 * c, 8 * c, 1, 1)
        norm("conv_head.1.0", 12 * c)
        found["conv_head.1.0.running_mean"] = found["conv_head.1.0.running_var"] = (12 * c,)
        found["conv_head.1.0.num_batches_tracked"] = ()
        linear("head", 12 * c, net.classes)
    return found


def weights(net: Net, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        fan = math.prod(shape[1:]) if len(shape) > 1 else 1
        values = rng.normal(size=shape) * (1.5 if ".offset." in name else 1.0) / math.sqrt(fan)
        return (
            values * 0.3 + (1 if name.endswith("weight") else 0) if len(shape) == 1 else values
        ).astype(np.float32)

    return {name: draw(name, shape) for name, shape in shapes(net).items()}


def _conv(x, w, bias, stride):
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    h, wd = x.shape[1], x.shape[2]
    taps = ((i, j) for i in range(3) for j in range(3))
    return (
        sum(padded[:, i : i + h : stride, j : j + wd : stride] @ w[:, :, i, j].T for i, j in taps)
        + bias
    )


def _gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


class Run:
    """Result of a forward pass; `maps` are the outputs of the four levels."""

    def __init__(self, net: Net, state: dict[str, np.ndarray], images: np.ndarray) -> None:
        self.net = net
        self.state = {name: np.asarray(array, np.float64) for name, array in state.items()}
        x = self.norm(
            "patch_embed.norm1.1",
            self.conv("patch_embed.conv1", np.asarray(images, np.float64), net.stem[0]),
        )
        x = self.norm("patch_embed.norm2.1", self.conv("patch_embed.conv2", _gelu(x), net.stem[1]))
        self.maps = []
        for i, depth in enumerate(net.depths):
            for j in range(depth):
                x = self.layer(f"levels.{i}.blocks.{j}", net.groups[i], x)
                if i == 2 and j in net.posts:
                    x = self.norm(f"levels.2.post_norms.{net.posts.index(j)}.0", x)
            if net.trailing:
                x = self.norm(f"levels.{i}.norm.0", x)
            self.maps.append(x)
            if i < 3:
                x = self.norm(
                    f"levels.{i}.downsample.norm.1", self.conv(f"levels.{i}.downsample.conv", x)
                )

    def fused(self) -> np.ndarray:
        weight, bias = self.state["dcnv3_head_x4.0.weight"], self.state["dcnv3_head_x4.0.bias"]
        deep = self.maps[3] @ weight[:, :, 0, 0].T + bias
        shallow = (
            self.maps[2] @ self.state["dcnv3_head_x3.weight"][:, :, 0, 0].T
            + self.state["dcnv3_head_x3.bias"]
        )
        for a in (0, 1):
            for b in (0, 1):
                shallow[:, a::2, b::2] += deep[..., 2 * a + b :: 4]
        return shallow.reshape(shallow.shape[0], -1, shallow.shape[-1])

    def linear(self, name, x):
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def conv(self, name, x, stride=2):
        return _conv(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias", 0.0), stride)

    def norm(self, name, x):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-6) * self.state[f"{name}.weight"] + self.state[
            f"{name}.bias"
        ]

    def layer(self, at, groups, x):
        for n, branch in (
            (1, lambda y: self.dcn(f"{at}.dcn", groups, y)),
            (2, lambda y: self.mlp(f"{at}.mlp", y)),
        ):
            if self.net.norm == "post":
                y = self.norm(f"{at}.norm{n}.0", branch(x))
            else:
                y = branch(self.norm(f"{at}.norm{n}.0", x))
            if self.net.norm == "res_post":
                y = self.norm(f"{at}.res_post_norm{n}.0", y)
            x = x + (self.state[f"{at}.gamma{n}"] * y if self.net.scale else y)
        return x

    def mlp(self, at, x):
        return self.linear(f"{at}.fc2", _gelu(self.linear(f"{at}.fc1", x)))

    def dcn(self, at, groups, x):
        b, height, width, c = x.shape
        kernel, reach = self.state[f"{at}.dw_conv.0.weight"][:, 0], self.net.kernel // 2
        padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
        taps = [(i, j) for i in range(self.net.kernel) for j in range(self.net.kernel)]
        h = (
            sum(padded[:, i : i + height, j : j + width] * kernel[:, i, j] for i, j in taps)
            + self.state[f"{at}.dw_conv.0.bias"]
        )
        h = _gelu(self.norm(f"{at}.dw_conv.1.1", h))
        v = self.linear(f"{at}.input_proj", x).reshape(b, height, width, groups, -1)
        offset = self.linear(f"{at}.offset", h).reshape(b, height, width, groups, 9, 2)
        mask = softmax(self.linear(f"{at}.mask", h).reshape(b, height, width, groups, 9), -1)
        y = np.zeros_like(v)
        s, g = self.net.offset_scale, np.arange(groups)
        for n, r, k, p in np.ndindex(b, height, width, 9):
            column = k + s * (p // 3 - 1 + offset[n, r, k, :, p, 0])
            row = r + s * (p % 3 - 1 + offset[n, r, k, :, p, 1])
            top, left = np.floor(row).astype(int), np.floor(column).astype(int)
            for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
                yy, xx = top + i, left + j
                inside = (yy >= 0) & (yy < height) & (xx >= 0) & (xx < width)
                weight = (
                    np.maximum(1 - abs(row - yy), 0)
                    * np.maximum(1 - abs(column - xx), 0)
                    * inside
                    * mask[n, r, k, :, p]
                )
                y[n, r, k] += (
                    weight[:, None] * v[n, np.clip(yy, 0, height - 1), np.clip(xx, 0, width - 1), g]
                )
        if self.net.center:
            weight, bias = (
                self.state[f"{at}.center_feature_scale_proj_{part}"] for part in ("weight", "bias")
            )
            share = expit(h @ weight.T + bias)[..., None]
            y = y * (1 - share) + v * share
        return self.linear(f"{at}.output_proj", y.reshape(b, height, width, c))
