"""Weights as a function of images, whatever they come from: `m3i_jax.load`.

import m3i_jax model = m3i_jax.load("runs/first")           # a workdir, or a file of timm, Hugging
Face, MAE, SiameseIM, Google, InternImage vectors = model.features(images)           # uint8 or
float [B, H, W, 3] of any size -> float32 [B, D]"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from m3i_jax import config as configuration
from m3i_jax import schema
from m3i_jax.data import preprocessing
from m3i_jax.data.preprocessing import Preprocessing
from m3i_jax.errors import UserError
from m3i_jax.evaluation import feature_extraction
from m3i_jax.models import backbones
from m3i_jax.parallel.sharding import path_text
from m3i_jax.training import checkpoint, checkpoint_dir, init_from, plan

POOLS = ("auto", "attention", "mean", "cls", "tokens")
_ROWS = 64  # images a device step


@dataclasses.dataclass
class LoadedEncoder:
    """An encoder with its weights.

    Attributes:
      config: settings; those of the run, or what a file tells and the defaults of its layout.
      params: `encoder`, and `pool` where it was trained.
      pool: what `feature_extraction` reads: attention, mean, cls or tokens.
      name: where the weights come from.
    """

    config: schema.Config
    params: Any
    pool: str
    name: str

    @functools.cached_property
    def function(self) -> Callable[[Any, Any], jax.Array]:
        """The compiled (params, pixels [B, S, S, 3]) -> features, for views: images that have the
        size already."""
        return jax.jit(
            functools.partial(feature_extraction.extract_features, self.config, self.pool)
        )

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are seen: as in the evaluations of the run, or as a file says."""
        return Preprocessing.of(self.config)

    def features(self, images: Any, *, ready: bool = False) -> np.ndarray:
        """Features of images, float32 [B, D], not normalised: `mean`, `attention` or `cls`, or [B,
        T, D] of `tokens`.

        Args:
          images: uint8, or floats in 0..1, [B, H, W, 3] (or one, [H, W, 3]), RGB; or a list of
            images of any sizes. Each is resized and cut as `preprocessing` says, which is what
            an evaluation of the run sees of it.
          ready: the images are views already, of the model's size: they are not resized or cut.

        Raises: ValueError: arrays of another shape or type, floats outside 0..1, or views of
          another size; features that are not finite.

        >>> from m3i_jax.models import vit
        >>> model = schema.Model(encoder=schema.Encoder(patch_size=8, width=8, depth=1, heads=2), dtype="float32")
        >>> config = schema.Config(model=model, data=schema.Data(image_size=32))
        >>> loaded = LoadedEncoder(config, {"encoder": vit.init(model, jax.random.key(0))}, "mean", "")
        >>> loaded.features([np.zeros((40, 60, 3), np.uint8), np.ones((32, 32, 3))]).shape
        (2, 8)
        """
        if isinstance(images, Sequence) or np.ndim(images) == 4:
            pictures = list(images)
        else:
            pictures = [images]
        see = (
            functools.partial(_ready, self.config.data.image_size)
            if ready
            else self.preprocessing.view
        )
        size = self.config.data.image_size
        out = []
        for at in range(0, len(pictures), _ROWS):
            views = [see(np.asarray(picture)) for picture in pictures[at : at + _ROWS]]
            kind = np.uint8 if all(v.dtype == np.uint8 for v in views) else np.float32
            rows = 1 << (len(views) - 1).bit_length()  # few sizes, so that little is compiled
            batch = np.zeros((rows, size, size, 3), kind)
            for row, v in enumerate(views):
                batch[row] = v / np.float32(255) if v.dtype != kind else v
            out.append(np.asarray(self.function(self.params, batch))[: len(views)])
        if not out:
            return np.zeros((0, *self.shape[1:]), np.float32)
        found = np.concatenate(out)
        if wrong := np.flatnonzero(~np.isfinite(found).reshape(len(found), -1).all(1)).tolist():
            raise ValueError(
                f"the features of {len(wrong)} images are not finite, first of image {wrong[0]}:"
                f" {self.name} overflows"
            )
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the features of one image: (1, D), or (1, T, D). Traces the encoder."""
        size = self.config.data.image_size
        return jax.eval_shape(
            self.function, self.params, jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
        ).shape


def _ready(size: int, picture: np.ndarray) -> np.ndarray:
    view = preprocessing.check_images(picture)
    if view.shape[:2] != (size, size):
        raise ValueError(
            f"a view has shape {view.shape}; it must be [{size}, {size}, 3], or leave"
            " ready=True out"
        )
    return view


def load(
    path: str, *, weights: str = "online", pool: str = "auto", heads: int = 0, dtype: str = ""
) -> LoadedEncoder:
    """The encoder of a run or of a file of weights.

    Args: path: workdir of a run, or a file or directory of timm, Hugging Face ViT or CLIP, MAE,
      SiameseIM, Google ViT or InternImage. An InternImage must have the sizes of a preset. With the
      fusion of M3I (H, G) its dense features are fused; without (T to XL) they are the last stage's
      map. Its images have the size that a preprocessor_config.json beside it tells, or 224 pixels.
      weights: online, or ema: the momentum average.
      pool: of the features: attention, mean of the patch tokens, cls, or all tokens; auto:
          attention if the run trained it, else mean.
      heads: of attention, where a file cannot tell; 0: as it tells, or 64 channels a head.
      dtype: bfloat16 or float32; empty: the run's, float32 for files.

    Raises: UserError: nothing there that can be read, or a checkpoint of a newer format; numbers
      that are not finite; a pooling that was not trained; weights that are no vision transformer of
      this kind and no InternImage of a preset, or do not fit each other.
    """
    if pool not in POOLS:
        raise UserError(f"pool={pool!r} is none of {', '.join(POOLS)}")
    source = init_from.open_weights(path, weights=weights, key="load")
    run = checkpoint_dir.is_run(path)
    config = configuration.resolve(
        configuration.load_from_workdir(path, "load")
        if run
        else _described(source, path, heads, "load")
    )
    if dtype:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    trained = (
        run
        and bool(plan.build_plan(config).where("category", "text"))
        and any(p.startswith("pool/") for p in source.shapes)
    )
    if pool == "attention" and not trained:
        raise UserError(f"load: {path}: has no pooling that was trained; use pool='mean'")
    if pool == "cls" and not config.model.encoder.cls_token:
        raise UserError(f"load: {path}: has no cls token; use pool='mean'")
    pool = ("attention" if trained else "mean") if pool == "auto" else pool
    wanted = [
        p
        for p in source.shapes
        if p.startswith("encoder/") or (pool == "attention" and p.startswith("pool/"))
    ]
    params: dict[str, Any] = {}
    for name, array in source.read(dict.fromkeys(wanted)).items():
        checkpoint.set_leaf(params, name, jnp.asarray(array))
    _fits(config, {name: source.shapes[name] for name in wanted}, path)
    return LoadedEncoder(config, params, pool, source.name)


def _fits(config: schema.Config, there: dict[str, tuple[int, ...]], path: str) -> None:
    """Raises UserError unless arrays of these shapes make up the encoder that their settings
    describe: some of any shape would be broadcast."""
    make = functools.partial(
        backbones.get_backbone(config.model).init, config.model, mask_token=True, grid=config.grid
    )
    made = jax.tree_util.tree_leaves_with_path(jax.eval_shape(make, jax.random.key(0)))
    wanted = {f"encoder/{path_text(way)}": leaf.shape for way, leaf in made}
    lost = [name for name in wanted if name not in there and name != "encoder/mask_token"]
    wrong = [
        name
        for name, shape in there.items()
        if name.startswith("encoder/") and name in wanted and shape != wanted[name]
    ]
    for name in [*lost, *wrong][:1]:
        told = f"{name} is {there.get(name, 'absent')}, and its encoder has {wanted[name]}"
        raise UserError(
            f"load: {path}: the arrays there do not make up an encoder ({told}); is the file whole?"
        )


def settings_of_weights(path: str, flag: str) -> ml_collections.ConfigDict:
    """The settings of a run, or those that go with a file of weights: `model`, the size of the
    images and their mean and deviation.

    Args:
      path: as of `load`.
      flag: what named it, for messages.

    Raises: UserError: nothing there that can be read, or no vision transformer of this kind and no
      InternImage of a preset.
    """
    if checkpoint_dir.is_run(path):
        return configuration.load_from_workdir(path, flag)
    return _described(init_from.open_weights(path, key=flag), path, 0, flag)


def build_encoder(config: ml_collections.ConfigDict, path: str, flag: str) -> None:
    """Let a run start from an encoder of elsewhere: its model, the size of its images and their
    mean and deviation, and its weights.

    Args:
      config: the run's, changed in place.
      path, flag: as of `settings_of_weights`, which raises.
    """
    there = settings_of_weights(path, flag)
    config.model.update(there.model)
    _seen_as(config, there)
    config.init_from, config.init.only = path, ("^encoder/",)


def fit_config_to_weights(config: schema.Config, path: str, flag: str) -> schema.Config:
    """The configuration for a file of weights: as it is where its encoder has the file's sizes,
    else with the encoder and the images that go with the file.

    Args:
      config: settings.
      path, flag: as of `settings_of_weights`, which raises.
    """
    told = init_from.open_weights(path, key=flag).settings
    here = {**dataclasses.asdict(config.model.encoder), **dataclasses.asdict(config.model)}
    shaping = (
        "backbone",
        "patch_size",
        "width",
        "depth",
        "mlp_ratio",
        *backbones.get_backbone(config.model).sections,
    )
    if all(told.get(name, here[name]) == here[name] for name in shaping):
        return config
    there, out = (
        settings_of_weights(path, flag),
        configuration.config_from_text(configuration.config_to_text(config), flag),
    )
    out.model.update(
        {
            name: there.model[name]
            for name in ("backbone", "scan", "encoder", *backbones.section_names())
        }
    )
    out.model.pool.heads = 1  # divides any width; a file has no pooling that was trained
    _seen_as(out, there)
    return configuration.resolve(out)


def _seen_as(config: ml_collections.ConfigDict, there: ml_collections.ConfigDict) -> None:
    config.data.image_size = there.data.image_size
    config.data.augment.mean, config.data.augment.std = (
        there.data.augment.mean,
        there.data.augment.std,
    )


def _described(
    source: init_from.WeightSource, path: str, heads: int, flag: str
) -> ml_collections.ConfigDict:
    """The settings of a file of weights."""
    told, config = dict(source.settings), configuration.default_config()
    if "width" not in told or "image_size" not in told:
        # a backbone with its own section of settings is recognized by the sizes of its presets
        sizes = [
            name
            for backbone in backbones.registered_backbones().values()
            if backbone.sections
            for name in backbone.presets
        ]
        raise UserError(
            f"{flag}: {path}: is neither a vision transformer of this kind nor one of"
            f" {', '.join(sizes)} ({source.name}); it can be read, but not run from here"
        )
    told["heads"] = (
        heads or told.get("heads") or (16 if told["width"] == 1280 else max(1, told["width"] // 64))
    )
    config.model.encoder.update({name: told[name] for name in config.model.encoder if name in told})
    config.model.update(
        {
            name: told[name]
            for name in ("backbone", "scan", *backbones.section_names())
            if name in told
        }
    )
    config.model.update({"dtype": "float32", "pool": {"heads": 1}})
    config.data.image_size = told["image_size"]
    config.data.augment.update({name: told[name] for name in ("mean", "std") if name in told})
    config.evaluate.crop = told.get("crop", config.evaluate.crop)
    config.data.background = told.get("background", config.data.background)
    return config
