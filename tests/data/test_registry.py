"""The registry of sources, and a source from outside the package: a class, a call that registers
it, and this test of it. No file of the package knows it."""

import ast
import graphlib
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
import pytest

import m3i_jax
from m3i_jax import config as configuration
from m3i_jax import parallel, schema
from m3i_jax.data import pipeline, splits
from m3i_jax.data.sources import mixture, registry
from m3i_jax.data.sources.base import Record
from m3i_jax.data.sources.shapes import ShapesSource
from m3i_jax.errors import UserError
from m3i_jax.training import trainer
from tests import toy

PACKAGE = pathlib.Path(m3i_jax.__file__).parent


SHAPES = ShapesSource(12)


class GradientSource:
    """Images of horizontal and vertical gradients; `path` is a file that holds their number."""

    name, classes, captions = "gradients", ("horizontal", "vertical"), False

    def __init__(self, path: str) -> None:
        self.size = int(pathlib.Path(path).read_text())

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> Record:
        ramp = np.linspace(index % 50, 255, 48).astype(np.uint8)
        ramp_HxW = np.broadcast_to(ramp if index % 2 else ramp[:, None], (48, 48))
        return Record(f"{index:06d}", np.stack([ramp_HxW] * 3, -1), 1 - index % 2)

    def fingerprint(self) -> str:
        return f"gradients-{self.size}"

    def description(self) -> str:
        return f"{self.size} gradients"


@pytest.fixture
def gradients(tmp_path: pathlib.Path) -> Iterator[str]:
    """Registers the source; the path of a file that it opens."""
    (tmp_path / "count.txt").write_text("40")
    with registry.SOURCE_KINDS.temporary():
        registry.register_source(
            registry.SourceKind(
                name="gradients",
                open=lambda path, split, data, cache: GradientSource(path),
                path="a file that holds a number",
            )
        )
        yield str(tmp_path / "count.txt")
    assert "gradients" not in schema.SOURCES


def test_a_registered_source_trains_a_step(gradients: str) -> None:
    config = toy.settings(
        data__source="gradients",
        data__path=gradients,
        data__classes=2,
        data__captions="no",
        data__holdout=0.2,
        data__threads=0,
        model__encoder__depth=1,
        objective__forms="supervised",
    )
    train, held_out = splits.open_splits(config.data)
    assert len(train) + len(held_out) == 40 and 0 < len(held_out) < 20
    batches = pipeline.iterate_batches(config, train, None, start=0)
    try:
        first = next(batches)
    finally:
        batches.close()
    assert set(np.unique(first["label"])) == {0, 1}
    mesh = parallel.make_mesh((1, 1, 1), jax.devices()[:1])
    one = trainer.Trainer(config, mesh, toy.VOCABULARY)
    _, metrics = one.step(one.init(), first)
    assert np.isfinite(float(metrics["loss"])) and float(metrics["loss/category"]) > 0


def test_a_registered_source_in_a_mixture(gradients: str) -> None:
    data = schema.Data(
        source="mixture", mixture=(f"gradients:{gradients}=1", "shapes:80=3"), captions="no"
    )
    source = splits.open_source(data)
    assert len(source) == 120 and source.classes[:3] == ("horizontal", "vertical", "circle")


def test_settings_that_a_registered_source_does_not_read(gradients: str) -> None:
    data = schema.Data(source="gradients", path=gradients)
    refused = mixture.unread(data, counted=True)
    assert {"data.directory", "data.class_names", "data.size"} <= set(refused)
    with pytest.raises(UserError, match="data.path is empty.*: give a file that holds a number"):
        splits.open_source(schema.Data(source="gradients"))
    with pytest.raises(UserError, match="'names.txt' is not read by data.source='gradients'"):
        splits.open_source(schema.Data(source="gradients", path=gradients, class_names="names.txt"))


def test_a_registered_source_without_splits_refuses_them() -> None:
    """It would be trained on as a whole, under the name of a part; without a path, too."""
    with registry.SOURCE_KINDS.temporary():
        registry.register_source(
            registry.SourceKind(
                name="bare", splits=False, open=lambda path, split, data, cache: SHAPES
            )
        )
        assert splits.open_source(schema.Data(source="bare")) is SHAPES
        mixed = schema.Data(source="mixture", mixture=("bare:", "bare:=size"))
        assert len(splits.open_source(mixed)) == 2 * len(SHAPES)
        for data, name in (
            (schema.Data(source="bare", split="train"), "train"),
            (schema.Data(source="bare", holdout_split="val"), "val"),
            (schema.Data(source="mixture", mixture=("bare:x@train",)), "train"),
            (schema.Data(source="mixture", mixture=("bare:@|val",)), "val"),
        ):
            with pytest.raises(UserError, match=f"'bare' has no splits, and '{name}' names one"):
                splits.open_splits(data)


def test_unregistered_names_are_refused() -> None:
    assert "gradients" not in registry.source_names()
    with pytest.raises(
        UserError, match="config.data.source: 'gradients' is not one of shapes, folder"
    ):
        toy.settings(data__source="gradients")
    with pytest.raises(UserError, match="data.source='gradients' is not a source: use 'shapes'"):
        registry.source_kind("gradients")


@pytest.mark.parametrize("name", ["mixture", "folder", "a:b", ""])
def test_names_that_cannot_be_registered(name: str) -> None:
    kind = registry.SourceKind(name=name, open=lambda path, split, data, cache: path)
    with pytest.raises(ValueError, match="a source cannot be named"):
        registry.register_source(kind)


def test_a_configuration_file_registers_a_source(tmp_path: pathlib.Path, gradients: str) -> None:
    """Twice, as a file that is read again does."""
    (tmp_path / "config.py").write_text(
        "from m3i_jax.config import default_config\n"
        "from m3i_jax.data.sources.registry import SourceKind, register_source\n"
        "def open_source(path, split, data, cache):\n"
        "    raise NotImplementedError\n"
        "def get_config():\n"
        "    register_source(SourceKind(name='gradients', open=open_source))\n"
        "    config = default_config()\n"
        "    config.data.source = 'gradients'\n"
        "    return config\n"
    )
    config = configuration.load_config(str(tmp_path / "config.py"))
    assert configuration.resolve(config).data.source == "gradients"


@pytest.mark.parametrize("name", registry.source_names())
def test_every_kind_of_this_package_is_registered_by_its_file(name: str) -> None:
    kind = registry.source_kind(name)
    assert kind.name == name and kind.open.__module__ == f"m3i_jax.data.sources.{name}"
    assert set(kind.reads) <= set(schema.Data.__dataclass_fields__)


def imports(file: pathlib.Path) -> Iterator[str]:
    """Modules of the package that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                path = PACKAGE.parent / (name.replace(".", "/") + ".py")
                yield name if path.exists() else node.module


def test_no_import_circle() -> None:
    graph: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        graph[name] = set(imports(file)) - {name}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError shows the circle
