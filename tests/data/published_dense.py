"""The small detectors and segmenters of tests/data/make_published_dense.py and of its test: sizes,
parameters by name, images."""

import zlib

import numpy as np

from tests.interop.published import Net

NANO = Net(16, (1, 1, 2, 1), (1, 2, 4, 8), "pre", scale=True)
SIDE, WIDTH, HEADS = 64, 64, 2
CLASSES, MAP_CLASSES = 8, 14  # of the built-in scenes
QUERIES, DEPTH, HIDDEN, DETECTIONS = 12, 3, 48, 300
SIZES = np.array([[64, 64], [41, 60]], np.int32)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TABLES = ("embed", "embeds", "embedding", "query_feat", "encoding")


def parameter(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values of the parameter of this published name, float64."""
    draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    layer, _, last = name.rpartition(".")
    if last == "running_var":
        return np.exp(0.3 * draw)
    if len(shape) == 1:
        one = last == "weight" or last.startswith("gamma") and "cb_modules.1.gamma" not in name
        values = float(one) + 0.2 * draw
        return values - 2.0 if "cls_branches" in name else values
    if layer.endswith(_TABLES) and "patch_embed" not in name or name.endswith("level_embeds"):
        return draw if "mask_embed" not in name and "cls_embed" not in name else 0.1 * draw
    scale = 0.5 if "reg_branches" in name else 2.0 if "offset" in name else 1.0
    return scale * draw / np.sqrt(np.prod(shape[1:]))


def images() -> np.ndarray:
    """uint8 [2, 64, 64, 3], 0 beyond their sizes."""
    r = np.random.RandomState(3)
    out = r.randint(0, 256, (2, SIDE, SIDE, 3)).astype(np.uint8)
    out[1, SIZES[1, 0] :] = 0
    out[1, :, SIZES[1, 1] :] = 0
    return out
