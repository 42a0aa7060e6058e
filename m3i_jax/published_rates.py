"""How named methods were published to be optimized, as settings: rates, decay, clipping, warm-up,
and the momentum of EMA targets.

Rates and momentum are those at 4,096 images a step, linear in the batch as `config.rescale` has
them, so that the batch of the publication, which a comment names, gets what was published.
"""

# DINO and its successors, 1,024 images: 0.996.
DINO = {
    "optim.freeze_prototypes": 0.01,  # an epoch of 100
    "optim.ema": 0.984,
    "optim.b2": 0.999,
    "optim.clip": 3.0,
    "optim.weight_decay": 0.04,
    "optim.min_lr": 1e-6,
    "optim.warmup_epochs": 10.0,
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
MAE = {"optim.lr": 2.4e-3, "optim.weight_decay": 0.05, "optim.clip": 0.0}
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
# 1,024 images: 1e-3, from 2e-4 and down to 1e-6, and 0.996.
MSN = {
    "optim.lr": 4e-3,
    "optim.min_lr": 4e-6,
    "optim.b2": 0.999,
    "optim.weight_decay": 0.04,
    "optim.clip": 3.0,
    "optim.warmup_epochs": 15.0,
    "optim.warmup_start": 0.2,
    "optim.ema": 0.984,
}
# 256 images: 0.999. It has SGD.
DENSECL = {"optim.ema": 0.984, "optim.ema_schedule": "constant"}
