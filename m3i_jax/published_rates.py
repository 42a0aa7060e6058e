"""How named methods were published to be optimized, as settings: rates, decay, clipping, warm-up,
and the momentum of EMA targets.

Rates and momentum are those at 4,096 images a step, linear in the batch as `config.rescale` has
them, so that the batch of the publication, which a comment names, gets what was published.
"""

# DINO and its successors. DINO and SimDINO, 512 images: 1e-3, down to 1e-6, and 0.996.
DINO = {
    "optim.freeze_prototypes": 0.01,  # an epoch of 100
    "optim.lr": 8e-3,
    "optim.min_lr": 8e-6,
    "optim.ema": 0.968,
    "optim.b2": 0.999,
    "optim.clip": 3.0,
    "optim.weight_decay": 0.04,
    "optim.decayed": "ranks",
    "optim.warmup_epochs": 10.0,
}
# 1,024 images: 2e-3, down to 1e-6, and 0.996.
IBOT = {**DINO, "optim.min_lr": 4e-6, "optim.ema": 0.984}
# 2,048 images: 4e-3 by the root of 2,048 / 1,024, down to 1e-6, and 0.992. Its epochs are of 1,250
# steps: 100 are 200 passes of ImageNet, and 10 of warm-up are 20.
DINOV2 = {
    **DINO,
    "optim.lr": 4e-3 * 8**0.5,
    "optim.min_lr": 2e-6,
    "optim.ema": 0.984,
    "optim.warmup_epochs": 20.0,
    "train.epochs": 200.0,
}
# Of convolutional networks by LARS or SGD, whose rates and decay are not AdamW's: 10 epochs of
# warm-up, and neither clipping nor stochastic depth.
RESNET = {
    "model.encoder.drop_path": 0.0,
    "optim.warmup_epochs": 10.0,
    "optim.clip": 0.0,
}
# Runs of SLIP's paper on YFCC, CLIP's included; its code decays tables and tokens, too.
YFCC = {
    "optim.b2": 0.98,
    "optim.min_lr": 1e-5,
    "optim.warmup_epochs": 1.0,
    "optim.clip": 0.0,
    "optim.decayed": "ranks",
    "train.epochs": 25.0,
}
# big_vision: kernels alone; its 1e-4 is not multiplied by the peak of 1e-3, as AdamW's 0.1 is.
BIG_VISION = {"optim.decayed": "kernels", "optim.weight_decay": 0.1}
# MAE and MILAN.
MAE = {
    "optim.lr": 2.4e-3,
    "optim.weight_decay": 0.05,
    "optim.clip": 0.0,
    "optim.decayed": "ranks",
}
# 2,048 images: 2e-3, down to 1e-5, and 0.9998.
DATA2VEC = {
    "optim.lr": 4e-3,
    "optim.min_lr": 2e-5,
    "optim.b2": 0.999,
    "optim.weight_decay": 0.05,
    "optim.clip": 3.0,
    "optim.warmup_epochs": 10.0,
    "optim.ema": 0.9996,
    "optim.ema_schedule": "constant",
}
# A CLIP teacher and 2,048 images: 1.2e-3, down to 2e-5.
FEATURE_DISTILLATION = {
    "optim.lr": 2.4e-3,
    "optim.min_lr": 4e-5,
    "optim.b2": 0.999,
    "optim.weight_decay": 0.05,
    "optim.clip": 3.0,
    "optim.warmup_epochs": 10.0,
}
# 1,024 images: 1e-3 from 2e-4, and 0.996. Its cosine to 1e-6 is 1.25 times as long as the run, at
# whose end it has 9.92e-5.
MSN = {
    "optim.lr": 4e-3,
    "optim.min_lr": 3.97e-4,
    "optim.b2": 0.999,
    "optim.weight_decay": 0.04,
    "optim.clip": 3.0,
    "optim.warmup_epochs": 15.0,
    "optim.warmup_start": 0.2,
    "optim.ema": 0.984,
}
# 256 images: 0.999.
DENSECL = {
    **RESNET,
    "optim.warmup_epochs": 0.0,
    "optim.ema": 0.984,
    "optim.ema_schedule": "constant",
}
# 2,048 images: 1e-3 from 2e-4, down to 1e-6, and 0.996.
IJEPA = {
    "optim.lr": 2e-3,
    "optim.b2": 0.999,
    "optim.min_lr": 2e-6,
    "optim.warmup_epochs": 40.0,
    "optim.warmup_start": 0.2,
    "optim.ema": 0.992,
    "optim.weight_decay": 0.04,
    "optim.decayed": "ranks",
    "optim.clip": 0.0,
}
# 4,096 images.
SIAMESE_IM = {
    "optim.lr": 1e-3,
    "optim.b2": 0.95,
    "optim.ema": 0.995,
    "optim.weight_decay": 0.05,
    "optim.decayed": "ranks",
    "optim.clip": 1.0,
}
# LAMB, whose rate is not AdamW's.
DEIT = {
    "optim.b2": 0.999,
    "optim.weight_decay": 0.05,
    "optim.warmup_epochs": 5.0,
}
# 16,384 images. Its cosine to 0 is cut at 0.8 of its length.
CAPI = {
    "optim.lr": 1e-3,
    "optim.min_lr": 9.549e-5,
    "optim.clip": 0.0,
    "optim.weight_decay": 0.1,
    "optim.ema": 0.999,
    "optim.warmup_epochs": 5.77,
}
# The README's for any batch; warm-up, b2 and what decays of the minimal example.
LEJEPA = {
    "optim.decayed": "all",
    "optim.lr": 5e-4,
    "optim.min_lr": 5e-7,
    "optim.b2": 0.999,
    "optim.weight_decay": 0.05,
    "optim.warmup_epochs": 1.0,
    "optim.warmup_start": 0.01,
    "optim.clip": 0.0,
}
# The 7 B run before its Gram stage: 4e-4 and 0.994 at 4,096 images.
DINOV3 = {
    "optim.schedule": "constant",
    "optim.lr": 4e-4,
    "optim.b2": 0.99,
    "optim.weight_decay": 0.04,
    "optim.clip": 30.0,
    "optim.layer_decay": 0.98,
    "optim.ema": 0.994,
    "optim.ema_schedule": "constant",
}
