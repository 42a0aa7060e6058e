"""Metadata, requirements and contents of the package. The core (install_requires) has the losses
and the encoders; the extra `train` has the program, which trains and evaluates, and every other
extra brings it.

A wheel also has configs/ and launch/, as m3i_jax/configs and m3i_jax/launch; an sdist has the whole
project. An editable installation uses the folders where they are.
"""

import pathlib
import re
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'__version__ = "([^"]+)"', (ROOT / "m3i_jax" / "version.py").read_text()
).group(1)
README = ROOT / "README.md"

# Folders beside the package that a wheel has inside it.
INSIDE = ("configs", "launch")
# Scripts of launch/ that need the tests.
DEVELOPMENT = ("bench.sh", "faults.sh", "soak.sh", "test.sh")
# The rest of the project, for the sdist.
BESIDE = (
    "tests",
    ".ci",
    ".github",
    ".gitignore",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CITATION.cff",
    "requirements.txt",
)

CORE = [
    # jax 0.10 is the last series for Python 3.11; from 3.12 on, the newest is used.
    'jax>=0.10.2,<0.11; python_version < "3.12"',
    'jax>=0.12; python_version >= "3.12"',
    "chex>=0.1.92",
    "flax>=0.12.8",
    "numpy>=2.2",
    "optax>=0.2.8",
]
TRAIN = [
    "absl-py>=2.3",
    "clu>=0.0.12",
    "ftfy>=6.3",
    "grain>=0.2.18",
    "ml_collections>=1.1",
    "ml_dtypes>=0.5",
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
    "arrow": ["pyarrow>=18"],  # keep-lists
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
    "neighbours": ["faiss-cpu>=1.10"],  # --mode=curate with the features of many images
    "ray": ["pyarrow>=18", "ray>=2.40"],  # --mode=curate --engine=ray
    "tensorboard": ["tensorboardX>=2.6.4"],
    "tfds": ["tensorflow-datasets>=4.9.10", "array_record>=0.8.3"],
    # Reads PyTorch's file format; timm and Transformers check exported weights.
    "torch": ["timm>=1.0.20", "torch>=2.10", "transformers>=4.57"],
    "wandb": ["wandb>=0.20"],
    "test": [
        "hypothesis>=6.150",  # the fuzzer, python -m tests.faults.fuzz
        "jsonschema>=4.23",  # the manifests of launch/
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
    EXTRAS["arrow"]
    + EXTRAS["dense"]
    + EXTRAS["export"]
    + EXTRAS["fast"]
    + EXTRAS["hub"]
    + EXTRAS["huggingface"]
    + EXTRAS["tfds"]
)
# Every extra is one of the program, so none leaves it incomplete.
EXTRAS = {"train": TRAIN} | {name: TRAIN + lines for name, lines in EXTRAS.items()}


def files_below(*names: str) -> list[str]:
    """Paths of files, and of those in folders, relative to the project."""
    found = []
    for path in (ROOT / name for name in names):
        found += [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [
        path.relative_to(ROOT).as_posix()
        for path in found
        if "__pycache__" not in path.parts and path.name != "RESULTS.json"
    ]


class BuildPackage(build_py):
    """Copies the folders INSIDE into the package, except for an editable installation."""

    def copied(self) -> dict[str, str]:
        if self.editable_mode:
            return {}
        package = pathlib.Path(self.build_lib) / "m3i_jax"
        return {
            str(package / name): name
            for name in files_below(*INSIDE)
            if pathlib.PurePosixPath(name).name not in DEVELOPMENT
        }

    def run(self) -> None:
        super().run()
        for target, source in self.copied().items():
            pathlib.Path(target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *self.copied()]

    def get_source_files(self) -> list[str]:
        """What an sdist has, so that the tests run in an unpacked one."""
        guides = [path.relative_to(ROOT).as_posix() for path in (ROOT / "m3i_jax").rglob("*.md")]
        return [*super().get_source_files(), *files_below(*INSIDE, *BESIDE), *sorted(guides)]


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
    package_data={"m3i_jax": ["py.typed", "*.pyi"]},
    cmdclass={"build_py": BuildPackage},
    entry_points={"console_scripts": ["m3i-jax = m3i_jax.__main__:run_command"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    keywords="jax flax pre-training self-supervised vision-transformer mutual-information",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Typing :: Typed",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
