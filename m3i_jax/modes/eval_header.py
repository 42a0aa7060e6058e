"""The header of the results of --mode=eval: weights, data, preprocessing, and all else that values
depend on. Results of another header are not continued."""

import dataclasses
import inspect
import json
import os
import pathlib
from collections.abc import Callable, Collection
from typing import Any

from m3i_jax import config as configuration
from m3i_jax import privacy, schema
from m3i_jax.data.preprocessing import Preprocessing
from m3i_jax.data.sources import base, captions
from m3i_jax.evaluation import registry, zero_shot
from m3i_jax.modes.eval_results import weight_files
from m3i_jax.modes.setup import Setup
from m3i_jax.parallel import distributed

# prefixes of the settings that a result depends on
_PREFIXES = ("evaluate.", "data.", "model.", "objective.", "seed ")
_LIMITS = {"queries": "query_limit", "index": "train_limit"}  # image set: its setting


def described(setup: Setup, checkpoint: str, step: int) -> dict[str, Any]:
    """Returns the part of the header that names the results: weights, data, preprocessing, and a
    digest of all settings that they depend on and of the files of the weights, which may have been
    written anew."""
    prefixes = _PREFIXES if setup.config.traits.views else (*_PREFIXES, "dense.")
    settings = [
        line
        for line in configuration.config_to_text(setup.config).splitlines()
        if line.startswith(prefixes)
    ]
    data = {
        name: {"name": part.name, "pictures": len(part), "fingerprint": part.fingerprint()}
        for name, part in (("index", setup.train), ("queries", setup.held_out))
    }
    of_file = setup.config.init_from == checkpoint  # `eval.evaluate_weights`
    copy = setup.config.init.weights if of_file else setup.config.evaluate.encoder
    return privacy.redact_tree({
        "checkpoint": checkpoint, "step": step,
        "encoder": copy, "data": data,
        "preprocessing": json.loads(json.dumps(Preprocessing.of(setup.config).described())),
        "of": base.stable_digest(
            *settings, setup.identity, str(len(setup.held_out)), *weight_files(checkpoint)
        ),
    })  # fmt: skip


def measured_by(setup: Setup, names: Collection[str]) -> dict[str, Any]:
    """Returns the part of the header that says how some evaluators measure: the code, how many
    images of each set they read, their settings, and a digest of the texts that they read.

    Args:
      setup: the run.
      names: of the evaluators.
    """
    enabled = [each for each in registry.evaluators() if each.name in names]
    images = evaluated_images(setup.config, len(setup.train), len(setup.held_out))
    reads = {name for each in enabled for name in each.reads}
    reads |= {_LIMITS[part] for part in images} | ({"features"} if "index" in images else set())
    settings = {
        field.name: getattr(setup.config.evaluate, field.name)
        for field in dataclasses.fields(schema.Evaluate)
        if field.name in reads
    }
    header = {
        "code": distributed.code_digest(),
        "evaluated": images,
        "settings": settings,
        "texts": base.stable_digest(*_texts(setup, enabled)),
    }
    return privacy.redact_tree(json.loads(json.dumps(header)))  # as it is read back


def evaluated_images(config: schema.Config, train: int, held_out: int) -> dict[str, int]:
    """Returns {image set: how many of its images are evaluated}, of sets of these sizes. Evaluators
    of dense tasks have no index.

    >>> evaluated_images(schema.Config(), 1_281_167, 4)
    {'index': 50000, 'queries': 4}
    """
    sizes = {"index": train, "queries": held_out} if config.traits.views else {"queries": held_out}
    limits = {part: getattr(config.evaluate, _LIMITS[part]) for part in sizes}
    return {part: min(limits[part], size) for part, size in sizes.items()}


def cut_queries(config: schema.Config, held_out: int) -> str:
    """Returns a line of warning if a limit leaves held-out images out; "" if it does not.

    >>> cut_queries(schema.Config(), 50_000)
    'warning: 10,000 of 50,000 held-out images are evaluated, evenly spread: raise evaluate.query...
    >>> cut_queries(schema.Config(), 10_000)
    ''
    """
    count = evaluated_images(config, 0, held_out)["queries"]
    if count == held_out:
        return ""
    return (
        f"warning: {count:,} of {held_out:,} held-out images are evaluated, evenly spread: raise"
        f" evaluate.query_limit={count} to evaluate all of them"
    )


def _texts(setup: Setup, enabled: Collection[registry.Evaluator]) -> list[str]:
    """Texts that results depend on, and that neither settings nor fingerprints contain: names,
    templates, captions, and the files of evaluators from outside the package."""
    texts = [*setup.classes]
    for each in enabled:
        if not each.of_package:
            texts += ["evaluator", each.name, _file_text(each.build)]
    if any("templates" in each.reads for each in enabled):
        for name in setup.config.evaluate.templates:
            texts += ["templates", *zero_shot.prompt_templates(name)[1]]
    if any(registry.CAPTIONS in each.needs for each in enabled):
        texts += ["captions", *captions.caption_digests(setup.held_out)]
    return texts


def _file_text(function: Callable[..., Any]) -> str:
    """The text of the file that defines a function; another text at each call without a file, so
    that no earlier result is taken for one of the same code."""
    try:
        path = inspect.getsourcefile(inspect.unwrap(function))
        return pathlib.Path(path or "").read_text("utf-8")
    except (TypeError, OSError, ValueError):
        return os.urandom(8).hex()
