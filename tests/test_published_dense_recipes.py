"""Recipes of dense tasks against literals of the public configurations that they follow, those of
detectron2, detrex, Mask2Former, mmsegmentation and InternImage. Paths in comments are in those."""

import functools
import pathlib
from typing import Any

import pytest

from m3i_jax import config as configuration

RECIPES = pathlib.Path(__file__).parents[1] / "configs" / "transfer"
_ADAMW = {"optim.b1": 0.9, "optim.b2": 0.999}
_VITDET = {
    **_ADAMW,
    "optim.weight_decay": 0.1,
    "optim.clip": 0.0,
    "optim.warmup_steps": 250,
    "optim.warmup_start": 0.001,
    "dense.maps.window": 14,
    "dense.maps.relative": "decomposed",
    "dense.geometry.scale": (0.1, 2.0),
    "dense.geometry.flip_p": 0.5,
    "data.image_size": 1024,
}
_QUERIES = {**_ADAMW, "optim.weight_decay": 1e-4, "optim.clip": 0.1, "train.batch_size": 16}
_UPERNET = {**_ADAMW, "optim.weight_decay": 0.05, "train.steps": 160_000, "train.batch_size": 16}
PUBLISHED: dict[str, dict[str, Any]] = {
    # projects/ViTDet/configs/COCO/mask_rcnn_vitdet_{b,l}_100ep.py, ..._h_75ep.py
    "coco.py": {
        **_VITDET,
        "train.steps": 184_375,
        "train.batch_size": 64,
        "optim.lr": 1e-4,
        "optim.milestones": (163_889 / 184_375, 177_546 / 184_375),
        "optim.layer_decay": 0.7,
        "optim.decayed": "but_norms",
        "model.encoder.drop_path": 0.1,
        "dense.maps.global_blocks": (2, 5, 8, 11),
    },
    "coco.py:model=vit_l16": {
        **_VITDET,
        "optim.layer_decay": 0.8,
        "optim.decayed": "but_norms",
        "model.encoder.drop_path": 0.4,
        "dense.maps.global_blocks": (5, 11, 17, 23),
    },
    "coco.py:model=vit_h14,image_size=896,epochs=75": {
        "train.steps": 138_281,
        "optim.layer_decay": 0.9,
        "optim.decayed": "all",
        "model.encoder.drop_path": 0.5,
        "dense.maps.global_blocks": (7, 15, 23, 31),
    },
    # detrex, projects/dino/configs/dino-vitdet/dino_vitdet_{base,large}_4scale_12ep.py
    "coco.py:head=dino": {
        **_QUERIES,
        "train.steps": 90_000,
        "optim.lr": 1e-4,
        "optim.encoder_lr": 0.1,
        "optim.layer_decay": 1.0,
        "optim.milestones": (11 / 12,),
        "optim.warmup_steps": 0,
        "model.encoder.drop_path": 0.1,
    },
    "coco.py:head=dino,model=vit_l16": {
        **_QUERIES,
        "train.steps": 90_000,
        "optim.milestones": (300_000 / 375_000,),
        "optim.warmup_steps": 250,
        "optim.warmup_start": 0.001,
        "model.encoder.drop_path": 0.4,
    },
    # InternImage, detection/configs/coco/dino_4scale_internimage_{t,l}_..., and ..._h_objects365...
    "coco.py:head=dino,model=internimage_l": {
        **_QUERIES,
        "optim.layer_decay": 0.9,
        "optim.warmup_steps": 500,
        "optim.warmup_start": 0.001,
        "optim.schedule": "steps",
        "model.encoder.drop_path": 0.4,
        "dense.detect.dino.denoising": 100,
        "dense.detect.dino.box_noise": 1.0,
        "dense.detect.dino.shared_heads": False,
    },
    "coco.py:head=dino,model=internimage_h,multi_scale=true": {
        **_QUERIES,
        "optim.layer_decay": 0.94,
        "optim.warmup_steps": 500,
        "optim.schedule": "constant",
        "optim.head_offset_lr": 1e-3,
        "model.encoder.drop_path": 0.5,
        "dense.detect.dino.denoising": 1000,
        "dense.geometry.test_short": 1000,
    },
    # Mask2Former, configs/coco/instance-segmentation/maskformer2_R50_bs16_50ep.yaml
    "coco.py:head=mask2former": {
        **_ADAMW,
        "train.steps": 368_750,
        "train.batch_size": 16,
        "optim.lr": 1e-4,
        "optim.weight_decay": 0.05,
        "optim.clip": 0.01,
        "optim.encoder_lr": 0.1,
        "optim.milestones": (327_778 / 368_750, 355_092 / 368_750),
        "dense.detect.mask2former.points": 12_544,
        "dense.detect.detections": 100,
    },
    # projects/ViTDet/configs/LVIS/mask_rcnn_vitdet_b_100ep.py
    "lvis.py": {
        **_VITDET,
        "train.steps": 156_250,
        "optim.lr": 2e-4,
        "optim.milestones": (138_889 / 156_250, 150_463 / 156_250),
        "dense.geometry.repeat": 0.001,
        "dense.detect.federated_classes": 50,
        "dense.detect.score_threshold": 0.02,
        "dense.detect.detections": 300,
        "data.classes": 1203,
    },
    # mmsegmentation, configs/mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py
    "ade20k.py": {
        **_UPERNET,
        "optim.lr": 1e-4,
        "optim.layer_decay": 0.65,
        "optim.decayed": "ranks",
        "optim.clip": 0.0,
        "optim.warmup_start": 1e-6,
        "optim.warmup_steps": 1499,
        "model.encoder.drop_path": 0.1,
        "dense.maps.blocks": (3, 5, 7, 11),
        "dense.segment.width": 768,
        "dense.segment.test_stride": 341,
        "dense.geometry.category_share": 0.75,
    },
    # BEiT-L at 640 pixels
    "ade20k.py:image_size=640": {"dense.segment.test_stride": 426},
    # InternImage, segmentation/configs/ade20k/upernet_internimage_{t,l}_...
    "ade20k.py:model=internimage_t": {
        **_UPERNET,
        "optim.lr": 6e-5,
        "optim.layer_decay": 1.0,
        "optim.clip": 0.0,
        "model.encoder.drop_path": 0.2,
        "dense.segment.width": 512,
    },
    "ade20k.py:model=internimage_l,image_size=640": {
        **_UPERNET,
        "optim.lr": 2e-5,
        "optim.layer_decay": 0.94,
        "optim.clip": 0.1,
        "model.encoder.drop_path": 0.4,
    },
    # the same folder, mask2former_internimage_h_896_80k_cocostuff2ade20k_ss.py
    "ade20k.py:model=internimage_h,head=mask2former,image_size=896,steps=80000": {
        **_ADAMW,
        "optim.lr": 1e-5,
        "optim.layer_decay": 0.95,
        "optim.clip": 0.1,
        "model.encoder.drop_path": 0.5,
        "dense.segment.width": 1024,
        "dense.segment.mask2former.queries": 200,
        "dense.segment.mask2former.heads": 32,
        "dense.geometry.category_share": 0.75,
    },
    # Mask2Former, configs/ade20k/semantic-segmentation/Base-ADE20K-SemanticSegmentation.yaml
    "ade20k.py:model=internimage_t,head=mask2former": {
        **_UPERNET,
        "optim.lr": 1e-4,
        "optim.encoder_lr": 0.1,
        "optim.clip": 0.01,
        "optim.warmup_steps": 0,
        "optim.decayed": "but_norms",
        "dense.geometry.category_share": 1.0,
    },
    # InternImage, classification/configs/internimage_{l,h,g}_22kto1k_*.yaml, batches of 512
    "finetune.py:path=DIR,model=internimage_l": {"model.encoder.drop_path": 0.1},
    "finetune.py:path=DIR,model=internimage_h": {
        "model.encoder.drop_path": 0.2,
        "model.encoder.drop_path_rule": "linear",
        "optim.min_lr": 0.0,
        "optim.layer_decay": 0.9,
        "optim.weight_decay": 0.05,
        "objective.label_smoothing": 0.3,
        "evaluate.crop": 0.875,
    },
    "finetune.py:path=DIR,model=internimage_g,image_size=512": {
        "model.encoder.drop_path": 0.4,
        "model.encoder.drop_path_rule": "linear",
        "evaluate.crop": 1.0,
    },
}


@pytest.mark.parametrize("spec", PUBLISHED)
def test_a_recipe_has_the_settings_of_its_source(spec: str) -> None:
    config = configuration.resolve(configuration.load_config(f"{RECIPES}/{spec}"))
    for key, expected in PUBLISHED[spec].items():
        value = functools.reduce(getattr, key.split("."), config)
        same = value == expected if isinstance(expected, str) else value == pytest.approx(expected)
        assert same, f"{key}: {value!r} instead of {expected!r}"
