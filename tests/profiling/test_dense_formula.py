"""FLOPs of the traced steps of the heads of InternImage-H are those of a formula of their shapes:
a composed backbone, DINO, Mask2Former, with or without remat."""

import pytest

from tests.bench import dense_formula

SMALL = {
    "dino": (
        "detect.py:head=dino,model=internimage_pico,image_size=96",
        {"dense.maps.composite": "2", "dense.detect.dino.remat": "true", "model.remat": "full"},
    ),
    "mask2former": (
        "segment.py:head=mask2former,model=internimage_pico,image_size=64",
        {"dense.segment.strides": "(2,4,8,16)"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dino", "mask2former"])
def test_flops_of_the_step_are_those_of_the_formula(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading maps at places counts in the formula alone, 3 % of the toy. The matching and the
    losses at points of Mask2Former count in the step alone. The step of the toy has 4.7 % more than
    the formula, of which the matching is about half; the rest is not explained. At full size all
    of it is below 1 % (`python -m tests.bench.dense_formula`)."""
    monkeypatch.setitem(dense_formula.RUNS, name, SMALL[name])
    config = dense_formula.settings(name)
    wanted = dense_formula.step(config) - dense_formula.reading(config)
    assert dense_formula.counted(config) == pytest.approx(
        wanted, rel=0.06 if name == "mask2former" else 0.01
    )
