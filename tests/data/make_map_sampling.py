"""Writes dense/map_sampling.npz: what torch and torchvision read from maps, for the tests of
`m3i_jax.models.dense.map_sampling`. Run it once, with torch and torchvision installed; the tests
need only the file.

    python -m tests.data.make_map_sampling
"""

import pathlib

import numpy as np

PLACE = pathlib.Path(__file__).parent / "dense" / "map_sampling.npz"
STRIDES, OUT, IMAGE = (4, 8, 16, 32), (7, 3), (96, 128)
SIZES = ((8, 12), (5, 5), (3, 16), (7, 7))
SHARES = (1, 2, 3, 6)
# Boxes of an image of 96 x 128: inside, thin, whole, across borders, outside, without area,
# smaller than a cell, with sides that are whole numbers of bins.
BOXES = np.array(
    [
        [10.3, 20.1, 60.2, 70.9],
        [0, 40.5, 128, 44.25],
        [100.5, 0, 103, 96],
        [0, 0, 128, 96],
        [-20, -13.5, 30, 40.1],
        [90.2, 70, 170, 130],
        [200, 200, 240, 230],
        [30, 30, 30, 60],
        [50.1, 50.2, 51, 50.9],
        [16, 8, 44, 36],
        [8, 8, 120, 92],
        [3.7, 2.2, 7.9, 90.3],
    ],
    np.float32,
)


def main() -> None:
    import torch
    import torchvision
    from torch.nn import functional

    rng = np.random.default_rng(11)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    made: dict[str, np.ndarray] = {
        "versions": np.array([torch.__version__, torchvision.__version__]),
        "boxes": BOXES,
    }
    to_torch = lambda x: torch.from_numpy(x).movedim(-1, -3).contiguous()
    from_torch = lambda x: np.ascontiguousarray(x.detach().movedim(-3, -1).numpy())

    def record(name, inputs, function, *, cotangent=None):
        """Values and gradients of a function of one map [..., H, W, C]."""
        leaf = to_torch(inputs).requires_grad_()
        y = function(leaf)
        g = normal(*from_torch(y).shape) if cotangent is None else cotangent
        (dx,) = torch.autograd.grad(y, leaf, to_torch(g))
        made.update({f"{name}/y": from_torch(y), f"{name}/g": g, f"{name}/dx": from_torch(dx)})

    boxes = [torch.from_numpy(BOXES)]
    for stride in STRIDES:
        map_HxWxC = normal(IMAGE[0] // stride, IMAGE[1] // stride, 3)
        made[f"map/{stride}"] = map_HxWxC
        for out in OUT:
            align = lambda x, out=out, stride=stride: torchvision.ops.roi_align(
                x[None], boxes, out, 1 / stride, sampling_ratio=-1, aligned=True
            )
            record(f"roi/{stride}/{out}", map_HxWxC, align)
    # The levels by detectron2's formula, whose canonical box has 24 pixels at stride 8 here.
    area = (BOXES[:, 2] - BOXES[:, 0]) * (BOXES[:, 3] - BOXES[:, 1])
    level = np.floor(3 + np.log2(np.sqrt(area) / 24 + 1e-8)).clip(2, 5).astype(int)
    made["levels"] = level - 2

    x = normal(2, *SIZES[0], 3)
    made["x"] = x
    for h, w in SIZES[1:]:
        resize = lambda x, size=(h, w): functional.interpolate(
            x, size=size, mode="bilinear", align_corners=False
        )
        record(f"resize/{h}x{w}", x, resize)
    for n in SHARES:
        record(f"mean/{n}", x, lambda x, n=n: functional.adaptive_avg_pool2d(x, n))

    points = torch.from_numpy(rng.uniform(-0.2, 1.2, (40, 2)).astype(np.float32)).requires_grad_()
    leaf = to_torch(x[0]).requires_grad_()
    y = functional.grid_sample(
        leaf[None], 2 * points[None, :, None] - 1, mode="bilinear", align_corners=False
    )[0, :, :, 0].T
    g = normal(*y.shape)
    dx, dpoints = torch.autograd.grad(y, (leaf, points), torch.from_numpy(g))
    made |= {
        "points": points.detach().numpy(),
        "points/y": y.detach().numpy(),
        "points/g": g,
        "points/dx": from_torch(dx),
        "points/dpoints": dpoints.numpy(),
    }

    masks = rng.uniform(size=(len(BOXES), 28, 28)).astype(np.float32)
    made["masks"] = masks
    made["pasted"] = np.stack(
        [
            sampled(torch.from_numpy(mask), box, *np.mgrid[: IMAGE[0], : IMAGE[1]][::-1] + 0.5)
            for mask, box in zip(masks, BOXES, strict=True)
        ]
    ).astype(np.float32)
    stored = np.stack([blob(rng, 56) for _ in BOXES])
    proposals = BOXES + rng.normal(size=BOXES.shape).astype(np.float32) * 5
    proposals[:, 2:] = np.maximum(proposals[:, 2:], proposals[:, :2] + 1)
    centres = (np.arange(28) + 0.5) / 28
    targets = []
    for mask, box, (x0, y0, x1, y1) in zip(
        stored, BOXES, proposals.astype(np.float64), strict=True
    ):
        at = np.meshgrid(x0 + centres * (x1 - x0), y0 + centres * (y1 - y0))
        targets.append(sampled(torch.from_numpy(mask.astype(np.float64)), box, *at))
    made |= {"stored": stored, "proposals": proposals, "targets": np.stack(targets)}
    PLACE.parent.mkdir(exist_ok=True)
    np.savez_compressed(PLACE, **made)


def sampled(mask, box: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A mask in the frame of its box at places (x, y) of the image, by torch's grid_sample."""
    import torch

    x0, y0, x1, y1 = box.astype(np.float64)
    if x1 <= x0 or y1 <= y0:
        return np.zeros(x.shape)
    grid = np.stack([(x - x0) / (x1 - x0), (y - y0) / (y1 - y0)], -1) * 2 - 1
    return torch.nn.functional.grid_sample(
        mask[None, None].double(), torch.from_numpy(grid)[None], align_corners=False
    )[0, 0].numpy()


def blob(rng: np.random.Generator, side: int) -> np.ndarray:
    """A mask with a hole: a disc without a smaller one, uint8 [side, side]."""
    y, x = np.mgrid[:side, :side] / side
    (a, b), (c, d) = rng.uniform(0.3, 0.7, (2, 2))
    return (((y - a) ** 2 + (x - b) ** 2 < 0.16) & ((y - c) ** 2 + (x - d) ** 2 > 0.02)).astype(
        np.uint8
    )


if __name__ == "__main__":
    main()
