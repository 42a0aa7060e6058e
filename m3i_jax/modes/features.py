"""--mode=features --out=FILE: write the features of all images of a source, by a run or by other
weights (init_from), as one npz.

Columns: keys (text), labels int32 (-1: none), held_out bool, features float32 [n, D], in the order
of the source, training images first; `about`: JSON with weights, preprocessing and data. The file
is written when all features are computed; until then the parts are in FILE.parts, and the same
command resumes from them."""

import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from m3i_jax import config as configuration
from m3i_jax import parallel, privacy, progress, schema, version
from m3i_jax.data import eval_batches, splits
from m3i_jax.data.preprocessing import Preprocessing, with_evaluation
from m3i_jax.data.sources import base
from m3i_jax.errors import UserError
from m3i_jax.evaluation import load
from m3i_jax.evaluation.feature_extraction import NotFiniteError, check_finite
from m3i_jax.interop import tensor_files
from m3i_jax.modes.eval_results import weight_files
from m3i_jax.modes.setup import check_writable, index_directory, lock_workdir, require_views
from m3i_jax.training import checkpoint_dir

_PART = 4096  # images of a part


def run(config: schema.Config, *, workdir: str, out: str, given: Collection[str] = ()) -> int:
    if not out:
        raise UserError("--out: is missing; give the npz file to write, such as --out=features.npz")
    require_views(config, "features", "use m3i_jax.load(RUN).detect or .segment")
    target = pathlib.Path(out)
    if target.suffix != ".npz" or target.is_dir():
        raise UserError(f"--out: {out!r} must be a file that ends in .npz")
    check_writable(target.parent, f"--out={out}", "choose another directory for the file")
    directory = check_writable(
        workdir,
        f"--workdir {workdir}",
        "the data index is written there; choose another --workdir, and give the run as init_from",
    )
    file = _weight_file(config, workdir, given)
    config = dataclasses.replace(config, init_from=file)
    model = _model(config, workdir, _which_weights(config, given))
    # weights of `init_from` keep their own preprocessing but for what is set
    model.config = with_evaluation(model.config, config, keep=bool(config.init_from))
    preprocessing = model.preprocessing
    train, held_out = splits.open_splits(config.data, cache=index_directory(config.data, directory))
    identity = {
        "weights": model.name,
        "pool": model.pool,
        **json.loads(json.dumps(preprocessing.described())),
    }
    identity |= {
        "train": base.stable_digest(train.fingerprint(), len(train)),
        "held_out": base.stable_digest(held_out.fingerprint(), len(held_out)),
    }
    parts_dir = target.with_name(target.name + ".parts")
    with lock_workdir(directory):
        files = weight_files(file) if file else []
        # of another release, images may be decoded in another way
        _remove_other_parts(parts_dir, identity | {"files": files, "release": version.__version__})
        print(
            f"{model.name}, {model.pool}: {len(train):,} training images, {len(held_out):,} held"
            f" out; {preprocessing.resized_side} {preprocessing.short_side},"
            f" {preprocessing.interpolation}, centre crop {preprocessing.image_size}"
        )
        parts = [
            _part(model, preprocessing, config, source, parts_dir / f"{name}.{start}.npz", start)
            for name, source in (("train", train), ("held_out", held_out))
            for start in range(0, len(source), _PART)
        ]
        skipped: dict[str, int] = {}
        for part in parts:
            for reason, count in json.loads(str(part["skipped"])).items():
                skipped[reason] = skipped.get(reason, 0) + count
        columns_of = [part for part in parts if "keys" in part]
        if not columns_of:
            raise UserError(f"{train.name}: no image could be read ({skipped}); see --mode=data")
        columns = {
            name: np.concatenate([part[name] for part in columns_of])
            for name in ("keys", "labels", "held_out", "features")
        }
        about = identity | {
            "classes": list(train.classes),
            "skipped": {reason: n for reason, n in skipped.items() if n},
        }
        tensor_files.write_npz(
            target, columns | {"about": np.array(json.dumps(privacy.redact_tree(about)))}
        )
        shutil.rmtree(parts_dir)
    bad = ", ".join(f"{n:,} {reason}" for reason, n in skipped.items() if n)
    print(
        f"{columns['features'].shape[0]:,} x {columns['features'].shape[1]} in {target}"
        + (f"; left out: {bad}" if bad else "")
    )
    return 0


def _weight_file(config: schema.Config, workdir: str, given: Collection[str]) -> str:
    """The weights that `init_from` names; "" for the run in the working directory, whose settings
    name the weights that it started from, unless the command line names these."""
    if "init_from" not in given and checkpoint_dir.is_run(workdir):
        began = configuration.load_from_workdir(workdir, f"--workdir {workdir}").init_from
        return "" if config.init_from == began else config.init_from
    return config.init_from


def _which_weights(config: schema.Config, given: Collection[str]) -> str:
    """Online or ema, of `init_from`; "": those that a run evaluates, and online of a file. A saved
    `init.weights` is of the weights that the run started from, and not of those of the command."""
    own = "init.weights" not in given and "init_from" in given
    return "" if own else config.init.weights


def _model(config: schema.Config, workdir: str, weights: str) -> load.LoadedEncoder:
    """The encoder of init_from, by its `weights`, or of the run in the working directory; pooled by
    evaluate.features."""
    pool = config.evaluate.features
    pooling = pool if pool in ("mean", "cls") else "auto"
    if config.init_from:
        model = load.load(config.init_from, weights=weights, pool=pooling)
        if not isinstance(model, load.LoadedEncoder):
            raise UserError(
                f"config.init_from: {model.name}: is a model of config.task={model.config.task},"
                " which has no features of images; give the weights that it was initialised from"
            )
    elif checkpoint_dir.is_run(workdir):
        model = load.load(workdir, weights=config.evaluate.encoder, pool=pooling)
    else:
        raise UserError(
            f"--workdir {workdir}: has no run; give one, or weights by --config.init_from=FILE"
        )
    if pool == "attention" and model.pool != pool:
        raise UserError(
            "config.evaluate.features: 'attention' needs a trained pooling, and"
            f" {model.name} has none; use 'mean'"
        )
    return model


def _remove_other_parts(parts_dir: pathlib.Path, identity: dict[str, Any]) -> None:
    """Remove the parts if they are of other weights, preprocessing, data or another release."""
    text, file = json.dumps(identity), parts_dir / "about.json"
    if parts_dir.is_dir() and not (file.is_file() and file.read_text() == text):
        print(
            f"{parts_dir}: removed, as its parts are of other weights, data or settings, or of"
            " another release of m3i_jax",
            flush=True,
        )
        shutil.rmtree(parts_dir)
    parts_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def _warn_of_infinite(features_BxD: np.ndarray, index_B: np.ndarray, source: Any) -> None:
    """Print the first image of a batch whose features are not finite: one of millions is no reason
    to write none."""
    try:
        check_finite(features_BxD, index_B, functools.partial(base.source_key, source))
    except NotFiniteError as error:
        print(f"warning: {error}", flush=True)


def _part(
    model: load.LoadedEncoder,
    preprocessing: Preprocessing,
    config: schema.Config,
    source: base.DataSource,
    file: pathlib.Path,
    start: int,
) -> dict[str, np.ndarray]:
    """The features of _PART images from `start` on, read from `file` if it exists."""
    if file.is_file():
        return dict(tensor_files.read_tensors(file))
    mesh = parallel.make_mesh((-1, 1, 1))
    shards, layout = jax.device_count(), parallel.data_sharding(mesh)
    rows = -(-config.evaluate.batch_size // shards) * shards
    indices = range(start, min(start + _PART, len(source)))
    data = config.data
    batches = eval_batches.evaluation_batches(
        source, indices, preprocessing, rows, threads=data.threads, missing=data.missing
    )
    if not isinstance(jax.tree.leaves(model.params)[0].sharding, jax.sharding.NamedSharding):
        model.params = jax.device_put(model.params, parallel.replicated(mesh))
    features: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    index: list[np.ndarray] = []
    bar = progress.track_progress(
        batches,
        f"features from image {start:,} on",
        len(indices),
        size=lambda batch: int(batch["valid"].sum()),
    )
    for batch in bar:
        valid = batch["valid"]
        features.append(
            np.asarray(model.function(model.params, jax.device_put(batch["views"], layout)))[valid]
        )
        _warn_of_infinite(features[-1], batch["index"][valid], source)
        labels.append(batch["label"][valid])
        index.append(batch["index"][valid])
    if not features:  # no image could be read
        return {"skipped": np.array(json.dumps(dict(batches.skipped)))}
    records = np.concatenate(index)
    columns = {
        "keys": np.array([base.source_key(source, int(i)) for i in records], np.str_),
        "labels": np.concatenate(labels),
        "held_out": np.full(len(records), file.name.startswith("held_out")),
        "features": np.concatenate(features),
        "skipped": np.array(json.dumps(dict(batches.skipped))),
    }
    tensor_files.write_npz(file, columns)
    return columns


def read_feature_file(path: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns (columns, about) of a file of features; about is {} if the file has no such array.

    Raises:
      UserError: the file has no keys or no features, or not one feature of numbers a key.
    """
    table = dict(tensor_files.read_tensors(path))
    if missing := {"keys", "features"} - table.keys():
        raise UserError(
            f"{path}: has no array {min(missing)!r}, and is no file of features: write it by"
            " --mode=features, or give keys (text [n]) and features (float [n, D])"
        )
    keys, features = table["keys"], table["features"]
    if keys.shape != features.shape[:1] or features.ndim != 2 or features.dtype.kind not in "fiu":
        raise UserError(
            f"{path}: keys have shape {keys.shape}, and features {features.shape} and type"
            f" {features.dtype}: write keys as text [n], and features as float [n, D]"
        )
    about = table.pop("about", None)
    return table, {} if about is None else json.loads(str(about))
