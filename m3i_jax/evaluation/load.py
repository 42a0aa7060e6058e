"""`m3i_jax.load`: the encoder of a run or of a file of weights, as a function of images.

import m3i_jax
model = m3i_jax.load("runs/first")  # or a file of timm, Hugging Face, MAE, SiameseIM, Google,
                                    # InternImage; or hf://OWNER/NAME
vectors = model.features(images)    # arrays, Pillow images, paths or a directory -> float32 [B, D]

Files of the Hugging Face Hub go to the cache of huggingface_hub, which is read without a network if
they are there.
"""

import concurrent.futures
import dataclasses
import functools
import importlib
import itertools
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from m3i_jax import config as configuration
from m3i_jax import progress, schema
from m3i_jax.data import image_inputs, preprocessing
from m3i_jax.data.cores import usable_cores
from m3i_jax.data.preprocessing import Preprocessing
from m3i_jax.errors import UserError
from m3i_jax.evaluation import feature_extraction, load_dense
from m3i_jax.models import backbones, networks, vit
from m3i_jax.objective import positions
from m3i_jax.training import (
    checkpoint_dir,
    encoder_shapes,
    plan,
    saved_arrays,
    teachers,
    weight_source,
)
from m3i_jax.training.unused_model_settings import reset_unused_model_settings

WEIGHTS = ("online", "ema")
DTYPES = ("bfloat16", "float32")
POOLS = ("auto", "attention", "mean", "cls", "tokens")
_ROWS = 64  # images a device step
_TABLE = "encoder/positions"
# what a pooling computes, beside its sizes
_OF_POOLING = ("kind", "query", "norm", "projection")
HUB_PREFIX = "hf://"
# weights, settings, preprocessing and the description; never code
HUB_FILES = ("*.safetensors", "*.json", "*.npz", "config.txt", "parameters/*", "README.md")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclasses.dataclass(repr=False)
class LoadedEncoder:
    """An encoder with its weights.

    Attributes:
      config: settings of the run, or those read from a file with the defaults of its layout.
      params: `encoder`, and `pool` if a pooling was trained.
      pool: attention, mean, cls or tokens; see `feature_extraction.extract_features`.
      name: origin of the weights, for messages.
    """

    config: schema.Config
    params: Any
    pool: str
    name: str

    @functools.cached_property
    def function(self) -> Callable[[Any, Any], jax.Array]:
        """The compiled function (params, views [B, S, S, 3]) -> features."""
        return jax.jit(
            functools.partial(feature_extraction.extract_features, self.config, self.pool)
        )

    @property
    def network(self) -> networks.Network:
        """The encoder as a function of (params["encoder"], normalised images), and as a module of
        flax; see `models.networks`."""
        return networks.network_of(self.config.model, self.config.data.image_size)

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of the run's evaluations, or that described by a file."""
        return Preprocessing.of(self.config)

    def __repr__(self) -> str:
        backbone = backbones.get_backbone(self.config.model)
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return (
            f"LoadedEncoder({self.name}: {self.config.model.backbone},"
            f" {backbone.describe(self.config.model)}, {count:,} parameters,"
            f" {self.config.data.image_size} pixels, pool={self.pool})"
        )

    def features(self, images: Any, *, ready: bool = False) -> np.ndarray:
        """Returns features of images, float32, not normalised: [B, D], or [B, T, D] for
        pool="tokens". Shows a progress bar where stderr is a terminal.

        Args:
          images: one image or several: a path, a Pillow image, or an array [H, W] or [H, W, C] of 1
            to 4 channels (gray, gray and alpha, RGB, RGBA): uint8, uint16, bool, or floats in 0..1;
            an array of them, [B, H, W] or [B, H, W, C]; a list or another iterable of images of any
            sizes; or a directory, whose images are read in the order of their relative paths, and
            of which a file that cannot be used has a row of NaN and is logged. Each is made RGB,
            resized and cropped by `preprocessing`, as in an evaluation of the run.
          ready: the images have the model's size and are not resized or cropped.

        Raises:
          ValueError: arrays of another shape or type, floats outside 0..1, paths of files that are
            no images, or views of another size; features that are not finite.
          UserError: a directory without images.

        >>> from m3i_jax.models import vit
        >>> encoder = schema.Encoder(patch_size=8, width=8, depth=1, heads=2)
        >>> model = schema.Model(encoder=encoder, dtype="float32")
        >>> config = schema.Config(model=model, data=schema.Data(image_size=32))
        >>> params = {"encoder": jax.jit(lambda key: vit.init(model, key))(jax.random.key(0))}
        >>> loaded = LoadedEncoder(config, params, "mean", "")
        >>> loaded.features([np.zeros((40, 60), np.uint8), np.ones((32, 32, 3))]).shape
        (2, 8)
        """
        each, total = image_inputs.iterate_images(images)
        size = self.config.data.image_size
        out, bad, skip = [], [], image_inputs.is_directory(images)
        with (
            concurrent.futures.ThreadPoolExecutor(usable_cores()) as pool,
            progress.progress_bar("features", total) as advance,
        ):
            view = functools.partial(self._view, ready, skip)
            while chunk := list(itertools.islice(each, _ROWS)):
                views = list(pool.map(view, chunk))
                bad += [None if v.size else image for image, v in zip(chunk, views, strict=True)]
                views = [v if v.size else np.zeros((size, size, 3), np.uint8) for v in views]
                dtype = np.uint8 if all(v.dtype == np.uint8 for v in views) else np.float32
                rows = 1 << (len(views) - 1).bit_length()  # powers of two: few compilations
                batch = np.zeros((rows, size, size, 3), dtype)
                for row, v in enumerate(views):
                    batch[row] = v / np.float32(255) if v.dtype != dtype else v
                out.append(np.asarray(self.function(self.params, batch))[: len(views)])
                advance(len(views))
        if not out:
            return np.zeros((0, *self.shape[1:]), np.float32)
        features = np.concatenate(out)
        finite = np.isfinite(features).reshape(len(features), -1).all(1)
        image_inputs.mark_unusable(features, bad)
        if wrong := np.flatnonzero(~finite).tolist():
            raise ValueError(
                f"the features of {len(wrong)} images are not finite, the first is image"
                f" {wrong[0]}: {self.name} overflows"
            )
        return features

    def _view(self, ready: bool, skip: bool, image: Any) -> np.ndarray:
        """The view [S, S, 3] of an image; [0, 0, 3] of one that cannot be used, to skip it."""
        pixels = image_inputs.rgb_pixels(image, background=self.preprocessing.background, skip=skip)
        if not pixels.size:
            return pixels
        if ready:
            return _check_view(self.config.data.image_size, pixels)
        return self.preprocessing.view(pixels)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the features of one image: (1, D), or (1, T, D). Traces the encoder."""
        size = self.config.data.image_size
        images = np.zeros((1, size, size, 3), np.uint8)
        return tuple(jax.eval_shape(self.function, self.params, images).shape)


def _check_view(size: int, image: np.ndarray) -> np.ndarray:
    view = preprocessing.check_images(image)
    if view.shape[:2] != (size, size):
        raise ValueError(
            f"a view has shape {view.shape}; with ready=True it must be [{size}, {size}, 3]: leave"
            " ready=True out to resize images"
        )
    return view


def load(
    path: str | os.PathLike[str],
    *,
    weights: str = "",
    pool: str = "auto",
    heads: int = 0,
    dtype: str = "",
) -> Any:
    """Returns the encoder of a run or of a file of weights, a `LoadedEncoder`; of a run of
    detection or segmentation its whole model, a `load_dense.LoadedDense`, and of a file of
    detectron2's ViTDet, or of InternImage's detectors with DINO and its segmenters, as well.

    Args:
      path: workdir of a run, or a file or directory of timm, Hugging Face ViT, CLIP, SigLIP,
        DINOv2 or DINOv3, MAE, SiameseIM, Google ViT or InternImage, a Mask R-CNN of detectron2's
        ViTDet, or a DINO, UperNet or Mask2Former of InternImage; or hf://OWNER/NAME[@REVISION],
        such a directory on the Hugging Face Hub. A DINOv2 of Hugging Face reads images of the size
        of its processor, with positions resized as there. An InternImage must have the sizes of a
        preset. With the fusion of M3I (H, G) its dense features are fused; without (T to XL) they
        are the map of the last stage. Its images have the size given by a preprocessor_config.json
        next to it, or 224 pixels.
      weights: online, or ema: the momentum average; "": those that the run evaluates, by its
        `evaluate.encoder`, and online for a file.
      pool: attention, mean (of the patch tokens), cls, or tokens (all of them); auto: that
        which the run trained, by `Plan.image_feature`, else mean.
      heads: attention heads, for a file that does not store them; 0: as stored, or 64 channels a
        head.
      dtype: bfloat16 or float32; "": that of the run, float32 for files.

    Returns:
      `LoadedEncoder`: `load("runs/first").features("images/")` gives float32 [B, D], and with
      pool="tokens" [B, T, D], in the order of the relative paths. `LoadedDense` has
      `detect` and `segment`.

    Raises:
      TypeError: the path is neither text nor an os.PathLike.
      UserError: no readable weights, or a checkpoint of a newer format; values that are not
        finite; a pooling that was not trained; weights that are neither a supported vision
        transformer nor an InternImage of a preset, or arrays that do not fit each other.
    """
    for name, value, known in (
        ("pool", pool, POOLS),
        ("weights", weights, ("", *WEIGHTS)),
        ("dtype", dtype, ("", *DTYPES)),
    ):
        if value not in known:
            raise UserError(
                f"load: {name}={value!r} is not one of {', '.join(filter(None, known))}; give one"
                " of these"
            )
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"load: path={path!r} is of type {type(path).__name__}; give the path of a run or of a"
            " file of weights"
        )
    given, path = path, os.path.expanduser(path)
    if path.startswith(HUB_PREFIX):
        path = fetch_weights(path)
    stated = checkpoint_dir.has_settings(path)
    if stated:
        settings = configuration.load_from_workdir(path, "load")
    source = weight_source.open_weights(path, weights=weights, key="load")
    if given != path:
        source.name = source.name.replace(path, str(given))
    if not stated:
        settings = _described(source, path, heads, "load")
        settings.data.image_size = source.settings.get("dense_size", settings.data.image_size)
    config = configuration.resolve(settings)
    if dtype:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    if not config.traits.views:
        return load_dense.load_dense(path, config, source)
    own = plan.build_plan(teachers.without_teachers(config)).image_feature if stated else "mean"
    trained = own == "attention" and any(p.startswith("pool/") for p in source.shapes)
    if pool == "attention" and not trained:
        raise UserError(f"load: {path}: has no trained pooling; use pool='mean'")
    if pool == "cls" and not config.model.encoder.cls_token:
        raise UserError(f"load: {path}: has no cls token; use pool='mean'")
    if pool == "auto":
        pool = own if trained or own == "cls" else "mean"
    names = [
        p
        for p in source.shapes
        if p.startswith("encoder/") or (pool == "attention" and p.startswith("pool/"))
    ]
    params: dict[str, Any] = {}
    arrays = source.read(dict.fromkeys(names))
    if not stated and "view_size" in source.settings:
        encoder = config.model.encoder
        how = {"cls": encoder.cls_token, "antialias": encoder.registers > 0}
        table = positions.resize_position_table(arrays[_TABLE], config.grid, **how)
        arrays[_TABLE] = table
    for name, array in arrays.items():
        saved_arrays.set_leaf(params, name, jnp.asarray(array))
    expected = encoder_shapes.encoder_shapes(config.model, config.grid)
    encoder_shapes.check_encoder(f"load: {path}", expected, {n: a.shape for n, a in arrays.items()})
    return LoadedEncoder(config, params, pool, source.name)


def settings_of_weights(path: str, flag: str) -> ml_collections.ConfigDict:
    """Returns the settings of a run or an export, or those that a file of weights implies:
    `model`, image size, mean and deviation of pixels.

    Args:
      path: see `load`.
      flag: the flag or setting that gave the path, for messages.

    Raises:
      UserError: no readable weights, or neither a supported vision transformer nor an InternImage
        of a preset.
    """
    if checkpoint_dir.has_settings(path):
        return configuration.load_from_workdir(path, flag)
    return _described(weight_source.open_weights(path, key=flag), path, 0, flag)


def build_encoder(
    config: ml_collections.ConfigDict, path: str, flag: str
) -> ml_collections.ConfigDict:
    """Set up a run that starts from other weights: their model, preprocessing and positions, and
    `init_from`, of a run with the weights that it evaluates. What a head of the source was trained
    with stays as of a new run: whether the encoder was frozen, how its pooling works, and the
    initial values of its layer of categories. A file states no precision of the matrix products,
    and so that of the recipe stays.

    Args:
      config: settings of the run, changed in place.
      path, flag: see `settings_of_weights`, which raises.

    Returns:
      the settings of the weights.
    """
    source, own = settings_of_weights(path, flag), config.model.to_dict()
    config.model.update(source.model)
    config.model.encoder.freeze = own["encoder"]["freeze"]
    config.model.pool.update({name: own["pool"][name] for name in _OF_POOLING})
    config.model.category_std = own["category_std"]
    if not checkpoint_dir.has_settings(path):
        config.model.dtype = own["dtype"]
    _copy_preprocessing(config, source)
    encoder, trained = config.model.encoder, vit.position_size(source)
    fixed = (
        encoder.positions in vit.FIXED and backbones.get_backbone(config.model).resizes_positions
    )
    if fixed and trained != config.data.image_size:
        encoder.position_grid = trained // encoder.patch_size
    reset_unused_model_settings(config)
    config.init_from, config.init.only = path, ("^encoder/",)
    if checkpoint_dir.is_run(path):
        config.init.weights = weight_source.evaluated_weights(configuration.resolve(source))
    return source


def fit_config_to_weights(config: schema.Config, path: str, flag: str) -> schema.Config:
    """Returns the configuration for a file of weights: with the encoder and the preprocessing of
    the file. `evaluate.crop`, `interpolation` and `squash` other than their defaults stay. An
    encoder of the same sizes keeps its heads if the file does not state them. A dense run keeps the
    size of its images and, with an encoder of the same sizes, all of its settings.

    Args:
      config: settings.
      path, flag: see `settings_of_weights`, which raises.
    """
    opened = weight_source.open_weights(path, key=flag)
    opened.require_own_encoder(f"{flag}: {path}")
    stored = opened.settings
    configured = {**dataclasses.asdict(config.model.encoder), **dataclasses.asdict(config.model)}
    sizes = (
        "backbone",
        "patch_size",
        "width",
        "depth",
        "mlp_ratio",
        *backbones.get_backbone(config.model).sections,
    )
    same = all(stored.get(name, configured[name]) == configured[name] for name in sizes)
    if same and not (config.traits.views and {"width", "image_size"} <= stored.keys()):
        return config
    heads = config.model.encoder.heads if same and "heads" not in stored else 0
    source = _described(opened, path, heads, flag)
    out = configuration.config_from_text(configuration.config_to_text(config), flag)
    out.model.update(
        {
            name: source.model[name]
            for name in ("backbone", "scan", "encoder", *backbones.section_names())
        }
    )
    out.model.pool.heads = source.model.pool.heads
    _copy_preprocessing(out, source)
    if not config.traits.views:  # that of a file is of its position table
        out.data.image_size = config.data.image_size
        if backbones.get_backbone(out.model).resizes_positions:
            out.dense.maps.image_size = source.data.image_size
    for name in preprocessing.RESIZING:
        if out.evaluate[name] == getattr(schema.Evaluate, name):
            out.evaluate[name] = source.evaluate[name]
    return configuration.resolve(out)


def _copy_preprocessing(
    config: ml_collections.ConfigDict, source: ml_collections.ConfigDict
) -> None:
    config.data.image_size = source.data.image_size
    config.data.augment.mean = source.data.augment.mean
    config.data.augment.std = source.data.augment.std


def _described(
    source: weight_source.WeightSource, path: str, heads: int, flag: str
) -> ml_collections.ConfigDict:
    """The settings of a file of weights."""
    source.require_own_encoder(f"{flag}: {path}")
    stored, config = dict(source.settings), configuration.default_config()
    if ("detect" in stored or "segment" in stored) and "width" not in stored:
        raise UserError(
            f"{flag}: {path}: m3i_jax has no encoder like its own ({source.name}); of its arrays"
            " only the head can be used, by a run with another encoder: --config.init_from=FILE"
            " --config.init.only='(\"^head/\",)'"
        )
    if "width" not in stored or "image_size" not in stored:
        # a backbone with its own section of settings is recognized by the sizes of its presets
        sizes = [
            name
            for backbone in backbones.registered_backbones().values()
            if backbone.sections
            for name in backbone.presets
        ]
        raise UserError(
            f"{flag}: {path}: is neither a supported vision transformer nor one of"
            f" {', '.join(sizes)} ({source.name}); m3i_jax can read its arrays, but not run it"
        )
    stored["heads"] = heads or weight_source.encoder_heads(stored)
    if stored.get("backbone") == "vit" and stored["width"] % max(stored["heads"], 1):
        raise UserError(
            f"{flag}: {path}: {stored['heads']} attention heads do not divide its width,"
            f" {stored['width']}; give their number by m3i_jax.load(..., heads=H), or as"
            " num_attention_heads in a config.json beside the file"
        )
    config.model.encoder.update(
        {name: stored[name] for name in config.model.encoder if name in stored}
    )
    config.model.update(
        {
            name: stored[name]
            for name in ("backbone", "scan", *backbones.section_names())
            if name in stored
        }
    )
    # a file has no trained pooling; those of probes have the encoder's heads
    pool_heads = stored["heads"] if stored["width"] % stored["heads"] == 0 else 1
    config.model.update({"dtype": "float32", "pool": {"heads": pool_heads}})
    config.data.image_size = stored.get("view_size", stored["image_size"])
    if "view_size" in stored:  # a dense run keeps the table as it is
        config.dense.maps.image_size = stored["image_size"]
    config.data.augment.update({name: stored[name] for name in ("mean", "std") if name in stored})
    if task := next((name for name in ("detect", "segment") if name in stored), ""):
        config.task = task
        config.dense[task].update(stored[task])
        config.dense.maps.update(stored.get("maps", {}))
        if backbones.get_backbone(config.model).resizes_positions:
            config.dense.maps.image_size = stored["image_size"]
        config.data.classes = stored["classes"]
        if task == "detect" and "dense_size" in stored:
            config.dense.geometry.test_short = stored.get("dense_short", 0)
        config.dense.geometry.update(stored.get("geometry", {}))
    config.evaluate.update(
        {name: stored[name] for name in ("crop", "interpolation", "squash") if name in stored}
    )
    config.data.background = stored.get("background", config.data.background)
    return config


def fetch_weights(location: str, key: str = "load") -> str:
    """Returns the directory with the files of a repository.

    Args:
      location: hf://OWNER/NAME, or with @REVISION: a branch, a tag or a commit.
      key: the flag or function that gave it, for messages.

    Raises:
      UserError: it is no name of a repository, huggingface_hub is not installed, or the repository
        cannot be read.

    >>> fetch_weights("hf://first")
    Traceback (most recent call last):
    m3i_jax.errors.UserError: load: 'hf://first' names no repository; write hf://OWNER/NAME or ...
    """
    name, at, revision = location.removeprefix(HUB_PREFIX).partition("@")
    if not _HUB_NAME.fullmatch(name) or (at and not revision):
        raise UserError(
            f"{key}: {location!r} names no repository; write hf://OWNER/NAME or"
            " hf://OWNER/NAME@REVISION"
        )
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise UserError(
            f"{key}: {location}: needs the package huggingface_hub; pip install 'm3i-jax[hub]'"
        ) from error
    try:
        return str(
            hub.snapshot_download(name, revision=revision or None, allow_patterns=list(HUB_FILES))
        )
    except Exception as error:  # of the network, the server, the cache or the name
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{key}: {location}: cannot be read ({type(error).__name__}: {reason}); check name,"
            " revision and network, and log in by `hf auth login` if it is private"
        ) from error
