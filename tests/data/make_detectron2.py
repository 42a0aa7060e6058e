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
import pathlib
import sys
import types
from typing import Any

import numpy as np

from tests.data import dense_scenes

PLACE = pathlib.Path(__file__).with_name("dense")
LAYERS, WINDOW, CANDIDATES, PROPOSALS = 4, 3, 16, 48
ANCHORS = 3 * (32**2 + 16**2 + 8**2 + 4**2 + 2**2)
THRESHOLD, DETECTIONS = 0.4, 8
SETS = {  # RPN's samples, RoIs, share of foreground among them
    "all": (ANCHORS, PROPOSALS + dense_scenes.SLOTS, 0.5),
    "few": (6, 24, 0.25),
}
LOSSES = ("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask")


def build(double: bool = False) -> Any:
    """The model, by detectron2's own classes, in the set `all`."""
    import torch
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import SimpleFeaturePyramid, ViT
    from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
    from detectron2.modeling.backbone.fpn import LastLevelMaxPool
    from detectron2.modeling.box_regression import Box2BoxTransform
    from detectron2.modeling.matcher import Matcher
    from detectron2.modeling.meta_arch import GeneralizedRCNN
    from detectron2.modeling.poolers import ROIPooler
    from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
    from detectron2.modeling.roi_heads import (
        FastRCNNConvFCHead,
        FastRCNNOutputLayers,
        MaskRCNNConvUpsampleHead,
        StandardROIHeads,
    )

    norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
    net = ViT(
        img_size=dense_scenes.SIDE,
        patch_size=16,
        embed_dim=32,
        depth=LAYERS,
        num_heads=2,
        drop_path_rate=0.0,
        norm_layer=norm,
        window_size=WINDOW,
        window_block_indexes=(0, 2),
        use_rel_pos=True,
        pretrain_img_size=64,
    )
    backbone = SimpleFeaturePyramid(
        net, "last_feat", 16, (4.0, 2.0, 1.0, 0.5), LastLevelMaxPool(), "LN", dense_scenes.SIDE
    )
    proposals = RPN(
        in_features=["p2", "p3", "p4", "p5", "p6"],
        head=StandardRPNHead(in_channels=16, num_anchors=3, conv_dims=[-1, -1]),
        anchor_generator=DefaultAnchorGenerator(
            sizes=[[8], [16], [32], [64], [96]],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=[4, 8, 16, 32, 64],
            offset=0.0,
        ),
        anchor_matcher=Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        batch_size_per_image=ANCHORS,
        positive_fraction=0.5,
        pre_nms_topk=(CANDIDATES, CANDIDATES),
        post_nms_topk=(PROPOSALS, PROPOSALS),
        nms_thresh=0.7,
    )

    def pooler(side: int) -> Any:
        return ROIPooler(
            side, (1 / 4, 1 / 8, 1 / 16, 1 / 32), 0, "ROIAlignV2", canonical_box_size=32
        )

    heads = StandardROIHeads(
        num_classes=dense_scenes.CLASSES,
        batch_size_per_image=SETS["all"][1],
        positive_fraction=SETS["all"][2],
        proposal_matcher=Matcher([0.5], [0, 1], allow_low_quality_matches=False),
        box_in_features=["p2", "p3", "p4", "p5"],
        box_pooler=pooler(7),
        box_head=FastRCNNConvFCHead(
            ShapeSpec(channels=16, height=7, width=7),
            conv_dims=[16, 16],
            fc_dims=[32],
            conv_norm="LN",
        ),
        box_predictor=FastRCNNOutputLayers(
            ShapeSpec(channels=32),
            test_score_thresh=THRESHOLD,
            test_topk_per_image=DETECTIONS,
            box2box_transform=Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
            num_classes=dense_scenes.CLASSES,
        ),
        mask_in_features=["p2", "p3", "p4", "p5"],
        mask_pooler=pooler(14),
        mask_head=MaskRCNNConvUpsampleHead(
            ShapeSpec(channels=16, width=14, height=14),
            num_classes=dense_scenes.CLASSES,
            conv_dims=[16, 16, 16],
            conv_norm="LN",
        ),
    )
    model = GeneralizedRCNN(
        backbone=backbone,
        proposal_generator=proposals,
        roi_heads=heads,
        pixel_mean=(123.675, 116.28, 103.53),
        pixel_std=(58.395, 57.12, 57.375),
        input_format="RGB",
    )
    return model.double() if double else model


def spread(model: Any, seed: int) -> None:
    """Fills the parameters with values at which everything counts: tables, biases and scales are
    not those of the start, and logits differ enough that no rank or label hangs on the last bit."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    gain = {"objectness_logits": 2.5, "anchor_deltas": 0.3, "cls_score": 1.6, "bbox_pred": 0.8}
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1:
                scale = name.endswith("weight")
                value.copy_(0.1 * noise + (1.0 if scale else 0.0))
            elif "pos_embed" in name or "rel_pos" in name:
                value.copy_((0.3 if "rel_pos" in name else 0.5) * noise)
            else:
                turned = "deconv" in name or ("simfp" in name and value.shape[-1] == 2)
                fan = value.shape[0] if turned else value[0].numel()
                factor = next((g for key, g in gain.items() if key in name), 1.0)
                value.copy_(noise * factor / fan**0.5)


def centre(model: Any, entries: list[dict[str, Any]]) -> None:
    """Moves the classifier's biases so that all classes, and the background, are predicted."""
    import torch

    model.eval()
    seen = watch(model)
    with torch.no_grad():
        for entry in entries:
            model.inference([entry], do_postprocess=False)
        model.roi_heads.box_predictor.cls_score.bias -= torch.cat(
            [scores for scores, _ in seen["predictions"]]
        ).mean(0)


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


def choose(model: Any, name: str) -> None:
    model.proposal_generator.batch_size_per_image = SETS[name][0]
    model.roi_heads.batch_size_per_image = SETS[name][1]
    model.roi_heads.positive_fraction = SETS[name][2]


def watch(model: Any) -> dict[str, list]:
    """Lists that the calls of the model's parts append to: proposals, predictions, masks."""
    seen: dict[str, list] = {k: [] for k in ("proposals", "rois", "predictions", "mask", "targets")}
    generator, heads = model.proposal_generator, model.roi_heads

    def after(place: Any, name: str, what: str, read: Any) -> None:
        original = getattr(place, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            seen[what].append(read(out, args))
            return out

        setattr(place, name, call)

    after(generator, "predict_proposals", "proposals", lambda out, _: out[0])
    after(heads, "label_and_sample_proposals", "rois", lambda out, _: out[0])
    after(heads.box_predictor, "forward", "predictions", lambda out, _: out)
    after(heads.mask_head, "layers", "mask", lambda out, _: out)
    return seen


def padded(rows: list[np.ndarray], count: int, fill: float = 0) -> np.ndarray:
    out = np.full((len(rows), count, *rows[0].shape[1:]), fill, rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def numpy(value: Any) -> np.ndarray:
    made = value.detach().numpy()
    return made.astype(np.float32) if made.dtype == np.float64 else made


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
    for i, entry in enumerate(entries[:2]):
        foreground = rois[i].gt_classes < dense_scenes.CLASSES
        which = rois[i].gt_masks[foreground]
        target = which.crop_and_resize(rois[i].proposal_boxes.tensor[foreground], 28).numpy()
        made[f"mask_targets/{i}"] = np.packbits(target, -1)
        made[f"mask_logits/{i}"] = numpy(seen["mask"][i][:, :, ::4, ::4])
        assert foreground.sum() < int(SETS["all"][1] * SETS["all"][2]), (
            "the cap must not be reached"
        )
        assert entry is entries[i]
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


def install(sampler: Sampler) -> None:
    import detectron2.modeling.proposal_generator.rpn as rpn
    import detectron2.modeling.roi_heads.roi_heads as roi_heads

    rpn.subsample_labels = roi_heads.subsample_labels = sampler


def exact_suppression() -> None:
    """Lets float64 scores through detectron2's NMS, and NMS a group at a time: torchvision's
    shift of the coordinates, which makes one group of all, costs digits of the IoU."""
    import detectron2.modeling.proposal_generator.proposal_utils as proposal_utils
    import detectron2.modeling.roi_heads.fast_rcnn as fast_rcnn
    from torchvision.ops import boxes

    def suppress(places: Any, scores: Any, groups: Any, threshold: float) -> Any:
        return boxes._batched_nms_vanilla(places.to(scores.dtype), scores, groups, threshold)

    proposal_utils.batched_nms = fast_rcnn.batched_nms = suppress


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
    rows, kept = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        losses, notes = step(model, entries, sampler, uniform_numbers(len(entries)))
        losses.sum(1).mean().backward()
        optimizer.step()
        rows.append(numpy(losses))
        kept.append([np.sort(n["kept"]["roi_slot"]) for n in notes])
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
        spread(models[kind], 0)
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


def report(what: str, made: dict, wide: dict) -> None:
    """Prints where float32 and float64 differ: the noise that a test has to allow."""
    print(what)
    for key in wide:
        a, b = np.asarray(made[key]), np.asarray(wide[key])
        if a.shape != b.shape or (a.dtype.kind in "iub" and (a != b).any()):
            print(
                "  DIFFERENT CHOICES",
                key,
                a.shape,
                b.shape,
                (a != b).sum() if a.shape == b.shape else "",
            )
        elif a.dtype.kind == "f" and a.size and "gradient" not in key:
            finite = np.isfinite(a)
            error = np.abs(a.astype(float) - b)[finite].max(initial=0)
            if error > 1e-5:
                print(f"  {key}: {error:.1e} of {np.abs(a[finite]).max():.1e}")


def save(name: str, arrays: dict[str, np.ndarray]) -> None:
    PLACE.mkdir(exist_ok=True)
    path = PLACE / f"{name}.npz"
    np.savez_compressed(path, **arrays)
    print(path.name, len(arrays), "arrays", path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
