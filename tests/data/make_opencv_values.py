"""Makes tests/data/dense/opencv.npz: values of OpenCV, which the tests themselves do not need.

    python tests/data/make_opencv_values.py

`image` and `resized_F`: INTER_LINEAR of a factor F, sides rounded half up."""

import pathlib

import cv2
import numpy as np

FOLDER = pathlib.Path(__file__).parent / "dense"


def resized() -> dict[str, np.ndarray]:
    """An image of noise, and its resized versions."""
    image = np.random.default_rng(3).integers(0, 256, (37, 54, 3)).astype(np.uint8)
    arrays = {"image": image}
    for factor in (0.5, 0.63, 0.9, 1.7):
        height, width = (int(side * factor + 0.5) for side in image.shape[:2])
        arrays[f"resized_{factor}"] = cv2.resize(
            image, (width, height), interpolation=cv2.INTER_LINEAR
        )
    return arrays


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / "opencv.npz", **resized())
