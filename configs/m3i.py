"""The paper's pre-training runs (Table 7): ViT-B/16 on ImageNet-1k with categories, ViT-B/16 on
YFCC-15M with captions, and InternImage-H on 442 million images with both. Every model can be
combined with every data set.

    python -m m3i_jax.main --workdir runs/m3i \\
      --config configs/m3i.py:data=imagenet,model=vit_b16,epochs=1600,path=/data/imagenet
    python -m m3i_jax.main --config configs/m3i.py:data=joint,model=internimage_h --mode=show

[P] marks the paper's Table 7, [S] its section 4, [C] a choice of this project where the paper is
silent; configs/README.md explains those about the method.

Other batch sizes [C]: below 4,096 images, learning rate and 1 - momentum are scaled in proportion,
lr * B / 4096 and 1 - (1 - 0.995) * B / 4096, so that weights and target move equally far per epoch.
Above, both stay, since the paper has the same values at 4,096 and 40,000. Warm-up and length are in
epochs and need no rule.
"""

from ml_collections import ConfigDict

from m3i_jax.config import default_config, rescale
from m3i_jax.errors import UserError
from m3i_jax.models import backbones, presets

# [P]; ImageNet's ablations have 400 [S]
EPOCHS = {"imagenet": 1600.0, "yfcc": 138.0, "joint": 30.0}
WARMUP = {"imagenet": 40.0, "yfcc": 3.5, "joint": 1.0}  # epochs [P]
BATCH = {"imagenet": 4096, "yfcc": 4096, "joint": 40_000}  # [P]
# Numbers of images, with which --mode=show plans without data; a run counts its source.
# ImageNet-1k's training split; YFCC-15M as published by CLIP; 427 million captioned and 15 million
# labelled images [S].
SIZE = {"imagenet": 1_281_167, "yfcc": 14_829_396, "joint": 442_000_000}


def get_config(
    data: str = "imagenet",
    model: str = "vit_b16",
    epochs: float = 0.0,
    batch_size: int = 0,
    path: str = "data",
) -> ConfigDict:
    """Settings of a run of the paper.

    Args:
      data: imagenet, yfcc or joint.
      model: vit_b16, vit_l16, vit_h14 (vit_s16 and vit_tiny for trials), internimage_t, _s, _b, _l,
        _xl, _h or _g.
      epochs, batch_size: 0: the paper's.
      path: imagenet: folder with train/ and val/; yfcc: folder of img2dataset tars; joint: folder
        with imagenet22k/ (one folder per class) and the folders of tars laion400m/, yfcc15m/ and
        cc12m/.
    """
    if data not in EPOCHS:
        raise UserError(f"configs/m3i.py: data={data} is not one of {', '.join(EPOCHS)}")
    if model not in presets.preset_names():
        names = ", ".join(presets.preset_names())
        raise UserError(f"configs/m3i.py: model={model} is not one of {names}")
    config, root = default_config(), path.rstrip("/")

    # Model. ViT-B/16 and InternImage-H [P]. For the others, which the paper does not have: four
    # decoder blocks of the encoder's width, at most 1024 [C]; InternImage-G is trained like H, the
    # smaller ones like the ViT [C].
    presets.apply_preset(config, model)
    huge = model in ("internimage_h", "internimage_g")
    config.model.encoder.drop_path = 0.2 if huge else 0.1  # [P]
    config.model.encoder.drop_path_rule = "uniform" if huge else "linear"  # [P]
    config.model.dtype = "bfloat16"  # [C]; parameters, norms, softmax and losses are float32

    # Data.
    config.data.image_size = 192 if huge else 224  # [P]
    # [P]; cells of 16 pixels [P], also for a last stage of stride 32 [C], for which
    # --config.data.mask_cell=32 is the alternative.
    config.data.mask = "blockwise"
    config.data.mask_ratio = 0.5  # [P]
    config.data.crop_scale = (0.08, 1.0)  # [C], as SiameseIM; operations [P], their strengths [C]
    # [C]; the paper says only that the text tower is BERT-Base in size
    config.data.tokenizer = "clip"
    config.data.caption_length = 77  # [C], CLIP's
    config.data.threads = 16  # [C]; per host
    config.data.size = SIZE[data]
    if data == "imagenet":
        config.data.source = "folder"
        config.data.path = root
        config.data.split = "train"  # all images, so that an epoch has 312 steps of 4,096
        config.data.holdout_split = "val"
        config.data.classes = 1000
        config.data.captions = "no"
    elif data == "yfcc":
        config.data.source = "tars"
        config.data.path = f"{root}/*.tar"
        # [C]: trains on all images; --config.data.holdout=0.001 monitors retrieval
        config.data.holdout = 0.0
        config.data.classes = 0  # captions only [S]
        config.data.captions = "yes"
    else:
        config.data.source = "mixture"
        # [S]; without weights, so that one epoch reads each image once [C]
        config.data.mixture = (
            f"folder:{root}/imagenet22k",
            f"tars:{root}/laion400m/*.tar",
            f"tars:{root}/yfcc15m/*.tar",
            f"tars:{root}/cc12m/*.tar",
        )
        config.data.holdout = 0.0  # [C]
        config.data.classes = 21_841  # ImageNet-22k's
        config.data.captions = "yes"

    # Objective.
    config.objective.forms = ("m3i",)
    config.objective.label_smoothing = 0.1  # [P]
    config.objective.weighting = "dynamic"  # Eq. 13
    config.objective.gamma = 1.0  # appendix B.1
    config.objective.second_moment = 0.02  # [C], as SiameseIM; 0 is the paper's text alone

    # Optimization.
    config.optim.lr = 1e-3  # [P]
    config.optim.min_lr = 0.0  # [C]
    config.optim.b1 = 0.9  # [P]
    config.optim.b2 = 0.95  # [P]
    # [P]; biases, norms, tokens, position tables and logit scale are exempt [C]
    config.optim.weight_decay = 0.1
    # [C], as InternImage and SiameseIM
    config.optim.clip = backbones.get_backbone(config.model).clip or 1.0
    config.optim.offset_lr = 0.1  # [C], DCNv3's offsets, as InternImage is fine-tuned
    config.optim.ema = 0.995  # [P]
    config.optim.ema_schedule = "cosine"  # [P]
    config.train.epochs = epochs or EPOCHS[data]
    # [P]; at most a tenth of a shorter run [C]
    config.optim.warmup_epochs = min(WARMUP[data], 0.1 * config.train.epochs)
    rescale(config, batch_size or BATCH[data])
    config.train.round_batch = data == "joint"  # [C]: 40,000 is no multiple of 2 x 64 chips
    return config
