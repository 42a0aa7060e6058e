"""Weights of another run or another project under this package's parameter paths. `init_from`,
loading and export read from them: both kinds of source are {path: shape}, so that a subset of the
weights is a subset of paths."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from m3i_jax import config as configuration
from m3i_jax import parallel, run_files, schema
from m3i_jax.errors import MissingWeights, UserError, path_exists
from m3i_jax.interop import (
    dense_weights,
    published_dense,
    sidecar_configs,
    tensor_files,
    vit_weights,
)
from m3i_jax.models import backbones, composite
from m3i_jax.parallel import distributed
from m3i_jax.parallel.sharding import path_text
from m3i_jax.training import checkpoint_dir, schedule_free
from m3i_jax.training.saved_arrays import ExportedArrays, RunWeights

RUNNING = published_dense.RUNNING  # of running statistics, in `shapes`
_STATISTICS = "opt/running/statistics/"  # those in the state of a run
_COPIES = tuple(f"encoder/{name}/" for name in composite.OWN_PARTS)
# heads of the published widths whose heads do not have 64 channels: SoViT-400m, ViT-H, -g, -G,
# SigLIP 2's giant
_OTHER_HEADS = dict.fromkeys((1152, 1280, 1408, 1536, 1664), 16)
CLASSES = "classes.json"  # names of the categories of a run


@dataclasses.dataclass
class WeightSource:
    """Weights of a run or a file.

    Attributes:
      name: of the source, for messages.
      shapes: {path: shape} of the arrays that have a path of this package, without a fixed position
        table; with batch norms, running statistics too, below `running/`.
      read: {path: sharding or None} -> {path: array}; None: as numpy.
      settings: of `model.encoder` and the pixels (mean, std, image_size), as far as the source has
        them; `view_size`, where its images have another size than its position table is of; of an
        InternImage also `backbone`, `scan` and `intern_image` of `model`, and of a file
        its `preset`; of a file with a detector or segmenter `detect` or `segment`, and `maps`, of
        `dense`, `classes`, `dense_size`, the side of its images, and `geometry`.
      unused: {name: count} of arrays that have no such path.
      notes: what was changed while reading.
      classes: names of the categories that its heads predict, of a run of a dense task; else None.
      foreign: why an encoder of this package with its arrays computes something else; "" if not.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    settings: dict[str, Any]
    unused: dict[str, int]
    notes: list[str]
    classes: tuple[str, ...] | None = None
    foreign: str = ""

    def require_own_encoder(self, where: str) -> None:
        """Raises UserError if an encoder of this package with the arrays computes something else
        than that of the file.

        Args:
          where: begins the message.
        """
        if self.foreign:
            raise UserError(
                f"{where}: {self.foreign}; m3i_jax can read its arrays, but not run it: give"
                " another encoder"
            )


def open_weights(
    location: str, *, weights: str = "online", key: str = "config.init_from"
) -> WeightSource:
    """Open the weights of a run or a file.

    Args:
      location: workdir, file, or Hugging Face directory.
      weights: online, or ema: the momentum copy; "": those that a run evaluates, and online for a
        file.
      key: flag or setting that gave the location, for messages.

    Raises:
      MissingWeights: the location does not exist.
      UserError: it cannot be read, the layout is unknown, or there is
        no momentum copy.
    """
    if not path_exists(location):
        raise MissingWeights(
            f"{key}: {location!r} does not exist; give the workdir of a run, or a file of weights"
            f" ({', '.join(tensor_files.ENDINGS[:4])})",
            location,
        )
    if checkpoint_dir.is_run(location):
        return _open_run(location, weights, key)
    if checkpoint_dir.is_export(location):
        return _open_export(location, weights, key)
    place = pathlib.Path(location).absolute()
    for checkpoints, step in ((place, ""), (place.parent, place.name)):
        if checkpoints.name != "checkpoints":
            continue  # else it may be a directory of files of weights that has this name
        steps = [str(number) for number in checkpoint_dir.complete_steps(checkpoints)]
        if step in steps or steps and not step:
            raise UserError(
                f"{key}: {location!r} holds checkpoints of a run, without its settings; give its"
                f" workdir, {str(checkpoints.parent)!r}, whose newest checkpoint is read"
            )
    try:
        table = tensor_files.read_tensors(location)
        dense = published_dense.load_published_dense(table) if weights != "ema" else None
        published = dense or vit_weights.load_vit(
            table, momentum=weights == "ema", config=sidecar_configs.read_sidecar_configs(location)
        )
        if published.layout == "detectron2" and dense_weights.has_mask_rcnn(table.shapes):
            _add_detector(published, table)
    except UserError as error:
        raise UserError(
            f"{key}: {error}" if location in str(error) else f"{key}: {location}: {error}"
        ) from error
    except Exception as error:  # arrays of a known name and another shape: name the file
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{key}: {location}: its arrays do not fit their names ({type(error).__name__}:"
            f" {reason}); check that the file is complete"
        ) from error

    def read(shardings: Mapping[str, Any]) -> dict[str, Any]:
        return {path: put_array(published.arrays[path], s) for path, s in shardings.items()}

    unused = published.unused | (
        {"of unknown names, such as " + published.unknown[0]: len(published.unknown)}
        if published.unknown
        else {}
    )
    foreign = published.foreign
    settings = {
        **backbones.recognize_weights(
            {
                path.removeprefix("encoder/"): array.shape
                for path, array in published.arrays.items()
                if path.startswith("encoder/") and not path.startswith(_COPIES)
            }
        ),
        **published.settings,
    }
    return WeightSource(
        f"{location} ({published.layout})",
        {p: a.shape for p, a in published.arrays.items()},
        read,
        settings,
        unused,
        published.notes + ([f"its features are others here: {foreign}"] if foreign else []),
        foreign=foreign,
    )


def open_on_all_hosts(
    location: str, *, weights: str = "online", key: str = "config.init_from"
) -> WeightSource:
    """`open_weights`, when a run starts: its hosts must read the same checkpoint, and a run that
    still trains may show them different newest ones. Also raises UserError: it does."""
    with parallel.fail_together(key):
        source = open_weights(location, weights=weights, key=key)
    distributed.assert_same_on_all_hosts(key, {key: source.name})
    return source


def _add_detector(published: vit_weights.PublishedWeights, table: tensor_files.TensorFile) -> None:
    """Adds pyramid and head of a Mask R-CNN, its settings, and those of its maps."""
    heads = dense_weights.load_mask_rcnn(table)
    for key, leaf in jax.tree_util.tree_leaves_with_path(heads):
        published.arrays[path_text(key)] = leaf
    for name in ("feature pyramid", "heads", "pixel statistics"):
        published.unused.pop(name, None)
    published.settings |= dense_weights.mask_rcnn_settings(table.shapes)
    sides = {
        int(path.split("/")[2].removeprefix("block")): (array.shape[0] + 1) // 2
        for path, array in published.arrays.items()
        if path.startswith("encoder/relative/") and path.endswith("/rows")
    }
    if sides:
        window, whole = min(sides.values()), max(sides.values())
        published.settings["maps"] = {
            "relative": "decomposed",
            "window": window if window < whole else 0,
            "global_blocks": tuple(b for b, side in sorted(sides.items()) if side == whole)
            if window < whole
            else (),
        }
        # the map of a global block is the whole input
        published.settings["dense_size"] = whole * published.settings["patch_size"]


def evaluated_weights(settings: schema.Config) -> str:
    """Returns which weights a run evaluates, online or ema, by its settings: those of an average
    that moves.

    >>> evaluated_weights(schema.Config(evaluate=schema.Evaluate(encoder="ema")))
    'ema'
    """
    return settings.evaluate.encoder if settings.optim.averages else "online"


def paths_in_state(run: RunWeights, weights: str, config: schema.Config) -> dict[str, str]:
    """{path: path in the state} of the parameters of a run; with weights=ema that of their average,
    where there is one. Raises UserError if the run has no average."""
    paths = {
        path.removeprefix("params/"): path for path in run.shapes if path.startswith("params/")
    }
    if weights != "ema":
        return paths
    average = {
        path.removeprefix("opt/target/params/"): path
        for path in run.shapes
        if path.startswith("opt/target/params/")
    }
    if not average or not config.optim.averages:
        why = f" (config.optim.ema={config.optim.ema:g})" if average else ""
        raise UserError(
            f"{run.key}: {run.workdir!r} has no momentum average{why}; use the online weights"
        )
    return paths | average


def _open_run(workdir: str, weights: str, key: str) -> WeightSource:
    run = RunWeights(workdir, key)
    config = configuration.resolve(configuration.load_from_workdir(workdir, key))
    weights = weights or evaluated_weights(config)
    paths = paths_in_state(run, weights, config) | {
        RUNNING + path.removeprefix(_STATISTICS): path
        for path in run.shapes
        if path.startswith(_STATISTICS)
    }

    def read(shardings: Mapping[str, Any]) -> dict[str, Any]:
        return read_trained(run, {path: (paths[path], at) for path, at in shardings.items()})

    name = f"{workdir} (step {run.step:,}, {'momentum average' if weights == 'ema' else 'online'})"
    return WeightSource(
        name,
        {path: run.shapes[full] for path, full in paths.items()},
        read,
        _settings_of_run(config),
        {},
        [],
        class_names(workdir),
    )


def _open_export(location: str, weights: str, key: str) -> WeightSource:
    """The arrays of an export of npz or orbax, with the settings of its run."""
    where, path = f"{key}: {location!r}", pathlib.Path(location)
    if weights == "ema":
        raise UserError(
            f"{where} is an export, of one copy of the weights; leave weights='ema' out"
        )
    config = configuration.resolve(configuration.load_from_workdir(location, key))
    read_arrays: Callable[[Iterable[str]], dict[str, np.ndarray]]
    if (path / checkpoint_dir.ARRAYS).is_file():
        table = tensor_files.read_tensors(path / checkpoint_dir.ARRAYS)
        shapes, read_arrays = table.shapes, lambda names: {name: table[name] for name in names}
    elif (path / checkpoint_dir.PARAMETERS).is_dir():
        exported = ExportedArrays(path / checkpoint_dir.PARAMETERS, where)
        shapes, read_arrays = exported.shapes, exported.read
    else:
        raise UserError(
            f"{where} holds a program without arrays, which jax.export.deserialize reads; give the"
            " run, or its export of npz or orbax"
        )

    def read(shardings: Mapping[str, Any]) -> dict[str, Any]:
        arrays = read_arrays(shardings)
        return {name: put_array(arrays[name], at) for name, at in shardings.items()}

    return WeightSource(
        f"{location} (an export)",
        shapes,
        read,
        _settings_of_run(config),
        {},
        [],
        class_names(location),
    )


def _settings_of_run(config: schema.Config) -> dict[str, Any]:
    """`WeightSource.settings` of a run, by its settings."""
    pixels = {
        "mean": config.data.augment.mean,
        "std": config.data.augment.std,
        # of a dense task, that of the pre-training to which its positions belong
        "image_size": config.dense.maps.image_size or config.data.image_size,
    }
    model = {
        "backbone": config.model.backbone,
        **{
            section: dataclasses.asdict(getattr(config.model, section))
            for section in backbones.get_backbone(config.model).sections
        },
    }
    return {**dataclasses.asdict(config.model.encoder), **model, **pixels}


def read_trained(run: RunWeights, wanted: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Arrays of a run as it is evaluated, by name; of a schedule-free run the average of its
    parameters, instead of the point where gradients are taken.

    Args:
      run: with a checkpoint.
      wanted: {name: (path in its state, sharding)}.

    Raises:
      UserError: numbers that are not finite, or arrays that cannot be read.
    """
    link = f"opt/{schedule_free.LINK}/"  # z, where the run takes its steps, and b1
    z = {path: link + "z/" + path.removeprefix("params/") for path, _ in wanted.values()}
    z = {path: of for path, of in z.items() if path.startswith("params/") and of in run.shapes}
    layout = {path: at for path, at in wanted.values()}
    averaged = {link + "b1": None} if z else {}
    arrays = run.read({**layout, **{of: layout[path] for path, of in z.items()}, **averaged})
    for path, of in z.items():
        b1 = float(arrays[link + "b1"])
        arrays[path] = schedule_free.average_of(arrays[path], arrays[of], b1)
    if bad := [name for name, (path, _) in wanted.items() if not _is_finite(arrays[path])]:
        raise UserError(
            f"{run.key}: {run.workdir!r}: {bad[0]} has numbers that are not finite (NaN or Inf),"
            f" {len(bad)} of {len(wanted)} arrays do; give an earlier checkpoint or another run"
        )
    return {name: arrays[path] for name, (path, _) in wanted.items()}


def encoder_heads(settings: Mapping[str, Any]) -> int:
    """Returns the attention heads of an encoder from the `settings` of its source. Where a file
    does not state them, they are those of the published sizes: 64 channels each, but 16 heads of
    SoViT-400m and ViT-H, -g and -G, and of SigLIP 2's giant, which has the width of DINOv2's and no
    gates. Those with rotary positions are DINOv3's, of which ViT-H+ has 64 channels a head, and
    ViT-7B 128.

    >>> [encoder_heads({"width": width}) for width in (32, 768, 1280, 1536)]
    [1, 12, 16, 16]
    >>> encoder_heads({"width": 1536, "activation": "swiglu"})
    24
    >>> [encoder_heads({"width": width, "positions": "rope"}) for width in (384, 1280, 4096)]
    [6, 20, 32]
    >>> encoder_heads({"width": 768, "heads": 6})
    6
    """
    width = settings["width"]
    other = {4096: 32} if settings.get("positions") == "rope" else _OTHER_HEADS
    if settings.get("activation") == "swiglu":
        other = {**other, 1536: 24}
    return settings.get("heads") or other.get(width) or max(1, width // 64)


def class_names(location: str) -> tuple[str, ...] | None:
    """Returns the names of the categories that a run, or the export of one of a dense task,
    predicts; None if it has no file of them, as other weights have none."""
    name = checkpoint_dir.DESCRIPTION if checkpoint_dir.is_export(location) else CLASSES
    file = pathlib.Path(location) / name
    names = run_files.read_run_json(file).get("classes") if file.is_file() else None
    return tuple(map(str, names)) if names else None


def _is_finite(array: Any) -> bool:
    """Whether all numbers of an array are finite; of a sharded one, those of this host."""
    parts = (
        [shard.data for shard in array.addressable_shards]
        if isinstance(array, jax.Array)
        else [array]
    )
    return all(bool(np.isfinite(np.asarray(part)).all()) for part in parts)


def put_array(array: Any, sharding: Any) -> Any:
    """Returns a float32 array with a sharding; None: as numpy."""
    value = np.asarray(array, np.float32)
    return (
        value
        if sharding is None
        else jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
    )
