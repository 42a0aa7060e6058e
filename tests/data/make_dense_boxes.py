"""Writes dense/boxes.npz: what torchvision makes of a few random boxes, for the tests of
objective/boxes.py and objective/assignment.py. Run it once, with torch and torchvision installed;
the tests need only the file.

    python -m tests.data.make_dense_boxes
"""

import pathlib

import numpy as np

PLACE = pathlib.Path(__file__).with_name("dense") / "boxes.npz"
THRESHOLDS = (0.3, 0.5, 0.7)
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def random_boxes(rng: np.random.Generator, number: int, side: float = 64.0) -> np.ndarray:
    """float32 [number, 4], some of them equal, some of no area."""
    place = rng.uniform(0, side, (number, 2))
    size = rng.uniform(0.5, side / 2, (number, 2))
    boxes = np.concatenate([place, place + size], 1).astype(np.float32)
    boxes[number // 2] = boxes[0]
    boxes[number // 3, 2:] = boxes[number // 3, :2]
    return boxes


def grid_boxes(rng: np.random.Generator, number: int) -> np.ndarray:
    """float32 [number, 4] with whole sides, so that many overlaps are equal, or 1/2."""
    place, size = rng.integers(0, 5, (number, 2)), rng.integers(1, 5, (number, 2))
    return np.concatenate([place, place + size], 1).astype(np.float32)


def crowded_boxes(rng: np.random.Generator, number: int) -> np.ndarray:
    """float32 [number, 4] around ten places, so that suppression chains."""
    boxes = random_boxes(rng, 10)[rng.integers(0, 10, number)]
    return (boxes + rng.normal(0, 3, (number, 4)).astype(np.float32)).astype(np.float32)


def main() -> None:
    import torch
    import torchvision
    from torchvision import ops
    from torchvision.models.detection._utils import BoxCoder, Matcher

    rng = np.random.default_rng(25)
    made: dict[str, np.ndarray] = {"version": np.array(torchvision.__version__)}
    made["a"], made["b"] = random_boxes(rng, 13), random_boxes(rng, 48)
    a, b = torch.from_numpy(made["a"]), torch.from_numpy(made["b"])
    made["area"] = ops.box_area(b).numpy()
    made["iou"] = ops.box_iou(a, b).numpy()
    made["giou"] = ops.generalized_box_iou(a, b).numpy()

    # loss and gradient of generalised IoU of pairs, without those of no area
    pairs = torch.from_numpy(np.delete(made["b"], 16, 0)[:40]).requires_grad_()
    goals = torch.from_numpy(random_boxes(rng, 40)).requires_grad_()
    ops.generalized_box_iou_loss(pairs, goals, reduction="sum", eps=0.0).backward()
    made["pairs"], made["goals"] = pairs.detach().numpy(), goals.detach().numpy()
    made["pairs/gradient"], made["goals/gradient"] = pairs.grad.numpy(), goals.grad.numpy()

    starts = torch.from_numpy(random_boxes(rng, 40)) + torch.tensor([0.0, 0.0, 1.0, 1.0])
    made["starts"] = starts.numpy()
    for name, weights in (("one", (1.0, 1.0, 1.0, 1.0)), ("head", WEIGHTS)):
        coder = BoxCoder(weights)
        made[f"encoded/{name}"] = coder.encode_single(pairs.detach(), starts).numpy()
        deltas = torch.from_numpy(rng.normal(0, 3, (40, 4)).astype(np.float32))
        made[f"deltas/{name}"] = deltas.numpy()
        made[f"decoded/{name}"] = coder.decode_single(deltas, starts).numpy()
    made["clipped"] = ops.clip_boxes_to_image(b - 10, (40, 56)).numpy()

    for name, boxes, levels in (
        ("random", random_boxes(rng, 200), 1000),
        ("crowded", crowded_boxes(rng, 200), 1000),
        ("ties", grid_boxes(rng, 200), 7),
    ):
        scores = (rng.integers(0, levels, 200) / levels).astype(np.float32)
        groups = rng.integers(0, 3, 200)
        made[f"nms/{name}/boxes"], made[f"nms/{name}/scores"] = boxes, scores
        made[f"nms/{name}/groups"] = groups
        for threshold in THRESHOLDS:
            keep, grouped = np.zeros((2, 200), bool)
            every = torch.arange(200)
            keep[_nms(ops, boxes, scores, every, threshold)] = True
            for group in range(3):
                members = torch.from_numpy(np.flatnonzero(groups == group))
                grouped[_nms(ops, boxes, scores, members, threshold)] = True
            made[f"nms/{name}/{threshold}"] = keep
            made[f"nms/{name}/{threshold}/grouped"] = grouped

    # overlaps on a coarse grid have many equal bests
    objects = np.concatenate([grid_boxes(rng, 9), [[90, 90, 95, 95]]]).astype(np.float32)
    priors = grid_boxes(rng, 300)
    for name, (objects_Mx4, priors_Nx4) in {
        "ties": (objects[:9], priors),
        "alone": (objects, priors),
        "random": (random_boxes(rng, 11)[[0, 1, 2, 4, 5, 6, 7]], random_boxes(rng, 300)),
    }.items():
        made[f"match/{name}/objects"], made[f"match/{name}/priors"] = objects_Mx4, priors_Nx4
        overlap = ops.box_iou(torch.from_numpy(objects_Mx4), torch.from_numpy(priors_Nx4))
        overlap = torch.nan_to_num(overlap)  # of two boxes of no area
        for kind, arguments in (("rpn", (0.7, 0.3, True)), ("head", (0.5, 0.5, False))):
            made[f"match/{name}/{kind}"] = Matcher(*arguments)(overlap).numpy()
        made[f"match/{name}/index"] = overlap.max(0)[1].numpy()
    PLACE.parent.mkdir(exist_ok=True)
    np.savez_compressed(PLACE, **made)  # type: ignore[arg-type]
    print(f"{PLACE}: {PLACE.stat().st_size:,} bytes")


def _nms(
    ops: object, boxes: np.ndarray, scores: np.ndarray, members: object, threshold: float
) -> np.ndarray:
    """Indices that stay of the members alone."""
    import torch

    kept = ops.nms(  # type: ignore[attr-defined]
        torch.from_numpy(boxes)[members], torch.from_numpy(scores)[members], threshold
    )
    return members[kept].numpy()  # type: ignore[index]


if __name__ == "__main__":
    main()
