"""Writes dense/rules.npz: what detectron2 and mmsegmentation make of small inputs where a rule is
tested by itself: federated loss, mask targets, repeat factors, schedules, resizes and crops for
given random numbers, photometric distortion, confusion and mIoU. Run by hand as make_detectron2.py
and make_mmseg.py are, in an environment that has both (and shapely).

    python -m tests.data.make_dense_rules detectron2           # the folder of the clone
"""

import pathlib
import sys
import tempfile
import types
from typing import Any
from unittest import mock

import numpy as np

from tests.data import dense_scenes
from tests.data.dense_writing import numpy, save
from tests.data.make_mmseg import without_compiled_part

SIDE = 64  # of the crops
POLYGONS = (  # of an image of 60 x 80: x y x y ...
    ((10.5, 8.2, 52.3, 12.7, 47.1, 40.9, 15.8, 35.2),),
    ((60.2, 20.1, 79.9, 25.6, 70.4, 59.3), (3.3, 44.4, 14.7, 45.1, 9.2, 58.8)),
    ((30.5, 30.5, 40.5, 30.5, 40.5, 50.5, 36.2, 50.5, 36.2, 38.1, 30.5, 38.1),),
)
HEIGHT, WIDTH = 60, 80


def federated() -> dict[str, np.ndarray]:
    """Three cases: few classes present, more than 49 present, and the plain sigmoid loss. In the
    place of torch.multinomial stands the greatest of log weight + Gumbel noise."""
    import torch
    from detectron2.data import MetadataCatalog
    from detectron2.data.detection_utils import get_fed_loss_cls_weights
    from detectron2.modeling.box_regression import Box2BoxTransform
    from detectron2.modeling.roi_heads import FastRCNNOutputLayers

    classes, regions = 80, 70
    rng = np.random.default_rng(21)
    count = np.floor(np.exp(rng.uniform(0, 8, classes))).astype(int)
    uniform = rng.random(classes, np.float32)
    MetadataCatalog.get("tiny").set(
        class_image_count=[{"id": i + 1, "image_count": int(c)} for i, c in enumerate(count)]
    )
    weight = get_fed_loss_cls_weights("tiny", 0.5)

    def draw(prob: Any, wanted: int, replacement: bool) -> Any:
        key = torch.log(prob[:-1].double()) - torch.log(
            -torch.log(torch.as_tensor(uniform).double())
        )
        return torch.argsort(key, descending=True)[:wanted]

    made: dict[str, np.ndarray] = {
        "image_count": count.astype(np.int32),
        "uniform": uniform,
        "weight": numpy(weight),
        "logits": rng.normal(-1, 2, (regions, classes + 1)).astype(np.float32),
    }
    few = rng.choice([3, 17, 42, 79, classes], regions, p=[0.1, 0.05, 0.1, 0.05, 0.7])
    many = np.concatenate([rng.permutation(classes)[:60], np.full(regions - 60, classes)])
    for name, labels, use in (("few", few, True), ("many", many, True), ("plain", few, False)):
        layers = FastRCNNOutputLayers(
            4,
            box2box_transform=Box2BoxTransform((1, 1, 1, 1)),
            num_classes=classes,
            use_sigmoid_ce=True,
            use_fed_loss=use,
            get_fed_loss_cls_weights=lambda: weight,
        )
        logits = torch.as_tensor(made["logits"]).requires_grad_()
        with mock.patch.object(torch, "multinomial", draw):
            loss = layers.sigmoid_cross_entropy_loss(logits, torch.as_tensor(labels))
        loss.backward()
        made |= {f"{name}/classes": labels.astype(np.int32), f"{name}/loss": numpy(loss)}
        made[f"{name}/kept"] = numpy(logits.grad.abs().sum(0) > 0)
        made[f"{name}/gradient"] = numpy(logits.grad)[:, ::16]
    return made


def targets() -> dict[str, np.ndarray]:
    """Mask targets of 28 x 28 from polygons, from a bitmask, and from the frame of the box."""
    import torch
    from detectron2.structures import BitMasks, PolygonMasks

    polygons = PolygonMasks([[np.array(p) for p in parts] for parts in POLYGONS])
    bits = BitMasks.from_polygon_masks(polygons, HEIGHT, WIDTH)
    boxes = polygons.get_bounding_boxes().tensor
    rng = np.random.default_rng(8)
    which = np.repeat(np.arange(3), 4)
    rois = boxes[which] + torch.as_tensor(rng.uniform(-6, 6, (12, 4))).float()
    rois[0], rois[4], rois[8] = boxes
    framed = polygons.crop_and_resize(boxes, dense_scenes.MASK).numpy()
    made = {
        "polygon": polygons[torch.as_tensor(which)].crop_and_resize(rois, 28).numpy(),
        "bitmask": bits[torch.as_tensor(which)].crop_and_resize(rois, 28).numpy(),
        "framed": dense_scenes.mask_targets(framed[which], boxes.numpy()[which], rois.numpy(), 28),
    }
    shares = {k: (v != made["polygon"]).mean() for k, v in made.items()}
    print("shares of bits that differ from polygons:", shares)
    return (
        {k: np.packbits(v, -1) for k, v in made.items()}
        | {
            "rois": numpy(rois),
            "object": which.astype(np.int32),
            "boxes": numpy(boxes),
            "masks": np.packbits(bits.tensor.numpy(), -1),
            "masks_in_box": np.packbits(framed, -1),
        }
        | {
            f"polygons/{i}/{j}": np.array(p)
            for i, parts in enumerate(POLYGONS)
            for j, p in enumerate(parts)
        }
    )


def repeats() -> dict[str, np.ndarray]:
    from detectron2.data.samplers import RepeatFactorTrainingSampler

    rng = np.random.default_rng(5)
    present = rng.random((200, 12)) < 0.3 ** np.arange(1, 13)
    images = [
        {"annotations": [{"category_id": int(c)} for c in np.flatnonzero(row)]} for row in present
    ]
    rule = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
    return {
        "present": present,
        "threshold": np.float32(0.05),
        "factors": numpy(rule(images, 0.05)),
    }


def schedules() -> dict[str, np.ndarray]:
    """Multipliers of the rate at chosen steps."""
    import torch
    from detectron2.solver import WarmupParamScheduler
    from fvcore.common.param_scheduler import MultiStepParamScheduler
    from mmengine.optim import LinearLR, PolyLR

    made = {}
    for name, last, first, second in (
        ("coco", 184375, 163889, 177546),
        ("lvis", 156250, 138889, 150463),
    ):
        rule = WarmupParamScheduler(
            MultiStepParamScheduler([1.0, 0.1, 0.01], milestones=[first, second], num_updates=last),
            warmup_length=250 / last,
            warmup_factor=0.001,
        )
        steps = [0, 1, 2, 100, 249, 250, 251, 1000, first - 1, first, first + 1]
        steps += [second - 1, second, second + 1, last - 1]
        made[f"{name}/steps"] = np.array(steps, np.int32)
        made[f"{name}/multipliers"] = np.array([rule(s / last) for s in steps])
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    rules = [
        LinearLR(optimizer, start_factor=1e-6, by_epoch=False, begin=0, end=1500),
        PolyLR(optimizer, eta_min=0.0, power=1.0, begin=1500, end=160000, by_epoch=False),
    ]
    steps, multipliers = [0, 1, 2, 750, 1498, 1499, 1500, 1501, 80000, 159998, 159999], []
    for step in range(160000):
        if step in steps:
            multipliers.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for rule in rules:
            rule.step()
    made["ade20k/steps"] = np.array(steps, np.int32)
    made["ade20k/multipliers"] = np.array(multipliers)
    return made


class Numbers:
    """Stands for numpy.random: each call takes the next of the given uniform numbers."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def take(self) -> float:
        return self.values.pop(0)

    def random_sample(self) -> float:
        return self.take()

    def uniform(self, low: float = 0.0, high: float = 1.0, size: Any = None) -> Any:
        value = low + (high - low) * self.take()
        return value if size is None else np.full(size, value)

    def randint(self, low: int, high: int | None = None) -> int:
        low, high = (0, low) if high is None else (low, high)
        return low + int(np.floor(self.take() * (high - low)))


def jitter() -> dict[str, np.ndarray]:
    """detectron2's DatasetMapper with ViTDet's large-scale jitter, crops of SIDE: from one image
    and its polygons, for given numbers for flip, scale and crop."""
    import detectron2.data.transforms as T
    from detectron2.data import DatasetMapper
    from detectron2.structures import BitMasks, BoxMode
    from PIL import Image

    image = dense_scenes.texture(np.random.default_rng(2), HEIGHT, WIDTH).astype(np.uint8)
    annotations = [
        {
            "bbox": [0.0, 0.0, 1.0, 1.0],  # recomputed from the polygons
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": i,
            "segmentation": [list(p) for p in parts],
        }
        for i, parts in enumerate(POLYGONS)
    ]
    mapper = DatasetMapper(
        is_train=True,
        augmentations=[
            T.RandomFlip(horizontal=True),
            T.ResizeScale(0.1, 2.0, SIDE, SIDE),
            T.FixedSizeCrop((SIDE, SIDE), pad=False),
        ],
        image_format="RGB",
        use_instance_mask=True,
        recompute_boxes=True,
    )
    draws = np.array(
        [  # flip (below 0.5), scale, crop
            (0.7, 0.3, 0.5),
            (0.7, 0.85, 0.25),
            (0.7, 0.6, 0.9),
            (0.2, 0.5, 0.0),
            (0.2, 0.95, 0.6),
            (0.7, 0.0, 0.4),
        ]
    )
    made = {"image": image, "draws": draws}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "image.png"
        Image.fromarray(image).save(path)
        for i, numbers in enumerate(draws):
            stand_in = Numbers(*numbers)
            with mock.patch.object(np.random, "uniform", stand_in.uniform):
                out = mapper({"file_name": str(path), "annotations": annotations})
            assert not stand_in.values
            found = out["instances"]
            rows, columns = found.image_size
            made[f"{i}/image"] = out["image"].numpy().transpose(1, 2, 0)
            made[f"{i}/boxes"] = numpy(found.gt_boxes.tensor)
            made[f"{i}/classes"] = numpy(found.gt_classes).astype(np.int32)
            bits = BitMasks.from_polygon_masks(found.gt_masks, rows, columns).tensor.numpy()
            made[f"{i}/masks"] = np.packbits(bits, -1)
    sizes, numbers = [], np.linspace(0, 1, 9)
    for height, width in ((480, 640), (427, 640), (640, 361), (333, 500), (1200, 200)):
        for u in numbers:
            for v in (0.0, 0.37, 1.0):
                stand_in = Numbers(u, v)
                with mock.patch.object(np.random, "uniform", stand_in.uniform):
                    resize = T.ResizeScale(0.1, 2.0, 1024, 1024).get_transform(
                        np.zeros((height, width, 3), np.uint8)
                    )
                    crop = T.FixedSizeCrop((1024, 1024), pad=False).get_transform(
                        np.empty((resize.new_h, resize.new_w, 3), np.uint8)
                    )[0]
                sizes.append([height, width, u, v, resize.new_h, resize.new_w, crop.y0, crop.x0])
    made["table"] = np.array(sizes)
    short = [
        T.ResizeShortestEdge(1024, 1024).get_transform(np.empty((h, w, 3), np.uint8))
        for h, w in ((480, 640), (427, 640), (333, 500), (1200, 200))
    ]
    made["test_table"] = np.array([[s.h, s.w, s.new_h, s.new_w] for s in short], np.int32)
    return made


def resized_range() -> dict[str, np.ndarray]:
    """mmseg's pipeline for ADE20k, with (256, 64) in the place of (2048, 512): RandomResize,
    RandomCrop with the rule of 75 %, RandomFlip; and sizes of the real one."""
    import mmcv
    from mmseg.datasets.transforms import RandomCrop
    from mmseg.registry import TRANSFORMS

    image = dense_scenes.texture(np.random.default_rng(4), 75, 110).astype(np.uint8)
    labels = np.zeros((75, 110), np.uint8)
    labels[20:50, 60:100], labels[55:, :30], labels[:10, :40] = 1, 2, 255
    made: dict[str, np.ndarray] = {"image": image, "map": labels}
    draws = np.random.default_rng(14).random((6, 23))  # scale, then pairs (row, column) of crops
    draws[1, 0], draws[2, 0], draws[3, 0], draws[3, 1:5] = 0.95, 0.99, 0.98, (0.0, 0.2, 0.0, 0.9)
    made["draws"] = draws
    for i, numbers in enumerate(draws):
        stand_in = Numbers(*numbers)
        resize = TRANSFORMS.build(
            {
                "type": "RandomResize",
                "scale": (256, 64),
                "ratio_range": (0.5, 2.0),
                "keep_ratio": True,
            }
        )
        crop = RandomCrop((SIDE, SIDE), cat_max_ratio=0.75)
        entry = {
            "img": image,
            "img_shape": (75, 110),
            "gt_seg_map": labels,
            "seg_fields": ["gt_seg_map"],
        }
        with (
            mock.patch.object(np.random, "random_sample", stand_in.random_sample),
            mock.patch.object(np.random, "randint", stand_in.randint),
        ):
            entry = resize(entry)
            made[f"{i}/resized"] = np.array(entry["img"].shape[:2], np.int32)
            entry = crop(entry)
        made[f"{i}/used"] = np.int32(23 - len(stand_in.values))
        made[f"{i}/image"], made[f"{i}/map"] = entry["img"], entry["gt_seg_map"]
    sizes = []
    for height, width in ((512, 683), (480, 640), (683, 512), (600, 2600), (256, 256), (1024, 333)):
        for ratio in (0.5, 0.73, 1.0, 1.61, 2.0):
            scale = (int(2048 * ratio), int(512 * ratio))
            new_width, new_height = mmcv.rescale_size((width, height), scale)
            sizes.append([height, width, ratio, new_height, new_width])
    made["table"] = np.array(sizes)
    return made


def photometric() -> dict[str, np.ndarray]:
    """mmseg's PhotoMetricDistortion: brightness, contrast, saturation, hue and order as given (nan:
    left out) on an image in RGB (the reference works on BGR)."""
    import mmseg.datasets.transforms.transforms as place

    rng = np.random.default_rng(6)
    image = dense_scenes.texture(rng, 20, 24).astype(np.uint8)
    image[:2] = rng.integers(0, 256, (2, 24, 3))
    image[2, :8] = np.arange(8)[:, None] * 36  # greys
    nan = np.nan
    settings = np.array(
        [  # brightness added, contrast, saturation, hue added of 180, contrast before the others
            (20.5, nan, nan, nan, 0),
            (nan, 1.37, nan, nan, 0),
            (nan, nan, 0.61, nan, 0),
            (nan, nan, nan, -11, 0),
            (nan, nan, nan, 17, 0),
            (-17.3, 0.71, 1.42, 8, 1),
            (-17.3, 0.71, 1.42, 8, 0),
            (31.2, 1.48, 1.31, -18, 1),
        ]
    )
    made = {"image": image, "settings": settings}
    for i, (brightness, contrast, saturation, hue, first) in enumerate(settings):

        def switch(value: float, number: float) -> list[float]:
            return [0.0] if np.isnan(value) else [0.9, number]

        adds = switch(contrast, contrast - 0.5)
        numbers = switch(brightness, (brightness + 32) / 64) + [0.9 * first]
        numbers += (adds if first else []) + switch(saturation, saturation - 0.5)
        numbers += switch(hue, (hue + 18.5) / 36) + ([] if first else adds)
        stand_in = Numbers(*numbers)
        with mock.patch.object(place, "random", stand_in):
            out = place.PhotoMetricDistortion()({"img": image[..., ::-1].copy()})["img"]
        assert not stand_in.values
        made[f"{i}"] = out[..., ::-1].copy()
    return made


def scores() -> dict[str, np.ndarray]:
    import torch
    from mmseg.evaluation import IoUMetric

    rng = np.random.default_rng(12)
    labels = rng.choice([0, 1, 2, 4, 255], (3, 20, 30), p=[0.3, 0.3, 0.2, 0.1, 0.1])
    right = rng.random(labels.shape) < 0.6
    predicted = np.where(right & (labels != 255), labels, rng.integers(0, 4, labels.shape))
    parts = [
        IoUMetric.intersect_and_union(torch.as_tensor(p), torch.as_tensor(t), 6, 255)
        for p, t in zip(predicted, labels, strict=True)
    ]
    total = [sum(p) for p in zip(*parts, strict=True)]
    found = IoUMetric.total_area_to_metrics(*total, ["mIoU"])
    return {
        "labels": labels.astype(np.uint8),
        "predicted": predicted.astype(np.uint8),
        "iou": np.asarray(found["IoU"]),
        "accuracy": np.asarray(found["Acc"]),
        "all_accuracy": np.asarray(found["aAcc"]),
    }


def main() -> None:
    sys.path += sys.argv[1:]
    sys.modules.setdefault("detectron2._C", types.ModuleType("detectron2._C"))
    without_compiled_part()
    parts = (federated, targets, repeats, schedules, jitter, resized_range, photometric, scores)
    save("rules", {f"{p.__name__}/{k}": v for p in parts for k, v in p().items()})


if __name__ == "__main__":
    main()
