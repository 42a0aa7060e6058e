"""Detectors and segmenters as `m3i_jax.load` returns them: predictions for images of any size, as
in the evaluations of the run.

    model = m3i_jax.load("runs/detect")
    found = model.detect([image])[0]    # boxes, scores, classes, masks in pixels of the image
    maps = m3i_jax.load("runs/segment").segment([image])
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import schema
from m3i_jax.data import annotated_eval, decode, image_inputs
from m3i_jax.errors import UserError
from m3i_jax.evaluation import detection_results, sliding_windows
from m3i_jax.parallel.sharding import path_text
from m3i_jax.training import checkpoint_dir, saved_arrays, weight_source
from m3i_jax.training.dense_task import DenseTask
from m3i_jax.training.task import make_task


@dataclasses.dataclass(frozen=True)
class DetectedObjects:
    """The detections of an image, by falling score; D of them.

    Attributes:
      boxes: float32 [D, 4], x0 y0 x1 y1 in pixels of the image.
      scores: float32 [D].
      classes: int [D].
      names: of the classes of the detections.
      masks: bool [D, H, W]; None if the run predicts no masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    names: tuple[str, ...]
    masks: np.ndarray | None


@dataclasses.dataclass(repr=False)
class LoadedDense:
    """A detector or segmenter with its weights.

    Attributes:
      config: settings of the run.
      params: parameters of encoder, pyramid and head, and `running` statistics.
      names: of the classes.
      name: origin of the weights, for messages.
      batch: images in a call of the model.
    """

    config: schema.Config
    params: Any
    names: tuple[str, ...]
    name: str
    batch: int = 1

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return (
            f"LoadedDense({self.name}: {self.config.task}, {len(self.names)} classes, {count:,}"
            f" parameters, {self.config.data.image_size} pixels)"
        )

    @property
    def task(self) -> DenseTask:
        """The task of the run."""
        task = make_task(self.config)
        assert isinstance(task, DenseTask)
        return task

    @functools.cached_property
    def function(self) -> Callable[..., dict[str, jax.Array]]:
        """The compiled function (params, images uint8 [B, S, S, 3], sizes int32 [B, 2]) ->
        predictions; see `DenseTask.predict`."""
        task = self.task

        def predict(params: Any, images: jax.Array, sizes: jax.Array) -> dict[str, jax.Array]:
            batch = {"image": images, "size": sizes}
            return task.predict(params, params["running"], batch)

        return jax.jit(predict)

    def detect(self, images: Any) -> list[DetectedObjects]:
        """Returns the objects of images.

        Args:
          images: one image or several of any sizes, as those of `LoadedEncoder.features`: paths, a
            directory, Pillow images, or arrays of 1 to 4 channels. The long side of each is scaled
            to the model's input.

        Raises:
          ValueError: see `as_images`.
          UserError: the run is not one of detection, or a directory has no image.
        """
        self._require("detect")
        out = []
        for image in as_images(images, background=self.config.data.background):
            original = image.shape[:2]
            square, size = annotated_eval.fit_pixels(
                decode.wrap_pixels(image),
                self.config.data.image_size,
                short=self.config.dense.geometry.test_short,
            )
            outputs = self.function(self.params, square[None], np.array([size]))
            row = {name: np.asarray(value)[0] for name, value in outputs.items()}
            found = detection_results.original_detections(row, content=size, size=original)
            masks = None
            if found.masks is not None:
                pixels = [detection_results.rle_to_mask(rle) for rle in found.masks]
                empty = np.zeros((0, *original), bool)
                masks = np.stack(pixels).astype(bool) if pixels else empty
            names = tuple(self.names[k] for k in found.classes.tolist())
            out.append(DetectedObjects(found.boxes, found.scores, found.classes, names, masks))
        return out

    def segment(self, images: Any) -> list[np.ndarray]:
        """Returns the class map [H, W] of each image, uint8, or uint16 for more than 256 classes;
        `names` has the names of the classes.

        Args:
          images: see `detect`. Each is resized and cut into windows as in the run's evaluations.

        Raises:
          ValueError, UserError: see `detect`.
        """
        self._require("segment")
        size_of, resize = sliding_windows.resize_rule(self.config)
        settings = sliding_windows.sliding_settings(
            self.config, classes=len(self.names), batch=self.batch
        )
        maps = sliding_windows.class_maps(
            lambda image, size: self.function(self.params, image, size)["logits"],
            enumerate(as_images(images, background=self.config.data.background)),
            settings,
            size_of=size_of,
            resize=resize,
        )
        return [pixels for _, pixels in maps]

    def features(self, images: Any, **_: Any) -> np.ndarray:
        """Raises, because these runs have no features of images: their encoder reads whole images
        by windows.

        Raises:
          UserError: always.
        """
        raise UserError(
            f"load: {self.name}: is a run of config.task={self.config.task}, which has no features"
            " of images; load the run or file that it was initialised from"
        )

    def _require(self, task: str) -> None:
        if self.config.task != task:
            raise UserError(
                f"load: {self.name}: is a run of config.task={self.config.task}, and .{task}()"
                f" needs a run of {task}; use .{self.config.task}()"
            )


def as_images(images: Any, *, background: int = 255) -> Iterator[np.ndarray]:
    """Returns images, read one by one, as RGB uint8 [H, W, 3].

    Args:
      images: see `image_inputs.iterate_images`.
      background: gray level 0..255 that replaces transparent pixels.

    Raises:
      ValueError: see `image_inputs.rgb_pixels`.

    >>> [image.shape for image in as_images(np.zeros((2, 4, 5, 4)))]
    [(4, 5, 3), (4, 5, 3)]
    """
    for image in image_inputs.iterate_images(images)[0]:
        pixels = image_inputs.rgb_pixels(image, background=background)
        floats = pixels.dtype != np.uint8
        yield np.rint(pixels * np.float32(255)).astype(np.uint8) if floats else pixels


def load_dense(path: str, config: schema.Config, source: weight_source.WeightSource) -> LoadedDense:
    """Returns the model of a run of detection or segmentation, or of a file with a detector; see
    `load.load`."""
    task = make_task(config)
    assert isinstance(task, DenseTask)
    shapes = {
        path_text(key): leaf.shape
        for key, leaf in jax.tree_util.tree_leaves_with_path(
            jax.eval_shape(task.init, jax.random.key(0))
        )
    }
    run = checkpoint_dir.is_run(path)
    table = "encoder/positions"  # a file may have a row for cls, which is not used
    wrong = [
        name
        for name, shape in shapes.items()
        if source.shapes.get(name) != shape and (run or name != table or name not in source.shapes)
    ]
    if wrong:
        raise UserError(
            f"load: {path}: its arrays are not those of its settings ({wrong[0]} is"
            f" {source.shapes.get(wrong[0], 'absent')}, expected {shapes[wrong[0]]})"
        )
    params: dict[str, Any] = {"running": {"pyramid": {}, "head": {}}, "pyramid": {}, "head": {}}
    statistics = [name for name in source.shapes if name.startswith(weight_source.RUNNING)]
    for name, array in source.read(dict.fromkeys([*shapes, *statistics])).items():
        if name == table and array.shape != shapes[name]:
            array = array[:, -shapes[name][1] :]
        saved_arrays.set_leaf(params, name, jnp.asarray(array))
    names = source.classes or tuple(map(str, range(config.data.classes)))
    return LoadedDense(config, params, names, source.name)
