"""Writes dense/losses.npz: values and gradients of the losses of segmentation and detection from
torch and torchvision, for the tests of objective/dense_losses.py. Run it once, with torch and
torchvision installed; the tests need only the file.

    python -m tests.data.make_dense_losses
"""

import pathlib
from collections.abc import Callable

import numpy as np

PLACE = pathlib.Path(__file__).with_name("dense") / "losses.npz"
FOCAL = {"default": (0.25, 2.0), "plain": (-1.0, 0.0), "other": (0.6, 1.5)}


def main() -> None:
    import torch
    import torchvision
    from torch.nn import functional

    rng = np.random.default_rng(26)
    made: dict[str, np.ndarray] = {"version": np.array(torchvision.__version__)}

    def keep(name: str, logits: np.ndarray, loss: Callable) -> None:
        """Value and gradient of a loss at some logits."""
        x = torch.from_numpy(logits).requires_grad_()
        value = loss(x)
        value.backward()
        made[f"{name}/value"], made[f"{name}/gradient"] = value.detach().numpy(), x.grad.numpy()

    # pixels: logits [B, H, W, K], a third of them ignored
    made["pixel/logits"] = logits = rng.normal(0, 4, (2, 5, 6, 7)).astype(np.float32)
    labels = rng.integers(0, 7, (2, 5, 6))
    labels[rng.random(labels.shape) < 0.3] = 255
    made["pixel/labels"] = labels.astype(np.uint8)
    keep(
        "pixel",
        logits,
        lambda x: functional.cross_entropy(
            x.permute(0, 3, 1, 2), torch.from_numpy(labels), ignore_index=255, reduction="sum"
        ),
    )

    # yes or no per element, some of them sure; soft targets for cross-entropy, hard for the others
    made["elements/logits"] = logits = rng.normal(0, 6, (9, 11)).astype(np.float32)
    made["elements/soft"] = soft = rng.random((9, 11)).astype(np.float32)
    made["elements/hard"] = hard = (soft > 0.7).astype(np.float32)
    keep(
        "binary",
        logits,
        lambda x: functional.binary_cross_entropy_with_logits(
            x, torch.from_numpy(soft), reduction="sum"
        ),
    )
    for name, (alpha, gamma) in FOCAL.items():
        keep(
            f"focal/{name}",
            logits,
            lambda x, a=alpha, g=gamma: torchvision.ops.sigmoid_focal_loss(
                x, torch.from_numpy(hard), alpha=a, gamma=g, reduction="sum"
            ),
        )

    def dice(x):
        p, t = x.sigmoid(), torch.from_numpy(hard)
        return (1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)).sum()

    keep("dice", logits, dice)

    # federated: 20 regions of 4 categories and background, 7 other categories kept
    made["federated/logits"] = logits = rng.normal(0, 3, (20, 30)).astype(np.float32)
    made["federated/classes"] = classes = rng.choice([2, 5, 11, 29, 30], 20)
    kept = np.unique(classes[classes < 30])
    kept = np.concatenate([kept, rng.choice(np.setdiff1d(np.arange(30), kept), 7, replace=False)])
    made["federated/kept"] = np.isin(np.arange(30), kept)

    def federated(x):
        target = functional.one_hot(torch.from_numpy(classes), 31)[:, :30].float()
        cost = functional.binary_cross_entropy_with_logits(x, target, reduction="none")
        return (cost * torch.from_numpy(made["federated/kept"])).sum()

    keep("federated", logits, federated)
    PLACE.parent.mkdir(exist_ok=True)
    np.savez_compressed(PLACE, **made)  # type: ignore[arg-type]
    print(f"{PLACE}: {PLACE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
