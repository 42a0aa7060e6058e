"""Makes tests/data/dense/opencv.npz: values of OpenCV, which the tests themselves do not need.

    python tests/data/make_opencv_values.py

`image` and `resized_F`: INTER_LINEAR of a factor F, sides rounded half up. `rgb`, `hsv`, `back`:
pixels, their 8-bit HSV, and what that becomes again (rows are long enough for vector instructions).
`choices` (active x 4, contrast first, brightness, contrast, saturation, hue) and `distorted`:
`scene` after mmsegmentation's photometric distortion with those choices instead of random ones."""

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


def converted() -> dict[str, np.ndarray]:
    """Pixels to HSV and back."""
    rng = np.random.default_rng(4)
    rgb = rng.integers(0, 256, (4096, 3)).astype(np.uint8)
    rgb[:256] = np.arange(256)[:, None]
    rgb[256:512, rng.integers(0, 3, 256)] = 0
    hsv = cv2.cvtColor(rgb[None], cv2.COLOR_RGB2HSV)
    return {"rgb": rgb, "hsv": hsv[0], "back": cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0]}


def convert(image: np.ndarray, alpha: float = 1, beta: float = 0) -> np.ndarray:
    """Scales and shifts as mmsegmentation does."""
    return np.clip(image.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)


def distorted() -> dict[str, np.ndarray]:
    """A small scene with chosen changes of colour."""
    rng = np.random.default_rng(5)
    scene = cv2.GaussianBlur(rng.integers(0, 256, (4, 64, 3)).astype(np.uint8), (0, 0), 1)
    choices = []
    for number in range(32):
        active = [number >> i & 1 for i in range(5)]
        brightness, contrast = rng.uniform(-32, 32), rng.uniform(0.5, 1.5)
        saturation, hue = rng.uniform(0.5, 1.5), rng.integers(-18, 18)
        choices.append([*active, brightness, contrast, saturation, hue])
    results = []
    for row in choices:
        brighten, change, saturate, turn, first, beta, contrast, saturation, hue = row
        image = scene[..., ::-1]  # BGR
        if brighten:
            image = convert(image, beta=beta)
        if change and first:
            image = convert(image, alpha=contrast)
        if saturate:
            hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
            hsv[..., 1] = convert(hsv[..., 1], alpha=saturation)
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
        if turn:
            hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
            hsv[..., 0] = (hsv[..., 0].astype(int) + int(hue)) % 180
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
        if change and not first:
            image = convert(image, alpha=contrast)
        results.append(image[..., ::-1])
    return {"scene": scene, "choices": np.array(choices), "distorted": np.array(results)}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / "opencv.npz", **resized(), **converted(), **distorted())
