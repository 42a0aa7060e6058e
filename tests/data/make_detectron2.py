"""Writes dense/vitdet*.npz: what detectron2 itself makes of a tiny ViTDet Mask R-CNN. Run by hand;
the tests need only the files, which dense/README.md describes.

    git clone https://github.com/facebookresearch/detectron2   # Apache-2.0
    git -C detectron2 checkout 02b5c4e295e990042a714712c21dc79b731e8833
    pip install torch torchvision fvcore iopath omegaconf hydra-core pycocotools
    python -m tests.data.make_detectron2 detectron2            # the folder of the clone

detectron2's compiled part is not needed: RoIAlign and NMS are torchvision's. The losses are those
of one image a process, which is how ViTDet was trained (64 images on 64 GPUs), and their mean over
the images. Nothing is sampled away in the set `all` (budgets equal the number of candidates); in
the set `few` those candidates are sampled whose stored uniform numbers are largest.
"""

import functools
import sys
import types
from typing import Any

import numpy as np

from tests.data import dense_scenes
from tests.data.dense_writing import numpy, padded, report, save
from tests.data.tiny_detectron2 import (
    ANCHORS,
    DETECTIONS,
    LAYERS,
    PROPOSALS,
    RATE,
    SEED,
    SETS,
    build,
    centre,
    choose,
    exact_suppression,
    spread,
    watch,
)

LOSSES = ("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask")


class Masks:
    """Masks in the frame of their boxes, in the place of detectron2's BitMasks: only the rule of
    the target differs (0.6 % of the bits)."""

    def __init__(self, masks: np.ndarray, boxes: np.ndarray) -> None:
        self.masks, self.boxes = masks, boxes

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, item: Any) -> "Masks":
        item = item.numpy()
        return Masks(self.masks[item], self.boxes[item])

    def crop_and_resize(self, rois: Any, side: int) -> Any:
        import torch

        made = dense_scenes.mask_targets(self.masks, self.boxes, rois.numpy(), side)
        return torch.as_tensor(made)


def inputs(batch: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """What detectron2's data loader would hand over, one entry an image."""
    import torch
    from detectron2.structures import Boxes, Instances

    made = []
    for i, (height, width) in enumerate(batch["size"].tolist()):
        valid = batch["classes"][i] >= 0
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.as_tensor(batch["boxes"][i][valid]))
        instances.gt_classes = torch.as_tensor(batch["classes"][i][valid]).long()
        instances.gt_masks = Masks(batch["masks"][i][valid], batch["boxes"][i][valid])
        image = torch.as_tensor(batch["image"][i, :height, :width].transpose(2, 0, 1).copy())
        made.append({"image": image, "instances": instances, "height": 2 * height, "width": width})
    return made


class Sampler:
    """Takes the place of detectron2's subsample_labels: of either kind, those of the largest
    uniform numbers, foreground first. `uniform` is set before each image; a RoI of the ground truth
    reads slot PROPOSALS + its number, however many proposals there are."""

    def __init__(self) -> None:
        self.uniform: dict[str, Any] = {}
        self.objects = 0
        self.kept: dict[str, np.ndarray] = {}
        self.labels: dict[str, np.ndarray] = {}
        self.margin = np.inf

    def __call__(self, labels: Any, count: int, share: float, background: int) -> Any:
        import torch

        kind = "rpn" if len(labels) == ANCHORS else "roi"
        slot = torch.arange(len(labels))
        if kind == "roi":
            found = len(labels) - self.objects
            slot = torch.where(slot < found, slot, slot - found + PROPOSALS)
        uniform = torch.as_tensor(self.uniform[kind])[slot]
        out = []
        wanted = int(count * share)
        for mask in ((labels != -1) & (labels != background), labels == background):
            index = mask.nonzero()[:, 0]
            order = torch.argsort(uniform[index], descending=True)
            out.append(index[order[:wanted]])
            wanted = count - len(out[0])
        self.labels[kind] = labels.numpy().copy()
        self.kept[kind] = torch.cat(out).numpy()
        if kind == "roi":
            self.kept["roi_slot"] = slot[torch.cat(out)].numpy()
        return tuple(out)


def step(model: Any, entries: list[dict[str, Any]], sampler: Sampler, uniforms: dict) -> Any:
    """Losses [images, 5] as tensors, image by image, and for each image what was sampled."""
    import torch
    from detectron2.utils.events import EventStorage

    rows, notes = [], []
    with EventStorage():
        for i, entry in enumerate(entries):
            sampler.uniform = {k: v[i] for k, v in uniforms.items()}
            sampler.objects = len(entry["instances"])
            losses = model([entry])
            rows.append(torch.stack([losses[name] for name in LOSSES]))
            notes.append({"kept": dict(sampler.kept), "labels": dict(sampler.labels)})
    return torch.stack(rows), notes


def forward_values(model: Any, entries: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Maps of backbone and pyramid, logits and deltas of the RPN, one forward pass."""
    import torch

    made = {}
    with torch.no_grad():
        images = model.preprocess_image(entries)
        made["normalised_corner"] = numpy(images.tensor[:, :, ::16, ::16])
        made["backbone"] = numpy(model.backbone.net(images.tensor)["last_feat"])
        maps = model.backbone(images.tensor)
        for name, value in maps.items():
            made[f"pyramid/{name}"] = numpy(value)[: 1 if name == "p2" else None]
        logits, deltas = model.proposal_generator.rpn_head(list(maps.values()))
        count, levels = len(entries), range(len(logits))
        made["rpn_logits"] = np.concatenate(
            [numpy(logits[n].permute(0, 2, 3, 1)).reshape(count, -1) for n in levels], 1
        )
        made["rpn_deltas"] = np.concatenate(
            [numpy(deltas[n].permute(0, 2, 3, 1)).reshape(count, -1, 4) for n in levels], 1
        )
        made["anchors"] = np.concatenate(
            [
                numpy(a.tensor)
                for a in model.proposal_generator.anchor_generator(list(maps.values()))
            ]
        )
        other = dense_scenes.texture(np.random.default_rng(3), 96, 160).astype(np.uint8)
        made["other_size/image"] = other
        normalised = (
            torch.as_tensor(other.transpose(2, 0, 1)) - model.pixel_mean
        ) / model.pixel_std
        made["other_size/backbone"] = numpy(model.backbone.net(normalised[None])["last_feat"])
    return made


def training_values(model: Any, name: str, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Losses, gradients of their mean over the images, proposals, sampled candidates, labels."""
    choose(model, name)
    entries, sampler = inputs(batch), Sampler()
    install(sampler)
    seen = watch(model)
    uniforms = uniform_numbers(len(entries))
    model.train()
    model.zero_grad()
    losses, notes = step(model, entries, sampler, uniforms)
    losses.sum(1).mean().backward()
    rois = seen["rois"]
    made = {
        "losses": numpy(losses),
        "proposals": padded([numpy(p.proposal_boxes.tensor) for p in seen["proposals"]], PROPOSALS),
        "proposal_logits": padded(
            [numpy(p.objectness_logits) for p in seen["proposals"]], PROPOSALS, -np.inf
        ),
        "rpn_labels": np.stack([n["labels"]["rpn"] for n in notes]).astype(np.int8),
        "roi_boxes": padded([numpy(r.proposal_boxes.tensor) for r in rois], SETS[name][1]),
        "roi_classes": padded([numpy(r.gt_classes) for r in rois], SETS[name][1], -1).astype(
            np.int32
        ),
        "roi_slots": padded([n["kept"]["roi_slot"] for n in notes], SETS[name][1], -1).astype(
            np.int32
        ),
        "roi_logits": padded([numpy(p[0]) for p in seen["predictions"]], SETS[name][1]),
        "roi_deltas": padded([numpy(p[1]) for p in seen["predictions"]], SETS[name][1]),
    }
    if name == "few":
        made["rpn_sampled"] = padded([n["kept"]["rpn"] for n in notes], SETS[name][0], -1).astype(
            np.int32
        )
    for i in range(2):
        foreground = rois[i].gt_classes < dense_scenes.CLASSES
        which = rois[i].gt_masks[foreground]
        target = which.crop_and_resize(rois[i].proposal_boxes.tensor[foreground], 28).numpy()
        made[f"mask_targets/{i}"] = np.packbits(target, -1)
        made[f"mask_logits/{i}"] = numpy(seen["mask"][i][:, :, ::4, ::4])
        assert foreground.sum() < int(SETS["all"][1] * SETS["all"][2]), (
            "the cap must not be reached"
        )
    for key, value in model.named_parameters():
        gradient = numpy(value.grad)
        made[f"gradient_norm/{key}"] = np.float32(np.linalg.norm(gradient.astype(float)))
        if gradient.size <= (2500 if name == "all" else 40):
            made[f"gradient/{key}"] = gradient
    return made


def detection_values(model: Any, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Detections in the frame of the input, and, resized to twice the height, with pasted masks."""
    import torch

    entries = inputs(batch)
    model.eval()
    seen = watch(model)
    made: dict[str, np.ndarray] = {}
    with torch.no_grad():
        raw = [model.inference([e], do_postprocess=False)[0] for e in entries]
        final = [model([e])[0]["instances"] for e in entries]
    made["proposals"] = padded(
        [numpy(p.proposal_boxes.tensor) for p in seen["proposals"][: len(entries)]], PROPOSALS
    )
    made["boxes"] = padded([numpy(r.pred_boxes.tensor) for r in raw], DETECTIONS)
    made["scores"] = padded([numpy(r.scores) for r in raw], DETECTIONS)
    made["classes"] = padded([numpy(r.pred_classes) for r in raw], DETECTIONS, -1).astype(np.int32)
    made["masks"] = padded([numpy(r.pred_masks[:, 0]) for r in raw], DETECTIONS)
    for i, result in enumerate(final):
        made[f"output/{i}/boxes"] = numpy(result.pred_boxes.tensor)
        made[f"output/{i}/scores"] = numpy(result.scores)
        made[f"output/{i}/pasted"] = np.packbits(numpy(result.pred_masks), -1)
        made[f"output/{i}/size"] = np.array(result.image_size, np.int32)
    return made


def image_values(model: Any) -> dict[str, np.ndarray]:
    """An image uint8 of another size and its detections, as detectron2's predictor makes them: the
    long side resized by Pillow, boxes and masks in pixels of the image. The masks' biases are
    raised by one, without which the masks of one class are empty."""
    import torch
    from PIL import Image

    height, width = 96, 160
    image = dense_scenes.texture(np.random.default_rng(5), height, width).astype(np.uint8)
    image[20:70, 30:95] = (200, 60, 30)
    image[40:90, 110:150] = (20, 180, 220)
    content = (round(height * dense_scenes.SIDE / width), dense_scenes.SIDE)
    resized = Image.fromarray(image).resize(content[::-1], Image.Resampling.BILINEAR)
    pixels = torch.as_tensor(np.array(resized).transpose(2, 0, 1))
    bias = model.roi_heads.mask_head.predictor.bias
    model.eval()
    with torch.no_grad():
        bias += 1
        raised = numpy(bias).copy()
        found = model([{"image": pixels, "height": height, "width": width}])[0]["instances"]
        bias -= 1
    return {
        "mask_bias": raised,
        "image": image,
        "boxes": numpy(found.pred_boxes.tensor),
        "scores": numpy(found.scores),
        "classes": numpy(found.pred_classes).astype(np.int32),
        "masks": np.packbits(numpy(found.pred_masks), -1),
    }


def install(sampler: Sampler) -> None:
    import detectron2.modeling.proposal_generator.rpn as rpn
    import detectron2.modeling.roi_heads.roi_heads as roi_heads

    rpn.subsample_labels = roi_heads.subsample_labels = sampler


def uniform_numbers(images: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(11)
    slots = PROPOSALS + dense_scenes.SLOTS
    return {
        "rpn": rng.random((images, ANCHORS), np.float32),
        "roi": rng.random((images, slots), np.float32),
    }


def trajectory(model: Any, batch: dict[str, np.ndarray], rate: float, steps: int = 8) -> dict:
    """Losses [steps, images, 5] before each AdamW step with ViTDet's groups, parameters after."""
    import torch
    from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
    from detectron2.solver.build import get_default_optimizer_params

    choose(model, "all")
    entries, sampler = inputs(batch), Sampler()
    install(sampler)
    model.train()
    before = {k: numpy(v).copy() for k, v in model.named_parameters()}
    groups = get_default_optimizer_params(
        model,
        base_lr=rate,
        weight_decay_norm=0.0,
        lr_factor_func=functools.partial(
            get_vit_lr_decay_rate, num_layers=LAYERS, lr_decay_rate=0.7
        ),
        overrides={"pos_embed": {"weight_decay": 0.0}},
    )
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.999), weight_decay=0.1)
    made: dict[str, np.ndarray] = {"rate": np.float32(rate)}
    names = {id(v): k for k, v in model.named_parameters()}
    for group in optimizer.param_groups:
        for value in group["params"]:
            made[f"group/{names[id(value)]}"] = np.array(
                [group["lr"] / rate, group["weight_decay"]], np.float32
            )
    rows = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses, _ = step(model, entries, sampler, uniform_numbers(len(entries)))
        losses.sum(1).mean().backward()
        optimizer.step()
        rows.append(numpy(losses))
    made["losses"] = np.stack(rows)
    for key, value in model.named_parameters():
        after = numpy(value)
        moved = (after.astype(float) - before[key]).ravel()
        made[f"moved/{key}"] = np.array(
            [np.linalg.norm(moved), moved @ np.cos(np.arange(moved.size))], np.float32
        )
        if after.size <= 1100:
            made[f"after/{key}"] = after
    return made


def main() -> None:
    sys.path += sys.argv[1:]
    sys.modules.setdefault("detectron2._C", types.ModuleType("detectron2._C"))
    import torch

    exact_suppression()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    batch = dense_scenes.detection_batch()
    models = {}
    for kind, double in (("float32", False), ("float64", True)):
        models[kind] = build()
        spread(models[kind], SEED)
        centre(models[kind], inputs(batch))
        if double:
            models[kind] = models[kind].double()
    model = models["float32"]
    state = {f"state/{k}": numpy(v) for k, v in model.state_dict().items()}
    uniforms = {f"uniform/{k}": v for k, v in uniform_numbers(3).items()}
    save("vitdet", state | batch | uniforms)
    save("vitdet_maps", forward_values(model, inputs(batch)))
    made = {}
    for name in SETS:
        made |= {f"{name}/{k}": v for k, v in training_values(model, name, batch).items()}
        wide = training_values(models["float64"], name, batch)
        report(f"training, {name}", made, {f"{name}/{k}": v for k, v in wide.items()})
    made |= (found := {f"detect/{k}": v for k, v in detection_values(model, batch).items()})
    wide = detection_values(models["float64"], batch)
    report("detections", found, {f"detect/{k}": v for k, v in wide.items()})
    save("vitdet_values", made)
    made = image_values(model)
    report("an image", made, image_values(models["float64"]))
    save("vitdet_image", made)
    made = trajectory(model, batch, RATE)
    report("steps", made, trajectory(models["float64"], batch, RATE))
    save("vitdet_steps", made)


if __name__ == "__main__":
    main()
