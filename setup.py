"""Metadata and requirements of the package. The core (install_requires) trains and evaluates on a
CPU; everything else is an extra."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'__version__ = "([^"]+)"', (ROOT / "m3i_jax" / "version.py").read_text()
).group(1)
README = ROOT / "README.md"

CORE = [
    # jax 0.10 is the last series for Python 3.11; from 3.12 on, the newest is used.
    'jax>=0.10.2,<0.11; python_version < "3.12"',
    'jax>=0.12; python_version >= "3.12"',
    "absl-py>=2.3",
    "chex>=0.1.92",
    "clu>=0.0.12",
    "flax>=0.12.8",
    "ftfy>=6.3",
    "grain>=0.2.18",
    "ml_collections>=1.1",
    "ml_dtypes>=0.5",
    "numpy>=2.2",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "Pillow>=12.0",
    "tensorstore>=0.1.80",
    "tokenizers>=0.22",
    "tqdm>=4.66",
    "xxhash>=3.5",
]


def accelerated(extra: str) -> list[str]:
    """The two jax requirements with one of jax's extras."""
    return [line.replace("jax", f"jax[{extra}]", 1) for line in CORE[:2]]


EXTRAS = {
    # Peers of the benchmarks under tests/bench; without a GPU, use torch's CPU build.
    "bench": ["tensorflow-cpu>=2.20", "timm>=1.0.20", "torch>=2.10", "torchvision>=0.25"],
    "cuda": accelerated("cuda12"),
    "cuda13": accelerated("cuda13"),
    "tpu": accelerated("tpu"),
    # Evaluation of detection: COCO (BSD), LVIS (Apache-2.0).
    "dense": ["faster-coco-eval>=1.8.0", "pycocotools>=2.0.11"],
    "export": ["flatbuffers>=24.3"],  # --mode=export --format=stablehlo
    "fast": ["cykooz-resizer>=4.0.1", "simplejpeg>=1.9"],
    "gcs": ["fsspec>=2025.1", "gcsfs>=2025.1"],
    "hub": ["huggingface_hub>=1.0"],  # m3i_jax.load("hf://OWNER/NAME")
    "huggingface": ["datasets>=4.0"],
    "maps": ["scikit-learn>=1.7"],
    "tensorboard": ["tensorboardX>=2.6.4"],
    "tfds": ["tensorflow-datasets>=4.9.10", "array_record>=0.8.3"],
    # Reads PyTorch's file format; timm and Transformers check exported weights.
    "torch": ["timm>=1.0.20", "torch>=2.10", "transformers>=4.57"],
    "wandb": ["wandb>=0.20"],
    "test": [
        "hypothesis>=6.150",  # the fuzzer, python -m tests.faults.fuzz
        "mypy>=2.0",
        "packaging>=24",
        "pytest>=9.0",
        "pytest-xdist>=3.8",
        "ruff>=0.15",
        "scipy>=1.15",
        "setuptools>=77",
        "tensorboardX>=2.6.4",
    ],
}
EXTRAS["bench"] += EXTRAS["fast"]  # used by the benchmark of the input pipeline
# These are small; without them, their tests would always be skipped.
EXTRAS["test"] += (
    EXTRAS["dense"]
    + EXTRAS["export"]
    + EXTRAS["fast"]
    + EXTRAS["hub"]
    + EXTRAS["huggingface"]
    + EXTRAS["tfds"]
)

setup(
    name="m3i-jax",
    version=VERSION,
    description=(
        "M3I Pre-training (CVPR 2023) in JAX: one stage, one input, category, text and dense"
        " self-supervised targets together."
    ),
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["m3i_jax", "m3i_jax.*"]),
    install_requires=CORE,
    extras_require=EXTRAS,
    keywords="jax flax pre-training self-supervised vision-transformer mutual-information",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
