"""Encoders in files of detectron2 and mmsegmentation: whole systems of those projects
(tests/data/dense) are read without an unknown name, and what is read is stored under the same
names."""

import pathlib
from typing import Any

import numpy as np
import pytest

from m3i_jax.interop import vit_layouts, vit_weights

DENSE = pathlib.Path(__file__).parent.parent / "data" / "dense"
SYSTEMS = {
    "detectron2": ("vitdet.npz", "backbone.net.", {"feature pyramid", "heads"}),
    "mmseg": ("upernet.npz", "backbone.", {"neck and heads"}),
}


def arrays(name: str) -> dict[str, np.ndarray]:
    file: Any = np.load(DENSE / name)
    return {k.removeprefix("state/"): file[k] for k in file.files if k.startswith("state/")}


@pytest.mark.parametrize("layout", SYSTEMS)
def test_a_round_trip_keeps_every_bit_of_an_encoder(layout: str) -> None:
    name, prefix, others = SYSTEMS[layout]
    theirs = arrays(name)
    found = vit_weights.load_vit(theirs)
    assert found.layout == layout and not found.unknown and not found.notes
    assert set(found.unused) == others and found.settings["depth"] == 4
    stored = vit_weights.store_vit(found.arrays, layout, heads=2, prefix=prefix)
    encoder = {k: a for k, a in theirs.items() if k.startswith(prefix)}
    assert sorted(stored) == sorted(encoder)
    for key, array in encoder.items():
        np.testing.assert_array_equal(stored[key], array, err_msg=key)


def test_relative_positions_are_an_array_a_block() -> None:
    found = vit_weights.load_vit(arrays("vitdet.npz")).arrays
    sides = [found[f"encoder/relative/block{block}/rows"].shape[0] for block in range(4)]
    assert sides == [5, 15, 5, 15]  # windows of 3, a map of 8


@pytest.mark.parametrize("prefix", ["backbone.net.", "net.", ""])
def test_names_of_detectron2_at_any_depth(prefix: str) -> None:
    names = {f"{prefix}blocks.0.attn.rel_pos_h": 0, f"{prefix}blocks.0.attn.qkv.weight": 0}
    layout = vit_layouts.layout_of(names)
    assert layout is not None and layout.name == "detectron2"


def test_names_of_timm_are_still_timm() -> None:
    layout = vit_layouts.layout_of({"blocks.0.attn.qkv.weight": 0, "blocks.0.norm1.weight": 0})
    assert layout is not None and layout.name == "timm"
