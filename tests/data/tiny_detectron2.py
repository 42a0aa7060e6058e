"""The tiny ViTDet Mask R-CNN of make_detectron2.py, built of detectron2's own classes."""

import functools
from typing import Any

from tests.data import dense_scenes

CHANNELS = 8
LAYERS, WINDOW, CANDIDATES, PROPOSALS = 4, 3, 16, 32
ANCHORS = 3 * (32**2 + 16**2 + 8**2 + 4**2 + 2**2)
THRESHOLD, DETECTIONS = 0.4, 6
# At this seed no ReLU is within 1e-5 of its corner, and rounding moves the losses of eight steps by
# about 1e-4. With most seeds rounding decides an element or a choice, and then gradients differ by
# parts in a thousand between any two programs.
SEED, RATE = 62, 5e-4
SETS = {  # RPN's samples, RoIs, share of foreground among them
    "all": (ANCHORS, PROPOSALS + dense_scenes.SLOTS, 0.5),
    "few": (6, 16, 0.25),
}


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
        net,
        "last_feat",
        CHANNELS,
        (4.0, 2.0, 1.0, 0.5),
        LastLevelMaxPool(),
        "LN",
        dense_scenes.SIDE,
    )
    proposals = RPN(
        in_features=["p2", "p3", "p4", "p5", "p6"],
        head=StandardRPNHead(in_channels=CHANNELS, num_anchors=3, conv_dims=[-1, -1]),
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
            ShapeSpec(channels=CHANNELS, height=7, width=7),
            conv_dims=[CHANNELS] * 2,
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
            ShapeSpec(channels=CHANNELS, width=14, height=14),
            num_classes=dense_scenes.CLASSES,
            conv_dims=[CHANNELS] * 3,  # the last one is the transposed one
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


def choose(model: Any, name: str) -> None:
    model.proposal_generator.batch_size_per_image = SETS[name][0]
    model.roi_heads.batch_size_per_image = SETS[name][1]
    model.roi_heads.positive_fraction = SETS[name][2]


def exact_suppression() -> None:
    """Lets float64 scores through detectron2's NMS, and NMS a group at a time: torchvision's
    shift of the coordinates, which makes one group of all, costs digits of the IoU."""
    import detectron2.modeling.proposal_generator.proposal_utils as proposal_utils
    import detectron2.modeling.roi_heads.fast_rcnn as fast_rcnn
    from torchvision.ops import boxes

    def suppress(places: Any, scores: Any, groups: Any, threshold: float) -> Any:
        return boxes._batched_nms_vanilla(places.to(scores.dtype), scores, groups, threshold)

    proposal_utils.batched_nms = fast_rcnn.batched_nms = suppress
