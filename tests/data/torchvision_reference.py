"""Writes torchvision.npz: what torchvision makes of two small images, for the test of the
operations that run on the device and of the crops. Run it once, with torch and torchvision
installed (pip install torch torchvision); the tests need only the file.

    python -m tests.data.torchvision_reference
"""

import pathlib

import numpy as np

PLACE = pathlib.Path(__file__).with_name("torchvision.npz")
SIDE, CROP = 32, 20
FACTORS = {
    "brightness": (0.6, 1.4),
    "contrast": (0.6, 1.4),
    "saturation": (0.6, 1.2),
    "hue": (-0.1, 0.06),
}
SIGMAS = (0.5, 1.0, 2.0)
BOXES = ((0, 0, 32, 32), (5, 9, 26, 15), (20, 3, 10, 16))  # top, left, height, width


def images() -> np.ndarray:
    """uint8 [2, SIDE, SIDE, 3]: a smooth one and one with edges."""
    rng = np.random.default_rng(4)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    waves = [np.sin(2 * np.pi * (a * x + b * y) + c) for a, b, c in rng.uniform(0.3, 1.6, (6, 3))]
    smooth = 127.5 + 80 * np.stack(
        [waves[0] + 0.5 * waves[3], waves[1] + 0.5 * waves[4], waves[2] + 0.5 * waves[5]], -1
    )
    edges = smooth[:, ::-1].copy()
    edges[6:20, 9:27] = 255 - edges[6:20, 9:27]
    return np.clip(np.stack([smooth, edges]) + rng.normal(0, 3, (2, SIDE, SIDE, 3)), 0, 255).astype(
        np.uint8
    )


def main() -> None:
    import torch
    import torchvision
    from PIL import Image
    from torchvision.transforms import InterpolationMode, functional

    made: dict[str, np.ndarray] = {
        "pictures": images(),
        "version": np.array(torchvision.__version__),
    }
    for name, factors in FACTORS.items():
        operation = getattr(functional, f"adjust_{name}")
        for kind in ("pillow", "tensor"):
            made[f"{name}/{kind}"] = np.stack(
                [
                    [_apply(operation, p, kind, factor) for p in made["pictures"]]
                    for factor in factors
                ]
            )
    for kind in ("pillow", "tensor"):
        made[f"grayscale/{kind}"] = np.stack(
            [_apply(functional.rgb_to_grayscale, p, kind, 3) for p in made["pictures"]]
        )
        made[f"solarize/{kind}"] = np.stack(
            [_apply(functional.solarize, p, kind, 128) for p in made["pictures"]]
        )
    # On floats: on 8 bits it would be the rounding that is compared.
    floats = torch.from_numpy(made["pictures"]).permute(0, 3, 1, 2) / 255
    blurred = [
        functional.gaussian_blur(floats, [23, 23], [s, s]).permute(0, 2, 3, 1).numpy()
        for s in SIGMAS
    ]
    made["blur/tensor"] = np.stack(blurred).astype(np.float16)
    for kind in ("pillow", "tensor"):
        cuts = []
        for top, left, height, width in BOXES:
            for image in made["pictures"]:
                image = (
                    Image.fromarray(image)
                    if kind == "pillow"
                    else torch.from_numpy(image).permute(2, 0, 1)
                )
                cut = functional.resized_crop(
                    image,
                    top,
                    left,
                    height,
                    width,
                    [CROP, CROP],
                    InterpolationMode.BICUBIC,
                    antialias=True,
                )
                cuts.append(np.asarray(cut) if kind == "pillow" else cut.permute(1, 2, 0).numpy())
        made[f"crop/{kind}"] = np.stack(cuts).reshape(len(BOXES), 2, CROP, CROP, 3)
    made["normalize/tensor"] = (
        functional.normalize(floats, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        .permute(0, 2, 3, 1)
        .numpy()
    )
    np.savez_compressed(PLACE, **made)  # type: ignore[arg-type]
    print(f"{PLACE}: {PLACE.stat().st_size:,} bytes")


def _apply(operation: object, image: np.ndarray, kind: str, argument: float) -> np.ndarray:
    import torch
    from PIL import Image

    if kind == "pillow":
        return np.asarray(operation(Image.fromarray(image), argument))  # type: ignore[operator]
    return operation(torch.from_numpy(image).permute(2, 0, 1), argument).permute(1, 2, 0).numpy()  # type: ignore[operator]


if __name__ == "__main__":
    main()
