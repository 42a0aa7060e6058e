"""--mode=features --out=FILE: features of every image of a source, by a run or by other weights
(init_from), as one npz.

keys (text), labels int32 (-1: none), held_out bool, features float32 [n, D], in the order of the
source, training part first; `about`, JSON that says what made them. The file appears when it is
whole. What is done until then lies beside it in FILE.parts, and the same command goes on there."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from m3i_jax import parallel, privacy, schema
from m3i_jax.data import eval_batches, splits
from m3i_jax.data.preprocessing import Preprocessing
from m3i_jax.data.sources import base
from m3i_jax.errors import UserError
from m3i_jax.evaluation import load
from m3i_jax.interop import tensor_files
from m3i_jax.modes import output
from m3i_jax.modes import setup as jobs
from m3i_jax.training import checkpoint_dir

_PART = 4096  # images between two writes


def run(config: schema.Config, *, workdir: str, out: str) -> int:
    if not out:
        raise UserError("--out: is missing; name the npz file to write, such as --out=features.npz")
    target = pathlib.Path(out)
    if target.suffix != ".npz" or target.is_dir():
        raise UserError(f"--out: {out!r} must be a file that ends in .npz")
    output.check_writable(target.parent, f"--out={out}", "choose another directory for the file")
    place = output.check_writable(
        workdir,
        f"--workdir {workdir}",
        "the index of the data is kept there; choose another --workdir, and name the run by"
        " init_from",
    )
    model = _model(config, workdir)
    preprocessing = _seen(config, model)
    train, held_out = splits.open_splits(config.data, cache=str(place / "index"))
    identity = {
        "weights": model.name,
        "pool": model.pool,
        **json.loads(json.dumps(preprocessing.described())),
    }
    identity |= {
        "train": base.stable_digest(train.fingerprint(), len(train)),
        "held_out": base.stable_digest(held_out.fingerprint(), len(held_out)),
    }
    kept = target.with_name(target.name + ".parts")
    with jobs.lock_workdir(place):
        _agree(kept, identity)
        seen = (
            f"short side {preprocessing.short_side}, of that {preprocessing.image_size} from the"
            " centre"
        )
        print(
            f"{model.name}, {model.pool}: {len(train):,} images for training, {len(held_out):,}"
            f" held out; {seen}"
        )
        made = [
            _part(model, preprocessing, config, source, kept / f"{name}.{at}.npz", at)
            for name, source in (("train", train), ("held_out", held_out))
            for at in range(0, len(source), _PART)
        ]
        skipped: dict[str, int] = {}
        for part in made:
            for reason, count in json.loads(str(part["skipped"])).items():
                skipped[reason] = skipped.get(reason, 0) + count
        whole = [part for part in made if "keys" in part]
        if not whole:
            raise UserError(f"no image of {train.name} could be read: {skipped}")
        columns = {
            name: np.concatenate([part[name] for part in whole])
            for name in ("keys", "labels", "held_out", "features")
        }
        about = identity | {
            "classes": list(train.classes),
            "skipped": {reason: n for reason, n in skipped.items() if n},
        }
        tensor_files.write_npz(
            target, columns | {"about": np.array(json.dumps(privacy.redact_tree(about)))}
        )
        shutil.rmtree(kept)
    told = ", ".join(f"{n:,} {reason}" for reason, n in skipped.items() if n)
    print(
        f"{columns['features'].shape[0]:,} x {columns['features'].shape[1]} in {target}"
        + (f"; left out: {told}" if told else "")
    )
    return 0


def _model(config: schema.Config, workdir: str) -> load.LoadedEncoder:
    """init_from, or the run in the working directory, read as evaluate.features says."""
    pool = config.evaluate.features
    usual = "mean" if pool == "mean" else "auto"
    if config.init_from:
        model = load.load(config.init_from, weights=config.init.weights, pool=usual)
    elif checkpoint_dir.is_run(workdir):
        model = load.load(workdir, weights=config.evaluate.encoder, pool=usual)
    else:
        raise UserError(
            f"--workdir {workdir}: has no run; name one, or weights by --config.init_from=FILE"
        )
    if pool == "attention" and model.pool != pool:
        raise UserError(
            "config.evaluate.features: 'attention' needs a pooling that was trained, and"
            f" {model.name} has none; use 'mean'"
        )
    return model


def _seen(config: schema.Config, model: load.LoadedEncoder) -> Preprocessing:
    """How images are seen: as the weights want it, cut as the configuration says."""
    return dataclasses.replace(
        model.preprocessing, crop=config.evaluate.crop, background=config.data.background
    )


def _agree(kept: pathlib.Path, identity: dict[str, Any]) -> None:
    """Parts of other features are not gone on with."""
    told, file = json.dumps(identity), kept / "about.json"
    if kept.is_dir() and not (file.is_file() and file.read_text() == told):
        shutil.rmtree(kept)
    kept.mkdir(parents=True, exist_ok=True)
    file.write_text(told)


def _part(
    model: load.LoadedEncoder,
    preprocessing: Preprocessing,
    config: schema.Config,
    source: base.DataSource,
    file: pathlib.Path,
    start: int,
) -> dict[str, np.ndarray]:
    """The features of _PART images from `start` on, from `file` if they are there."""
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
    found: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    index: list[np.ndarray] = []
    for batch in batches:
        valid = batch["valid"]
        found.append(
            np.asarray(model.function(model.params, jax.device_put(batch["views"], layout)))[valid]
        )
        labels.append(batch["label"][valid])
        index.append(batch["index"][valid])
    if not found:  # every image was bad
        return {"skipped": np.array(json.dumps(dict(batches.skipped)))}
    places = np.concatenate(index)
    columns = {
        "keys": np.array([base.source_key(source, int(i)) for i in places], np.str_),
        "labels": np.concatenate(labels),
        "held_out": np.full(len(places), file.name.startswith("held_out")),
        "features": np.concatenate(found),
        "skipped": np.array(json.dumps(dict(batches.skipped))),
    }
    tensor_files.write_npz(file, columns)
    return columns


def read_feature_file(path: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(columns, about) of a file of features."""
    table = dict(tensor_files.read_tensors(path))
    return table, json.loads(str(table.pop("about")))
