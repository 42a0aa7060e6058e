"""Inputs of the evaluators of dense tasks, shared by all of them: the compiled predictions of a
run, and its held-out images in batches of fixed shape."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from m3i_jax import parallel
from m3i_jax.data import annotated_eval, sampler
from m3i_jax.evaluation.registry import EvalInputs


class Predictor:
    """Predictions of a dense task for batches of this host, compiled once.

    Args:
      inputs: of the run; `inputs.task` predicts.

    The function takes (parameters as of `EvalContext.params`, images uint8 [B, S, S, 3], sizes
    int32 [B, 2]), B the rows of this host, and returns the arrays of these rows.
    """

    def __init__(self, inputs: EvalInputs) -> None:
        self._mesh, task = inputs.mesh, inputs.task

        def predict(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            return task.predict(params, params["running"], batch)

        self._predict = parallel.Program(
            predict,
            name="predict",
            announced="the predictions of the evaluation",
            out_shardings=parallel.data_sharding(inputs.mesh),
        )

    def __call__(
        self, params: Any, image_BxSxSx3: np.ndarray, size_Bx2: np.ndarray
    ) -> dict[str, np.ndarray]:
        batch = parallel.to_global(self._mesh, {"image": image_BxSxSx3, "size": size_Bx2})
        with jax.set_mesh(self._mesh):
            out = self._predict(params, batch)
        return {name: parallel.local_rows(value) for name, value in out.items()}


def predictor(inputs: EvalInputs) -> Predictor:
    """Returns the predictor of a run, built once."""
    made: Predictor = inputs.once("predictor", functools.partial(Predictor, inputs))
    return made


def queries(inputs: EvalInputs) -> list[int]:
    """Returns numbers of the held-out records that are evaluated, spread over the source."""
    return sampler.spread_records(len(inputs.held_out), inputs.config.evaluate.query_limit)


@dataclasses.dataclass(frozen=True)
class PredictedImage:
    """A held-out image with its predictions: arrays of one row."""

    index: int
    fitted: annotated_eval.FittedImage
    outputs: dict[str, np.ndarray]


def predicted_images(
    inputs: EvalInputs,
    params: Any,
    records: list[int],
    poll: Callable[[], None],
    skipped: dict[str, int],
) -> Iterator[PredictedImage]:
    """Returns this host's share of the predictions for some held-out images, scaled to
    `data.image_size`.

    Args:
      inputs: of the run.
      params: as of `EvalContext.params`.
      records: numbers of the records, the same on all hosts.
      poll: called before each batch; may raise.
      skipped: receives {reason: images of this host that could not be read}.
    """
    data, predict = inputs.config.data, predictor(inputs)
    batches = annotated_eval.detection_eval_batches(
        inputs.held_out,
        records,
        data.image_size,
        inputs.batch_size,
        background=data.background,
        short=inputs.config.dense.geometry.test_short,
        threads=max(1, data.threads),
        missing=data.missing,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )
    for batch in batches:
        poll()
        outputs = predict(params, batch["image"], batch["size"])
        for row, fitted in zip(np.flatnonzero(batch["valid"]), batches.rows, strict=True):
            arrays = {name: value[row] for name, value in outputs.items()}
            yield PredictedImage(int(batch["index"][row]), fitted, arrays)
    skipped.update({reason: n for reason, n in batches.skipped.items() if n})
