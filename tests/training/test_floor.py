"""Matrix products of one step of the paper's ViT-B/16, counted on the traced program of the real
step, compared with the lower bound."""

import dataclasses
import functools
import pathlib

import jax

from m3i_jax import config as configuration
from m3i_jax import parallel
from m3i_jax.modes import setup
from m3i_jax.profiling import flops
from m3i_jax.training import trainer

ROOT = pathlib.Path(__file__).parent.parent.parent
BATCH = 8
# golden: a mixed view, 12 blocks of 197 tokens forward and backward, two clean views forward, two
# passes of 4 decoder blocks without the rows that are not read, pooling and categories
FLOOR = 279.5e9


@functools.cache
def counted(**objective: object) -> float:
    """Operations of a mixed view with categories and no captions."""
    made = configuration.load_config(f"{ROOT}/configs/folder.py:model=vit_b16,batch_size={BATCH}")
    config = setup.complete_config(
        configuration.resolve(made), classes=1000, captions=False, size=1000
    )
    config = dataclasses.replace(
        config,
        objective=dataclasses.replace(config.objective, **objective),
        # one trace of a block; test_main.py counts the blocks without it
        model=dataclasses.replace(config.model, scan=True),
    )
    one = trainer.Trainer(config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), 0)
    return flops.count_flops(one.trace, one.template, trainer.abstract_batch(config)).dot / BATCH


def test_a_step_is_at_its_floor() -> None:
    assert 0.99 <= counted() / FLOOR <= 1.005  # below: something that should be computed is not


def test_dynamic_weighting_costs_no_products() -> None:
    assert counted() / counted(weighting="fixed") <= 1.005
