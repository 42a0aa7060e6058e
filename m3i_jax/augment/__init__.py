"""Augmentation on the device: photometric changes, random erasing, mixup and CutMix."""
